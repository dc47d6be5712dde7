//! Every way in which a program gets a socket or an epoll instance, and what may happen to a call while it is answered.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use kbp_kernel::process::PidFd;
use kbp_kernel::sockopt;
use kbp_tests::apps::processes;
use kbp_tests::lab::{LIMIT, join_netns, on, on_with};
use kbp_tests::{Arm, Containerd, Lab, Pod, Run, Runtime, Settings, Tasks, fixtures, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const WINDOW: u32 = 47;

/// Everything that `ways make` makes, and whether it has the window.
const WAYS: [(&str, bool); 32] = [
    ("v4-listening", true),
    ("v4-connected", true),
    ("v4-accepted", true),
    ("v4-udp-bound", true),
    ("v4-udp-connected", true),
    ("v4-unbound-listening", true),
    ("v6-listening", true),
    ("v6-connected", true),
    ("v6-accepted", true),
    ("v6-udp-bound", true),
    ("v6-udp-connected", true),
    ("v6-unbound-listening", true),
    ("reuseport-first", true),
    ("reuseport-second", true),
    ("thread-socket", true),
    ("thread-epoll", true),
    ("epoll-inner", true),
    ("epoll-outer", true),
    ("epoll-duplicate", true),
    ("passed-bound", true),
    ("passed-unbound", true),
    ("passed-epoll", true),
    ("forked-socket", true),
    ("forked-epoll", true),
    ("execed-socket", true),
    ("execed-epoll", true),
    ("setuid-socket", true),
    ("setuid-epoll", true),
    ("suid-program-socket", true),
    ("suid-program-epoll", true),
    // No business of kbp's.
    ("unix", false),
    // The limit that docs/sockets.md names: no trapped call tells of it.
    ("udp-sendto-only", false),
];

fn with_ways(lab: &Lab<'_>) {
    let ways = fixtures::ways().expect("program");
    lab.rootfs.binary(&ways, "/usr/bin/ways").expect("copy");
    lab.rootfs
        .binary(&ways, "/usr/bin/ways-suid")
        .expect("copy");
    let path = lab.rootfs.dir().join("usr/bin/ways-suid");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o4755)).expect("chmod");
}

/// Windows of descriptors that a program told as `name pid descriptor`, the process by its id in the container.
fn windows(lab: &Lab<'_>, container: &str, told: &str) -> Result<BTreeMap<String, u32>, String> {
    let group = format!("/{}/{container}", lab.sandbox.name());
    let mut outside = BTreeMap::new();
    for pid in processes(&group) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let inside = status
            .lines()
            .find_map(|l| l.strip_prefix("NSpid:"))
            .and_then(|l| l.split_whitespace().next_back()?.parse::<u32>().ok());
        outside.extend(inside.map(|inside| (inside, pid)));
    }
    let mut windows = BTreeMap::new();
    for line in told.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, pid, number] = words[..] else {
            continue;
        };
        let (pid, number): (u32, i32) = (
            pid.parse().map_err(|_| line.to_owned())?,
            number.parse().map_err(|_| line.to_owned())?,
        );
        let pid = outside
            .get(&pid)
            .ok_or_else(|| format!("no process {pid}"))?;
        let fd = PidFd::open(*pid)
            .and_then(|p| p.get_fd(number))
            .map_err(|e| format!("{line}: {e}"))?;
        let window = if sockopt::is_epoll(fd.as_fd()) {
            sockopt::epoll_params(fd.as_fd()).map(|p| p.busy_poll)
        } else {
            sockopt::busy_poll(fd.as_fd())
        };
        windows.insert(name.to_owned(), window.map_err(|e| e.to_string())?.0);
    }
    Ok(windows)
}

/// Container `c` in a pod of its own, started from an edited spec, and what it says when it has gone every way.
fn start_ways<'s>(lab: &Lab<'s>, edit: impl FnOnce(&mut serde_json::Value)) -> (Pod<'s>, String) {
    with_ways(lab);
    let pod = lab.pod("pod");
    let mut spec = lab.spec("c", &["/usr/bin/ways", "make"]).expect("spec");
    join_netns(&mut spec, &pod.netns.path());
    // So that a set-user-id program is one.
    spec["process"]["noNewPrivileges"] = false.into();
    edit(&mut spec);
    let log = lab.sandbox.dir().join("ways.log");
    let run = lab
        .container_of_spec("c", &spec)
        .flag("--log-uri", format!("file://{}", log.display()));
    lab.containerd.start_container(run).expect("start");
    let told = wait_until("every way", LIMIT, || {
        let told = std::fs::read_to_string(&log).unwrap_or_default();
        // The first process and its four children.
        match told.lines().filter(|l| l.ends_with("ready")).count() {
            5 => Ok(told),
            _ => Err(told),
        }
    })
    .expect("ready");
    (pod, told)
}

