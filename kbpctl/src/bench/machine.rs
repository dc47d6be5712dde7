//! The machine, described well enough to judge the figures, and without names of anybody.

use std::time::Duration;

use anyhow::Result;
use kbp_kernel::CpuId;
use kbp_kernel::cpu::Topology;
use serde::{Deserialize, Serialize};

use crate::load::Cost;

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) isolated: String,
    pub(crate) is_virtual: bool,
    pub(crate) cpuidle: String,
    pub(crate) governor: String,
    pub(crate) memory_gib: f64,
    pub(crate) containerd: String,
    pub(crate) kbpctl: String,
    pub(crate) client_cpu: u32,
    pub(crate) server_cpu: u32,
    /// Share of all CPU time that other work took in the second before the start, 0 to 1.
    pub(crate) other_work: f64,
    /// Of the same before each round, the most.
    pub(crate) other_work_max: f64,
}

/// Other work above this makes figures noise.
pub(crate) const BUSY: f64 = 0.1;

impl Machine {
    pub(crate) fn describe(topology: &Topology, containerd: String, cpus: (CpuId, CpuId)) -> Self {
        let read = |path: &str| {
            let text = std::fs::read_to_string(path).ok();
            text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty())
        };
        let info = read("/proc/cpuinfo").unwrap_or_default();
        let model = info
            .lines()
            .find(|l| l.starts_with("model name"))
            .and_then(|l| l.split(':').nth(1));
        let memory = read("/proc/meminfo").unwrap_or_default();
        let memory = memory.lines().find_map(|l| {
            l.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse::<f64>()
                .ok()
        });
        let none = || "none".to_owned();
        let isolated = topology.isolated.to_string();
        Self {
            kernel: format!(
                "Linux {}",
                read("/proc/sys/kernel/osrelease").unwrap_or_else(none)
            ),
            cpu: model.unwrap_or("no model name").trim().to_owned(),
            cpus: topology.online.len(),
            isolated: if isolated.is_empty() {
                none()
            } else {
                isolated
            },
            is_virtual: info
                .lines()
                .find(|l| l.starts_with("flags"))
                .is_some_and(|l| l.split_whitespace().any(|f| f == "hypervisor")),
            cpuidle: read("/sys/devices/system/cpu/cpuidle/current_driver").unwrap_or_else(none),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
                .unwrap_or_else(none),
            memory_gib: memory.unwrap_or(0.0) / f64::from(1 << 20),
            containerd,
            kbpctl: env!("CARGO_PKG_VERSION").to_owned(),
            client_cpu: cpus.0.0,
            server_cpu: cpus.1.0,
            other_work: 0.0,
            other_work_max: 0.0,
        }
    }

    /// Label and value, for reports.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("kernel", self.kernel.clone()),
            (
                "CPUs",
                format!(
                    "{} × {}{}",
                    self.cpus,
                    self.cpu,
                    if self.is_virtual {
                        ", in a virtual machine"
                    } else {
                        ""
                    }
                ),
            ),
            ("isolated CPUs", self.isolated.clone()),
            (
                "placement",
                match self.client_cpu == self.server_cpu {
                    true => format!("client and server both on CPU {}", self.client_cpu),
                    false => format!(
                        "client on CPU {}, server on CPU {}",
                        self.client_cpu, self.server_cpu
                    ),
                },
            ),
            ("sleep states", self.cpuidle.clone()),
            ("frequency governor", self.governor.clone()),
            ("memory", format!("{:.0} GiB", self.memory_gib)),
            ("containerd", self.containerd.clone()),
            ("kbpctl", self.kbpctl.clone()),
            (
                "other work",
                format!(
                    "{:.0} % of all CPU time before the start, up to {:.0} % before a round",
                    100.0 * self.other_work,
                    100.0 * self.other_work_max
                ),
            ),
        ]
    }

    /// A warning when other work disturbed the bench.
    pub(crate) fn warning(&self) -> Option<String> {
        let worst = self.other_work.max(self.other_work_max);
        (worst > BUSY).then(|| {
            format!(
                "other work took up to {:.0} % of the CPU time between the rounds: take these figures for noise and measure again on a quiet machine",
                100.0 * worst
            )
        })
    }
}

/// Share of all CPU time that other work takes, watched for `watch`; 0 to 1.
pub(crate) fn other_work(cpus: usize, watch: Duration) -> Result<f64> {
    let before = Cost::now()?;
    // Not to await anything: the time is what is measured.
    std::thread::sleep(watch);
    let busy = Cost::now()?.since(before).cpu_seconds;
    Ok((busy / (watch.as_secs_f64() * cpus.max(1) as f64)).clamp(0.0, 1.0))
}

/// Where client and server run: the first CPU, and the first on another core, else another one, else the same.
pub(crate) fn place(topology: &Topology) -> Result<(CpuId, CpuId)> {
    let usable = kbp_kernel::cpu::usable()?;
    let cpus: Vec<CpuId> = topology
        .online
        .iter()
        .filter(|c| usable.contains(*c))
        .collect();
    let client = *cpus
        .first()
        .ok_or_else(|| anyhow::anyhow!("no CPU is online"))?;
    let siblings = topology.siblings(client)?;
    let other = cpus
        .iter()
        .find(|c| !siblings.contains(**c))
        .or(cpus.get(1));
    Ok((client, other.copied().unwrap_or(client)))
}
