//! What the loads print, as figures.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::IoContext;
use crate::{Error, Result};

/// What a load found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Answers, all of them right.
    pub samples: u64,
    /// Answers a second.
    pub per_second: f64,
    /// Median round trip in µs.
    pub p50_us: f64,
    /// 99th percentile in µs.
    pub p99_us: f64,
    /// Answers to the connection that had the fewest, against the mean of all; 1 where the load does not tell.
    pub fewest_answers: f64,
}

fn unreadable(what: &str, text: &str) -> Error {
    Error::Command {
        command: format!("read what {what} printed"),
        reason: text.chars().take(2000).collect(),
    }
}

/// The JSON object of `app-load` and of the Go client.
pub(super) fn own_json(text: &str) -> Result<Figures> {
    let wrong = || unreadable("the load", text);
    let line = text
        .lines()
        .find(|l| l.starts_with('{'))
        .ok_or_else(wrong)?;
    let value: Value = serde_json::from_str(line).map_err(|_| wrong())?;
    let number = |name: &str| value[name].as_f64().ok_or_else(wrong);
    if value["wrong"] != 0 || number("samples")? < 1.0 {
        return Err(wrong());
    }
    Ok(Figures {
        samples: number("samples")? as u64,
        per_second: number("per_second")?,
        p50_us: number("p50_us")?,
        p99_us: number("p99_us")?,
        fewest_answers: value["fewest_answers"].as_f64().unwrap_or(1.0),
    })
}

/// `wrk --latency`'s report.
pub(super) fn wrk(text: &str) -> Result<Figures> {
    let wrong = || unreadable("wrk", text);
    if text.contains("Socket errors") || text.contains("Non-2xx") {
        return Err(wrong());
    }
    let after = |start: &str| {
        text.lines()
            .find_map(|l| l.trim().strip_prefix(start))
            .map(str::trim)
    };
    let samples = text
        .lines()
        .find_map(|l| l.split_once(" requests in "))
        .and_then(|(n, _)| n.trim().parse().ok());
    Ok(Figures {
        samples: samples.filter(|n| *n > 0).ok_or_else(wrong)?,
        per_second: after("Requests/sec:")
            .and_then(|n| n.parse().ok())
            .ok_or_else(wrong)?,
        p50_us: after("50%").and_then(wrk_time).ok_or_else(wrong)?,
        p99_us: after("99%").and_then(wrk_time).ok_or_else(wrong)?,
        fewest_answers: 1.0,
    })
}

/// `63.00us`, `1.25ms` or `1.00s` in µs.
fn wrk_time(text: &str) -> Option<f64> {
    [("us", 1.0), ("ms", 1e3), ("s", 1e6)]
        .into_iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor))
}

/// A transaction of pgbench's log: when it ended, in seconds since 1970, and its time in µs.
fn transaction(line: &str) -> Option<(f64, f64)> {
    let mut columns = line.split(' ');
    let time: f64 = columns.nth(2)?.parse().ok()?;
    let seconds: f64 = columns.nth(1)?.parse().ok()?;
    let micros: f64 = columns.next()?.parse().ok()?;
    Some((seconds + micros * 1e-6, time))
}

