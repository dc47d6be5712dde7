//! What a report says of the machine on which its figures were measured.

use anyhow::{Context, Result};
use serde::Serialize;

/// The machine, and what it did when the measurement began.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Machine {
    /// Release of the running kernel.
    pub kernel: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Load average of the last minute.
    pub load: f64,
}

impl Machine {
    /// As it is now.
    pub fn read() -> Result<Self> {
        let load = read("/proc/loadavg")?;
        let minute = load.split(' ').next().unwrap_or_default();
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?,
            cpus: std::thread::available_parallelism()
                .context("number of CPUs")?
                .get(),
            load: minute
                .parse()
                .with_context(|| format!("/proc/loadavg: {load}"))?,
        })
    }
}

/// The model of the CPUs as the kernel names it; some architectures have none.
pub fn cpu_model() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find(|l| l.starts_with("model name"))
        .and_then(|l| l.split(':').nth(1));
    model.map_or("no model name", str::trim).to_owned()
}

fn read(path: &str) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_described() {
        let machine = Machine::read().expect("/proc");
        assert!(machine.kernel.contains('.'), "{machine:?}");
        assert!(machine.cpus > 0 && machine.load >= 0.0, "{machine:?}");
        assert!(!cpu_model().is_empty());
    }
}
