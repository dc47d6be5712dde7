//! The way of a packet: a pollable veth, a worker that is really there, and the sockets of servers that know nothing of it.

use std::path::PathBuf;
use std::time::Duration;

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_kernel::process::{Scheduling, affinity, cpu_time, scheduling, set_affinity};
use kbp_kernel::{CpuId, CpuSet};
use kbp_poller::policy::WorkerPolicy;
use kbp_tests::lab::{LIMIT, join_netns, on, on_with};
use kbp_tests::{Arm, Lab, Pod, Run, Runtime, Settings, Sockets, fixtures, wait_until};

kbp_tests::scenarios!(on [kbp_on_machine, kbp_on_v2]: an_exec_busy_polls, a_pod_of_two_containers);

/// An unmodified server: where it comes from and how it is started.
struct Server {
    binary: PathBuf,
    arguments: &'static [&'static str],
    port: u16,
    /// Whether it waits in epoll.
    epoll: bool,
}

fn servers() -> Vec<Server> {
    let echo = || fixtures::echo().expect("echo server");
    let redis = kbp_tests::binaries::program("redis-server", "redis-server").expect("redis");
    let memcached = kbp_tests::binaries::program("memcached", "memcached").expect("memcached");
    let go = fixtures::go_echo().expect("Go echo server");
    vec![
        Server {
            binary: echo(),
            arguments: &["epoll", "7000"],
            port: 7000,
            epoll: true,
        },
        Server {
            binary: echo(),
            arguments: &["old-epoll", "7000"],
            port: 7000,
            epoll: true,
        },
        Server {
            binary: echo(),
            arguments: &["blocking", "7000"],
            port: 7000,
            epoll: false,
        },
        Server {
            binary: go,
            arguments: &["7000"],
            port: 7000,
            epoll: true,
        },
        Server {
            binary: redis,
            arguments: &["--port", "7000", "--save", ""],
            port: 7000,
            epoll: true,
        },
        Server {
            binary: memcached,
            arguments: &["-u", "root", "-p", "7000"],
            port: 7000,
            epoll: true,
        },
    ]
}

impl Server {
    /// A container with it.
    fn container(&self, lab: &Lab<'_>, id: &str, pod: &Pod<'_>) -> Run {
        lab.rootfs
            .binary(&self.binary, "/usr/bin/server")
            .expect("copy the server");
        let command = ["/usr/bin/server"].iter().chain(self.arguments).copied();
        lab.container(id, command).netns(&pod.netns.path())
    }
}

/// Runs the client of the fixtures on `cpu`, in a container of its own whose pod has no worker and whose sockets do not poll, and
/// returns how many requests were answered.
fn ask(lab: &Lab<'_>, pod: &Pod<'_>, ip: &str, cpu: CpuId, count: u32) -> u32 {
    let echo = fixtures::echo().expect("echo client");
    lab.rootfs
        .binary(&echo, "/usr/bin/echo-client")
        .expect("copy the client");
    let command = format!(
        "exec taskset {:x} /usr/bin/echo-client client {ip} 7000 {count}",
        1u64 << cpu.0
    );
    let run = lab.script("client", &command).netns(&pod.netns.path());
    let run = run
        .annotation("kbp.io/worker", "none")
        .annotation("kbp.io/busy-poll", "off");
    let output = lab
        .containerd
        .run(&run)
        .expect("client")
        .success()
        .expect("answers");
    let answered = output
        .stdout
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok());
    answered.unwrap_or_else(|| panic!("{output}"))
}

/// Two CPUs: what is to be polled must be sent from another CPU than the poller's, or softirq has it before the poller runs.
fn two_cpus() -> [CpuId; 2] {
    let cpus: Vec<CpuId> = kbp_kernel::cpu::usable().expect("CPUs").iter().collect();
    assert!(cpus.len() >= 2, "this test takes two CPUs");
    [cpus[0], cpus[1]]
}

/// Pins every thread of a process.
fn pin(pid: u32, cpu: CpuId) {
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("threads")
        .flatten()
    {
        let tid = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse().ok())
            .expect("thread id");
        set_affinity(tid, &CpuSet::from_iter([cpu])).expect("pin");
    }
}