/// Whether exactly `had` have this window, of all that there are.
fn only_these_have(windows: &BTreeMap<String, u32>, had: &[String], window: u32) -> bool {
    windows.iter().all(|(name, now)| {
        let expected = if had.contains(name) { window } else { 0 };
        *now == expected
    })
}

#[test]
fn what_is_there_follows_the_cpuset_and_the_quota() {
    on(Arm::KBP, |lab| {
        let online = kbp_kernel::cpu::Topology::read().expect("CPUs").online;
        let first = online.iter().next().expect("a CPU").to_string();
        let (_pod, told) = start_ways(lab, |spec| {
            spec["linux"]["resources"]["cpu"] = serde_json::json!({ "cpus": first });
        });
        let now = || windows(lab, "c", &told).expect("windows");
        let before = now();
        let window = before["v4-accepted"];
        // Under `auto` not every process has polling epoll instances, so they are taken as they are.
        let had: Vec<String> = before
            .iter()
            .filter(|(_, window)| **window > 0)
            .map(|(name, _)| name.clone())
            .collect();
        for name in ["v4-accepted", "forked-socket", "v6-udp-connected"] {
            assert!(had.iter().any(|h| h == name), "{name}: {before:#?}");
        }
        assert!(had.iter().any(|h| h.contains("epoll")), "{before:#?}");
        assert!(only_these_have(&before, &had, window), "{before:#?}");

        let tasks = Tasks::of(&lab.containerd);
        let update = |cpu: serde_json::Value| {
            tasks
                .update("c", &serde_json::json!({ "cpu": cpu }))
                .expect("update");
            now()
        };
        let tight = update(serde_json::json!({ "quota": 10_000, "period": 100_000 }));
        assert!(tight.values().all(|window| *window == 0), "{tight:#?}");
        let wide = update(serde_json::json!({ "quota": -1 }));
        // The short one where others run on its CPU.
        let (short, long) = (kbp_poller::window::SHORT.0, kbp_poller::window::LONG.0);
        let own = wide["v4-accepted"];
        assert!([short, long].contains(&own), "{wide:#?}");
        assert!(
            had.iter().all(|name| wide[name] == own),
            "{before:#?} and then {wide:#?}"
        );
        // Every online CPU is nobody's own.
        let shared = update(serde_json::json!({ "cpus": online.to_string() }));
        assert!(
            had.iter().all(|name| shared[name] == short),
            "{before:#?} and then {shared:#?}"
        );
        lab.containerd.remove("c").expect("remove");
    });
}

fn every_way_has_its_window(lab: &Lab<'_>) {
    let (_pod, told) = start_ways(lab, |spec| {
        spec["annotations"]["kbp.io/busy-poll"] = WINDOW.to_string().into();
    });
    let windows = windows(lab, "c", &told).expect("windows");
    let kbp = lab.arm.runtime == Runtime::Kbp;
    for (name, set) in WAYS {
        let expected = if kbp && set { WINDOW } else { 0 };
        assert_eq!(windows.get(name), Some(&expected), "{name}: {windows:#?}");
    }
    assert_eq!(windows.len(), WAYS.len(), "{windows:#?}");
    lab.containerd.remove("c").expect("remove");
}

#[test]
fn every_way_to_a_socket_under_stock_has_none() {
    on(Arm::STOCK, every_way_has_its_window);
}

#[test]
fn every_way_to_a_socket() {
    on(Arm::KBP, every_way_has_its_window);
}

/// A thousand processes that fork, exec and make sockets while signals rain on them, as Go's runtime does it to its threads.
fn no_call_is_lost(lab: &Lab<'_>) {
    with_ways(lab);
    let pod = lab.pod("pod");
    let run = lab
        .container("c", ["/usr/bin/ways", "storm", "1000"])
        .netns(&pod.netns.path())
        .seccomp();
    let output = run_for(&lab.containerd, &run, Duration::from_secs(120));
    assert!(
        output.contains("processes: 1000 failed: 0"),
        "{output}\n{}",
        lab.containerd.log()
    );
}

