//! What a bench found, as it is written and read again.

use std::path::Path;

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use kbp_plot::median;
use serde::{Deserialize, Serialize};

use super::machine::Machine;
use crate::load::{Cost, Measured};

/// Version of the format; a reader refuses others.
pub(crate) const FORMAT: u32 = 1;

/// A whole bench.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bench {
    pub(crate) format: u32,
    /// `rtt`, `pps`, `bulk` or `app`.
    pub(crate) workload: String,
    /// What that was, in a sentence.
    pub(crate) description: String,
    /// Unix time of the start.
    pub(crate) started: u64,
    pub(crate) machine: Machine,
    /// What was asked for.
    pub(crate) asked: Asked,
    pub(crate) arms: Vec<ArmResult>,
}

/// The settings that two benches have to share to be compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) warm_up: f64,
    /// Requests a second; None: a closed loop.
    pub(crate) rate: Option<f64>,
    /// Bytes of a request.
    pub(crate) size: usize,
    /// A CPU hog beside each of the pair.
    pub(crate) hog: bool,
    /// Datagrams a second from a neighbour.
    pub(crate) flood: Option<f64>,
}

/// One arm over all rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ArmResult {
    pub(crate) name: String,
    pub(crate) what: String,
    /// The latencies of all rounds together: nanoseconds and how often.
    pub(crate) histogram: Vec<(u64, u64)>,
    pub(crate) rounds: Vec<Round>,
    /// Parts of kbp that were not active.
    pub(crate) inactive: Vec<String>,
}

/// One round of one arm.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Round {
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
    pub(crate) samples: u64,
    pub(crate) offered: u64,
    pub(crate) achieved: u64,
    pub(crate) lost: u64,
    pub(crate) late_p99_us: f64,
    pub(crate) bytes: u64,
    pub(crate) retransmits: u64,
    pub(crate) cost: Cost,
    /// sockperf's median and 99th percentile in the same containers, µs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) sockperf_us: Option<(f64, f64)>,
    /// (quantile, µs), for the band of the plot.
    pub(crate) curve: Vec<(f64, f64)>,
}

/// What the tables show of an arm.
#[derive(Debug, Clone, Default)]
pub(crate) struct Summary {
    /// µs at [`QUANTILES`], over all rounds together, each where at least one sample is beyond it; None: no latencies.
    pub(crate) quantiles: Option<[Option<f64>; 5]>,
    pub(crate) max_us: f64,
    pub(crate) samples: u64,
    /// Lowest and highest median of a round.
    pub(crate) p50_range: (f64, f64),
    /// A second.
    pub(crate) offered_rate: f64,
    pub(crate) achieved_rate: f64,
    pub(crate) lost: u64,
    pub(crate) late_p99_us: f64,
    pub(crate) gbit: f64,
    /// Lowest and highest of a round.
    pub(crate) gbit_range: (f64, f64),
    pub(crate) rate_range: (f64, f64),
    pub(crate) retransmits: u64,
    /// CPUs that were busy, of the whole machine.
    pub(crate) cpus_busy: f64,
    /// CPU time of the whole machine for one request or packet, µs.
    pub(crate) cpu_us_each: Option<f64>,
    pub(crate) cpu_s_per_gbyte: Option<f64>,
    pub(crate) switches_rate: f64,
    pub(crate) stolen: f64,
}

/// The quantiles of the tables.
pub(crate) const QUANTILES: [(f64, &str); 5] = [
    (0.5, "p50"),
    (0.9, "p90"),
    (0.99, "p99"),
    (0.999, "p99.9"),
    (0.9999, "p99.99"),
];

/// The quantiles of the curves: every halving of the tail as far as there are samples.
fn curve(histogram: &Histogram<u64>) -> Vec<(f64, f64)> {
    (1..=17)
        .map(|k| 1.0 - 0.5f64.powi(k))
        // Beyond that it is the slowest sample over and over.
        .filter(|q| histogram.len() as f64 * (1.0 - q) >= 1.0)
        .map(|q| (q, us(histogram.value_at_quantile(q))))
        .collect()
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

fn histogram(counts: &[(u64, u64)]) -> Result<Histogram<u64>> {
    let mut histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3).context("histogram")?;
    for (value, count) in counts {
        histogram.saturating_record_n(*value, *count);
    }
    Ok(histogram)
}