fn every_server_busy_polls(lab: &Lab<'_>, seccomp: bool) {
    let expected = match lab.arm.runtime {
        Runtime::Kbp => 77,
        Runtime::Stock => 0,
    };
    for (n, server) in servers().iter().enumerate() {
        let pod = lab.pod(&format!("pod{n}"));
        let id = format!("server{n}");
        let mut run = server
            .container(lab, &id, &pod)
            .annotation("kbp.io/busy-poll", "77");
        if seccomp {
            run = run.seccomp();
        }
        lab.containerd.start_container(run).expect("start");
        let pid = lab.containerd.pid(&id).expect("pid");
        lab.wait_for_port(pid, server.port);
        // Bound is not yet all: some make their epoll instance after their sockets.
        let name = format!("{} {:?}", server.binary.display(), server.arguments);
        let sockets = wait_until(&format!("sockets of {name}"), LIMIT, || {
            let sockets = Sockets::of(pid).map_err(|e| e.to_string())?;
            let complete = !sockets.inet.is_empty() && (!server.epoll || !sockets.epoll.is_empty());
            if complete && sockets.all_poll_for(expected) {
                Ok(sockets)
            } else {
                Err(format!("{sockets:?}"))
            }
        })
        .expect("busy polling");
        assert!(
            sockets.other.iter().all(|w| *w == 0),
            "sockets that are not IP were touched: {sockets:?}"
        );

        // What a server accepts polls like the socket it listens on.
        if server.arguments != ["blocking", "7000"]
            && !server.binary.ends_with("memcached")
            && !server.binary.ends_with("redis-server")
        {
            let client_pod = lab.pod(&format!("peer{n}"));
            let echo = fixtures::echo().expect("echo client");
            lab.rootfs
                .binary(&echo, "/usr/bin/echo-client")
                .expect("copy the client");
            let hold = lab
                .container("hold", ["/usr/bin/echo-client", "hold", &pod.ip(), "7000"])
                .netns(&client_pod.netns.path());
            lab.containerd
                .start_container(hold.annotation("kbp.io/busy-poll", "55"))
                .expect("client");
            let holder = lab.containerd.pid("hold").expect("pid");
            wait_until(&format!("connection to {name}"), LIMIT, || {
                let (there, here) = (
                    Sockets::of(pid).map_err(|e| e.to_string())?,
                    Sockets::of(holder).map_err(|e| e.to_string())?,
                );
                let polled = there.inet.len() > sockets.inet.len() && there.all_poll_for(expected);
                let own = if lab.arm.runtime == Runtime::Kbp {
                    55
                } else {
                    0
                };
                if polled && here.inet == [own] {
                    Ok(())
                } else {
                    Err(format!("server {there:?}, client {here:?}"))
                }
            })
            .expect("both ends busy-poll");
            lab.containerd.remove("hold").expect("remove");
        }
        lab.containerd.remove(&id).expect("remove");
    }
}

/// Without kbp none of these sockets polls: the looking itself is right.
#[test]
fn stock_servers_do_not_busy_poll() {
    on(Arm::STOCK, |lab| every_server_busy_polls(lab, true));
}

#[test]
fn every_server_busy_polls_without_a_profile() {
    on(Arm::KBP, |lab| every_server_busy_polls(lab, false));
}

#[test]
fn every_server_busy_polls_under_the_default_profile() {
    on(Arm::KBP, |lab| every_server_busy_polls(lab, true));
}

#[test]
fn every_server_busy_polls_on_v2() {
    on(Arm::KBP_V2, |lab| every_server_busy_polls(lab, true));
}

#[test]
fn every_server_busy_polls_under_crun() {
    on(Arm::KBP_CRUN, |lab| every_server_busy_polls(lab, true));
}

