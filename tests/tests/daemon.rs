//! The node's daemon under real shims: it takes their pods over, is killed, comes back, and no packet notices.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::netns::Netns;
use kbp_kernel::{CpuId, CpuSet, cpu, process};
use kbp_poller::api;
use kbp_poller::client::Client;
use kbp_poller::state::PodState;
use kbp_tests::lab::{LIMIT, Pod, on_with};
use kbp_tests::{Arm, Lab, Settings, binaries, command::Running, wait_until};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// What the daemon may take to have a pod again after it was started anew: in the best of some rounds, since a busy machine may hold up
/// any of them.
const BACK: Duration = Duration::from_secs(1);

/// The CPUs of workers and of senders; two, or a worker on the sender's CPU would never run.
fn cpus() -> (CpuId, CpuId) {
    let usable = cpu::usable().expect("cpus");
    let first = usable.iter().next().expect("a CPU");
    let last = usable.iter().last().expect("a CPU");
    assert_ne!(first, last, "this test takes two CPUs");
    (last, first)
}

fn settings() -> Settings {
    Settings {
        kbp_config: format!("cpus = \"{}\"\nworker = \"shared\"\n", cpus().0),
        ..Settings::default()
    }
}

/// A daemon on the node; ended in the orderly way when it is dropped.
struct Daemon<'l> {
    lab: &'l Lab<'l>,
    running: Option<Running>,
    pid: u32,
}

impl<'l> Daemon<'l> {
    fn start(lab: &'l Lab<'l>) -> Self {
        let binary = binaries::kbp_binary("kbp-poller").expect("kbp-poller");
        let mut command = lab.containerd.command(binary);
        command.arg("serve");
        let mut running = Running::start(command).expect("start kbp-poller");
        let ready = lab.state_dir().join(api::READY);
        let pid = running.pid();
        wait_until(
            "the daemon to serve",
            LIMIT,
            || match std::fs::read_to_string(&ready) {
                Ok(text) if text == format!("{pid}\n") => Ok(()),
                other => Err(format!("{other:?}: {}", running.stderr())),
            },
        )
        .expect("daemon");
        Self {
            lab,
            running: Some(running),
            pid,
        }
    }

    fn kill(mut self) {
        // It may have been killed already.
        process::kill(self.pid, SIGKILL).expect("kill");
        drop(self.running.take().map(|mut r| r.wait(LIMIT)));
    }

    fn client(&self) -> Client {
        Client::connect(&self.lab.state_dir().join(api::SOCKET), LIMIT).expect("connect")
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            let _ = process::kill(self.pid, SIGTERM);
            if running.wait(LIMIT).is_none() {
                running.kill();
            }
        }
    }
}

/// The shims of these pods; asked once, since `ctr` takes longer than what is measured.
fn shims(lab: &Lab<'_>, pods: &[&str]) -> BTreeMap<String, u32> {
    let shim = |id: &&str| lab.containerd.shim_pid(id).expect("shim");
    pods.iter().map(|id| ((*id).to_owned(), shim(id))).collect()
}

/// Polling threads of a process.
fn pollers(pid: u32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let names = tasks
        .into_iter()
        .flatten()
        .flatten()
        .map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
    names.filter(|name| name.starts_with("iou-sqp-")).count()
}

/// Waits until every pod is polled by `owner`, and by nobody else: no other process of the node has a polling thread.
fn wait_owner(lab: &Lab<'_>, pods: &[&str], owner: impl Fn(&str) -> u32, limit: Duration) {
    wait_until("the pods to change hands", limit, || {
        for pod in pods {
            let owner = owner(pod);
            match lab.state(pod) {
                Some(PodState {
                    owner_pid,
                    worker: Some(worker),
                    ..
                }) if owner_pid == owner => {
                    if !std::path::Path::new(&format!("/proc/{owner}/task/{}", worker.tid)).exists()
                    {
                        return Err(format!("{pod}: {owner} has no thread {}", worker.tid));
                    }
                }
                other => return Err(format!("{pod}: {other:?}, not of {owner}")),
            }
        }
        Ok(())
    })
    .expect("owner");
}

