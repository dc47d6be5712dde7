//! `auto`'s window is taken away while it hurts, and `kbpctl status` says why; one that the pod asks for stays.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kbp_tests::binaries::kbp_binary;
use kbp_tests::lab::{LIMIT, join_netns, on};
use kbp_tests::sockets::Sockets;
use kbp_tests::{Arm, Lab, Pod, Tasks, command, fixtures, wait_until};
use serde_json::Value;

/// For what has to be seen on a machine that may be busy with other things.
const SEEN: Duration = Duration::from_secs(90);
const ASKED: u32 = 47;

/// All of these use the same CPU, and what polls there harms who is judged by another test.
static FIRST_CPU: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    FIRST_CPU.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with_echo(lab: &Lab<'_>) {
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/echoes").expect("copy");
}

/// Starts a container whose only CPU is the first one; `busy_poll`: what it asks for.
fn start_on_one_cpu(lab: &Lab<'_>, pod: &Pod<'_>, id: &str, words: &[&str], busy_poll: &str) {
    let spec = on_one_cpu(lab, pod, id, words, busy_poll);
    let run = lab.container_of_spec(id, &spec);
    lab.containerd.start_container(run).expect("start");
}

fn on_one_cpu(lab: &Lab<'_>, pod: &Pod<'_>, id: &str, words: &[&str], busy_poll: &str) -> Value {
    let command: Vec<&str> = ["/usr/bin/echoes"].iter().chain(words).copied().collect();
    let mut spec = lab.spec(id, &command).expect("spec");
    join_netns(&mut spec, &pod.netns.path());
    let online = kbp_kernel::cpu::Topology::read().expect("CPUs").online;
    let first = online.iter().next().expect("a CPU").to_string();
    spec["linux"]["resources"]["cpu"] = serde_json::json!({ "cpus": first });
    spec["annotations"]["kbp.io/busy-poll"] = busy_poll.into();
    spec
}

