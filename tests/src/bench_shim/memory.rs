//! What a process has in memory (`smaps_rollup` of proc(5)).

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// How long a process is given to come to rest.
const REST: Duration = Duration::from_secs(5);
/// How long it has to stay the same.
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

/// Memory of the shim whose container's first process is `init`, once it is at rest.
pub(crate) fn of_shim(init: u32) -> Result<Memory> {
    let shim = number(&format!("/proc/{init}/status"), "PPid:")?;
    let limit = Instant::now() + REST;
    let (mut last, mut since) = (read(shim)?, Instant::now());
    while since.elapsed() < STILL && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(100));
        let now = read(shim)?;
        if (now.rss_kib, now.threads) != (last.rss_kib, last.threads) {
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
