//! The units of config/systemd under the real thing: systemd is process 1 of these machines.

use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kbp_kernel::cpu;
use kbp_kernel::netns::Netns;
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_kernel::process;
use kbp_poller::api::{self, AttachRequest};
use kbp_poller::client::{Attached, Client};
use kbp_tests::binaries::kbp_binary;
use kbp_tests::lab::on_with;
use kbp_tests::{Arm, Settings};
use serde_json::json;

use crate::cgroup2;
use crate::node::{any_cpu, ip, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const SIGSTOP: i32 = 19;
const SIGKILL: i32 = 9;
const SERVICE: &str = "kbp-poller.service";

fn systemctl(args: &[&str]) -> String {
    let output = Command::new("systemctl").args(args).output();
    let output = output.expect("systemctl");
    assert!(output.status.success(), "systemctl {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn shown(property: &str) -> String {
    systemctl(&["show", "--property", property, "--value", SERVICE])
}

/// The daemon's process, once systemd has it as started.
fn started() -> u32 {
    wait_until("the service to be started", || {
        (shown("ActiveState") == "active").then_some(())
    });
    shown("MainPID").parse().expect("a process")
}

fn client() -> Client {
    let socket = Path::new("/run/kbp").join(api::SOCKET);
    Client::connect(&socket, LIMIT).expect("connect")
}

fn install() -> Installed {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/systemd");
    for unit in ["kbp-poller.service", "kbp-poller.socket"] {
        let to = Path::new("/run/systemd/system").join(unit);
        std::fs::copy(root.join(unit), to).expect("copy a unit");
    }
    let binary = kbp_binary("kbp-poller").expect("kbp-poller");
    std::fs::copy(binary, "/usr/local/bin/kbp-poller").expect("copy kbp-poller");
    std::fs::create_dir_all("/etc/kbp").expect("mkdir");
    let config = format!("cpus = \"{}\"\n", any_cpu());
    std::fs::write("/etc/kbp/config.toml", config).expect("config");
    systemctl(&["daemon-reload"]);
    let verified = Command::new("systemd-analyze")
        .args(["verify", "kbp-poller.service", "kbp-poller.socket"])
        .output()
        .expect("systemd-analyze");
    let said = String::from_utf8_lossy(&verified.stderr);
    let ours: Vec<&str> = said.lines().filter(|l| l.contains("kbp-poller")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{said}");
    Installed
}

/// Ends the daemon and its socket, however a test ends.
struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        let units = [SERVICE, "kbp-poller.socket"];
        let _ = Command::new("systemctl").arg("stop").args(units).status();
    }
}

/// A namespace that is made after the daemon was started: its mount has to arrive in the service's own mount namespace.
fn make_pod(host: &Netns) -> Netns {
    ip(host, "netns add pod");
    ip(host, "link add vhost0 type veth peer name eth0 netns pod");
    ip(host, "link set vhost0 up");
    ip(host, "address add 10.88.0.1/24 dev vhost0");
    let pod = Netns::open(Path::new("/run/netns/pod")).expect("namespace");
    ip(&pod, "link set eth0 up");
    ip(&pod, "address add 10.88.0.2/24 dev eth0");
    pod
}

/// Packets of the pod until the daemon's worker has polled some.
fn wait_polled(host: &Netns, pod: &Netns) {
    let socket = pod.run(|| UdpSocket::bind("10.88.0.2:0")).expect("enter");
    let socket = socket.expect("bind");
    let start = busy_poll_rx_packets(host).expect("counter");
    wait_until("packets to be polled", || {
        for _ in 0..50 {
            // Nobody listens: what counts is who took it.
            let _ = socket.send_to(&[0; 64], "10.88.0.1:9");
            std::thread::sleep(Duration::from_micros(200));
        }
        (busy_poll_rx_packets(host).expect("counter") > start).then_some(())
    });
}

fn is_listed() -> bool {
    let pods = client().list().expect("list");
    pods.iter().any(|p| p.id == "pod" && p.degraded.is_empty())
}

#[test]
#[ignore = "run in an emulated machine by linux_7_under_systemd"]
fn the_units_activate_confine_watch_and_restart_the_daemon_in_a_booted_guest() {
    let _installed = install();
    let host = Netns::current().expect("own namespace");
    // Socket activation: nothing runs until somebody asks.
    systemctl(&["start", "kbp-poller.socket"]);
    assert_eq!(shown("ActiveState"), "inactive");
    assert_eq!(client().list().expect("list"), []);
    let first = started();
    assert_eq!(shown("NRestarts"), "0");

    // Readiness: when systemctl returns, the daemon serves.
    systemctl(&["restart", SERVICE]);
    let ready = std::fs::read_to_string("/run/kbp/poller.pid").expect("it serves");
    let second = started();
    assert_eq!(ready, format!("{second}\n"));
    assert_ne!(first, second);

    // Confined, and attaching works all the same.
    let status = std::fs::read_to_string(format!("/proc/{second}/status")).expect("status");
    let value = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.expect("a line").trim().to_owned()
    };
    // NET_ADMIN 12, SYS_PTRACE 19, SYS_ADMIN 21, SYS_NICE 23 (linux/capability.h).
    let needed = format!("{:016x}", 1u64 << 12 | 1 << 19 | 1 << 21 | 1 << 23);
    for (name, expected) in [
        ("CapEff:", needed.as_str()),
        ("CapBnd:", &needed),
        ("NoNewPrivs:", "1"),
        // A filter (prctl(2)).
        ("Seccomp:", "2"),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    let pod = make_pod(&host);
    let request = AttachRequest {
        id: "pod".to_owned(),
        namespace: "test".to_owned(),
        netns: "/run/netns/pod".to_owned(),
        worker: "shared".to_owned(),
        ..AttachRequest::default()
    };
    match client().attach(&request).expect("attach") {
        Attached::Pod(attached) => {
            assert_eq!(attached.degraded, []);
            assert!(attached.worker.is_some());
        }
        other => panic!("{other:?}"),
    }
    wait_polled(&host, &pod);

    // The watchdog: a daemon that hangs is replaced, and the next one has its pods.
    assert!(process::kill(second, SIGSTOP).expect("stop"));
    wait_until("the watchdog", || (shown("NRestarts") == "1").then_some(()));
    let third = started();
    assert_ne!(second, third);
    wait_until("its pod", || is_listed().then_some(()));
    wait_polled(&host, &pod);

    // One that is killed comes back as well.
    assert!(process::kill(third, SIGKILL).expect("kill"));
    wait_until("the restart", || (shown("NRestarts") == "2").then_some(()));
    started();
    wait_until("its pod", || is_listed().then_some(()));

    // And stays away when it is told to; its socket waits for who asks next.
    systemctl(&["stop", SERVICE]);
    assert!(!Path::new("/run/kbp/poller.pid").exists());
    assert!(Path::new("/run/kbp/poller.sock").exists());
    assert!(is_listed(), "started again by the question");
}

/// The idle-class worker of the confined daemon gives way to all other cgroups, whichever version the machine has.
fn idle_workers_are_in_the_idle_cgroup(hierarchy: &str) {
    let _installed = install();
    let host = Netns::current().expect("own namespace");
    systemctl(&["start", SERVICE]);
    let pod = make_pod(&host);
    let request = AttachRequest {
        id: "idle".to_owned(),
        namespace: "test".to_owned(),
        netns: "/run/netns/pod".to_owned(),
        worker: "idle".to_owned(),
        ..AttachRequest::default()
    };
    let attached = match client().attach(&request).expect("attach") {
        Attached::Pod(attached) => attached,
        other => panic!("{other:?}"),
    };
    assert_eq!(attached.degraded, []);
    let reason = &attached.worker_reason;
    assert!(!reason.contains("warning"), "{reason}");
    let worker = attached.worker.as_ref().expect("a worker");
    assert_eq!((worker.policy.as_str(), worker.idle_class), ("idle", true));
    let groups = std::fs::read_to_string(format!("/proc/{0}/task/{0}/cgroup", worker.tid));
    let groups = groups.expect("its cgroups");
    assert!(groups.contains(":/kbp-idle\n"), "{groups}");
    let group = Path::new(hierarchy).join("kbp-idle");
    let idle = std::fs::read_to_string(group.join("cpu.idle")).expect("cpu.idle");
    assert_eq!(idle.trim(), "1");
    // A thread that wakes up is put where only an idle class runs, and there the sender would handle what it sends.
    let elsewhere = cpu::usable().expect("cpus");
    let elsewhere = elsewhere.iter().filter(|c| c.0 != worker.cpu).collect();
    kbp_kernel::process::set_affinity(0, &elsewhere).expect("pin");
    wait_polled(&host, &pod);

    // With its daemon the worker goes.
    systemctl(&["stop", SERVICE]);
    wait_until("the thread to end", || {
        let thread = format!("/proc/{}", worker.tid);
        (!Path::new(&thread).exists()).then_some(())
    });
    assert!(!group.exists(), "an empty cgroup stays");
    ip(&host, "netns delete pod");
}

#[test]
#[ignore = "run in an emulated machine by linux_7_under_systemd"]
fn idle_workers_of_the_service_are_in_the_idle_cgroup_in_a_booted_guest() {
    idle_workers_are_in_the_idle_cgroup("/sys/fs/cgroup");
}

#[test]
#[ignore = "run in an emulated machine by linux_6_18_under_systemd_with_cgroup_v1"]
fn idle_workers_of_the_service_are_in_the_idle_cgroup_on_cgroup_v1() {
    idle_workers_are_in_the_idle_cgroup("/sys/fs/cgroup/cpu,cpuacct");
}

/// `SystemdCgroup = true`, and a path of systemd's: the containers' cgroups are scopes of the real systemd.
#[test]
#[ignore = "run in an emulated machine by linux_7_under_systemd"]
fn containers_are_scopes_of_systemd_in_a_booted_guest() {
    on_with(Arm::KBP, Settings::default(), |lab| {
        // The node's /run is its own, and systemd's sockets are below the machine's.
        let link = lab.sandbox.dir().join("run/systemd");
        std::os::unix::fs::symlink("/proc/1/root/run/systemd", &link).expect("link");
        let options = lab.sandbox.dir().join("options.toml");
        std::fs::write(&options, "SystemdCgroup = true\n").expect("options");
        let scope = |id: &str| format!("kbp-{}-{id}.scope", lab.sandbox.name());
        let cgroup = cgroup2::all(lab, &|id, script| {
            let mut spec = lab.spec(id, &["sh", "-c", script]).expect("spec");
            let path = format!("kbptest.slice:kbp-{}:{id}", lab.sandbox.name());
            spec["linux"]["cgroupsPath"] = path.into();
            spec["linux"]["resources"]["memory"] = json!({ "limit": cgroup2::LIMITED });
            lab.container_of_spec(id, &spec)
                .flag("--runtime-config-path", options.display())
        });
        assert_eq!(cgroup, format!("/kbptest.slice/{}", scope("lives")));
        for id in ["lives", "eats", "dies"] {
            let state = ["show", "--property", "ActiveState", "--value", &scope(id)];
            wait_until("the end of its scope", || {
                (systemctl(&state) == "inactive").then_some(())
            });
        }
        std::fs::remove_file(&link).expect("remove the link");
    });
}
