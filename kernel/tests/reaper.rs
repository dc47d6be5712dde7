//! Reaping. In one test of its own process, since it waits for any child.

use std::process::{Command, Stdio};
use std::time::Duration;

use kbp_kernel::Error;
use kbp_kernel::process::{self, Exit, PidFd};

fn shell(script: &str) -> u32 {
    // Dropping a std Child neither kills nor reaps it.
    Command::new("sh")
        .args(["-c", script])
        .stdin(Stdio::null())
        .spawn()
        .expect("sh")
        .id()
}

#[test]
fn children_and_orphans_are_peeked_at_and_reaped() {
    assert_eq!(
        process::wait_any_peek().expect("peek"),
        None,
        "no children yet"
    );

    for (script, exit, status) in [
        ("exit 0", Exit::Code(0), 0),
        ("exit 255", Exit::Code(255), 255),
        (
            "kill -9 $$",
            Exit::Signal {
                signal: 9,
                core_dumped: false,
            },
            137,
        ),
        // A real-time signal, which not every library knows.
        (
            "kill -34 $$",
            Exit::Signal {
                signal: 34,
                core_dumped: false,
            },
            162,
        ),
    ] {
        let pid = shell(script);
        assert_eq!(
            process::wait_any_peek().expect("peek"),
            Some(pid),
            "{script}"
        );
        assert_eq!(
            process::wait_any_peek().expect("peek"),
            Some(pid),
            "{script}: still there"
        );
        assert!(process::is_zombie(pid).expect("look"), "{script}");
        let info = process::consume(pid).expect("reap");
        assert_eq!(
            (info.pid, info.exit, info.status()),
            (pid, exit, status),
            "{script}"
        );
        let error = process::consume(pid).expect_err("reaped already");
        assert_eq!(error.errno(), Some(libc::ECHILD), "{error}");
    }

    let runs = shell("exec sleep 600");
    assert_eq!(process::peek_ended().expect("peek"), None, "it still runs");
    let error = process::consume(runs).expect_err("it still runs");
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert!(process::kill(runs, libc::SIGKILL).expect("kill"));
    assert_eq!(process::wait_any_peek().expect("peek"), Some(runs));
    assert_eq!(process::consume(runs).expect("reap").status(), 137);

    // An orphan comes to the nearest subreaper; before that it goes to init.
    process::become_subreaper().expect("become subreaper");
    let output = Command::new("sh")
        .args(["-c", "sleep 600 >/dev/null 2>&1 & echo $!"])
        .output()
        .expect("sh, reaped by std");
    let orphan: u32 = String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .expect("a pid");
    let handle = PidFd::open(orphan).expect("open");
    assert!(handle.signal(libc::SIGTERM).expect("signal"));
    assert!(handle.wait_end(Duration::from_secs(60)).expect("wait"));
    assert_eq!(process::wait_any_peek().expect("peek"), Some(orphan));
    let info = process::consume(orphan).expect("reap");
    assert_eq!(
        info.exit,
        Exit::Signal {
            signal: libc::SIGTERM,
            core_dumped: false
        }
    );
    assert_eq!(
        process::wait_any_peek().expect("peek"),
        None,
        "nothing is left"
    );

    // Inherited over exec: the child says what it has.
    assert!(!process::thp_disabled().expect("ask"));
    for (disabled, enabled) in [(true, "0"), (false, "1")] {
        process::set_thp_disabled(disabled).expect("switch");
        assert_eq!(process::thp_disabled().expect("ask"), disabled);
        let grep = Command::new("sed")
            .args(["-n", "s/^THP_enabled:\\t//p", "/proc/self/status"])
            .output();
        let told = String::from_utf8(grep.expect("sed").stdout).expect("text");
        assert_eq!(told.trim(), enabled);
    }
}
