//! The tables, as Markdown that is also fit to be read on a terminal, and what is in the JSON files.

use std::fmt::Write as _;

use crate::stats::{LatencyRow, ThroughputRow};

/// The latency table: a row an arm, and for each workload that has both arms their ratio.
pub(crate) fn latency_table(rows: &[LatencyRow]) -> String {
    let header = [
        "workload",
        "arm",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "max µs",
        "samples",
        "CPU s",
        "CPU µs/request",
    ];
    let numbers = |row: &LatencyRow| {
        let per_request = 1e6 * row.cpu_seconds / row.samples.max(1) as f64;
        [
            row.p50_us,
            row.p99_us,
            row.p99_9_us,
            row.max_us,
            row.samples as f64,
            row.cpu_seconds,
            per_request,
        ]
    };
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let [p50, p99, p99_9, max, samples, cpu, per_request] = numbers(row);
        lines.push(vec![
            row.workload.clone(),
            row.arm.clone(),
            format!("{p50:.1}"),
            format!("{p99:.1}"),
            format!("{p99_9:.1}"),
            format!("{max:.0}"),
            format!("{samples:.0}"),
            format!("{cpu:.2}"),
            format!("{per_request:.1}"),
        ]);
        if row.arm == "kbp"
            && let Some(stock) = rows
                .iter()
                .find(|r| r.workload == row.workload && r.arm == "stock")
        {
            lines.push(ratios(
                &row.workload,
                numbers(row).iter().zip(&numbers(stock)),
            ));
        }
    }
    markdown(&lines)
}

/// The throughput table, built like the latency table.
pub(crate) fn throughput_table(rows: &[ThroughputRow]) -> String {
    let header = ["workload", "arm", "Gbit/s", "retransmits", "CPU s"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        lines.push(vec![
            row.workload.clone(),
            row.arm.clone(),
            format!("{:.2}", row.gbit_per_second),
            row.retransmits.to_string(),
            format!("{:.2}", row.cpu_seconds),
        ]);
        if row.arm == "kbp"
            && let Some(stock) = rows
                .iter()
                .find(|r| r.workload == row.workload && r.arm == "stock")
        {
            let numbers =
                |r: &ThroughputRow| [r.gbit_per_second, r.retransmits as f64, r.cpu_seconds];
            lines.push(ratios(
                &row.workload,
                numbers(row).iter().zip(&numbers(stock)),
            ));
        }
    }
    markdown(&lines)
}

fn ratios<'a>(workload: &str, pairs: impl Iterator<Item = (&'a f64, &'a f64)>) -> Vec<String> {
    let ratio = |(kbp, stock): (&f64, &f64)| {
        if *stock > 0.0 {
            format!("{:.2}×", kbp / stock)
        } else {
            "–".to_owned()
        }
    };
    let mut line = vec![workload.to_owned(), "kbp / stock".to_owned()];
    line.extend(pairs.map(ratio));
    line
}

/// A Markdown table with aligned columns: the first two to the left, numbers to the right.
fn markdown(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines
            .iter()
            .map(|l| l[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Writing to a String cannot fail.
            let _ = if column < 2 {
                write!(text, "| {cell:<width$} ")
            } else {
                write!(text, "| {cell:>width$} ")
            };
        }
        text.push_str("|\n");
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let (dashes, end) = if column < 2 {
                    (width + 2, "")
                } else {
                    (width + 1, ":")
                };
                let _ = write!(text, "|{:-<dashes$}{end}", "");
            }
            text.push_str("|\n");
        }
    }
    text
}

/// `text` in lines of at most `width` characters, broken between words.
pub(crate) fn wrap(text: &str, width: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(arm: &str, p50_us: f64) -> LatencyRow {
        LatencyRow {
            workload: "redis-get".to_owned(),
            arm: arm.to_owned(),
            p50_us,
            p99_us: 2.0 * p50_us,
            p99_9_us: 3.0 * p50_us,
            max_us: 100.0 * p50_us,
            samples: 1000,
            cpu_seconds: 2.0,
        }
    }

    #[test]
    fn the_table_compares_with_stock() {
        let table = latency_table(&[row("stock", 80.0), row("kbp", 20.0)]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 5, "{table}");
        let width = lines[0].chars().count();
        assert!(lines.iter().all(|l| l.chars().count() == width), "{table}");
        assert!(
            lines[4].contains("0.25×") && lines[4].contains("1.00×"),
            "{table}"
        );
        assert!(!latency_table(&[row("kbp", 20.0)]).contains('×'));
    }

    #[test]
    fn text_is_wrapped_between_words() {
        assert_eq!(wrap("one two three", 7), "one two\nthree");
        assert_eq!(wrap("", 7), "");
    }

    #[test]
    fn result_json_has_exactly_the_promised_keys() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("result.json");
        kbp_tests::bench::write_json(&path, &[row("stock", 80.0), row("kbp", 20.0)])
            .expect("write");
        let text = std::fs::read_to_string(&path).expect("read");
        let rows: Vec<serde_json::Map<String, serde_json::Value>> =
            serde_json::from_str(&text).expect("JSON");
        for row in rows {
            let keys: Vec<&str> = row.keys().map(String::as_str).collect();
            assert_eq!(
                keys,
                [
                    "workload",
                    "arm",
                    "p50_us",
                    "p99_us",
                    "p99_9_us",
                    "max_us",
                    "samples",
                    "cpu_seconds"
                ]
            );
        }
    }
}
