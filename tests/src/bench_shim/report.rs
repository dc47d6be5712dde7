//! The table, the JSON, and how the figures compare.

use std::fmt::Write as _;
use std::time::Duration;

use kbp_tests::bench::Machine;
use serde::Serialize;

use crate::Arm;
use crate::memory::Memory;
use crate::phases::Phases;

/// A figure's quantiles over some samples.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Quantiles<T> {
    #[serde(skip)]
    samples: Vec<T>,
}

impl Quantiles<Phases> {
    pub(crate) fn of(samples: &[Phases]) -> Self {
        Self {
            samples: samples.to_vec(),
        }
    }

    /// Milliseconds that the given part of the samples does not exceed.
    fn at(&self, quantile: f64, of: impl Fn(&Phases) -> Duration) -> f64 {
        let mut sorted: Vec<Duration> = self.samples.iter().map(of).collect();
        sorted.sort();
        let rank = (quantile * sorted.len() as f64).ceil() as usize;
        let duration = sorted.get(rank.max(1) - 1).copied().unwrap_or_default();
        (duration.as_secs_f64() * 1e6).round() / 1e3
    }
}

/// One arm beside so many sleeping pods.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) arm: Arm,
    /// Medians over the shims of the sleeping pods.
    pub(crate) memory: Memory,
    /// Largest resident set among them, in KiB.
    pub(crate) max_rss_kib: u64,
    /// Share of one CPU that all these shims use while their containers sleep.
    pub(crate) silent_share: f64,
    pub(crate) create_p50_ms: f64,
    pub(crate) start_p50_ms: f64,
    pub(crate) exit_p50_ms: f64,
    pub(crate) delete_p50_ms: f64,
    pub(crate) start_to_exit_p50_ms: f64,
    pub(crate) start_to_exit_p90_ms: f64,
    pub(crate) whole_p50_ms: f64,
    pub(crate) samples: usize,
}

/// Every arm beside so many sleeping pods of each.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Scale {
    pub(crate) pods: usize,
    pub(crate) rows: Vec<Row>,
}

impl Scale {
    pub(crate) fn new(
        pods: usize,
        memory: &[(Arm, Vec<Memory>)],
        silent: &[(Arm, f64)],
        times: &[(Arm, Quantiles<Phases>)],
    ) -> Self {
        let rows = times.iter().map(|(arm, times)| {
            let shims = memory
                .iter()
                .find(|(of, _)| of == arm)
                .map_or(&[][..], |(_, shims)| shims);
            let middle = |of: fn(&Memory) -> u64| {
                let mut all: Vec<u64> = shims.iter().map(of).collect();
                all.sort_unstable();
                all.get(all.len() / 2).copied().unwrap_or(0)
            };
            Row {
                arm: *arm,
                memory: Memory {
                    rss_kib: middle(|m| m.rss_kib),
                    pss_kib: middle(|m| m.pss_kib),
                    private_kib: middle(|m| m.private_kib),
                    threads: middle(|m| m.threads),
                },
                max_rss_kib: shims.iter().map(|m| m.rss_kib).max().unwrap_or(0),
                silent_share: silent
                    .iter()
                    .find(|(of, _)| of == arm)
                    .map_or(0.0, |(_, share)| *share),
                create_p50_ms: times.at(0.5, |p| p.create),
                start_p50_ms: times.at(0.5, |p| p.start),
                exit_p50_ms: times.at(0.5, |p| p.exit),
                delete_p50_ms: times.at(0.5, |p| p.delete),
                start_to_exit_p50_ms: times.at(0.5, Phases::start_to_exit),
                start_to_exit_p90_ms: times.at(0.9, Phases::start_to_exit),
                whole_p50_ms: times.at(0.5, Phases::whole),
                samples: times.samples.len(),
            }
        });
        Self {
            pods,
            rows: rows.collect(),
        }
    }

    fn row(&self, arm: Arm) -> Option<&Row> {
        self.rows.iter().find(|row| row.arm == arm)
    }
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    pub(crate) machine: Machine,
    pub(crate) containerd: String,
    pub(crate) scales: Vec<Scale>,
}

