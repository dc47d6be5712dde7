//! kbp on stock kernels of the distribution, each in an emulated machine: what works there works, and what does not is said for
//! the right reason. The tests of [`guest`] and its siblings are the ones that run inside; `linux_*` bring them there.
//!
//! Software emulation is slow, so `make test` runs two kernels and `make test-kernels` all.

mod attach;
mod bench;
mod cgroup2;
#[path = "../../../poller/tests/kernel/changes.rs"]
mod changes;
mod checkpoint;
mod doctor;
#[path = "../../../poller/tests/kernel/gives_way.rs"]
mod gives_way;
mod known;
#[path = "../../../poller/tests/kernel/node.rs"]
#[allow(dead_code, reason = "the poller's own tests use more of it")]
mod node;
mod systemd;
mod uplink;

use std::time::Duration;

use kbp_tests::Kernel;

/// Twice what the tests take in a machine on a host that is otherwise busy.
const LIMIT: Duration = Duration::from_secs(400);

/// Runs the tests that are for a guest on a kernel.
fn on(series: &str) {
    run(series, "in_a_guest", &[]);
}

/// Runs those tests in a machine of this kernel whose names say so.
fn run(series: &str, tests: &str, environment: &[(&str, &str)]) {
    let kernel = Kernel::unpacked(series).expect("a kernel");
    let here = std::env::current_exe().expect("this program");
    // One at a time: workers need a CPU of two.
    let arguments = ["--ignored", "--test-threads=1", tests];
    let environment = [environment, &[("KBP_SERIES", series)]].concat();
    let run = || {
        kernel
            .run_with(LIMIT, &here, &arguments, &environment)
            .expect("an emulated machine")
    };
    let mut output = run();
    // Kernels have faults of their own: the scheduler of a 7.3 crashed once (`tg_cpus`, from `task_tick_fair`). One that kbp brings
    // about comes twice.
    if output.stderr.contains("Kernel panic") {
        println!("{}: once more, after {output}", kernel.version());
        output = run();
    }
    let ran = output.stdout.contains("test result: ok.") && !output.stdout.contains(" 0 passed");
    assert!(
        output.code == Some(0) && ran,
        "{}: {output}",
        kernel.version()
    );
    println!("{}: {output}", kernel.version());
}

#[test]
fn linux_6_1() {
    on("6.1");
}

#[test]
#[ignore = "run by make test-kernels"]
fn linux_6_12() {
    on("6.12");
}

#[test]
#[ignore = "run by make test-kernels"]
fn linux_6_18() {
    on("6.18");
}

#[test]
fn linux_7() {
    on("7");
}

#[test]
fn linux_7_under_systemd() {
    run("7", "in_a_booted_guest", &[("VM_INIT", "systemd")]);
}

/// Debian 12's systemd knows the old hierarchies, and kernels do up to today.
#[test]
#[ignore = "run by make test-kernels"]
fn linux_6_18_under_systemd_with_cgroup_v1() {
    let environment = [("VM_INIT", "systemd"), ("VM_CGROUP", "1")];
    run("6.18", "on_cgroup_v1", &environment);
}

/// A machine of its own, so that the others keep their time.
#[test]
#[ignore = "run by make test-kernels"]
fn bench_and_checkpoint_with_cgroup_v2() {
    run("6.1", "on_cgroup_v2", &[]);
}
