//! What one measurement yields, and the medians over the rounds.

use kbp_plot::CurvePoint;
use serde::Serialize;

/// Latencies and cost of one measurement.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Latency {
    /// Median in µs.
    pub(crate) p50: f64,
    /// 99th percentile in µs.
    pub(crate) p99: f64,
    /// 99.9th percentile in µs.
    pub(crate) p99_9: f64,
    /// Slowest request in µs.
    pub(crate) max: f64,
    /// Requests answered.
    pub(crate) samples: u64,
    /// (quantile, µs), ascending.
    pub(crate) curve: Vec<(f64, f64)>,
}

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

/// The median; of an even number of values, the mean of the two in the middle. None of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
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

/// The curve over the rounds, at the quantiles that every round has.
pub(crate) fn curve(samples: &[LatencySample]) -> Vec<CurvePoint> {
    let Some(first) = samples.first() else {
        return Vec::new();
    };
    let at = |sample: &LatencySample, quantile: f64| {
        let curve = &sample.latency.curve;
        curve
            .iter()
            .find(|p| (p.0 - quantile).abs() < 1e-9)
            .map(|p| p.1)
    };
    let quantiles = first.latency.curve.iter().map(|p| p.0);
    quantiles
        .filter_map(|quantile| {
            let values: Option<Vec<f64>> = samples.iter().map(|s| at(s, quantile)).collect();
            let values = values?;
            Some(CurvePoint {
                quantile,
                low_us: values.iter().copied().fold(f64::INFINITY, f64::min),
                median_us: median(values.iter().copied())?,
                high_us: values.iter().copied().fold(0.0, f64::max),
            })
        })
        .collect()
}

/// A thousandth is beyond what any of these clocks resolves.
fn round3(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(p50: f64, curve: Vec<(f64, f64)>) -> LatencySample {
        let latency = Latency {
            p50,
            p99: 2.0 * p50,
            p99_9: 3.0 * p50,
            max: 4.0 * p50,
            samples: 100,
            curve,
        };
        LatencySample {
            latency,
            cpu_seconds: 1.0,
        }
    }

    #[test]
    fn the_median_is_the_middle_and_an_outlier_does_not_move_it() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([1000.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([1.0, 2.0, 3.0, 1000.0]), Some(2.5));
    }

    #[test]
    fn a_row_holds_the_median_of_each_column() {
        let samples = [
            sample(10.0, vec![]),
            sample(30.0, vec![]),
            sample(20.0, vec![]),
        ];
        let row = LatencyRow::of("redis-get", "kbp", &samples).expect("there are samples");
        assert_eq!(
            (row.p50_us, row.p99_us, row.p99_9_us, row.max_us),
            (20.0, 40.0, 60.0, 80.0)
        );
        assert_eq!(LatencyRow::of("redis-get", "kbp", &[]), None);
    }

    #[test]
    fn a_curve_keeps_only_the_quantiles_of_every_round() {
        let samples = [
            sample(1.0, vec![(0.5, 1.0), (0.75, 4.0)]),
            sample(1.0, vec![(0.5, 3.0), (0.75, 5.0), (0.875, 9.0)]),
        ];
        let points = curve(&samples);
        assert_eq!(points.len(), 2);
        assert_eq!(
            (points[0].low_us, points[0].median_us, points[0].high_us),
            (1.0, 2.0, 3.0)
        );
    }
}
