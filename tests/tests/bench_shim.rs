//! `kbp-bench-shim`: its figures are complete, and nothing of it stays, also when it is interrupted.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kbp_tests::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn start(out: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_kbp-bench-shim"))
        .arg("--quick")
        .arg("--out")
        .arg(out)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the bench")
}

/// The directory of the sandbox of a process, which its keeper removes.
fn sandbox_is_gone(pid: u32) -> bool {
    let prefix = format!("kbp-t-{pid}-");
    let entries = std::fs::read_dir("/tmp").expect("read /tmp");
    !entries
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
}

#[test]
fn a_quick_run_measures_every_shim_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("new/shim.json");
    let bench = start(&out);
    let pid = bench.id();
    let output = bench.wait_with_output().expect("wait");
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8(output.stdout).expect("text");
    let report: Value =
        serde_json::from_slice(&std::fs::read(&out).expect("the figures")).expect("JSON");
    let scales = report["scales"].as_array().expect("scales");
    assert_eq!(scales.len(), 2);
    for scale in scales {
        let rows = scale["rows"].as_array().expect("rows");
        let arms: Vec<_> = rows.iter().filter_map(|row| row["arm"].as_str()).collect();
        assert_eq!(arms, ["stock", "kbp-off", "kbp-on"]);
        for row in rows {
            let number = |name: &str| row[name].as_f64().expect("a number");
            let memory = |name: &str| row["memory"][name].as_u64().expect("a number");
            assert!(
                memory("private_kib") <= memory("pss_kib")
                    && memory("pss_kib") <= memory("rss_kib")
                    && memory("private_kib") > 0,
                "{row}"
            );
            assert!(
                number("create_p50_ms") > 0.0
                    && number("start_to_exit_p50_ms") > number("create_p50_ms"),
                "{row}"
            );
        }
        // The one of the two measurements that other work on the machine does not change.
        let rss = |n: usize| rows[n]["memory"]["rss_kib"].as_u64().expect("a number");
        assert!(10 * rss(1) <= 6 * rss(0), "{scale}");
        assert!(10 * rss(2) <= 6 * rss(0), "{scale}");
    }
    for shim in ["stock", "kbp off", "kbp on"] {
        assert!(table.contains(shim), "{shim} is not in {table}");
    }
    assert!(sandbox_is_gone(pid));
}

#[test]
fn an_interrupted_run_removes_everything() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("shim.json");
    let mut bench = start(&out);
    let pid = bench.id();
    let stderr = BufReader::new(bench.stderr.take().expect("piped"));
    let mut lines = stderr.lines();
    // It says what it measures when it begins to.
    lines.next().expect("a line").expect("text");
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT).expect("interrupt it");
    let last = lines.map_while(Result::ok).last();
    let status = bench.wait().expect("wait");
    assert_eq!(status.code(), Some(130), "{last:?}");
    assert!(
        last.expect("a line")
            .contains("everything it made is removed")
    );
    assert!(!out.exists());
    wait_until(
        "the sandbox to go",
        Duration::from_secs(10),
        || match sandbox_is_gone(pid) {
            true => Ok(()),
            false => Err("its directory is there".to_owned()),
        },
    )
    .expect("it is gone");
}
