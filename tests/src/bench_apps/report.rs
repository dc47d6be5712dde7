//! The table and the JSON file.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use kbp_tests::bench::{over, write_json};
use serde::Serialize;

use crate::{Results, Sample, Workload};

/// Name of an arm.
pub(crate) fn arm(kbp: bool) -> &'static str {
    if kbp { "kbp" } else { "stock" }
}

/// Medians of one arm.
#[derive(Debug, Clone, Copy, Serialize)]
struct Medians {
    p50_us: f64,
    p99_us: f64,
    per_second: f64,
    cpu_us_per_answer: f64,
    /// Of the connection with the fewest, against their mean; 1 where the load does not tell.
    fewest_answers: f64,
}

/// A row of `result.json`.
#[derive(Debug, Serialize)]
struct Row<'a> {
    workload: &'static str,
    clients: u32,
    arm: &'static str,
    median: Medians,
    rounds: &'a [Sample],
}

fn medians(samples: &[Sample]) -> Medians {
    Medians {
        p50_us: over(samples, |s| s.figures.p50_us),
        p99_us: over(samples, |s| s.figures.p99_us),
        per_second: over(samples, |s| s.figures.per_second),
        fewest_answers: over(samples, |s| s.figures.fewest_answers),
        cpu_us_per_answer: over(samples, |s| {
            1e6 * s.cpu_seconds / s.figures.samples.max(1) as f64
        }),
    }
}

/// Writes `result.json`: medians and every round.
pub(crate) fn write_results(directory: &Path, results: &Results) -> Result<()> {
    let rows: Vec<Row<'_>> = results
        .iter()
        .map(|((workload, clients, kbp), samples)| Row {
            workload: workload.name(),
            clients: *clients,
            arm: arm(*kbp),
            median: medians(samples),
            rounds: samples,
        })
        .collect();
    write_json(&directory.join("result.json"), &rows)
}

/// What is promised of a workload: whether it is kept, by its ratios kbp / stock, and by kbp's median.
fn verdict(workload: Workload, clients: u32, [p50, p99, rate]: [f64; 3], p50_us: f64) -> String {
    let (promise, kept) = match (workload, clients) {
        (Workload::App(_), 1) => ("p50 ≤ 0.35, p99 ≤ 0.60", p50 <= 0.35 && p99 <= 0.6),
        (Workload::App(_), _) => ("rate ≥ 1.00", rate >= 1.0),
        (Workload::ShortConnections, _) => ("rate ≥ 0.90", rate >= 0.9),
        (Workload::NoSockets, _) => ("p50 ≤ 1.02", p50 <= 1.02),
        (Workload::TrappedCalls, _) => ("p50 ≤ 12 µs", p50_us <= 12.0),
    };
    format!("{} ({promise})", if kept { "kept" } else { "NOT kept" })
}

/// A row a workload and number of clients, both arms side by side.
pub(crate) fn table(results: &Results) -> String {
    let mut text = String::from(
        "| workload | clients | p50 µs stock → kbp | ratio | p99 µs stock → kbp | ratio | answers/s stock → kbp | ratio | CPU µs/answer stock → kbp | least served stock → kbp | promise |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|\n",
    );
    for ((workload, clients, kbp), samples) in results {
        let Some(stock) = results.get(&(*workload, *clients, false)).filter(|_| *kbp) else {
            continue;
        };
        let (s, k) = (medians(stock), medians(samples));
        let (p50, p99) = (k.p50_us / s.p50_us, k.p99_us / s.p99_us);
        let rate = k.per_second / s.per_second;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {clients} | {:.1} → {:.1} | {p50:.2} | {:.1} → {:.1} | {p99:.2} | {:.0} → {:.0} | {rate:.2} | {:.1} → {:.1} | {:.2} → {:.2} | {} |",
            workload.name(),
            s.p50_us,
            k.p50_us,
            s.p99_us,
            k.p99_us,
            s.per_second,
            k.per_second,
            s.cpu_us_per_answer,
            k.cpu_us_per_answer,
            s.fewest_answers,
            k.fewest_answers,
            verdict(*workload, *clients, [p50, p99, rate], k.p50_us),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use kbp_tests::apps::{App, Figures};

    use super::*;
    use crate::MANY;

    fn sample(p50_us: f64, per_second: f64) -> Sample {
        Sample {
            figures: Figures {
                samples: 100,
                per_second,
                p50_us,
                p99_us: 2.0 * p50_us,
                fewest_answers: 1.0,
            },
            cpu_seconds: 1.0,
        }
    }

    #[test]
    fn the_table_has_ratios_of_medians_and_what_is_kept() {
        let redis = Workload::App(App::Redis);
        let mut results = Results::new();
        results.insert((redis, 1, false), vec![sample(100.0, 10.0)]);
        results.insert(
            (redis, 1, true),
            vec![sample(30.0, 20.0), sample(900.0, 20.0), sample(20.0, 20.0)],
        );
        results.insert((redis, MANY, false), vec![sample(100.0, 10.0)]);
        results.insert((redis, MANY, true), vec![sample(100.0, 9.0)]);
        let text = table(&results);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(
            lines[2].contains("| redis | 1 | 100.0 → 30.0 | 0.30 |"),
            "{text}"
        );
        assert!(lines[2].contains("| kept (p50"), "{text}");
        assert!(lines[3].contains("NOT kept (rate"), "{text}");
    }
}
