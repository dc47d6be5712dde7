//! `kbpctl status` of a pod that works: counters in JSON, and the live view behind a real terminal, which it gives back however it ends.

use kbp_tests::binaries::kbp_binary;
use kbp_tests::lab::{LIMIT, on};
use kbp_tests::{Arm, Lab, Pod, Terminal, command, fixtures, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Leaves the alternate screen, shows the cursor.
const LEAVE: &str = "\x1b[?1049l";

fn kbpctl() -> String {
    kbp_binary("kbpctl").expect("kbpctl").display().to_string()
}

/// A polling server with traffic behind it.
fn with_server(lab: &Lab<'_>, test: impl FnOnce(&Pod<'_>)) {
    let pod = lab.pod("pod");
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    let run = lab
        .container("server", ["/usr/bin/server", "epoll", "7000"])
        .netns(&pod.netns.path())
        .annotation("kbp.io/busy-poll", "500")
        .annotation("kbp.io/worker", "idle");
    lab.containerd.start_container(run).expect("server");
    lab.wait_for_port(lab.containerd.pid("server").expect("pid"), 7000);
    test(&pod);
    lab.containerd.remove("server").expect("remove");
}

fn ask(lab: &Lab<'_>, pod: &Pod<'_>, times: u32) {
    let echo = fixtures::echo().expect("echo").display().to_string();
    let times = times.to_string();
    lab.sandbox
        .run(&echo, &["client", &pod.ip(), "7000", &times])
        .expect("the pod answers the node");
}

fn status(lab: &Lab<'_>) -> Value {
    let mut run = lab.containerd.command(kbpctl());
    run.args(["status", "--json"]);
    let output = command::run(run, LIMIT).expect("status").success();
    serde_json::from_str(&output.expect("status").stdout).expect("JSON")
}

#[test]
fn json_counts_packets_sockets_and_what_was_polled() {
    on(Arm::KBP, |lab| {
        with_server(lab, |pod| {
            let count = |key: &str| status(lab)["pods"][0]["counters"][key].as_u64();
            let before = count("from_pod").expect("packets from the pod");
            let polled = count("polled_by_sockets").expect("polled packets");
            ask(lab, pod, 500);
            assert!(count("from_pod").expect("from") >= before + 500);
            assert!(count("to_pod").expect("to") >= 500);
            assert!(count("worker_cpu_ns").is_some(), "there is an idle worker");
            // Asked back to back, a server with a window of 500 µs polls.
            wait_until("polled packets", LIMIT, || {
                ask(lab, pod, 200);
                let now = count("polled_by_sockets").expect("polled packets");
                (now > polled).then_some(()).ok_or(format!("{now}"))
            })
            .expect("the sockets poll");
            let parked = status(lab)["pods"][0]["rates"]["worker_cpu"].clone();
            let share = parked.as_f64().expect("the worker was read twice");
            assert!((0.0..=1.0).contains(&share), "{share}");
            // Counted up about once a second.
            wait_until("a socket with a window", LIMIT, || {
                let sockets = status(lab)["pods"][0]["sockets"]["sockets_set"].clone();
                sockets
                    .as_u64()
                    .filter(|n| *n > 0)
                    .map(drop)
                    .ok_or(format!("{sockets}"))
            })
            .expect("sockets");
        });
    });
}

#[test]
fn the_live_view_shows_the_pod_and_gives_the_terminal_back() {
    on(Arm::KBP, |lab| {
        with_server(lab, |_| {
            // How it ends: a key, Ctrl-C, a signal.
            for key in [Some("q"), Some("\x03"), None] {
                let mut shell = lab.containerd.command("sh");
                shell.args([
                    "-c",
                    // Its process id is known before it begins.
                    &format!(
                        "sh -c 'echo pid $$; exec {} status --watch --interval 0.2'; echo status $?; stty -a; echo the end",
                        kbpctl()
                    ),
                ]);
                shell.env("TERM", "xterm");
                let mut terminal = Terminal::start(&shell).expect("terminal");
                terminal.resize(30, 180).expect("resize");
                let begin = terminal.expect("server", LIMIT);
                let begin = begin.expect("the pod is shown");
                match key {
                    Some(key) => {
                        terminal.type_text("s").expect("sort");
                        terminal.expect("sockets", LIMIT).expect("sorted");
                        terminal.type_text(key).expect("end");
                    }
                    None => {
                        let pid = begin.split("pid ").nth(1);
                        let pid = pid.and_then(|p| p.split_whitespace().next()?.parse().ok());
                        let pid = Pid::from_raw(pid.expect("its id"));
                        kill(pid, Signal::SIGTERM).expect("signal");
                    }
                }
                let shown = terminal.expect("the end", LIMIT).expect("end");
                assert!(shown.contains(LEAVE), "{shown}");
                let after = shown.rsplit(LEAVE).next().expect("text");
                assert!(
                    after.contains(" icanon") && after.contains(" echo "),
                    "the terminal is still raw: {after}"
                );
                assert!(after.contains("status 0"), "{after}");
            }
        });
    });
}

#[test]
fn without_a_terminal_the_live_view_says_what_to_do() {
    on(Arm::KBP, |lab| {
        let mut run = lab.containerd.command(kbpctl());
        run.args(["status", "--watch"]);
        let output = command::run(run, LIMIT).expect("status").expect_code(1);
        let output = output.expect("status 1");
        assert!(output.stderr.contains("status --watch --json"), "{output}");
        // And that does work there: an object a line, until its reader has seen enough.
        let mut lines = lab.containerd.command("sh");
        lines.args([
            "-c",
            &format!(
                "{} status --watch --json --interval 0.1 | head -3",
                kbpctl()
            ),
        ]);
        let output = command::run(lines, LIMIT).expect("status").success();
        for line in output.expect("lines").stdout.lines() {
            let status: Value = serde_json::from_str(line).expect("JSON");
            assert!(status["pods"].is_array(), "{line}");
        }
    });
}
