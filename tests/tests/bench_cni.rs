//! `kbp-bench-cni`: its figures are complete, and nothing of it stays, also when it is interrupted.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kbp_tests::{binaries, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn start(out: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_kbp-bench-cni"))
        .arg("--quick")
        .arg("--kbp")
        .arg(binaries::kbp_binary("kbp").expect("the plugin"))
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
fn a_quick_run_measures_every_plugin_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("new/cni.json");
    let bench = start(&out);
    let pid = bench.id();
    let output = bench.wait_with_output().expect("wait");
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8(output.stdout).expect("text");
    let report: Value =
        serde_json::from_slice(&std::fs::read(&out).expect("the figures")).expect("JSON");
    let calls = report["calls"].as_array().expect("calls");
    let mut kinds = BTreeSet::new();
    for call in calls {
        let p50 = call["p50_ms"].as_f64().expect("a median");
        assert!(
            p50 > 0.0 && p50 <= call["max_ms"].as_f64().expect("a maximum"),
            "{call}"
        );
        kinds.insert(format!(
            "{} {} {} {}",
            call["plugin"], call["family"], call["at_once"], call["verb"]
        ));
    }
    // Four plugins, two verbs: v4 alone and at once, dual stack alone.
    assert_eq!(kinds.len(), 4 * 2 * 3, "{kinds:?}");
    // One at a time and at once, v4 and dual stack.
    assert_eq!(report["work"].as_array().map(Vec::len), Some(4));
    assert_eq!(report["scale"].as_array().map(Vec::len), Some(2));
    for plugin in [
        "ptp",
        "bridge",
        "kbp+host-local",
        "kbp+kbp-local",
        "own work",
    ] {
        assert!(table.contains(plugin), "{plugin} is not in {table}");
    }
    assert!(sandbox_is_gone(pid));
}

#[test]
fn an_interrupted_run_removes_everything() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("cni.json");
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
