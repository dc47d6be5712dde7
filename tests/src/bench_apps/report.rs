//! The table.

use std::fmt::Write as _;

use kbp_tests::bench::{Interval, over};

use crate::row::{Row, Turn};

/// What is promised of a workload: whether it is kept, by its ratios kbp / stock, and by kbp's median.
fn verdict(row: &Row, [p50, p99, rate]: [Interval; 3], p50_us: f64) -> String {
    let kept = |promise: &str, kept: bool| {
        format!("{} ({promise})", if kept { "kept" } else { "NOT kept" })
    };
    match (row.workload.as_str(), row.clients) {
        ("short-connections", _) => kept("rate ≥ 0.90", rate.median >= 0.9),
        ("no-sockets", _) => kept("p50 ≤ 1.02", p50.median <= 1.02),
        ("trapped-calls", _) => kept("p50 ≤ 12 µs", p50_us <= 12.0),
        (_, 1) => kept(
            "p50 ≤ 0.35, p99 ≤ 0.60",
            p50.median <= 0.35 && p99.median <= 0.6,
        ),
        _ if rate.median >= 1.0 => kept("rate ≥ 1.00", true),
        _ if rate.contains(1.0) => "not told apart (rate ≥ 1.00)".to_owned(),
        _ => kept("rate ≥ 1.00", false),
    }
}

/// A row a workload and number of clients.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| workload | clients | p50 µs stock → kbp | ratio | p99 µs stock → kbp | ratio | answers/s stock → kbp | ratio | stock / stock: p50 | rate | CPU µs/answer stock → kbp | least served stock → kbp | pods on the short way | idle pairs' CPU | promise |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|\n",
    );
    for row in rows {
        let ratios = [
            row.ratio(|t| t.figures.p50_us),
            row.ratio(|t| t.figures.p99_us),
            row.ratio(|t| t.figures.per_second),
            row.control(|t| t.figures.p50_us),
            row.control(|t| t.figures.per_second),
        ];
        let [
            Some(p50),
            Some(p99),
            Some(rate),
            Some(same_p50),
            Some(same_rate),
        ] = ratios
        else {
            continue;
        };
        let both = |figure: fn(&Turn) -> f64| [over(row.stock(), figure), over(row.kbp(), figure)];
        let (p50_us, p99_us) = (both(|t| t.figures.p50_us), both(|t| t.figures.p99_us));
        let per_second = both(|t| t.figures.per_second);
        let cpu = both(|t| 1e6 * t.cpu_seconds / t.figures.samples.max(1) as f64);
        let fewest = both(|t| t.figures.fewest_answers);
        let short = |at: usize| row.kbp().map(|t| t.short_way[at]).sum::<u32>();
        let others = row.stock().chain(row.kbp()).map(|t| t.others);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} → {:.1} | {p50} | {:.1} → {:.1} | {p99} | {:.0} → {:.0} | {rate} | {same_p50} | {same_rate} | {:.1} → {:.1} | {:.2} → {:.2} | {} to {} of {} | {:.2} % | {} |",
            row.workload,
            row.clients,
            p50_us[0],
            p50_us[1],
            p99_us[0],
            p99_us[1],
            per_second[0],
            per_second[1],
            cpu[0],
            cpu[1],
            fewest[0],
            fewest[1],
            short(0),
            short(1),
            2 * row.cycles.len(),
            100.0 * others.fold(0.0, f64::max),
            verdict(row, [p50, p99, rate], p50_us[1]),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::row;

    #[test]
    fn the_table_has_ratios_with_their_intervals_and_what_is_kept() {
        let rows = [
            row("redis", 1, &[110.0; 6]),
            row("redis", 50, &[121.0; 6]),
            row("go-http", 50, &[99.0, 104.5, 104.5, 104.5, 104.5, 115.5]),
            row("static-c", 50, &[99.0; 6]),
            row("node-http", 50, &[]),
        ];
        let text = table(&rows);
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(lines.len(), 4, "{text}");
        for (line, start, verdict) in [
            (
                lines[0],
                "| redis | 1 | 10.0 → 3.0 | 0.30 (0.30 to 0.30) |",
                "| kept (p50",
            ),
            (lines[1], "| redis | 50 |", "| kept (rate"),
            (lines[2], "| go-http | 50 |", "| not told apart (rate"),
            (lines[3], "| static-c | 50 |", "| NOT kept (rate"),
        ] {
            assert!(line.starts_with(start) && line.contains(verdict), "{line}");
        }
        assert!(lines[2].contains("| 0.95 (0.90 to 1.05) | 1.00"), "{text}");
        assert!(lines[0].contains("| 12 to 12 of 12 | 0.10 % |"), "{text}");
    }
}