impl ArmResult {
    pub(crate) fn new(name: &str, what: &str) -> Self {
        Self {
            name: name.to_owned(),
            what: what.to_owned(),
            histogram: Vec::new(),
            rounds: Vec::new(),
            inactive: Vec::new(),
        }
    }

    /// Adds a round.
    pub(crate) fn add(
        &mut self,
        measured: &Measured,
        sockperf_us: Option<(f64, f64)>,
    ) -> Result<()> {
        let one = histogram(&measured.histogram)?;
        self.rounds.push(Round {
            seconds: measured.seconds,
            p50_us: us(one.value_at_quantile(0.5)),
            p99_us: us(one.value_at_quantile(0.99)),
            max_us: us(one.max()),
            samples: one.len(),
            offered: measured.offered,
            achieved: measured.achieved,
            lost: measured.lost,
            late_p99_us: us(measured.late_p99_ns),
            bytes: measured.bytes,
            retransmits: measured.retransmits,
            cost: measured.cost,
            sockperf_us,
            curve: curve(&one),
        });
        let mut all = histogram(&self.histogram)?;
        all.add(one).context("add histograms")?;
        self.histogram = all
            .iter_recorded()
            .map(|v| (v.value_iterated_to(), v.count_at_value()))
            .collect();
        Ok(())
    }

    /// The whole curve over all rounds: (quantile, µs).
    pub(crate) fn curve(&self) -> Vec<(f64, f64)> {
        histogram(&self.histogram).map_or_else(|_| Vec::new(), |h| curve(&h))
    }

    /// (µs, share that is at least this fast), at most `points` of them.
    pub(crate) fn cdf(&self, points: usize) -> Vec<(f64, f64)> {
        let total: u64 = self.histogram.iter().map(|(_, n)| n).sum();
        let every = self.histogram.len().div_ceil(points.max(1)).max(1);
        let mut seen = 0;
        let last = self.histogram.len().saturating_sub(1);
        let steps = self
            .histogram
            .iter()
            .enumerate()
            .filter_map(|(n, (ns, count))| {
                seen += count;
                (n % every == 0 || n == last).then(|| (us(*ns), seen as f64 / total.max(1) as f64))
            });
        steps.collect()
    }

    /// What the tables show.
    pub(crate) fn summary(&self) -> Summary {
        let sum = |f: &dyn Fn(&Round) -> f64| self.rounds.iter().map(f).sum::<f64>();
        let range = |f: &dyn Fn(&Round) -> f64| {
            let values = self.rounds.iter().map(f);
            let low = values.clone().fold(f64::INFINITY, f64::min);
            (low.min(f64::MAX), values.fold(0.0, f64::max))
        };
        let seconds = sum(&|r| r.seconds).max(1e-9);
        let all = histogram(&self.histogram).ok().filter(|h| !h.is_empty());
        let cpu = sum(&|r| r.cost.cpu_seconds);
        let achieved = sum(&|r| r.achieved as f64);
        let bytes = sum(&|r| r.bytes as f64);
        let gbit = |r: &Round| r.bytes as f64 * 8.0 / 1e9 / r.seconds.max(1e-9);
        Summary {
            quantiles: all.as_ref().map(|h| {
                // A share of the samples that is less than one of them is not known.
                let known = |q: f64| h.len() as f64 * (1.0 - q) >= 1.0 - 1e-6;
                QUANTILES.map(|(q, _)| known(q).then(|| us(h.value_at_quantile(q))))
            }),
            max_us: all.as_ref().map_or(0.0, |h| us(h.max())),
            samples: all.as_ref().map_or(0, Histogram::len),
            p50_range: range(&|r| r.p50_us),
            offered_rate: sum(&|r| r.offered as f64) / seconds,
            achieved_rate: achieved / seconds,
            lost: self.rounds.iter().map(|r| r.lost).sum(),
            late_p99_us: range(&|r| r.late_p99_us).1,
            gbit: bytes * 8.0 / 1e9 / seconds,
            gbit_range: range(&gbit),
            rate_range: range(&|r| r.achieved as f64 / r.seconds.max(1e-9)),
            retransmits: self.rounds.iter().map(|r| r.retransmits).sum(),
            cpus_busy: cpu / seconds,
            cpu_us_each: (achieved > 0.0).then(|| cpu * 1e6 / achieved),
            cpu_s_per_gbyte: (bytes > 0.0).then(|| cpu / (bytes / 1e9)),
            switches_rate: sum(&|r| r.cost.switches as f64) / seconds,
            stolen: sum(&|r| r.cost.stolen_seconds) / seconds,
        }
    }

