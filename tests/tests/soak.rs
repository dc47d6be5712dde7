//! Many pods come and go, and some of their shims are killed: nothing is left.

use std::path::Path;

use kbp_tests::lab::{LIMIT, on};
use kbp_tests::{Arm, Lab, Leftovers, Network, Pod, Sockets, fixtures, running, wait_until};

kbp_tests::scenarios!(on [kbp_on_machine, kbp_on_v2]: a_killed_shim_leaves_nothing, a_killed_node_is_cleared_at_the_next_start);

/// Create, start, use and delete; the node is looked at after each tenth round, and at the end by `on`.
fn rounds(lab: &Lab<'_>, count: u32) {
    let before = Leftovers::of(lab.sandbox).expect("before");
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    let network = Network::kbp(lab.sandbox);
    for round in 0..count {
        let id = format!("c{round}");
        let pod = Pod::new(lab.sandbox, &id, &network).expect("pod");
        let run = lab
            .container(&id, ["/usr/bin/server", "epoll", "7000"])
            .netns(&pod.netns.path())
            .annotation("kbp.io/worker", "idle")
            .seccomp();
        lab.containerd.start_container(run).expect("start");
        let pid = lab.containerd.pid(&id).expect("pid");
        lab.wait_for_port(pid, 7000);
        let state = lab.state(&id).expect("state");
        assert!(
            state.worker.is_some() && state.degraded.is_empty(),
            "round {round}: {state:#?}"
        );
        assert!(
            Sockets::of(pid)
                .expect("sockets")
                .all_poll_for(state.busy_poll_us.unwrap_or(0))
        );
        lab.containerd.remove(&id).expect("remove");
        assert!(lab.state(&id).is_none());
        drop(pod);
        if round % 10 == 9 {
            Leftovers::wait_until_clean(lab.sandbox, &before).expect("clean");
            assert_eq!(network.leases(), Vec::<String>::new());
        }
    }
}

#[test]
fn fifty_rounds() {
    on(Arm::KBP, |lab| rounds(lab, 50));
}

#[test]
fn twenty_rounds_on_v2() {
    on(Arm::KBP_V2, |lab| rounds(lab, 20));
}

#[test]
fn ten_rounds_under_crun() {
    on(Arm::KBP_CRUN, |lab| rounds(lab, 10));
}

/// Many at once: creations, deletions and claims cross each other.
#[test]
fn pods_at_once() {
    on(Arm::KBP_V2, |lab| {
        std::thread::scope(|scope| {
            for thread in 0..6 {
                scope.spawn(move || {
                    for round in 0..3 {
                        let id = format!("c{thread}-{round}");
                        let pod = lab.pod(&id);
                        let run = lab
                            .container(&id, ["sleep", "1000"])
                            .annotation("kbp.io/worker", "idle")
                            .netns(&pod.netns.path());
                        lab.containerd.start_container(run).expect("start");
                        let state = lab.state(&id).expect("state");
                        assert!(
                            state.worker.is_some() && state.degraded.is_empty(),
                            "{state:#?}"
                        );
                        lab.containerd.remove(&id).expect("remove");
                    }
                });
            }
        });
    });
}

/// A killed shim: containerd cleans up through the shim's `delete` command; the rest is the kernel's and CNI's.
fn a_killed_shim_leaves_nothing(lab: &Lab<'_>) {
    let before = Leftovers::of(lab.sandbox).expect("before");
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    let network = Network::kbp(lab.sandbox);
    for round in 0..3 {
        let pod = Pod::new(lab.sandbox, "pod", &network).expect("pod");
        let run = lab
            .container("c", ["/usr/bin/server", "epoll", "7000"])
            .netns(&pod.netns.path())
            .seccomp();
        // A dedicated worker holds a claim as well.
        lab.containerd
            .set_kbp_config("cpus = \"1\"\n")
            .expect("config");
        lab.containerd
            .start_container(run.annotation("kbp.io/worker", "dedicated"))
            .expect("start");
        let pid = lab.containerd.pid("c").expect("pid");
        lab.wait_for_port(pid, 7000);
        let worker = lab.state("c").expect("state").worker.expect("worker");
        let shim = lab.containerd.shim_pid("c").expect("shim");
        lab.sandbox
            .run("kill", &["-9", &shim.to_string()])
            .expect("kill");
        wait_until("the task to be gone", LIMIT, || {
            match lab.containerd.task("c") {
                Ok(None) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .expect("containerd notices");
        wait_until("worker, container and state to be gone", LIMIT, || {
            let left = (
                Path::new(&format!("/proc/{}", worker.tid)).exists(),
                running(pid),
                lab.state("c").is_some(),
            );
            if left == (false, false, false) {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
        .expect("clean");
        lab.containerd.remove("c").expect("remove");
        // The fifos are the client's, which would remove them with a task of its own.
        std::fs::remove_dir_all(lab.sandbox.dir().join("run/containerd/fifo"))
            .expect("the client's fifos");
        drop(pod);
        Leftovers::wait_until_clean(lab.sandbox, &before)
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert_eq!(network.leases(), Vec::<String>::new());
    }
}

/// Shim and containerd are killed together, as when a node runs out of memory; the next start of containerd clears it away.
fn a_killed_node_is_cleared_at_the_next_start(lab: &Lab<'_>) {
    let pod = lab.pod("pod");
    lab.start_sleeper("c", &pod);
    let pid = lab.containerd.pid("c").expect("pid");
    let shim = lab.containerd.shim_pid("c").expect("shim");
    lab.containerd.kill();
    lab.sandbox
        .run("kill", &["-9", &shim.to_string()])
        .expect("kill");
    lab.containerd.restart().expect("restart");
    wait_until("the task to be gone", LIMIT, || {
        match lab.containerd.task("c") {
            Ok(None) if !running(pid) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .expect("containerd clears");
    lab.containerd.remove("c").expect("remove");
    std::fs::remove_dir_all(lab.sandbox.dir().join("run/containerd/fifo"))
        .expect("the client's fifos");
    // The name is free, and kbp works for it.
    lab.start_sleeper("c", &pod);
    let state = lab.state("c").expect("state");
    assert!(
        state.worker.is_some() && state.degraded.is_empty(),
        "{state:#?}"
    );
    lab.containerd.remove("c").expect("remove");
}

/// A create that fails half-way takes back what it had done.
#[test]
fn failed_starts_leave_nothing() {
    on(Arm::KBP, |lab| {
        let pod = lab.pod("pod");
        for _ in 0..10 {
            let output = lab
                .containerd
                .run(
                    &lab.container("c", ["/no/such/command"])
                        .netns(&pod.netns.path()),
                )
                .expect("run");
            assert_ne!(output.code, Some(0));
            assert!(lab.state("c").is_none());
        }
    });
}
