//! `kbp-bench-cni`: its figures are complete, and nothing of it stays, also when it is interrupted.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use kbp_tests::bench::trial::Trial;
use kbp_tests::binaries::kbp_binary;

fn start(out: &Path) -> Trial {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_kbp-bench-cni"));
    bench.arg("--quick");
    bench
        .arg("--kbp")
        .arg(kbp_binary("kbp").expect("the plugin"));
    Trial::start(bench, out).expect("it starts")
}

#[test]
fn a_quick_run_measures_every_plugin_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("new/cni.json");
    let (table, report) = start(&out).finish().expect("a whole run");
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
    assert_eq!(report["scale"].as_array().map(Vec::len), Some(4));
    for plugin in [
        "ptp",
        "bridge",
        "kbp+host-local",
        "kbp+kbp-local",
        "own work",
    ] {
        assert!(table.contains(plugin), "{plugin} is not in {table}");
    }
}

#[test]
fn an_interrupted_run_removes_everything() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("cni.json");
    start(&out).interrupt().expect("nothing is left");
}