/// The default window is what the state file says, and it is not zero on this machine.
#[test]
fn the_state_says_what_the_sockets_do() {
    on(Arm::KBP, |lab| {
        let pod = lab.pod("pod");
        let server = &servers()[0];
        lab.containerd
            .start_container(server.container(lab, "server", &pod))
            .expect("start");
        let pid = lab.containerd.pid("server").expect("pid");
        lab.wait_for_port(pid, 7000);
        let state = lab.state("server").expect("state file");
        assert!(state.degraded.is_empty(), "{state:#?}");
        assert_eq!(
            state.owner_pid,
            lab.containerd.shim_pid("server").expect("shim")
        );
        let window = state.busy_poll_us.expect("a window");
        assert!((1..=100).contains(&window), "{state:#?}");
        assert!(Sockets::of(pid).expect("sockets").all_poll_for(window));
        let [interface] = &state.interfaces[..] else {
            panic!("{state:#?}")
        };
        assert_eq!(interface.pod_interface, "eth0");
        let links = lab.sandbox.ip("-o link show").expect("links");
        assert!(
            links.contains(&format!(
                "{}: {}@",
                interface.host_ifindex, interface.host_interface
            )),
            "{links}\n{state:#?}"
        );
        // Nobody polls the host end here.
        assert!(interface.host_napi.is_none() && interface.pod_napi.is_some());
        lab.containerd.remove("server").expect("remove");
        assert!(lab.state("server").is_none());
    });
}

/// A second process in a running container gets the same sockets.
fn an_exec_busy_polls(lab: &Lab<'_>) {
    let pod = lab.pod("pod");
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    let run = lab
        .container("c", ["sleep", "1000"])
        .netns(&pod.netns.path())
        .annotation("kbp.io/busy-poll", "66")
        .seccomp();
    lab.containerd.start_container(run).expect("start");
    for (mode, port) in [("epoll", 7001), ("blocking", 7002)] {
        let pid_file = lab.rootfs.dir().join("tmp/pid");
        let script = format!("echo $$ > /tmp/pid; exec /usr/bin/server {mode} {port}");
        let mut exec = lab
            .containerd
            .ctr_start(["tasks", "exec", "--exec-id", mode, "c", "sh", "-c", &script])
            .expect("exec");
        let init = lab.containerd.pid("c").expect("pid");
        lab.wait_for_port(init, port);
        // Its pid outside: the one whose command line it is.
        let list = lab
            .containerd
            .ctr(["tasks", "ps", "c"])
            .expect("ps")
            .success()
            .expect("ps")
            .stdout;
        let pids = list
            .lines()
            .filter_map(|l| l.split_whitespace().next()?.parse::<u32>().ok());
        let pid = pids.into_iter().find(|p| {
            std::fs::read_to_string(format!("/proc/{p}/cmdline"))
                .is_ok_and(|c| c.starts_with("/usr/bin/server"))
        });
        let pid = pid.unwrap_or_else(|| panic!("the server is not in\n{list}"));
        let sockets = wait_until("the exec's sockets", LIMIT, || {
            let sockets = Sockets::of(pid).map_err(|e| e.to_string())?;
            let complete =
                !sockets.inet.is_empty() && (mode == "blocking" || !sockets.epoll.is_empty());
            if complete {
                Ok(sockets)
            } else {
                Err(format!("{sockets:?}"))
            }
        })
        .expect("sockets");
        assert!(sockets.all_poll_for(66), "{sockets:?}");
        lab.containerd
            .ctr([
                "tasks",
                "kill",
                "--signal",
                "SIGKILL",
                "--exec-id",
                mode,
                "c",
            ])
            .expect("kill")
            .success()
            .expect("kill");
        exec.wait(LIMIT).expect("end of the exec");
        std::fs::remove_file(pid_file).expect("pid file");
    }
    lab.containerd.remove("c").expect("remove");
}

/// What the trapped calls answer is what they answer under the stock shim, to the last errno.
#[test]
fn trapped_calls_answer_as_ever() {
    let mut answers = Vec::new();
    for arm in [Arm::STOCK, Arm::KBP, Arm::KBP_V2, Arm::KBP_CRUN] {
        on(arm, |lab| {
            let echo = fixtures::echo().expect("echo");
            lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
            for seccomp in [false, true] {
                let pod = lab.pod("pod");
                lab.sandbox.ip("-n pod link set lo up").expect("loopback");
                let mut run = lab
                    .container("c", ["/usr/bin/server", "semantics"])
                    .netns(&pod.netns.path());
                if seccomp {
                    run = run.seccomp();
                }
                let output = lab
                    .containerd
                    .run(&run)
                    .expect("run")
                    .success()
                    .expect("code");
                assert!(
                    output.stdout.contains("failures under signals: 0"),
                    "{output}"
                );
                answers.push((arm, seccomp, output.stdout));
            }
        });
    }
    let (_, _, stock) = &answers[0];
    assert!(stock.lines().count() > 25, "{stock}");
    for (arm, seccomp, answer) in &answers {
        assert_eq!(answer, stock, "{arm:?}, default profile: {seccomp}");
    }
}

