//! Reads what the clients print: redis-benchmark's text, udp-rr's and iperf3's JSON.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

/// What a client measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// Median in µs.
    pub p50: f64,
    /// 99th percentile in µs.
    pub p99: f64,
    /// 99.9th percentile in µs.
    pub p99_9: f64,
    /// Slowest request in µs.
    pub max: f64,
    /// Requests answered.
    pub samples: u64,
    /// (quantile, µs), ascending.
    pub curve: Vec<(f64, f64)>,
}

/// Reads redis-benchmark's report for one test (Redis 7, `--precision 3`).
///
/// p50, p99 and max stand in its summary. p99.9 does not: it is the least latency that its two distributions show for at least 99.9 % of the
/// requests, so it is an upper bound and never flatters. Its histogram counts in steps of 8 µs and prints the upper edge of a step.
pub fn redis_benchmark(text: &str) -> Result<Latency> {
    // Progress is rewritten in place with carriage returns.
    let lines = || text.split(['\n', '\r']).map(str::trim);
    let mut points: Vec<(f64, u64)> = lines().filter_map(distribution_line).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let samples = points.iter().map(|p| p.1).max();
    let samples = samples.filter(|n| *n > 0).with_context(|| {
        format!(
            "redis-benchmark printed no latency distribution: {}",
            excerpt(text)
        )
    })?;
    let summary = lines()
        .skip_while(|line| !line.starts_with("latency summary"))
        .nth(2)
        .with_context(|| {
            format!(
                "redis-benchmark printed no latency summary: {}",
                excerpt(text)
            )
        })?;
    let columns: Result<Vec<f64>, _> = summary.split_whitespace().map(str::parse).collect();
    let columns =
        columns.with_context(|| format!("latency summary of redis-benchmark: {summary}"))?;
    // avg min p50 p95 p99 max, in milliseconds.
    let [_, _, p50, _, p99, max] = columns[..] else {
        bail!("latency summary of redis-benchmark has not six columns: {summary}");
    };
    let at_least = |quantile: f64| {
        let wanted = quantile * samples as f64;
        let found = points.iter().find(|p| p.1 as f64 >= wanted);
        found.map_or(max * 1000.0, |p| p.0 * 1000.0)
    };
    let curve = (1..=16).map(|k| 1.0 - 0.5f64.powi(k));
    Ok(Latency {
        p50: p50 * 1000.0,
        p99: p99 * 1000.0,
        p99_9: at_least(0.999),
        max: max * 1000.0,
        samples,
        curve: curve
            .filter(|q| enough(samples, *q))
            .map(|q| (q, at_least(q)))
            .collect(),
    })
}

/// Requests per second of redis-benchmark's report.
pub fn redis_benchmark_rate(text: &str) -> Result<f64> {
    let number = text.lines().find_map(|line| {
        line.trim()
            .strip_prefix("throughput summary:")?
            .split_whitespace()
            .next()
    });
    let rate = number
        .and_then(|n| n.parse::<f64>().ok())
        .filter(|rate| rate.is_finite() && *rate > 0.0);
    rate.with_context(|| format!("redis-benchmark printed no throughput: {}", excerpt(text)))
}

/// (milliseconds, cumulative count) of `99.902% <= 0.375 milliseconds (cumulative count 19981)`.
fn distribution_line(line: &str) -> Option<(f64, u64)> {
    let (_, rest) = line.split_once("% <= ")?;
    let (milliseconds, rest) = rest.split_once(" milliseconds (cumulative count ")?;
    Some((
        milliseconds.parse().ok()?,
        rest.strip_suffix(')')?.parse().ok()?,
    ))
}

/// A quantile means something only with some requests beyond it.
fn enough(samples: u64, quantile: f64) -> bool {
    samples as f64 * (1.0 - quantile) >= 5.0
}

/// Reads what `udp-rr` prints.
pub fn udp_rr(text: &str) -> Result<Latency> {
    let value: Value = serde_json::from_str(text.trim())
        .with_context(|| format!("udp-rr printed: {}", excerpt(text)))?;
    let number = |key: &str| {
        let found = value.get(key).and_then(Value::as_f64);
        found.with_context(|| format!("udp-rr's report has no number {key}: {}", excerpt(text)))
    };
    let lost = number("lost")?;
    if lost > 0.0 {
        // A lost datagram costs no latency sample, so silence about it would flatter.
        bail!("udp-rr lost {lost} datagrams on one machine");
    }
    let samples = number("samples")? as u64;
    let curve: Vec<(f64, f64)> =
        serde_json::from_value(value.get("curve").cloned().unwrap_or_default())
            .with_context(|| format!("udp-rr's curve: {}", excerpt(text)))?;
    Ok(Latency {
        p50: number("p50_us")?,
        p99: number("p99_us")?,
        p99_9: number("p99_9_us")?,
        max: number("max_us")?,
        samples,
        curve: curve.into_iter().filter(|p| enough(samples, p.0)).collect(),
    })
}

