//! `kbp-bench-poller`: its figures are complete, and nothing of it stays, also when it is interrupted.

use std::path::Path;
use std::process::Command;

use kbp_tests::bench::trial::Trial;
use serde_json::Value;

fn start(parts: &str, out: &Path) -> Trial {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_kbp-bench-poller"));
    bench.args(["--quick", "--parts", parts]);
    Trial::start(bench, out).expect("it starts")
}

#[test]
fn a_quick_run_measures_every_kind_of_worker_that_there_is() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("new/poller.json");
    let (table, report) = start("workers,filters,ends", &out)
        .finish()
        .expect("a whole run");
    let rows = |part: &str| report[part].as_array().cloned().expect("rows");
    let number = |row: &Value, name: &str| row[name].as_f64().expect("a number");
    for kind in [
        "stock",
        "spinner",
        "softirq",
        "sqpoll",
        "sqpoll, prefer",
        "socket",
        "kthread",
        "threaded",
    ] {
        if let Some(why) = report["wanting"][kind].as_str() {
            assert!(table.contains(why), "{table}");
            continue;
        }
        let of_kind: Vec<Value> = rows("workers")
            .into_iter()
            .filter(|row| row["kind"] == kind)
            .collect();
        assert_eq!(of_kind.len(), 2, "1 and 10 veths: {of_kind:?}");
        for row in of_kind {
            let (p50, p99) = (number(&row, "p50_us"), number(&row, "p99_us"));
            assert!(p50 > 0.0 && p50 <= p99, "{row}");
            let (sent, came) = (
                number(&row, "sent_per_second"),
                number(&row, "delivered_per_second"),
            );
            assert!(came > 0.0 && came <= sent, "{row}");
            // Nobody polls these on the other CPU.
            if ["stock", "spinner", "softirq"].contains(&kind) {
                assert!(number(&row, "taken") < 0.5, "{row}");
            }
        }
        assert!(table.contains(&format!("| {kind} | 10 |")), "{table}");
    }
    if report["wanting"]["sqpoll, prefer"].is_null() {
        number(&report, "round_us_a_napi");
        assert!(table.contains("A NAPI more makes a round"), "{table}");
    }
    let mut read = 0.0;
    for kind in ["stock", "softirq", "sqpoll, chained", "threaded, chained"] {
        if report["wanting"][kind].is_string() {
            continue;
        }
        for rules in [0, 30, 100] {
            let mut row = rows("filters").into_iter();
            let row = row.find(|r| r["kind"] == kind && r["rules"] == rules);
            let row = row.unwrap_or_else(|| panic!("no {kind} with {rules} rules: {table}"));
            assert!(number(&row, "delivered_per_second") > 0.0, "{row}");
            // On a busy machine the reader may not have had a turn in one of them.
            read += number(&row, "read_per_second");
        }
    }
    assert!(read > 0.0, "{table}");
    for row in rows("ends") {
        assert!(number(&row, "p50_us") > 0.0, "{row}");
    }
}

#[test]
fn an_interrupted_run_removes_everything() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("poller.json");
    start("workers", &out).interrupt().expect("nothing is left");
}