/// `ctr run` with more time than usual.
fn run_for(containerd: &Containerd<'_>, run: &Run, limit: Duration) -> String {
    let mut running = containerd.ctr_start(run.arguments()).expect("ctr run");
    let output = running.wait(limit).expect("its end in time");
    output.to_string()
}

#[test]
fn no_call_is_lost_under_stock() {
    on(Arm::STOCK, no_call_is_lost);
}

#[test]
fn no_call_is_lost_among_forks_execs_and_signals() {
    on(Arm::KBP, no_call_is_lost);
}

/// A shim that is stopped answers nobody, and nobody notices more than that it took longer.
#[test]
fn calls_wait_for_a_stopped_shim() {
    on(Arm::KBP, |lab| {
        with_ways(lab);
        let pod = lab.pod("pod");
        let run = lab
            .container("c", ["/usr/bin/ways", "tick", "/tmp/ticks"])
            .netns(&pod.netns.path())
            .annotation("kbp.io/busy-poll", "47");
        lab.containerd.start_container(run).expect("start");
        let shim = Pid::from_raw(lab.containerd.shim_pid("c").expect("shim").cast_signed());
        let file = lab.rootfs.dir().join("tmp/ticks");
        let ticks = || std::fs::read(&file).map_or(0, |t| t.len());
        let more_than = |count: usize| {
            wait_until("further calls", LIMIT, || {
                let now = ticks();
                if now > count {
                    Ok(now)
                } else {
                    Err(format!("{now}"))
                }
            })
            .expect("calls are answered")
        };
        more_than(10);
        kill(shim, Signal::SIGSTOP).expect("stop the shim");
        // It may be in the middle of a tick, and then waits in the next call.
        let mut last = (ticks(), Instant::now());
        let stopped = wait_until("the calls to wait", LIMIT, || {
            let now = ticks();
            if now != last.0 {
                last = (now, Instant::now());
            }
            if last.1.elapsed() > Duration::from_millis(300) {
                Ok(now)
            } else {
                Err(format!("{now} calls and more"))
            }
        });
        kill(shim, Signal::SIGCONT).expect("let the shim go on");
        more_than(stopped.expect("they wait") + 10);
        let all = std::fs::read_to_string(&file).expect("ticks");
        assert!(
            all.bytes().all(|b| b == b'+'),
            "a socket without window: {all}"
        );
        lab.containerd.remove("c").expect("remove");
    });
}

/// Two containers of a pod with one notifier: one comes and goes, again and again, while the other connects.
#[test]
fn a_container_that_exits_does_not_disturb_the_other_of_its_pod() {
    on(Arm::KBP, |lab| {
        with_ways(lab);
        let echo = fixtures::echo().expect("echo server");
        lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
        let pod = lab.pod("pod");
        let part = |id: &str, kind: &str, command: &[&str]| {
            let mut spec = lab.spec(id, command).expect("spec");
            join_netns(&mut spec, &pod.netns.path());
            spec["annotations"]["io.kubernetes.cri.sandbox-id"] = "pause".into();
            spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
            spec
        };
        let start = |id: &str, kind: &str, command: &[&str]| {
            let run = lab.container_of_spec(id, &part(id, kind, command));
            lab.containerd.start_container(run).expect("start");
        };
        start("pause", "sandbox", &["/usr/bin/server", "epoll", "7000"]);
        lab.wait_for_port(lab.containerd.pid("pause").expect("pid"), 7000);
        let log = lab.sandbox.dir().join("connects.log");
        let spec = part(
            "app",
            "container",
            &["/usr/bin/ways", "connect", "127.0.0.1", "7000"],
        );
        let run = lab
            .container_of_spec("app", &spec)
            .flag("--log-uri", format!("file://{}", log.display()));
        lab.containerd.start_container(run).expect("start");
        let connects = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            text.lines().count()
        };
        for round in 0..5 {
            let before = connects();
            let id = format!("brief{round}");
            start(
                &id,
                "container",
                &["/usr/bin/ways", "exit", "127.0.0.1", "7000"],
            );
            lab.containerd
                .wait_for_state(&id, "STOPPED")
                .expect("it ends");
            lab.containerd.remove(&id).expect("remove");
            wait_until("further connections", LIMIT, || {
                let now = connects();
                if now > before {
                    Ok(())
                } else {
                    Err(format!("{now}"))
                }
            })
            .expect("the other goes on");
        }
        let state = lab.containerd.task("app").expect("tasks");
        assert!(
            state.is_some_and(|(state, _)| state == "RUNNING"),
            "{}",
            std::fs::read_to_string(&log).unwrap_or_default()
        );
        let pause = lab.state("pause").expect("state");
        assert_eq!(pause.sockets.errors, 0, "{pause:#?}");
        lab.containerd.remove("app").expect("remove");
        lab.containerd.remove("pause").expect("remove");
    });
}