fn start_server<'l>(lab: &'l Lab<'l>, id: &str) -> Pod<'l> {
    // While one runs, its file cannot be written.
    if !lab.rootfs.dir().join("usr/bin/server").exists() {
        let echo = kbp_tests::fixtures::echo().expect("echo server");
        lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    }
    let pod = lab.pod(id);
    let server = lab
        .container(id, ["/usr/bin/server", "epoll", "7000"])
        .netns(&pod.netns.path());
    lab.containerd.start_container(server).expect("start");
    lab.wait_for_port(lab.containerd.pid(id).expect("pid"), 7000);
    pod
}

/// Datagrams from a pod to the host as fast as they go, until it is stopped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Flood {
    fn start(pod: &Netns, to: &str) -> Self {
        let socket = pod.run(|| UdpSocket::bind("0.0.0.0:0")).expect("enter");
        let socket = socket.expect("bind");
        socket.connect((to, 9)).expect("connect");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let elsewhere: CpuSet = [cpus().1].into_iter().collect();
        let thread = std::thread::spawn(move || {
            process::set_affinity(0, &elsewhere).expect("pin the sender");
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                // Where nobody listens, every now and then an error of an earlier one is told instead.
                if socket.send(&[0; 64]).is_ok() {
                    sent += 1;
                }
            }
            sent
        });
        Self { stop, thread }
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("flood")
    }
}

/// Packets that a pod's host end has received, and drops at either end of the pair, qdisc included.
fn received(lab: &Lab<'_>, pod: &Pod<'_>, host_interface: &str) -> (u64, u64) {
    let read = |text: &str, path: &str| -> u64 {
        let value: serde_json::Value = serde_json::from_str(text).expect("JSON of ip");
        value[0]
            .pointer(path)
            .and_then(serde_json::Value::as_u64)
            .expect(path)
    };
    let host = lab
        .sandbox
        .ip(&format!("-s -j link show dev {host_interface}"))
        .expect("host end");
    let inside = pod.netns.ip("-s -j link show dev eth0").expect("pod end");
    let dropped = read(&host, "/stats64/rx/dropped") + read(&inside, "/stats64/tx/dropped");
    (read(&host, "/stats64/rx/packets"), dropped)
}

/// Round trips of a client in a container of its own while `disturb` runs; how many there were, all answered.
fn ping_pong<'l>(lab: &'l Lab<'l>, server: &Pod<'l>, disturb: impl FnOnce()) -> u64 {
    let rr = binaries::kbp_binary("udp-rr").expect("udp-rr");
    lab.rootfs.binary(&rr, "/usr/bin/udp-rr").expect("copy");
    let pod = lab.pod("client");
    let target = format!("{}:7000", server.ip());
    let client = lab
        .container("client", ["/usr/bin/udp-rr", &target, "/tmp/enough"])
        .netns(&pod.netns.path());
    let mut running = lab
        .containerd
        .ctr_start(client.arguments())
        .expect("start the client");
    wait_until("the client to run", LIMIT, || {
        lab.state("client").map(drop).ok_or(String::new())
    })
    .expect("client");
    disturb();
    let enough = lab.rootfs.dir().join("tmp/enough");
    std::fs::write(enough, "").expect("write");
    let output = running.wait(LIMIT).expect("the client ends");
    let output = output.success().expect("every request is answered");
    let result: serde_json::Value = serde_json::from_str(output.stdout.trim()).expect("JSON");
    println!("{result}");
    assert_eq!(result["lost"], 0, "{result}");
    result["samples"].as_u64().expect("samples")
}

#[test]
fn pods_of_running_shims_are_taken_over_and_go_back() {
    on_with(Arm::KBP, settings(), |lab| {
        let pods = ["a", "b"];
        let _netns = pods.map(|id| start_server(lab, id));
        let shims = shims(lab, &pods);
        let shim = |id: &str| shims[id];
        wait_owner(lab, &pods, shim, LIMIT);

        let daemon = Daemon::start(lab);
        let began = Instant::now();
        wait_owner(lab, &pods, |_| daemon.pid, LIMIT);
        println!("taken over within {:?}", began.elapsed());
        // One worker for both, and none left in the shims.
        assert_eq!(pollers(daemon.pid), 1);
        for id in pods {
            wait_until("the shim's worker to end", LIMIT, || {
                match pollers(shim(id)) {
                    0 => Ok(()),
                    n => Err(format!("{n}")),
                }
            })
            .expect("no worker");
            lab.answers(id);
        }
        let listed = daemon.client().list().expect("list");
        assert_eq!(listed.len(), 2);
        assert!(listed.iter().all(|pod| pod.bound), "{listed:?}");
        // A pod that starts now goes to the daemon at once, and ends there.
        let _c = start_server(lab, "c");
        wait_owner(lab, &["c"], |_| daemon.pid, LIMIT);
        assert_eq!(pollers(lab.containerd.shim_pid("c").expect("shim")), 0);
        lab.containerd.remove("c").expect("remove");
        assert!(lab.state("c").is_none());

        // In the orderly way.
        drop(daemon);
        wait_owner(lab, &pods, shim, LIMIT);
        for id in pods {
            assert_eq!(pollers(shim(id)), 1);
            lab.containerd.remove(id).expect("remove");
        }
    });
}