/// Gbit/s at the receiver and retransmits of `iperf3 --json`.
pub fn iperf3(text: &str) -> Result<(f64, u64)> {
    let value: Value = serde_json::from_str(text.trim())
        .with_context(|| format!("iperf3 printed: {}", excerpt(text)))?;
    if let Some(error) = value.get("error").and_then(Value::as_str) {
        bail!("iperf3: {error}");
    }
    let rate = value
        .pointer("/end/sum_received/bits_per_second")
        .and_then(Value::as_f64);
    let rate =
        rate.with_context(|| format!("iperf3's report has no received rate: {}", excerpt(text)))?;
    let retransmits = value
        .pointer("/end/sum_sent/retransmits")
        .and_then(Value::as_u64);
    Ok((rate / 1e9, retransmits.unwrap_or(0)))
}

/// The beginning of an output that could not be read, on one line.
fn excerpt(text: &str) -> String {
    let short: String = text.chars().take(300).collect();
    format!("{:?}", short)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = " GET: rps=0.0 (overall: inf) avg_msec=0.014 (overall: 0.014)\r====== GET ======\n  20000 requests completed in 0.28 seconds\n\nLatency by percentile distribution:\n0.000% <= 0.007 milliseconds (cumulative count 10459)\n75.000% <= 0.015 milliseconds (cumulative count 18794)\n99.805% <= 0.167 milliseconds (cumulative count 19962)\n99.902% <= 0.375 milliseconds (cumulative count 19981)\n100.000% <= 3.831 milliseconds (cumulative count 20000)\n\nCumulative distribution of latencies:\n99.620% <= 0.103 milliseconds (cumulative count 19924)\n99.910% <= 0.303 milliseconds (cumulative count 19980)\n100.000% <= 4.103 milliseconds (cumulative count 20000)\n\nSummary:\n  throughput summary: 70671.38 requests per second\n  latency summary (msec):\n          avg       min       p50       p95       p99       max\n        0.012     0.000     0.007     0.023     0.087     3.831\n";

    #[test]
    fn redis_benchmark_gives_the_tightest_upper_bound_for_p99_9() {
        let latency = redis_benchmark(REPORT).expect("a whole report");
        assert_eq!(
            (latency.p50, latency.p99, latency.max, latency.samples),
            (7.0, 87.0, 3831.0, 20000)
        );
        assert_eq!(
            redis_benchmark_rate(REPORT).expect("a whole report"),
            70671.38
        );
        // 19,980 of 20,000 are exactly 99.9 %: the second list knows it tighter than the first.
        assert_eq!(latency.p99_9, 303.0);
        assert_eq!(latency.curve[0], (0.5, 7.0));
        assert!(latency.curve.windows(2).all(|w| w[0].1 <= w[1].1));
        assert!(latency.curve.iter().all(|p| 20000.0 * (1.0 - p.0) >= 5.0));
    }

    #[test]
    fn redis_benchmark_without_a_report_is_an_error() {
        for text in [
            "",
            "Could not connect to Redis at 10.0.0.2:6379: Connection refused",
            &REPORT[..400],
        ] {
            assert!(redis_benchmark(text).is_err(), "{text}");
            assert!(redis_benchmark_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn udp_rr_refuses_lost_datagrams() {
        let report = |lost: u32| {
            format!(
                r#"{{"samples":1000,"lost":{lost},"p50_us":12.5,"p99_us":30,"p99_9_us":90,"max_us":200,"curve":[[0.5,12.5],[0.999,90.0]]}}"#
            )
        };
        let latency = udp_rr(&report(0)).expect("a whole report");
        assert_eq!(
            (latency.p50, latency.samples, latency.curve.len()),
            (12.5, 1000, 1)
        );
        assert!(udp_rr(&report(3)).is_err());
        assert!(udp_rr("{}").is_err());
    }

    #[test]
    fn iperf3_reports_the_receivers_rate_or_its_error() {
        let report = r#"{"end":{"sum_sent":{"bits_per_second":2e10,"retransmits":7},"sum_received":{"bits_per_second":1.5e10}}}"#;
        assert_eq!(iperf3(report).expect("a whole report"), (15.0, 7));
        let error = iperf3(r#"{"error":"unable to connect"}"#)
            .expect_err("an error")
            .to_string();
        assert!(error.contains("unable to connect"), "{error}");
    }
}