/// What the host end and the pod end of a container have that lacks nothing.
fn features_of_both_ends(lab: &Lab<'_>, pod: &Pod<'_>, container: &str) -> (Features, Features) {
    let state = lab.state(container).expect("state");
    assert!(state.degraded.is_empty(), "{state:#?}");
    let host = ethtool::features(
        &lab.sandbox.netns().expect("node"),
        &state.interfaces[0].host_interface,
    )
    .expect("host end");
    let inner = ethtool::features(&pod.netns.open().expect("pod"), "eth0").expect("pod end");
    (host, inner)
}

/// TSO off at the host end and GRO on in the pod, and the other way round as well where a worker is asked for, whoever made the veth.
fn both_ends_are_pollable(lab: &Lab<'_>, pod: &Pod<'_>) {
    lab.containerd
        .start_container(
            lab.container("c", ["sleep", "1000"])
                .netns(&pod.netns.path()),
        )
        .expect("start");
    let (host, inner) = features_of_both_ends(lab, pod, "c");
    assert!(!host.tso && inner.gro, "{host:?} {inner:?}");
    assert!(!host.gro && inner.tso, "{host:?} {inner:?}");
    lab.containerd.remove("c").expect("remove");
    let polled = lab
        .container("w", ["sleep", "1000"])
        .netns(&pod.netns.path())
        .annotation("kbp.io/worker", "idle");
    lab.containerd.start_container(polled).expect("start");
    let (host, inner) = features_of_both_ends(lab, pod, "w");
    // TSO in the pod is off while the worker is wanted only.
    assert!(host.gro && !host.tso && inner.gro, "{host:?} {inner:?}");
    let state = lab.state("w").expect("state");
    assert!(state.interfaces[0].host_napi.is_some(), "{state:#?}");
    lab.containerd.remove("w").expect("remove");
}

#[test]
fn both_ends_of_kbps_veth_are_pollable() {
    on(Arm::KBP, |lab| both_ends_are_pollable(lab, &lab.pod("pod")));
}

#[test]
fn both_ends_of_anothers_veth_are_made_pollable() {
    on(Arm::KBP_V2, |lab| {
        both_ends_are_pollable(lab, &lab.ptp_pod("pod"))
    });
}

