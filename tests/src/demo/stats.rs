//! What one measurement yields, and the medians over the rounds.

use kbp_plot::median;
use kbp_tests::bench::clients::Latency;
use serde::Serialize;

/// Latencies with what they cost.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LatencySample {
    /// The latencies.
    pub(crate) latency: Latency,
    /// Busy seconds of every CPU of the machine, pollers included.
    pub(crate) cpu_seconds: f64,
}

/// Bulk throughput with what it cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ThroughputSample {
    /// Gbit/s as the receiver counted it.
    pub(crate) gbit_per_second: f64,
    /// TCP segments sent again.
    pub(crate) retransmits: u64,
    /// Busy seconds of every CPU of the machine, pollers included.
    pub(crate) cpu_seconds: f64,
}

/// A row of `result.json`: medians over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct LatencyRow {
    pub(crate) workload: String,
    pub(crate) arm: String,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p99_9_us: f64,
    pub(crate) max_us: f64,
    pub(crate) samples: u64,
    pub(crate) cpu_seconds: f64,
}

/// A row of `throughput.json`: medians over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ThroughputRow {
    pub(crate) workload: String,
    pub(crate) arm: String,
    pub(crate) gbit_per_second: f64,
    pub(crate) retransmits: u64,
    pub(crate) cpu_seconds: f64,
}

impl LatencyRow {
    /// Medians of `samples`; None of no samples.
    pub(crate) fn of(workload: &str, arm: &str, samples: &[LatencySample]) -> Option<Self> {
        let over =
            |field: fn(&LatencySample) -> f64| Some(round3(median(samples.iter().map(field))?));
        Some(Self {
            workload: workload.to_owned(),
            arm: arm.to_owned(),
            p50_us: over(|s| s.latency.p50)?,
            p99_us: over(|s| s.latency.p99)?,
            p99_9_us: over(|s| s.latency.p99_9)?,
            max_us: over(|s| s.latency.max)?,
            samples: over(|s| s.latency.samples as f64)? as u64,
            cpu_seconds: over(|s| s.cpu_seconds)?,
        })
    }
}

impl ThroughputRow {
    /// Medians of `samples`; None of no samples.
    pub(crate) fn of(workload: &str, arm: &str, samples: &[ThroughputSample]) -> Option<Self> {
        let over =
            |field: fn(&ThroughputSample) -> f64| Some(round3(median(samples.iter().map(field))?));
        Some(Self {
            workload: workload.to_owned(),
            arm: arm.to_owned(),
            gbit_per_second: over(|s| s.gbit_per_second)?,
            retransmits: over(|s| s.retransmits as f64)? as u64,
            cpu_seconds: over(|s| s.cpu_seconds)?,
        })
    }
}

/// A thousandth is beyond what any of these clocks resolves.
fn round3(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(p50: f64) -> LatencySample {
        let latency = Latency {
            p50,
            p99: 2.0 * p50,
            p99_9: 3.0 * p50,
            max: 4.0 * p50,
            samples: 100,
            curve: Vec::new(),
        };
        LatencySample {
            latency,
            cpu_seconds: 1.0,
        }
    }

    #[test]
    fn a_row_holds_the_median_of_each_column() {
        let samples = [sample(10.0), sample(30.0), sample(20.0)];
        let row = LatencyRow::of("redis-get", "kbp", &samples).expect("there are samples");
        assert_eq!(
            (row.p50_us, row.p99_us, row.p99_9_us, row.max_us),
            (20.0, 40.0, 60.0, 80.0)
        );
        assert_eq!(LatencyRow::of("redis-get", "kbp", &[]), None);
    }
}
