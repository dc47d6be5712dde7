//! What the whole machine spends: `/proc/stat`, which no container narrows.

use anyhow::{Context, Result};
use kbp_kernel::cpu_time::CpuTimes;
use serde::{Deserialize, Serialize};

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
        let times = CpuTimes::read().context("what the CPUs do")?;
        Ok(Self {
            cpu_seconds: times.all.busy().as_secs_f64(),
            stolen_seconds: times.all.stolen.as_secs_f64(),
            switches: times.switches,
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