/// The worker: a kernel thread of the shim, on its CPU, in its class, that moves packets while there are any and sleeps when not.
/// An idle-class worker gets what the machine leaves it, which on a busy one is nothing: only a dedicated one is asked for packets.
fn the_worker_is_really_there(lab: &Lab<'_>) {
    for policy in [WorkerPolicy::Idle, WorkerPolicy::Dedicated] {
        let (server_pod, client_pod) = (lab.pod("spod"), lab.pod("cpod"));
        // Only the worker polls: the sockets are left alone.
        let server = servers()[2].container(lab, "server", &server_pod);
        let run = server
            .annotation("kbp.io/worker", &policy.to_string())
            .annotation("kbp.io/busy-poll", "off");
        lab.containerd.start_container(run).expect("start");
        let pid = lab.containerd.pid("server").expect("pid");
        lab.wait_for_port(pid, 7000);
        assert!(
            Sockets::of(pid).expect("sockets").all_poll_for(0),
            "busy-poll is off"
        );

        let state = lab.state("server").expect("state");
        let worker = state
            .worker
            .clone()
            .unwrap_or_else(|| panic!("no worker: {state:#?}"));
        assert_eq!((worker.kind.as_str(), worker.policy), ("sqpoll", policy));
        let shim = lab.containerd.shim_pid("server").expect("shim");
        let name = std::fs::read_to_string(format!("/proc/{shim}/task/{}/comm", worker.tid))
            .expect("a thread of the shim");
        assert!(name.starts_with("iou-sqp"), "{name}");
        let class = if policy == WorkerPolicy::Idle {
            Scheduling::Idle
        } else {
            Scheduling::Other(0)
        };
        assert_eq!(scheduling(worker.tid).expect("class"), class);
        assert_eq!(
            affinity(worker.tid).expect("affinity"),
            CpuSet::from_iter([CpuId(worker.cpu)])
        );

        if policy == WorkerPolicy::Dedicated {
            let other = two_cpus()
                .into_iter()
                .find(|c| c.0 != worker.cpu)
                .expect("another CPU");
            pin(pid, other);
            let node = lab.sandbox.netns().expect("node");
            let spent = cpu_time(shim, worker.tid).expect("CPU time");
            // How many it takes before softirq does differs from run to run, and some runs pass without any.
            let packets = busy_poll_rx_packets(&node).expect("counter");
            wait_until("packets that the worker received", LIMIT, || {
                let answered = ask(lab, &client_pod, &server_pod.ip(), other, 2000);
                assert!(answered > 1900, "{answered} of 2000 answered");
                let polled = busy_poll_rx_packets(&node).expect("counter") - packets;
                if polled > 200 {
                    Ok(())
                } else {
                    Err(format!("{polled} up to now"))
                }
            })
            .expect("the worker polls");
            let worked = cpu_time(shim, worker.tid).expect("CPU time") - spent;
            assert!(worked >= Duration::from_millis(10), "it worked {worked:?}");
        }

        // No traffic: after its lease it sleeps.
        let lease = Duration::from_millis(worker.lease_ms.into());
        wait_until("sleep of the worker", LIMIT, || {
            let before = cpu_time(shim, worker.tid).map_err(|e| e.to_string())?;
            // A span of time is what is looked at here, not awaited: it must pass without any use of the CPU.
            std::thread::sleep(lease.max(Duration::from_millis(100)) * 2);
            let spent = cpu_time(shim, worker.tid).map_err(|e| e.to_string())? - before;
            if spent.is_zero() {
                Ok(())
            } else {
                Err(format!("it still takes {spent:?}"))
            }
        })
        .expect("an idle pod costs nothing");

        lab.containerd.remove("server").expect("remove");
        // The kernel takes a moment to end the thread.
        let thread = format!("/proc/{shim}/task/{}", worker.tid);
        wait_until("end of the worker", LIMIT, || {
            if std::path::Path::new(&thread).exists() {
                Err(thread.clone())
            } else {
                Ok(())
            }
        })
        .expect("it ends with its pod");
    }
}

#[test]
fn the_worker_is_really_there_on_the_machine() {
    on_with(Arm::KBP, pool(), the_worker_is_really_there);
}

#[test]
fn the_worker_is_really_there_on_v2() {
    on_with(Arm::KBP_V2, pool(), the_worker_is_really_there);
}

/// A node with a pool of one CPU.
fn pool() -> Settings {
    Settings {
        kbp_config: "cpus = \"1\"\n".to_owned(),
        ..Settings::default()
    }
}

/// Sockets that poll receive by polling; the counter of the pod's own namespace says so, and without a window it stands still.
#[test]
fn sockets_receive_by_polling() {
    on(Arm::KBP, |lab| {
        let (server_pod, client_pod) = (lab.pod("spod"), lab.pod("cpod"));
        let netns = server_pod.netns.open().expect("netns");
        let [here, there] = two_cpus();
        // Both kinds of waiting: epoll_wait and a blocking recv.
        for (server, window) in [(0, "200"), (2, "200"), (0, "off")] {
            let run = servers()[server].container(lab, "server", &server_pod);
            let run = run
                .annotation("kbp.io/worker", "none")
                .annotation("kbp.io/busy-poll", window);
            lab.containerd.start_container(run).expect("start");
            let pid = lab.containerd.pid("server").expect("pid");
            lab.wait_for_port(pid, 7000);
            pin(pid, here);
            let state = lab.state("server").expect("state");
            assert!(
                state.worker.is_none() && state.degraded.is_empty(),
                "{state:#?}"
            );
            let ask = || {
                let before = busy_poll_rx_packets(&netns).expect("counter");
                let answered = ask(lab, &client_pod, &server_pod.ip(), there, 2000);
                assert!(answered > 1900, "{answered} of 2000 answered");
                busy_poll_rx_packets(&netns).expect("counter") - before
            };
            if window == "off" {
                assert_eq!(ask(), 0, "nobody polls");
            } else {
                wait_until(
                    "packets that the server received by polling",
                    LIMIT,
                    || match ask() {
                        polled if polled > 400 => Ok(()),
                        polled => Err(format!("{polled} of 2000")),
                    },
                )
                .unwrap_or_else(|e| panic!("server {server}: {e}"));
            }
            lab.containerd.remove("server").expect("remove");
        }
    });
}

