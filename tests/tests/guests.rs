//! Unusual guests, and usual ones in unusual moments: they must not notice kbp, and kbp must not stumble over them.

use std::time::{Duration, Instant};

use kbp_tests::lab::{LIMIT, join_netns, on};
use kbp_tests::{
    Arm, Generation, Lab, Network, Oci, Runtime, Sockets, fixtures, running, wait_until,
};
use serde_json::json;

kbp_tests::scenarios!(on [kbp_on_machine, kbp_on_v2]: a_storm_of_trapped_calls, kbp_outlives_containerd);

fn with_echo(lab: &Lab<'_>) {
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs
        .binary(&echo, "/usr/bin/server")
        .expect("copy the server");
}

/// Many threads in trapped calls at once, while the container is paused, resumed, executed in and killed.
fn a_storm_of_trapped_calls(lab: &Lab<'_>) {
    with_echo(lab);
    for round in 0..3 {
        let pod = lab.pod("pod");
        let run = lab
            .container("c", ["/usr/bin/server", "storm", "12"])
            .netns(&pod.netns.path())
            .seccomp();
        lab.containerd.start_container(run).expect("start");
        let pid = lab.containerd.pid("c").expect("pid");
        for n in 0..3 {
            let output = lab
                .containerd
                .exec("c", ["/usr/bin/server", "semantics"])
                .expect("exec")
                .success()
                .expect("code");
            assert!(
                output.stdout.contains("failures under signals: 0"),
                "round {round}, exec {n}: {output}"
            );
            lab.containerd.tasks(["pause", "c"]).expect("pause");
            lab.containerd.tasks(["resume", "c"]).expect("resume");
        }
        assert!(
            running(pid),
            "a trapped call failed:\n{}",
            lab.containerd.log()
        );
        let started = Instant::now();
        lab.containerd.remove("c").expect("remove");
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "deletion took {:?}",
            started.elapsed()
        );
    }
}

/// The other architecture of the machine: no profile may kill its programs, and their sockets poll too.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_32_bit_program() {
    for arm in [Arm::STOCK, Arm::KBP, Arm::KBP_CRUN] {
        on(arm, |lab| {
            let hello = fixtures::hello_i386().expect("i386 program");
            lab.rootfs.binary(&hello, "/usr/bin/hello").expect("copy");
            for seccomp in [false, true] {
                let pod = lab.pod("pod");
                let log = lab.sandbox.dir().join("hello.log");
                let run = lab
                    .container("c", ["/usr/bin/hello"])
                    .netns(&pod.netns.path())
                    .annotation("kbp.io/busy-poll", "33");
                let run = run.flag("--log-uri", format!("file://{}", log.display()));
                let run = if seccomp { run.seccomp() } else { run };
                lab.containerd.start_container(run).expect("start");
                let pid = lab.containerd.pid("c").expect("pid");
                lab.wait_for_port(pid, 7032);
                let expected = if arm.runtime == Runtime::Kbp { 33 } else { 0 };
                let sockets = Sockets::of(pid).expect("sockets");
                assert!(
                    sockets.all_poll_for(expected),
                    "default profile {seccomp}: {sockets:?}"
                );
                assert_eq!(
                    std::fs::read_to_string(&log).expect("log"),
                    "hello from i386\n"
                );
                std::fs::remove_file(&log).expect("remove");
                lab.containerd.remove("c").expect("remove");
            }
        });
    }
}

