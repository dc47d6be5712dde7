//! The table, the JSON, and how the figures compare.

use std::fmt::Write as _;

use kbp_tests::bench::Machine;
use serde::Serialize;

use crate::plugin::{Arm, Variant};
use crate::stats::Summary;

/// Calls of one kind.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) plugin: Arm,
    pub(crate) family: &'static str,
    pub(crate) masquerade: bool,
    /// How many were under way at the same time.
    pub(crate) at_once: usize,
    pub(crate) verb: &'static str,
    #[serde(flatten)]
    pub(crate) summary: Summary,
}

/// ADD on a node that has so many pods already.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Scale {
    pub(crate) plugin: Arm,
    pub(crate) existing_pods: usize,
    #[serde(flatten)]
    pub(crate) summary: Summary,
}

/// Everything that was measured.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    pub(crate) machine: Machine,
    /// Start and end of a kbp that does nothing (VERSION): part of every figure of kbp.
    pub(crate) start_only: Option<Summary>,
    pub(crate) calls: Vec<Row>,
    /// ADD by kbp with its built-in IPAM, from when the started process gets its input to its end.
    pub(crate) work: Vec<Row>,
    pub(crate) scale: Vec<Scale>,
}

impl Report {
    /// The table and the comparisons, for people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "CNI calls in milliseconds, process start included. Linux {}, {} CPUs, load {:.2} at the start\n\n",
            self.machine.kernel, self.machine.cpus, self.machine.load
        );
        let _ = writeln!(
            text,
            "{:<15} {:<5} {:<5} {:>7} {:<4} {:>9} {:>9} {:>9} {:>9} {:>8}",
            "plugin", "ips", "masq", "at once", "verb", "p50", "p90", "p99", "max", "samples"
        );
        for row in &self.calls {
            let masquerade = if row.masquerade { "yes" } else { "no" };
            let _ = writeln!(
                text,
                "{:<15} {:<5} {:<5} {:>7} {:<4} {}",
                row.plugin.name(),
                row.family,
                masquerade,
                row.at_once,
                row.verb,
                columns(&row.summary)
            );
        }
        if let Some(start) = &self.start_only {
            let _ = writeln!(
                text,
                "{:<40} {}",
                "kbp, start only (VERSION)",
                columns(start)
            );
        }
        for row in &self.work {
            let what = format!(
                "kbp, own work of ADD, {}, {} at once",
                row.family, row.at_once
            );
            let _ = writeln!(text, "{what:<40} {}", columns(&row.summary));
        }
        for scale in &self.scale {
            let name = scale.plugin.name();
            let what = format!("{name} ADD, {} pods exist", scale.existing_pods);
            let _ = writeln!(text, "{what:<40} {}", columns(&scale.summary));
        }
        text.push('\n');
        for (what, ratio) in self.ratios() {
            let _ = writeln!(text, "{what:<55} {ratio:.3}");
        }
        text
    }

    /// Ratios of medians.
    fn ratios(&self) -> Vec<(String, f64)> {
        let mut ratios = Vec::new();
        for (dual_stack, masquerade) in [(false, false), (false, true), (true, false), (true, true)]
        {
            let variant = Variant {
                dual_stack,
                masquerade,
            };
            for (arm, other) in [
                (Arm::KbpHostLocal, Arm::Ptp),
                (Arm::KbpLocal, Arm::Ptp),
                (Arm::KbpHostLocal, Arm::Bridge),
                (Arm::KbpLocal, Arm::Bridge),
            ] {
                let Some((ours, theirs)) = self.add(arm, variant).zip(self.add(other, variant))
                else {
                    continue;
                };
                let what = format!(
                    "ADD {}{}: {} / {}",
                    variant.family(),
                    if masquerade { " masquerade" } else { "" },
                    arm.name(),
                    other.name()
                );
                ratios.push((what, ours / theirs));
            }
        }
        for arm in [Arm::KbpLocal, Arm::Ptp] {
            let of_arm: Vec<_> = self.scale.iter().filter(|row| row.plugin == arm).collect();
            if let [few, many] = of_arm[..] {
                let what = format!(
                    "{} ADD at {} / at {} pods",
                    arm.name(),
                    many.existing_pods,
                    few.existing_pods
                );
                ratios.push((what, many.summary.p50_ms / few.summary.p50_ms));
            }
        }
        ratios
    }

    /// Median of one ADD at a time.
    fn add(&self, arm: Arm, variant: Variant) -> Option<f64> {
        let row = self.calls.iter().find(|row| {
            row.plugin == arm
                && row.family == variant.family()
                && row.masquerade == variant.masquerade
                && row.at_once == 1
                && row.verb == "ADD"
        })?;
        Some(row.summary.p50_ms)
    }
}

fn columns(summary: &Summary) -> String {
    format!(
        "{:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>8}",
        summary.p50_ms, summary.p90_ms, summary.p99_ms, summary.max_ms, summary.samples
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_the_same_kind_are_compared() {
        let row = |plugin, at_once, p50_ms| Row {
            plugin,
            family: "v4",
            masquerade: false,
            at_once,
            verb: "ADD",
            summary: Summary {
                p50_ms,
                p90_ms: 0.0,
                p99_ms: 0.0,
                max_ms: 0.0,
                samples: 1,
            },
        };
        let report = Report {
            calls: vec![
                row(Arm::KbpLocal, 30, 100.0),
                row(Arm::Ptp, 1, 12.0),
                row(Arm::KbpLocal, 1, 3.0),
            ],
            ..Report::default()
        };
        assert_eq!(
            report.ratios(),
            [("ADD v4: kbp+kbp-local / ptp".to_owned(), 0.25)]
        );
    }
}
