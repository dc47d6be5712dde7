//! What the whole machine spends: `/proc/stat`, which no container narrows.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// `/proc/stat` counts in these; the kernel fixes it at 100 for every architecture that runs containers.
const TICKS_PER_SECOND: f64 = 100.0;

/// Seconds of all CPUs together, and context switches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// Busy: everything but idle, waiting for I/O and what a hypervisor took.
    pub(crate) cpu_seconds: f64,
    /// What a hypervisor gave to somebody else although it was wanted.
    pub(crate) stolen_seconds: f64,
    /// Context switches.
    pub(crate) switches: u64,
}

impl Cost {
    /// Since boot.
    pub(crate) fn now() -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        Self::parse(&stat)
    }

    fn parse(stat: &str) -> Result<Self> {
        let line = stat.lines().find_map(|l| l.strip_prefix("cpu "));
        let line = line.context("/proc/stat has no line for all CPUs")?;
        let fields: Result<Vec<u64>, _> = line.split_whitespace().map(str::parse).collect();
        let fields = fields.with_context(|| format!("/proc/stat: {line}"))?;
        // user nice system idle iowait irq softirq steal guest guest_nice; the guest's are in user and nice already.
        let [user, nice, system, _, _, irq, softirq, steal, ..] = fields[..] else {
            bail!("/proc/stat has too few columns: {line}");
        };
        let switches = stat.lines().find_map(|l| l.strip_prefix("ctxt "));
        let switches = switches.and_then(|n| n.trim().parse().ok());
        Ok(Self {
            cpu_seconds: (user + nice + system + irq + softirq) as f64 / TICKS_PER_SECOND,
            stolen_seconds: steal as f64 / TICKS_PER_SECOND,
            switches: switches.context("/proc/stat has no line ctxt")?,
        })
    }

    /// What was spent since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            cpu_seconds: self.cpu_seconds - before.cpu_seconds,
            stolen_seconds: self.stolen_seconds - before.stolen_seconds,
            switches: self.switches.saturating_sub(before.switches),
        }
    }
}

/// TCP segments sent again in this process's network namespace.
pub(crate) fn retransmits() -> u64 {
    let text = std::fs::read_to_string("/proc/self/net/snmp").unwrap_or_default();
    let mut lines = text.lines().filter_map(|l| l.strip_prefix("Tcp:"));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return 0;
    };
    let found = names
        .split_whitespace()
        .zip(values.split_whitespace())
        .find(|(name, _)| *name == "RetransSegs");
    found.and_then(|(_, n)| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_everything_but_idle_iowait_and_steal() {
        let stat = "cpu  100 200 400 9 9 800 1600 300 1 2\ncpu0 9 9 9\nctxt 42\n";
        let cost = Cost::parse(stat).expect("a whole file");
        assert_eq!(
            (cost.cpu_seconds, cost.stolen_seconds, cost.switches),
            (31.0, 3.0, 42)
        );
        assert!(Cost::parse("cpu  1 2 3\n").is_err());
        assert!(Cost::parse("ctxt 1\n").is_err());
    }
}
