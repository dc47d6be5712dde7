//! Idle-class workers give way to containers, which have cgroups of their own: for the machine that the tests run on, which has cgroup
//! v1 or v2, and for emulated ones.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use kbp_kernel::{CpuId, CpuSet, cpu, netstat, process};
use kbp_poller::policy::WorkerPolicy;

use crate::node::{Node, thread_lives, wait_parked, wait_until};

/// Where the controller `cpu` of cgroup v1 is mounted on usual machines; None: it is version 2's.
fn v1() -> Option<&'static Path> {
    ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"]
        .into_iter()
        .map(Path::new)
        .find(|root| root.join("tasks").exists())
}

/// Something that wants a CPU all the time, in a cgroup as a container has one.
struct Hog {
    group: PathBuf,
    process: Child,
}

/// How the name of its cgroup begins; the rest is the id of the test's process.
const GROUP: &str = "kbp-poller-test-";

/// Removes the cgroups of tests that were killed.
fn clear(root: &Path) {
    for entry in std::fs::read_dir(root).expect("cgroups").flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(GROUP));
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another test may have been faster.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

impl Hog {
    fn start(root: &Path, cpu: CpuId) -> Self {
        clear(root);
        let group = root.join(format!("{GROUP}{}", std::process::id()));
        std::fs::create_dir(&group).expect("make a cgroup");
        let mut sh = Command::new("sh");
        sh.args(["-c", "while :; do :; done"]);
        process::end_with_parent(&mut sh);
        let process = sh.spawn().expect("start sh");
        let hog = Self { group, process };
        let pid = hog.process.id();
        std::fs::write(hog.group.join("cgroup.procs"), pid.to_string())
            .expect("move to the cgroup");
        process::set_affinity(pid, &CpuSet::from_iter([cpu])).expect("pin");
        hog
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        wait_until("the cgroup to be empty", || {
            std::fs::remove_dir(&self.group).ok()
        });
    }
}

/// Attaches with an idle worker, and expects that it gives way to another cgroup, or that the state says that it does not.
pub(crate) fn gives_way_or_says_that_it_does_not() {
    let node = Node::new();
    let attachment = node.attached(node.request("a", WorkerPolicy::Idle, ""));
    let state = attachment.state();
    assert_eq!(state.degraded, []);
    let worker = state.worker.expect("a worker");
    let task = format!("/proc/{0}/task/{0}", worker.tid);
    let groups = std::fs::read_to_string(format!("{task}/cgroup"));
    let groups = groups.expect("the worker's cgroups");
    let warned = state
        .worker_reason
        .contains("warning: it is idle towards its own cgroup only");
    let root = match v1() {
        Some(root) => root,
        // Processes are moved, so it takes a kind of worker that can belong to one of its own.
        None if worker.kind == "sqpoll" => Path::new("/sys/fs/cgroup"),
        None => {
            let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
            let alone = read("/proc/self/cgroup").trim() == "0::/"
                && read("/proc/sys/kernel/sched_autogroup_enabled").trim() != "1";
            assert_eq!(warned, !alone, "{}", state.worker_reason);
            return;
        }
    };
    let group = root.join("kbp-idle");
    assert!(!warned, "{}", state.worker_reason);
    assert!(groups.contains(":/kbp-idle\n"), "{groups}");
    let idle = std::fs::read_to_string(group.join("cpu.idle")).expect("cpu.idle");
    assert_eq!(idle.trim(), "1");

    let traffic = node.traffic();
    let used = || process::cpu_time(worker.tid, worker.tid).expect("cpu time");
    let parked = used();
    wait_until("the worker to run", || (used() > parked).then_some(()));
    // It polls the pod's end, too, which nothing else does here.
    let polled = || netstat::busy_poll_rx_packets(&node.pod).expect("counter");
    let before = polled();
    let socket = node
        .host
        .run(|| UdpSocket::bind("0.0.0.0:0"))
        .expect("enter");
    let socket = socket.expect("socket on the host");
    // On a busy machine it seldom runs, so that only a flood from another CPU meets it.
    let cpus = cpu::usable().expect("cpus");
    let elsewhere: CpuSet = cpus.iter().filter(|c| c.0 != worker.cpu).collect();
    process::set_affinity(0, &elsewhere).expect("pin");
    wait_until("packets to be polled at the pod's end", || {
        for _ in 0..20_000 {
            socket.send_to(b"x", "10.200.0.2:9").expect("send");
        }
        (polled() > before).then_some(())
    });
    let hog = Hog::start(root, CpuId(worker.cpu));
    let (before, since) = (used(), Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    let share = (used() - before).as_secs_f64() / since.elapsed().as_secs_f64();
    drop(hog);
    // In an ordinary cgroup, or as a session of the root one, it would be a half.
    assert!(share < 0.15, "{share}");
    drop(traffic);
    wait_parked(worker.tid);

    attachment.detach().expect("detach");
    wait_until("the thread to end", || {
        (!thread_lives(worker.tid)).then_some(())
    });
    // Other idle workers of the machine may keep it.
    wait_until("the cgroup to go, or to be another's", || {
        let left = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        (!group.exists() || !left.is_empty()).then_some(())
    });
}
