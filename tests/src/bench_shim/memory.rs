//! What a process has in memory (`smaps_rollup` of proc(5)).

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kbp_kernel::process;
use serde::Serialize;

/// How long processes are given to come to rest.
const REST: Duration = Duration::from_secs(5);
/// How long their CPU time is counted.
const SILENCE: Duration = Duration::from_secs(5);
/// How long they have to stay the same.
const STILL: Duration = Duration::from_millis(1500);

/// Memory of one process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Everything resident.
    pub(crate) rss_kib: u64,
    /// The same, with what several processes share divided among them.
    pub(crate) pss_kib: u64,
    /// What no other process has.
    pub(crate) private_kib: u64,
    pub(crate) threads: u64,
}

/// The shims whose containers' first processes are `inits`.
pub(crate) fn shims_of(inits: &[u32]) -> Result<Vec<u64>> {
    let parent = |init: &u32| number(&format!("/proc/{init}/status"), "PPid:");
    inits.iter().map(parent).collect()
}

/// Share of one CPU that these processes use together, whose containers sleep.
pub(crate) fn silent_share(shims: &[u64]) -> Result<f64> {
    let used = || -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for shim in shims {
            sum += process::cpu_time_of_all(u32::try_from(*shim)?)?;
        }
        Ok(sum)
    };
    let (before, since) = (used()?, Instant::now());
    // Not to await anything: the silence is what is measured.
    std::thread::sleep(SILENCE);
    Ok((used()? - before).as_secs_f64() / since.elapsed().as_secs_f64())
}

/// Memory of these shims, once they are all at rest.
pub(crate) fn of_shims(shims: &[u64]) -> Result<Vec<Memory>> {
    let all = || {
        shims
            .iter()
            .map(|shim| read(*shim))
            .collect::<Result<Vec<_>>>()
    };
    let limit = Instant::now() + REST;
    let (mut last, mut since) = (all()?, Instant::now());
    while since.elapsed() < STILL && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(100));
        let now = all()?;
        if now != last {
            since = Instant::now();
        }
        last = now;
    }
    Ok(last)
}

fn read(pid: u64) -> Result<Memory> {
    let rollup = format!("/proc/{pid}/smaps_rollup");
    Ok(Memory {
        rss_kib: number(&rollup, "Rss:")?,
        pss_kib: number(&rollup, "Pss:")?,
        private_kib: number(&rollup, "Private_Clean:")? + number(&rollup, "Private_Dirty:")?,
        threads: number(&format!("/proc/{pid}/status"), "Threads:")?,
    })
}

fn number(path: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("no {name} in {path}"))
}
