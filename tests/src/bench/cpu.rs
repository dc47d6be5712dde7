//! What the machine's CPUs are and how busy they are.

use std::time::Duration;

use anyhow::{Context, Result};
use kbp_kernel::CpuId;
use kbp_kernel::cpu::Topology;
use kbp_kernel::cpu_time::CpuTimes;

/// Busy seconds of all CPUs together since boot: everything but idle, waiting for I/O and what a hypervisor took.
pub fn busy_seconds() -> Result<f64> {
    let times = CpuTimes::read().context("what the CPUs do")?;
    Ok(times.all.busy().as_secs_f64())
}

/// Share of all CPU time that other work takes at this moment, watched for a second; 0 to 1.
pub fn other_work(cpus: usize) -> Result<f64> {
    const WATCH: Duration = Duration::from_secs(1);
    let before = busy_seconds()?;
    // Not to await anything: the second is what is measured.
    std::thread::sleep(WATCH);
    let busy = busy_seconds()? - before;
    Ok((busy / (WATCH.as_secs_f64() * cpus.max(1) as f64)).min(1.0))
}

/// Where the server and the client run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The client's CPU.
    pub client: CpuId,
    /// The server's CPU.
    pub server: CpuId,
    /// How the two are related, for the report where it is not as it should be.
    pub relation: Relation,
}

/// How two CPUs are related.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// Different cores.
    Cores,
    /// Two hardware threads of one core.
    Threads,
    /// There is only one.
    Same,
}

/// The first CPU for the client, the first on another core for the server; threads of one core or one CPU where there is no other.
pub fn place(topology: &Topology) -> Result<Placement> {
    let cpus: Vec<CpuId> = topology.online.iter().collect();
    let client = *cpus.first().context("no CPU is online")?;
    let siblings = topology.siblings(client)?;
    let (server, relation) = match cpus.iter().find(|c| !siblings.contains(**c)) {
        Some(other) => (*other, Relation::Cores),
        None => match cpus.get(1) {
            Some(thread) => (*thread, Relation::Threads),
            None => (client, Relation::Same),
        },
    };
    Ok(Placement {
        client,
        server,
        relation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_grows_with_work() {
        let before = busy_seconds().expect("/proc/stat");
        let begin = std::time::Instant::now();
        while begin.elapsed() < std::time::Duration::from_millis(200) {
            std::hint::spin_loop();
        }
        assert!(busy_seconds().expect("/proc/stat") - before >= 0.1);
    }
}
