//! The demo as a user runs it, only shorter: what it writes, and that nothing is left after it, also when it is interrupted.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kbp_tests::command::{Running, run};
use kbp_tests::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(180);

fn demo(out: &Path, arguments: &[&str]) -> Command {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_kbp-demo"));
    demo.args(["--rounds", "1", "--seconds", "1", "--out"])
        .arg(out)
        .args(arguments);
    demo
}

fn rows(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("the demo writes it");
    serde_json::from_str(&text).expect("a JSON array")
}

/// `workload/arm` of every row.
fn names(rows: &[Value]) -> Vec<String> {
    let text = |row: &Value, key: &str| row[key].as_str().expect("text").to_owned();
    rows.iter()
        .map(|row| format!("{}/{}", text(row, "workload"), text(row, "arm")))
        .collect()
}

#[test]
fn both_arms_are_measured_and_written() {
    let out = tempfile::tempdir().expect("a directory");
    let output = run(demo(out.path(), &[]), LIMIT)
        .expect("run the demo")
        .success()
        .expect("exit code 0");

    let latency = rows(&out.path().join("result.json"));
    assert_eq!(
        names(&latency),
        [
            "redis-get/stock",
            "redis-get/kbp",
            "udp-echo/stock",
            "udp-echo/kbp"
        ]
    );
    for row in &latency {
        let number = |key: &str| row[key].as_f64().expect("a number");
        assert!(
            number("samples") > 100.0 && number("cpu_seconds") > 0.0,
            "{row}"
        );
        assert!(
            0.0 < number("p50_us") && number("p50_us") <= number("p99_us"),
            "{row}"
        );
        assert!(
            number("p99_us") <= number("p99_9_us") && number("p99_9_us") <= number("max_us"),
            "{row}"
        );
    }
    let throughput = rows(&out.path().join("throughput.json"));
    assert_eq!(names(&throughput), ["bulk-tcp/stock", "bulk-tcp/kbp"]);
    assert!(throughput.iter().all(|row| {
        row["gbit_per_second"]
            .as_f64()
            .is_some_and(|rate| rate > 0.1)
    }));
    for (file, begin) in [("latency.svg", "<svg"), ("latency.png", "\u{fffd}PNG")] {
        let bytes = std::fs::read(out.path().join(file)).expect(file);
        assert!(
            String::from_utf8_lossy(&bytes[..100]).contains(begin),
            "{file}"
        );
    }
    assert!(
        !output.stdout.contains("Not all of kbp was active"),
        "{output}"
    );
    for text in ["kbp / stock", "How these figures were got", "kbpctl status"] {
        assert!(output.stdout.contains(text), "{text} is missing: {output}");
    }
}

#[test]
fn an_interrupted_demo_removes_everything() {
    let out = tempfile::tempdir().expect("a directory");
    // The first step of the demo, and a later one: containerd comes up in the one, containers run in the other.
    for (moment, arm) in [
        ("building the image", "stock"),
        ("[ 1/", "stock"),
        ("[ 1/", "kbp"),
    ] {
        let mut running =
            Running::start(demo(out.path(), &["--arm", arm])).expect("start the demo");
        let pid = running.pid();
        let begun = wait_until(moment, LIMIT, || match running.stderr().contains(moment) {
            true => Ok(true),
            false if kbp_tests::running(pid) => Err(String::new()),
            false => Ok(false),
        });
        assert!(begun.expect("the demo begins"), "{}", running.stderr());
        let pid = Pid::from_raw(running.pid().cast_signed());
        for signal in [Signal::SIGINT, Signal::SIGINT, Signal::SIGTERM] {
            kill(pid, signal).expect("signal the demo");
        }
        let output = running.wait(LIMIT).expect("the demo ends");
        assert_eq!(output.code, Some(130), "{output}");
        let sandbox = format!("kbp-t-{pid}-");
        let left = |dir: &Path| {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            entries
                .filter(|e| e.file_name().to_string_lossy().starts_with(&sandbox))
                .count()
        };
        assert_eq!(left(Path::new("/tmp")), 0, "{output}");
        let controllers = std::fs::read_dir("/sys/fs/cgroup")
            .expect("cgroups")
            .flatten();
        assert_eq!(
            controllers.map(|c| left(&c.path())).sum::<usize>(),
            0,
            "{output}"
        );
        assert!(!out.path().join("result.json").exists());
    }
}