/// A container with user ids of its own.
#[test]
fn a_user_namespace() {
    for arm in [Arm::STOCK, Arm::KBP, Arm::KBP_V2] {
        on(arm, |lab| {
            with_echo(lab);
            let pod = lab.pod("pod");
            let mut spec = lab
                .spec("c", &["/usr/bin/server", "epoll", "7000"])
                .expect("spec");
            join_netns(&mut spec, &pod.netns.path());
            let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            let namespaces = spec["linux"]["namespaces"]
                .as_array_mut()
                .expect("namespaces");
            namespaces.push(json!({ "type": "user" }));
            // sysfs shows a network namespace, and this one belongs to others.
            spec["mounts"]
                .as_array_mut()
                .expect("mounts")
                .retain(|m| m["type"] != "sysfs");
            spec["annotations"]["kbp.io/busy-poll"] = "44".into();
            lab.containerd
                .start_container(lab.container_of_spec("c", &spec))
                .expect("start");
            let pid = lab.containerd.pid("c").expect("pid");
            let ids = std::fs::read_to_string(format!("/proc/{pid}/uid_map")).expect("map");
            assert_eq!(
                ids.split_whitespace().collect::<Vec<_>>(),
                ["0", "100000", "65536"]
            );
            lab.wait_for_port(pid, 7000);
            let expected = if arm.runtime == Runtime::Kbp { 44 } else { 0 };
            let sockets = Sockets::of(pid).expect("sockets");
            assert!(sockets.all_poll_for(expected), "{sockets:?}");
            lab.containerd.remove("c").expect("remove");
        });
    }
}

/// A container that is a seccomp supervisor itself, as a container runtime in a container may be: a filter tree has room for one, and with
/// `busy-poll: off` it is the container's.
#[test]
fn a_supervisor_in_the_container() {
    for (arm, busy_poll, answer) in [
        (Arm::STOCK, "auto", "ok"),
        (Arm::KBP, "off", "ok"),
        (Arm::KBP, "auto", "EBUSY"),
    ] {
        on(arm, |lab| {
            with_echo(lab);
            let pod = lab.pod("pod");
            let run = lab
                .container("c", ["/usr/bin/server", "supervise"])
                .netns(&pod.netns.path());
            let output = lab
                .containerd
                .run(&run.annotation("kbp.io/busy-poll", busy_poll))
                .expect("run")
                .success()
                .expect("code");
            assert_eq!(
                output.stdout.trim(),
                format!("listener: {answer}"),
                "{arm:?}, {busy_poll}"
            );
        });
    }
}

/// Two interfaces in a pod: both are made pollable and polled.
#[test]
fn two_interfaces() {
    on(Arm::KBP, |lab| {
        let pod = lab.pod("pod");
        let second = Network::ptp(lab.sandbox);
        second
            .add("pod", &pod.netns, "eth1")
            .expect("second interface");
        lab.start_sleeper("c", &pod);
        let state = lab.state("c").expect("state");
        let mut names: Vec<_> = state
            .interfaces
            .iter()
            .map(|i| i.pod_interface.as_str())
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["eth0", "eth1"], "{state:#?}");
        assert!(
            state
                .interfaces
                .iter()
                .all(|i| i.host_napi.is_some() && i.pod_napi.is_some()),
            "{state:#?}"
        );
        assert!(
            state.worker.is_some() && state.degraded.is_empty(),
            "{state:#?}"
        );
        lab.containerd.remove("c").expect("remove");
        second.del("pod", Some(&pod.netns), "eth1").expect("DEL");
    });
}

/// containerd comes and goes; the pod's worker stays, and an exec after it is treated like one before it.
fn kbp_outlives_containerd(lab: &Lab<'_>) {
    with_echo(lab);
    let pod = lab.pod("pod");
    let run = lab
        .container("c", ["sleep", "1000"])
        .netns(&pod.netns.path())
        .annotation("kbp.io/worker", "idle")
        .annotation("kbp.io/busy-poll", "45");
    lab.containerd.start_container(run).expect("start");
    let before = lab.state("c").expect("state");
    lab.containerd.restart().expect("restart");
    let after = lab.state("c").expect("state");
    assert_eq!(
        before.worker.as_ref().map(|w| w.tid),
        after.worker.as_ref().map(|w| w.tid)
    );
    let mut exec = lab
        .containerd
        .ctr_start([
            "tasks",
            "exec",
            "--exec-id",
            "e",
            "c",
            "/usr/bin/server",
            "epoll",
            "7000",
        ])
        .expect("exec");
    let init = lab.containerd.pid("c").expect("pid");
    lab.wait_for_port(init, 7000);
    let group = format!("/{}/c", lab.sandbox.name());
    let server = std::fs::read_dir("/proc")
        .expect("processes")
        .flatten()
        .find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let own = std::fs::read_to_string(entry.path().join("cgroup"))
                .ok()?
                .contains(&group);
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            (own && name.trim() == "server").then_some(pid)
        });
    let server = server.expect("the exec's process");
    assert!(Sockets::of(server).expect("sockets").all_poll_for(45));
    lab.containerd
        .tasks(["kill", "--signal", "SIGKILL", "--exec-id", "e", "c"])
        .expect("kill");
    exec.wait(LIMIT).expect("end of the exec");
    lab.containerd.remove("c").expect("remove");
}