/// The node's `net.core.busy_poll`, put back at the end; it is everybody's.
struct NodeBusyPoll(String);

impl NodeBusyPoll {
    const PATH: &str = "/proc/sys/net/core/busy_poll";

    fn set(window: &str) -> Self {
        let before = std::fs::read_to_string(Self::PATH).expect("net.core.busy_poll");
        std::fs::write(Self::PATH, window).expect("set net.core.busy_poll");
        Self(before)
    }
}

impl Drop for NodeBusyPoll {
    fn drop(&mut self) {
        std::fs::write(Self::PATH, self.0.trim()).expect("put net.core.busy_poll back");
    }
}

/// A program in `poll` busy-polls where the node-wide setting is on *and* its socket has a window. Without the window, as every socket
/// outside of kbp's pods, it does not, although its veth could be polled: such programs are not slowed.
#[test]
fn poll_busy_polls_with_the_node_wide_setting_and_only_with_a_window() {
    on(Arm::KBP, |lab| {
        with_ways(lab);
        let echo = fixtures::echo().expect("echo client");
        lab.rootfs.binary(&echo, "/usr/bin/client").expect("copy");
        let _setting = NodeBusyPoll::set("200");
        for (busy_poll, polls) in [("200", true), ("off", false)] {
            let (pod, peer) = (lab.pod("pod"), lab.pod("peer"));
            let server = lab
                .container("server", ["/usr/bin/ways", "poll", "7000"])
                .netns(&pod.netns.path())
                .annotation("kbp.io/busy-poll", busy_poll);
            lab.containerd.start_container(server).expect("start");
            let pid = lab.containerd.pid("server").expect("pid");
            lab.wait_for_port(pid, 7000);
            let netns = pod.netns.open().expect("namespace");
            let taken = || kbp_kernel::netstat::busy_poll_rx_packets(&netns).expect("counter");
            let before = taken();
            // From another CPU, or softirq has the packet before anybody can poll for it; the scheduler is free to do so.
            let ask = wait_until("packets taken by polling", LIMIT, || {
                let run = lab
                    .container(
                        "client",
                        ["/usr/bin/client", "client", &pod.ip(), "7000", "2000"],
                    )
                    .netns(&peer.netns.path())
                    .annotation("kbp.io/busy-poll", "off");
                let output = lab.containerd.run(&run).map_err(|e| e.to_string())?;
                let output = output.success().map_err(|e| e.to_string())?;
                let taken = taken() - before;
                match (polls, taken) {
                    (true, 0) => Err(format!("none; {output}")),
                    (false, 1..) => Ok(Err(format!("{taken} of them"))),
                    _ => Ok(Ok(())),
                }
            });
            ask.expect("answers").expect("a socket without a window");
            lab.containerd.remove("server").expect("remove");
        }
    });
}

/// In a network namespace that is not the node's first one there is no such setting: the pod runs, and says what it lacks.
#[test]
fn a_node_wide_setting_that_cannot_be_had_is_told() {
    let settings = Settings {
        kbp_config: "node-busy-poll = 50".to_owned(),
        ..Settings::default()
    };
    on_with(Arm::KBP, settings, |lab| {
        let pod = lab.pod("pod");
        let run = lab
            .container("c", ["sleep", "1000"])
            .netns(&pod.netns.path());
        lab.containerd.start_container(run).expect("start");
        let state = lab.state("c").expect("state");
        assert!(
            state
                .degraded
                .iter()
                .any(|d| d.reason.contains("node-busy-poll")),
            "{state:#?}"
        );
        assert!(state.busy_poll_us.is_some(), "{state:#?}");
        lab.containerd.remove("c").expect("remove");
    });
}