/// `dedicated`: a CPU of the pool for one pod, claimed as long as it lives; the next pod finds none.
#[test]
fn a_dedicated_worker_has_a_cpu_of_its_own() {
    on_with(Arm::KBP, pool(), |lab| {
        let (first, second) = (lab.pod("pod1"), lab.pod("pod2"));
        let run = |id: &str, pod: &Pod<'_>| {
            lab.container(id, ["sleep", "1000"])
                .netns(&pod.netns.path())
                .annotation("kbp.io/worker", "dedicated")
        };
        lab.containerd
            .start_container(run("c1", &first))
            .expect("start");
        let worker = lab.state("c1").expect("state").worker.expect("worker");
        assert_eq!(
            (worker.cpu, worker.policy, worker.idle_class),
            (1, WorkerPolicy::Dedicated, false)
        );
        assert_eq!(scheduling(worker.tid).expect("class"), Scheduling::Other(0));
        assert_eq!(
            affinity(worker.tid).expect("affinity"),
            CpuSet::from_iter([CpuId(1)])
        );

        let refused = lab
            .containerd
            .run(
                &run("c2", &second)
                    .annotation("kbp.io/required", "true")
                    .detached(),
            )
            .expect("run");
        assert_ne!(refused.code, Some(0));
        assert!(refused.text().contains("CPU 1 is held by"), "{refused}");
        lab.containerd.remove("c2").expect("remove");

        lab.containerd
            .start_container(run("c2", &second))
            .expect("it runs without");
        let state = lab.state("c2").expect("state");
        assert!(
            state
                .degraded
                .iter()
                .any(|d| d.reason.contains("CPU 1 is held by")),
            "{state:#?}"
        );
        lab.containerd.remove("c2").expect("remove");

        lab.containerd.remove("c1").expect("remove");
        lab.containerd
            .start_container(run("c2", &second))
            .expect("start");
        assert_eq!(
            lab.state("c2").expect("state").worker.map(|w| w.cpu),
            Some(1),
            "the CPU is free again"
        );
        lab.containerd.remove("c2").expect("remove");
    });
}

/// The window follows the pod's CPUs: longer on CPUs of its own, none under a tight quota.
#[test]
fn the_window_follows_cpuset_and_quota() {
    on(Arm::KBP, |lab| {
        let echo = fixtures::echo().expect("echo server");
        lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
        let mut windows = Vec::new();
        for (id, cpu) in [
            ("shared", None),
            ("own", Some(("cpus", serde_json::json!("1")))),
            ("quota", Some(("quota", serde_json::json!(50_000)))),
        ] {
            let pod = lab.pod(id);
            let mut spec = lab
                .spec(id, &["/usr/bin/server", "epoll", "7000"])
                .expect("spec");
            join_netns(&mut spec, &pod.netns.path());
            if let Some((key, value)) = cpu {
                spec["linux"]["resources"]["cpu"][key] = value;
                if key == "quota" {
                    spec["linux"]["resources"]["cpu"]["period"] = 100_000.into();
                }
            }
            lab.containerd
                .start_container(lab.container_of_spec(id, &spec))
                .expect("start");
            let pid = lab.containerd.pid(id).expect("pid");
            lab.wait_for_port(pid, 7000);
            let state = lab.state(id).expect("state");
            let window = state.busy_poll_us.unwrap_or(0);
            assert!(
                Sockets::of(pid).expect("sockets").all_poll_for(window),
                "{state:#?}"
            );
            assert!(!state.busy_poll_reason.is_empty());
            if id == "own" {
                assert_eq!(state.cpuset.as_deref(), Some("1"));
            }
            windows.push(window);
            lab.containerd.remove(id).expect("remove");
        }
        let [shared, own, quota] = windows[..] else {
            unreachable!("three arms")
        };
        assert!(own > shared && shared > 0, "own {own}, shared {shared}");
        assert_eq!(quota, 0, "a window would eat the quota");
    });
}