/// The link of a living pod goes down and up, which gives it other NAPI instances: the state follows.
#[test]
fn the_link_goes_down_and_up() {
    on(Arm::KBP, |lab| {
        let pod = lab.pod("pod");
        lab.start_sleeper("c", &pod);
        let before = lab.state("c").expect("state").interfaces[0].clone();
        lab.sandbox
            .ip(&format!("link set {} down", before.host_interface))
            .expect("down");
        lab.sandbox
            .ip(&format!("link set {} up", before.host_interface))
            .expect("up");
        wait_until("the new ids in the state", LIMIT, || {
            let state = lab.state("c").ok_or("no state")?;
            let now = &state.interfaces[0];
            let renewed = now.host_napi.is_some()
                && now.host_napi != before.host_napi
                && state.degraded.is_empty();
            if renewed {
                Ok(())
            } else {
                Err(format!("{state:#?}"))
            }
        })
        .expect("followed");
        lab.containerd.remove("c").expect("remove");
    });
}

/// The network goes before the container, as when a node is torn down in the wrong order.
#[test]
fn the_network_goes_first() {
    on(Arm::KBP, |lab| {
        let pod = lab.pod("pod");
        lab.start_sleeper("c", &pod);
        assert!(lab.state("c").expect("state").worker.is_some());
        drop(pod);
        lab.answers("c");
        lab.containerd.remove("c").expect("remove");
        assert!(lab.state("c").is_none());
    });
}

/// One resident shim a pod is the price of the runtime: it must not be higher than the stock one's.
#[test]
fn the_shim_is_smaller_than_the_stock_one() {
    let resident = |generation, runtime| {
        let mut size = 0;
        on(
            Arm {
                generation,
                runtime,
                oci: Oci::Runc,
            },
            |lab| {
                let pod = lab.ptp_pod("pod");
                lab.containerd
                    .start_container(
                        lab.container("c", ["sleep", "1000"])
                            .netns(&pod.netns.path())
                            .seccomp(),
                    )
                    .expect("start");
                lab.containerd
                    .exec("c", ["true"])
                    .expect("exec")
                    .success()
                    .expect("exec");
                let shim = lab.containerd.shim_pid("c").expect("shim");
                let status =
                    std::fs::read_to_string(format!("/proc/{shim}/status")).expect("status");
                let line = status
                    .lines()
                    .find_map(|l| l.strip_prefix("VmRSS:"))
                    .expect("resident set");
                size = line
                    .trim()
                    .trim_end_matches(" kB")
                    .parse::<u32>()
                    .expect("kB");
                lab.containerd.remove("c").expect("remove");
            },
        );
        size
    };
    for generation in [Generation::Machine, Generation::V2] {
        if generation.is_wanting() {
            continue;
        }
        let (stock, kbp) = (
            resident(generation, Runtime::Stock),
            resident(generation, Runtime::Kbp),
        );
        println!("{generation:?}: stock {stock} kB, kbp {kbp} kB");
        assert!(
            kbp < stock,
            "{generation:?}: stock {stock} kB, kbp {kbp} kB"
        );
    }
}