#[test]
fn a_killed_daemon_costs_a_ping_pong_nothing_and_is_back_within_a_second() {
    on_with(Arm::KBP, settings(), |lab| {
        let server = start_server(lab, "server");
        let pods = ["server", "client"];
        let samples = ping_pong(lab, &server, || {
            let shims = shims(lab, &pods);
            let shim = |id: &str| shims[id];
            let rounds = [(); 3].map(|()| {
                let daemon = Daemon::start(lab);
                let began = Instant::now();
                wait_owner(lab, &pods, |_| daemon.pid, LIMIT);
                let there = began.elapsed();
                daemon.kill();
                let began = Instant::now();
                wait_owner(lab, &pods, shim, LIMIT);
                [there, began.elapsed()]
            });
            println!("with the daemon and with the shims within {rounds:?}");
            for way in [0, 1] {
                let best = rounds.iter().map(|round| round[way]).min();
                assert!(best < Some(BACK), "{rounds:?}");
            }
        });
        assert!(samples > 100, "{samples} round trips");
        // What the killed one left goes with the next.
        drop(Daemon::start(lab));
        for id in pods {
            lab.containerd.remove(id).expect("remove");
        }
    });
}

#[test]
fn a_killed_daemon_costs_a_flood_not_one_packet() {
    on_with(Arm::KBP, settings(), |lab| {
        let pod = start_server(lab, "server");
        let shims = shims(lab, &["server"]);
        let shim = |id: &str| shims[id];
        wait_owner(lab, &["server"], shim, LIMIT);
        let state = lab.state("server").expect("state");
        let host_end = state.interfaces[0].host_interface.clone();
        let gateway = pod.netns.ip("-j route show default").expect("route");
        let gateway: serde_json::Value = serde_json::from_str(&gateway).expect("JSON");
        let gateway = gateway[0]["gateway"]
            .as_str()
            .expect("a gateway")
            .to_owned();
        let (before, dropped_before) = received(lab, &pod, &host_end);
        let flood = Flood::start(&pod.netns.open().expect("open"), &gateway);
        for _ in 0..3 {
            let daemon = Daemon::start(lab);
            wait_owner(lab, &["server"], |_| daemon.pid, LIMIT);
            wait_until("the shim's worker to end", LIMIT, || {
                match pollers(shim("server")) {
                    0 => Ok(()),
                    n => Err(format!("{n}")),
                }
            })
            .expect("no worker");
            let killed = daemon.pid;
            assert!(process::kill(killed, SIGKILL).expect("kill"));
            // Not one moment with two: when the shim has a worker, the daemon has none any more.
            wait_until("the shim's worker", LIMIT, || {
                if pollers(shim("server")) == 0 {
                    return Err("none".to_owned());
                }
                assert_eq!(pollers(killed), 0, "the killed one still polls");
                Ok(())
            })
            .expect("a worker");
            daemon.kill();
            wait_owner(lab, &["server"], shim, LIMIT);
        }
        let sent = flood.end();
        assert!(sent > 10_000, "{sent} datagrams are no flood");
        // The last ones may still be in the qdisc.
        let arrived = wait_until("every packet", LIMIT, || {
            let (after, _) = received(lab, &pod, &host_end);
            let arrived = after - before;
            if arrived >= sent {
                Ok(arrived)
            } else {
                Err(format!("{arrived} of {sent}"))
            }
        });
        let (_, dropped) = received(lab, &pod, &host_end);
        assert_eq!(dropped - dropped_before, 0, "of {sent}");
        arrived.expect("none is lost");
        drop(Daemon::start(lab));
        lab.containerd.remove("server").expect("remove");
    });
}