    /// Medians over the rounds of (this tool's p50, sockperf's p50), where both were asked.
    pub(crate) fn beside_sockperf(&self) -> Option<(f64, f64)> {
        let asked: Vec<(f64, f64)> = self
            .rounds
            .iter()
            .filter_map(|r| Some((r.p50_us, r.sockperf_us?.0)))
            .collect();
        Some((
            median(asked.iter().map(|a| a.0))?,
            median(asked.iter().map(|a| a.1))?,
        ))
    }
}

impl Bench {
    /// Reads a result.json.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let value: serde_json::Value = serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is no JSON: give the result.json that --out leaves",
                path.display()
            )
        })?;
        if value["format"] != FORMAT {
            bail!(
                "{} is no result of this kbpctl bench (format {}, not {FORMAT}): it reads the result.json that --out leaves",
                path.display(),
                value["format"]
            );
        }
        serde_json::from_value(value).with_context(|| format!("read {}", path.display()))
    }

    /// The arm with which the others are compared: `stock`, else the first.
    pub(crate) fn base(&self) -> Option<&ArmResult> {
        let stock = self.arms.iter().find(|a| a.name == "stock");
        stock.or(self.arms.first())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An arm of two rounds whose latencies are around `us`.
    pub(crate) fn arm(name: &str, us: u64) -> ArmResult {
        let mut arm = ArmResult::new(name, "a test");
        for _ in 0..2 {
            let measured = Measured {
                seconds: 1.0,
                histogram: vec![(us * 1000, 990), (us * 10_000, 9), (us * 100_000, 1)],
                offered: 1000,
                achieved: 1000,
                cost: Cost {
                    cpu_seconds: 0.5,
                    stolen_seconds: 0.0,
                    switches: 2000,
                },
                ..Measured::default()
            };
            arm.add(&measured, Some((us as f64, 2.0 * us as f64)))
                .expect("round");
        }
        arm
    }

    #[test]
    fn a_summary_is_of_all_rounds_together() {
        let arm = arm("x", 10);
        let summary = arm.summary();
        let quantiles = summary.quantiles.expect("latencies");
        let [median, _, _, tail, far] = quantiles;
        assert!(
            median.is_some_and(|us| (us - 10.0).abs() < 0.1),
            "{quantiles:?}"
        );
        assert!(
            tail.is_some_and(|us| (us - 100.0).abs() < 1.0),
            "{quantiles:?}"
        );
        assert_eq!(far, None, "2000 samples have no 99.99th percentile");
        assert!((summary.max_us - 1000.0).abs() < 2.0);
        assert_eq!(summary.samples, 2000);
        assert!((summary.cpus_busy - 0.5).abs() < 1e-9);
        assert!((summary.cpu_us_each.expect("requests") - 500.0).abs() < 1e-6);
        assert!((summary.switches_rate - 2000.0).abs() < 1e-6);
        assert!(arm.curve().windows(2).all(|w| w[0].1 <= w[1].1));
        let cdf = arm.cdf(100);
        assert!((cdf.last().expect("points").1 - 1.0).abs() < 1e-9);
        let (own, theirs) = arm.beside_sockperf().expect("both");
        assert!((own - theirs).abs() < 0.1);
    }

    #[test]
    fn nothing_measured_is_no_division_by_zero() {
        let summary = ArmResult::new("x", "y").summary();
        assert_eq!(summary.quantiles, None);
        assert!(summary.cpus_busy.abs() < 1e-9);
        assert_eq!(summary.cpu_us_each, None);
    }
}