/// pgbench's report and its log, a line a transaction, without those that ended in the first `lead`. The log is removed.
pub(super) fn pgbench(text: &str, root: &Path, lead: Duration) -> Result<Figures> {
    let wrong = || unreadable("pgbench", text);
    let failed = text
        .lines()
        .find_map(|l| l.strip_prefix("number of failed transactions: "));
    let ended = text.lines().any(|l| l.starts_with("tps = "));
    if !ended || failed.is_some_and(|f| !f.starts_with("0 ")) {
        return Err(wrong());
    }
    let dir = root.join("tmp");
    let mut transactions: Vec<(f64, f64)> = Vec::new();
    for entry in std::fs::read_dir(&dir)
        .context(|| format!("read {}", dir.display()))?
        .flatten()
    {
        if !entry.file_name().to_string_lossy().starts_with("pgbench.") {
            continue;
        }
        let path = entry.path();
        let log = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        transactions.extend(log.lines().filter_map(transaction));
        std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
    }
    let begun = |(end, time): &(f64, f64)| end - time * 1e-6;
    let begin = transactions.iter().map(begun).fold(f64::MAX, f64::min) + lead.as_secs_f64();
    transactions.retain(|(end, _)| *end >= begin);
    let end = transactions.iter().map(|t| t.0).fold(begin, f64::max);
    let mut times: Vec<f64> = transactions.iter().map(|t| t.1).collect();
    times.sort_by(f64::total_cmp);
    let at = |quantile: f64| {
        let rank = (quantile * times.len() as f64).ceil() as usize;
        times.get(rank.max(1) - 1).copied().ok_or_else(wrong)
    };
    Ok(Figures {
        samples: times.len() as u64,
        per_second: times.len() as f64 / (end - begin).max(1e-6),
        p50_us: at(0.5)?,
        p99_us: at(0.99)?,
        fewest_answers: 1.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrks_report_is_read_and_errors_refuse_it() {
        let report = "Running 1s test @ http://10.0.0.2:7000/\n  1 threads and 1 connections\n  Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency    70.19us   20.10us   1.02ms   95.10%\n  Latency Distribution\n     50%   63.00us\n     75%   70.00us\n     90%   88.00us\n     99%    1.25ms\n  14000 requests in 1.10s, 2.37MB read\nRequests/sec:  12727.27\nTransfer/sec:      2.16MB\n";
        let figures = wrk(report).expect("a report");
        assert_eq!(
            figures,
            Figures {
                samples: 14000,
                per_second: 12727.27,
                p50_us: 63.0,
                p99_us: 1250.0,
                fewest_answers: 1.0,
            }
        );
        assert!(wrk(&format!("{report}  Non-2xx or 3xx responses: 3\n")).is_err());
        assert!(wrk("unable to connect").is_err());
    }

    #[test]
    fn pgbenchs_log_gives_the_quantiles_without_the_lead() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("tmp")).expect("mkdir");
        // One every 10 ms, the slow ones first.
        let log: String = (1..=100)
            .map(|n| {
                format!(
                    "0 {n} {} 0 1700000000 {:06}\n",
                    101 - n,
                    100 + (n - 1) * 10_000
                )
            })
            .collect();
        let report = "number of failed transactions: 0 (0.000%)\ntps = 1234.5 (without initial connection time)\n";
        for (lead, samples, p50, p99) in [(0, 100, 50.0, 99.0), (500, 50, 25.0, 50.0)] {
            std::fs::write(dir.path().join("tmp/pgbench.17"), &log).expect("write");
            let figures =
                pgbench(report, dir.path(), Duration::from_millis(lead)).expect("a report");
            assert_eq!(
                (figures.samples, figures.p50_us, figures.p99_us),
                (samples, p50, p99)
            );
            assert!((figures.per_second - 100.0).abs() < 4.0, "{figures:?}");
        }
        let refused = |report: &str| pgbench(report, dir.path(), Duration::ZERO).is_err();
        assert!(refused(report), "the log is used up");
        std::fs::write(dir.path().join("tmp/pgbench.17"), &log).expect("write");
        assert!(refused(&report.replace(": 0 ", ": 7 ")) && refused("killed"));
    }

    #[test]
    fn a_load_with_wrong_answers_is_refused() {
        let text = r#"{"samples":5,"wrong":0,"per_second":1.0,"p50_us":2.0,"p99_us":3.0}"#;
        assert_eq!(own_json(text).expect("figures").samples, 5);
        assert!(own_json(&text.replace("\"wrong\":0", "\"wrong\":1")).is_err());
        assert!(own_json(&text.replace("\"samples\":5", "\"samples\":0")).is_err());
        assert!(own_json("").is_err());
    }
}