/// A pod of two containers, as CRI makes them: one shim, one attachment, and the sockets of both poll.
fn a_pod_of_two_containers(lab: &Lab<'_>) {
    let pod = lab.pod("pod");
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    let part = |id: &str, kind: &str, command: &[&str]| {
        let mut spec = lab.spec(id, command).expect("spec");
        join_netns(&mut spec, &pod.netns.path());
        spec["annotations"]["io.kubernetes.cri.sandbox-id"] = "pause".into();
        spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
        if kind == "sandbox" {
            spec["annotations"]["kbp.io/busy-poll"] = "88".into();
        }
        lab.container_of_spec(id, &spec)
    };
    lab.containerd
        .start_container(part("pause", "sandbox", &["sleep", "1000"]))
        .expect("sandbox");
    lab.containerd
        .start_container(part(
            "app",
            "container",
            &["/usr/bin/server", "epoll", "7000"],
        ))
        .expect("container");
    let shim = lab.containerd.shim_pid("pause").expect("shim");
    assert_eq!(
        lab.containerd.shim_pid("app").expect("shim"),
        shim,
        "one shim for the pod"
    );
    let pid = lab.containerd.pid("app").expect("pid");
    lab.wait_for_port(pid, 7000);
    let sockets = Sockets::of(pid).expect("sockets");
    assert!(sockets.all_poll_for(88), "{sockets:?}");
    let states = kbp_poller::state::read_all(&lab.state_dir()).expect("states");
    assert_eq!(
        states.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(),
        ["pause"]
    );
    lab.containerd.remove("app").expect("remove");
    assert!(lab.state("pause").is_some(), "the pod lives on");
    lab.answers("pause");
    // A container that comes back in the same pod, as after a crash of the application.
    lab.containerd
        .start_container(part(
            "app",
            "container",
            &["/usr/bin/server", "epoll", "7000"],
        ))
        .expect("container");
    let pid = lab.containerd.pid("app").expect("pid");
    lab.wait_for_port(pid, 7000);
    assert!(Sockets::of(pid).expect("sockets").all_poll_for(88));
    lab.containerd.remove("app").expect("remove");
    lab.containerd.remove("pause").expect("remove");
}

/// Ids are unique in a containerd namespace only.
#[test]
fn the_same_id_in_two_namespaces() {
    on(Arm::KBP, |lab| {
        let (first, second) = (lab.pod("pod1"), lab.pod("pod2"));
        lab.containerd
            .start_container(
                lab.container("c", ["sleep", "1000"])
                    .netns(&first.netns.path()),
            )
            .expect("start");
        let other = format!("{}-b", lab.sandbox.name());
        let other_ctr = |arguments: Vec<String>| {
            let mut command = lab.containerd.ctr_command(["--namespace", &other]);
            command.args(arguments);
            kbp_tests::command::run(command, LIMIT)
                .expect("ctr")
                .success()
                .expect("ctr")
        };
        other_ctr(
            lab.container("c", ["sleep", "1000"])
                .netns(&second.netns.path())
                .detached()
                .arguments(),
        );
        let states = kbp_poller::state::read_all(&lab.state_dir()).expect("states");
        assert_eq!(states.len(), 2, "{states:#?}");
        other_ctr(
            ["tasks", "delete", "--force", "c"]
                .map(str::to_owned)
                .to_vec(),
        );
        other_ctr(["containers", "delete", "c"].map(str::to_owned).to_vec());
        let state = lab
            .state("c")
            .expect("the other one's state is still there");
        assert_eq!(state.namespace, lab.sandbox.name());
        lab.containerd.remove("c").expect("remove");
    });
}
