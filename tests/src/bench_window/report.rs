//! A table a situation, and the medians as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use kbp_tests::bench::write_json;
use serde_json::json;

use crate::record::{Arm, Records, Situation, median};

/// A table for each situation: arms down, pauses across, each cell `p50 / p99`; where a quota stopped the server, how often.
pub(crate) fn tables(records: &Records) -> String {
    let groups = records.groups();
    let situations: BTreeSet<Situation> = groups.keys().map(|k| k.0).collect();
    let mut text = String::new();
    for situation in situations {
        let gaps: BTreeSet<u32> = groups
            .keys()
            .filter(|k| k.0 == situation)
            .map(|k| k.2)
            .collect();
        let arms: BTreeSet<&Arm> = groups
            .keys()
            .filter(|k| k.0 == situation)
            .map(|k| &k.1)
            .collect();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{}: p50 / p99 in µs by pause; † periods in which the quota stopped the server\n",
            situation.title()
        );
        let head: Vec<String> = gaps.iter().map(|g| format!("{g} µs")).collect();
        let _ = writeln!(text, "| window | {} |", head.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(gaps.len()));
        for arm in arms {
            let cells: Vec<String> = gaps
                .iter()
                .map(|gap| {
                    let Some(rounds) = groups.get(&(situation, arm.clone(), *gap)) else {
                        return "–".to_owned();
                    };
                    let throttled: u64 = rounds.iter().map(|r| r.throttled_periods).sum();
                    let mark = if throttled > 0 {
                        format!(" †{throttled}")
                    } else {
                        String::new()
                    };
                    format!(
                        "{:.1} / {:.0}{mark}",
                        median(rounds, |r| r.p50_us),
                        median(rounds, |r| r.p99_us)
                    )
                })
                .collect();
            let _ = writeln!(text, "| {} | {} |", arm.name, cells.join(" | "));
        }
        text.push('\n');
    }
    text
}

/// Writes `result.json`: a row a situation, arm and pause, with its ratios to stock.
pub(crate) fn write_results(directory: &Path, records: &Records) -> Result<()> {
    let groups = records.groups();
    let stock: BTreeMap<(Situation, u32), (f64, f64)> = groups
        .iter()
        .filter(|(key, _)| key.1.is_stock())
        .map(|(key, rounds)| {
            let figures = (median(rounds, |r| r.p50_us), median(rounds, |r| r.p99_us));
            ((key.0, key.2), figures)
        })
        .collect();
    let rows: Vec<_> = groups
        .iter()
        .map(|((situation, arm, gap), rounds)| {
            let (p50, p99) = (median(rounds, |r| r.p50_us), median(rounds, |r| r.p99_us));
            let late = [0, 1].map(|at| median(rounds, |r| r.late_us[at].unwrap_or(f64::NAN)));
            let base = stock.get(&(*situation, *gap));
            json!({
                "situation": situation, "window": arm.name, "gap_us": gap, "rounds": rounds.len(),
                "p50_us": p50, "p99_us": p99, "p99_9_us": median(rounds, |r| r.p99_9_us),
                "p50_to_stock": base.map(|b| p50 / b.0), "p99_to_stock": base.map(|b| p99 / b.1),
                "throttled_periods": rounds.iter().map(|r| r.throttled_periods).sum::<u64>(),
                "lost": rounds.iter().map(|r| r.lost).sum::<u64>(),
                "cpu_seconds": median(rounds, |r| r.cpu_seconds),
                "timers_late_us": late,
            })
        })
        .collect();
    write_json(&directory.join("result.json"), &rows)
}