/// What `kbpctl status --verbose` says, on one line.
fn status(lab: &Lab<'_>) -> String {
    let mut run = lab
        .containerd
        .command(kbp_binary("kbpctl").expect("kbpctl"));
    run.args(["status", "--verbose"]);
    let output = command::run(run, LIMIT).expect("status").success();
    let words = output.expect("status").stdout;
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sockets(lab: &Lab<'_>, id: &str) -> Sockets {
    Sockets::of(lab.containerd.pid(id).expect("pid")).expect("sockets")
}

fn windows(lab: &Lab<'_>, id: &str) -> Vec<u32> {
    let sockets = sockets(lab, id);
    sockets.inet.into_iter().chain(sockets.epoll).collect()
}

/// Waits until everything that a container has, has no window, and the status says so for this reason.
fn wait_for_none(lab: &Lab<'_>, id: &str, reason: &str) {
    wait_until("no window", SEEN, || {
        let (had, status) = (sockets(lab, id), status(lab));
        let state = lab.state(id).expect("state");
        let told = state.busy_poll_us.is_none()
            && state.busy_poll_reason.starts_with("auto: off for now")
            && state.busy_poll_reason.contains(reason)
            && status.contains(&format!("window: {}", state.busy_poll_reason));
        match had.all_poll_for(0) && told {
            true => Ok(()),
            false => Err(format!("{had:?}, {}: {status}", state.busy_poll_reason)),
        }
    })
    .unwrap_or_else(|error| panic!("{id}: {error}\n{}", lab.containerd.log()));
}

#[test]
fn a_pair_on_one_cpu_loses_its_windows_and_one_that_was_asked_for_stays() {
    let _alone = alone();
    on(Arm::KBP, |lab| {
        with_echo(lab);
        for busy_poll in ["auto", "20"] {
            let (pod, peer) = (lab.pod("pod"), lab.pod("peer"));
            start_on_one_cpu(lab, &pod, "server", &["epoll", "7000"], "auto");
            lab.wait_for_port(lab.containerd.pid("server").expect("pid"), 7000);
            let before = windows(lab, "server");
            assert!(before.iter().all(|w| *w > 0), "{before:?}");
            let words = ["client", &pod.ip(), "7000", "20000000"];
            start_on_one_cpu(lab, &peer, "client", &words, busy_poll);
            // Because it waits for the other's window, or because the other wants its CPU: that depends on who is seen first.
            wait_for_none(lab, "server", ", since ");
            match busy_poll {
                "auto" => wait_for_none(lab, "client", ", since "),
                _ => {
                    assert!(sockets(lab, "client").all_poll_for(20));
                    let state = lab.state("client").expect("state");
                    assert_eq!(state.busy_poll_us, Some(20), "{state:#?}");
                }
            }
            lab.containerd.remove("client").expect("remove");
            lab.containerd.remove("server").expect("remove");
        }
    });
}

#[test]
fn threads_that_would_poll_at_once_lose_their_windows_until_they_are_few() {
    let _alone = alone();
    on(Arm::KBP, |lab| {
        with_echo(lab);
        let (pod, fixed, peer) = (lab.pod("pod"), lab.pod("fixed"), lab.pod("peer"));
        let asked = ASKED.to_string();
        for (pod, id, busy_poll) in [(&pod, "server", "auto"), (&fixed, "asked", &*asked)] {
            start_on_one_cpu(lab, pod, id, &["threads", "7000"], busy_poll);
            lab.wait_for_port(lab.containerd.pid(id).expect("pid"), 7000);
        }
        let before = windows(lab, "server");
        assert!(before.iter().all(|w| *w > 0), "{before:?}");
        let talk = |id: &str, ip: &str, count: &str| {
            let words = ["/usr/bin/echoes", "talk", ip, "7000", count];
            let run = lab.container(id, words).netns(&peer.netns.path());
            let run = run.annotation("kbp.io/busy-poll", "off");
            lab.containerd.start_container(run).expect("start");
        };
        talk("to-asked", &fixed.ip(), "3");
        talk("to-server", &pod.ip(), "3");
        wait_for_none(lab, "server", "3 blocking connections of process");
        let kept = windows(lab, "asked");
        assert_eq!(kept, vec![ASKED; 4], "a listening socket and three more");
        let state = lab.state("asked").expect("state");
        assert_eq!(state.busy_poll_us, Some(ASKED), "{state:#?}");

        // Its container's window goes and comes back, and this one's does not come with it.
        let update = |quota: i64| {
            let cpu = serde_json::json!({ "cpu": { "quota": quota, "period": 100_000 } });
            let tasks = Tasks::of(&lab.containerd);
            tasks.update("server", &cpu).expect("update");
            lab.state("server").expect("state").busy_poll_reason
        };
        let tight = update(50_000);
        assert!(tight.contains("quota of 0.5"), "{tight}");
        // Long enough for a look that finds nothing to look after. What that changes is to be seen only below, when it is wrong.
        std::thread::sleep(Duration::from_secs(1));
        let wide = update(-1);
        assert!(wide.contains("3 blocking connections"), "{wide}");
        assert!(sockets(lab, "server").all_poll_for(0), "{wide}");

        for id in ["to-asked", "to-server"] {
            lab.containerd.remove(id).expect("remove");
        }
        talk("again", &pod.ip(), "1");
        wait_until("windows", SEEN, || {
            let (had, state) = (windows(lab, "server"), lab.state("server").expect("state"));
            let back = had.iter().all(|w| Some(*w) == state.busy_poll_us);
            match back && had.len() == 2 {
                true => Ok(()),
                false => Err(format!("{had:?}: {}", state.busy_poll_reason)),
            }
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", lab.containerd.log()));
        for id in ["again", "server", "asked"] {
            lab.containerd.remove(id).expect("remove");
        }
    });
}

/// Two containers of a pod: the one whose threads are too many loses its window alone, and takes what is known of it along when it goes.
#[test]
fn another_container_of_the_pod_keeps_its_window() {
    let _alone = alone();
    on(Arm::KBP, |lab| {
        with_echo(lab);
        let (pod, peer) = (lab.pod("pod"), lab.pod("peer"));
        for (id, kind, words) in [
            ("kept", "sandbox", ["epoll", "7001"]),
            ("many", "container", ["threads", "7000"]),
        ] {
            let mut spec = on_one_cpu(lab, &pod, id, &words, "auto");
            spec["annotations"]["io.kubernetes.cri.sandbox-id"] = "kept".into();
            spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
            let run = lab.container_of_spec(id, &spec);
            lab.containerd.start_container(run).expect("start");
            let port = words[1].parse().expect("port");
            lab.wait_for_port(lab.containerd.pid(id).expect("pid"), port);
        }
        // A shorter one while the other container runs on that CPU.
        let kept = || {
            let there = windows(lab, "kept");
            assert!(there.iter().all(|w| *w > 0), "{there:?}");
        };
        kept();
        let words = ["/usr/bin/echoes", "talk", &pod.ip(), "7000", "3"];
        let run = lab.container("talk", words).netns(&peer.netns.path());
        let run = run.annotation("kbp.io/busy-poll", "off");
        lab.containerd.start_container(run).expect("start");
        let told = |reason: &str| {
            wait_until("the reason", SEEN, || {
                let told = lab.state("kept").expect("state").busy_poll_reason;
                match told.contains(reason) {
                    true => Ok(()),
                    false => Err(told),
                }
            })
            .unwrap_or_else(|error| panic!("{error}\n{}", lab.containerd.log()));
        };
        told("would poll at once on one CPU");
        assert!(sockets(lab, "many").all_poll_for(0));
        kept();
        lab.containerd.remove("talk").expect("remove");
        lab.containerd.remove("many").expect("remove");
        told("auto: the pod");
        kept();
        lab.containerd.remove("kept").expect("remove");
    });
}
