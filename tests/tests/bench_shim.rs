//! `kbp-bench-shim`: its figures are complete, and nothing of it stays, also when it is interrupted.

use std::path::Path;
use std::process::Command;

use kbp_tests::bench::trial::Trial;

fn start(out: &Path) -> Trial {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_kbp-bench-shim"));
    bench.arg("--quick");
    Trial::start(bench, out).expect("it starts")
}

#[test]
fn a_quick_run_measures_every_shim_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("new/shim.json");
    let (table, report) = start(&out).finish().expect("a whole run");
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
}

#[test]
fn an_interrupted_run_removes_everything() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("shim.json");
    start(&out).interrupt().expect("nothing is left");
}
