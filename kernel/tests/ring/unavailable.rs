//! Kernels and nodes on which in-kernel polling cannot be: each says why, and nothing stays behind.

use std::io::ErrorKind;
use std::process::Command;

use kbp_kernel::Error;
use kbp_kernel::ring::PollRing;

use crate::forbid::with_failing_call;
use crate::options;

fn reason(number: i64, errno: i32) -> String {
    let made = with_failing_call(number, errno, || PollRing::new(&options(100)));
    match made.expect_err("it cannot be made") {
        Error::Unsupported { feature, reason } => {
            assert!(feature.contains("io_uring"), "{feature}");
            reason
        }
        other => panic!("not Unsupported: {other}"),
    }
}

#[test]
fn io_uring_is_missing_or_forbidden() {
    assert!(reason(libc::SYS_io_uring_setup, libc::ENOSYS).contains("no io_uring"));
    for errno in [libc::EPERM, libc::EACCES] {
        let reason = reason(libc::SYS_io_uring_setup, errno);
        // Whoever forbids it here, the sysctl is named when it is that.
        let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
        let expected = match disabled.as_deref().map(str::trim) {
            Ok("0") => "seccomp filter or security module",
            Err(error) if error.kind() == ErrorKind::NotFound => {
                "seccomp filter or security module"
            }
            _ => "kernel.io_uring_disabled",
        };
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn sqpoll_is_refused() {
    let reason = reason(libc::SYS_io_uring_setup, libc::EINVAL);
    assert!(reason.contains("SQPOLL ring on CPU"), "{reason}");
}

/// Linux 6.1 does not know the request, 6.9 to 6.12 not its static mode: EINVAL both times.
#[test]
fn static_napi_tracking_is_missing() {
    for errno in [libc::EINVAL, libc::EOPNOTSUPP] {
        let reason = reason(libc::SYS_io_uring_register, errno);
        assert!(reason.contains("6.13"), "{reason}");
    }
}

#[test]
fn another_error_keeps_its_errno() {
    let made = with_failing_call(libc::SYS_io_uring_setup, libc::ENOMEM, || {
        PollRing::new(&options(100))
    });
    let error = made.expect_err("no memory");
    assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
}

#[test]
#[ignore = "run in a pid namespace by in_a_pid_namespace_the_thread_cannot_be_named"]
fn without_a_visible_thread() {
    match PollRing::new(&options(100)) {
        Err(Error::Unsupported { reason, .. }) => assert!(reason.contains("hostPID"), "{reason}"),
        Err(other) => panic!("not Unsupported: {other}"),
        // Newer kernels tell the number that the thread has here.
        Ok(ring) => {
            let name =
                std::fs::read_to_string(format!("/proc/self/task/{}/comm", ring.thread_id()));
            assert!(
                name.expect("a thread of this process")
                    .starts_with("iou-sqp-")
            );
        }
    }
}

#[test]
fn in_a_pid_namespace_the_thread_cannot_be_named() {
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().expect("own path"))
        .args([
            "--exact",
            "unavailable::without_a_visible_thread",
            "--ignored",
        ])
        .output()
        .expect("unshare");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}