impl Report {
    /// The table and the comparisons, for people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "shims: memory of one whose container sleeps, in KiB, and milliseconds of `true`; medians.\n\
             Linux {}, containerd {}, {} CPUs, load {:.2} at the start\n\n",
            self.machine.kernel, self.containerd, self.machine.cpus, self.machine.load
        );
        let _ = writeln!(
            text,
            "{:<5} {:<8} {:>7} {:>7} {:>7} {:>7} {:>8} {:>7} {:>7} {:>7} {:>13} {:>7} {:>7} {:>8}",
            "pods",
            "shim",
            "RSS",
            "max",
            "PSS",
            "private",
            "threads",
            "create",
            "start",
            "exit",
            "start-to-exit",
            "p90",
            "delete",
            "samples"
        );
        for scale in &self.scales {
            for row in &scale.rows {
                let memory = &row.memory;
                let _ = writeln!(
                    text,
                    "{:<5} {:<8} {:>7} {:>7} {:>7} {:>7} {:>8} {:>7.1} {:>7.1} {:>7.1} {:>13.1} {:>7.1} {:>7.1} {:>8}",
                    scale.pods,
                    row.arm.name(),
                    memory.rss_kib,
                    row.max_rss_kib,
                    memory.pss_kib,
                    memory.private_kib,
                    memory.threads,
                    row.create_p50_ms,
                    row.start_p50_ms,
                    row.exit_p50_ms,
                    row.start_to_exit_p50_ms,
                    row.start_to_exit_p90_ms,
                    row.delete_p50_ms,
                    row.samples
                );
            }
        }
        for scale in &self.scales {
            for row in &scale.rows {
                let _ = writeln!(
                    text,
                    "{} silent pods, {}: the shims use {:.2} % of a CPU",
                    scale.pods,
                    row.arm.name(),
                    100.0 * row.silent_share
                );
            }
        }
        text.push('\n');
        for (what, ratio) in self.ratios() {
            let _ = writeln!(text, "{what:<45} {ratio:.3}");
        }
        text
    }

    /// Ratios of medians to the stock shim's.
    fn ratios(&self) -> Vec<(String, f64)> {
        type Figure = (&'static str, fn(&Row) -> f64);
        let figures: [Figure; 4] = [
            ("RSS", |row| row.memory.rss_kib as f64),
            ("PSS", |row| row.memory.pss_kib as f64),
            ("start-to-exit", |row| row.start_to_exit_p50_ms),
            ("with deletion", |row| row.whole_p50_ms),
        ];
        let mut ratios = Vec::new();
        for scale in &self.scales {
            let Some(stock) = scale.row(Arm::Stock) else {
                continue;
            };
            for arm in [Arm::KbpOff, Arm::KbpOn] {
                let Some(row) = scale.row(arm) else { continue };
                for (name, figure) in figures {
                    let what = format!("{} pods: {name}, {} / stock", scale.pods, arm.name());
                    ratios.push((what, figure(row) / figure(stock)));
                }
            }
        }
        ratios
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(milliseconds: u64) -> Phases {
        let part = Duration::from_millis(milliseconds);
        Phases {
            create: part,
            start: part,
            exit: part,
            delete: part,
        }
    }

    fn memory(rss_kib: u64) -> Memory {
        Memory {
            rss_kib,
            pss_kib: rss_kib / 2,
            private_kib: rss_kib / 4,
            threads: 3,
        }
    }

    #[test]
    fn medians_are_compared_with_the_stock_shim_s() {
        let times =
            |all: &[u64]| Quantiles::of(&all.iter().copied().map(phases).collect::<Vec<_>>());
        let scale = Scale::new(
            2,
            &[
                (Arm::Stock, vec![memory(1000), memory(3000), memory(2000)]),
                (Arm::KbpOff, vec![memory(500)]),
            ],
            &[(Arm::Stock, 0.25)],
            &[
                (Arm::Stock, times(&[30, 10, 20])),
                (Arm::KbpOff, times(&[10])),
            ],
        );
        let stock = scale.row(Arm::Stock).expect("a row");
        assert_eq!((stock.memory.rss_kib, stock.max_rss_kib), (2000, 3000));
        assert_eq!(stock.silent_share, 0.25);
        assert_eq!(
            (stock.start_to_exit_p50_ms, stock.start_to_exit_p90_ms),
            (60.0, 90.0)
        );
        let report = Report {
            machine: Machine::default(),
            containerd: String::new(),
            scales: vec![scale],
        };
        let ratios: Vec<f64> = report.ratios().into_iter().map(|(_, r)| r).collect();
        assert_eq!(ratios, [0.25, 0.25, 0.5, 0.5]);
    }
}
