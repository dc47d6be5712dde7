//! Probes on the running kernel: what it has is found, what is forbidden is said, and nothing stays behind.

use std::fs;
use std::time::{Duration, Instant};

use kbp_kernel::probe;

#[path = "support/forbid.rs"]
mod forbid;

use forbid::with_failing_call;

/// Threads, children and descriptors of this process, by what makes them ours.
fn traces() -> (usize, usize, usize) {
    let count = |path: &str| fs::read_dir(path).expect("list /proc/self").count();
    let tasks = fs::read_dir("/proc/self/task").expect("list threads");
    let children = tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok())
        .map(|list| list.split_whitespace().count())
        .sum();
    (count("/proc/self/task"), children, count("/proc/self/fd"))
}

// One test, so that no other thread of this process comes and goes while it counts.
#[test]
fn probes_find_what_this_kernel_has_and_leave_nothing() {
    type Probe = (&'static str, fn() -> kbp_kernel::Result<()>);
    let probes: [Probe; 6] = [
        ("sqpoll_napi", probe::sqpoll_napi),
        ("socket_busy_poll", probe::socket_busy_poll),
        ("epoll_busy_poll", probe::epoll_busy_poll),
        ("seccomp_notify", probe::seccomp_notify),
        ("seccomp_sync_wake_up", probe::seccomp_sync_wake_up),
        ("pidfd_getfd", probe::pidfd_getfd),
    ];
    let before = traces();
    let filtered = filters();
    for (name, probe) in probes {
        probe().unwrap_or_else(|error| panic!("{name}: {error}"));
        // The kernel takes a ring and its thread down a moment after it is closed.
        let until = Instant::now() + Duration::from_secs(60);
        while traces() != before {
            assert!(
                Instant::now() < until,
                "{name} left something: {:?}, before {before:?}",
                traces()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(filters(), filtered, "a filter stayed on the caller");

    for (name, probe, number) in [
        (
            "sqpoll_napi",
            probe::sqpoll_napi as fn() -> _,
            libc::SYS_io_uring_setup,
        ),
        ("pidfd_getfd", probe::pidfd_getfd, libc::SYS_pidfd_getfd),
        (
            "epoll_busy_poll",
            probe::epoll_busy_poll,
            libc::SYS_epoll_create1,
        ),
        (
            "socket_busy_poll",
            probe::socket_busy_poll,
            libc::SYS_setsockopt,
        ),
        ("seccomp_notify", probe::seccomp_notify, libc::SYS_seccomp),
        (
            "seccomp_sync_wake_up",
            probe::seccomp_sync_wake_up,
            libc::SYS_seccomp,
        ),
    ] {
        let error = with_failing_call(number, libc::EPERM, probe)
            .expect_err(name)
            .to_string();
        assert!(error.contains("Operation not permitted"), "{name}: {error}");
    }
}

/// Seccomp filters of the calling thread.
fn filters() -> Option<String> {
    let status = fs::read_to_string("/proc/thread-self/status").expect("own status");
    status
        .lines()
        .find(|line| line.starts_with("Seccomp_filters:"))
        .map(str::to_owned)
}
