//! What was measured, kept line by line so that nothing is lost when a run is broken off.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use kbp_tests::bench::over;
use serde::{Deserialize, Serialize};

/// Who shares a CPU with whom.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Situation {
    /// Client and server have a CPU each.
    Own,
    /// No cpusets: the scheduler decides.
    Shared,
    /// No cpusets, but each program has bound itself to a CPU of its own.
    Pinned,
    /// Both on one CPU.
    OneCpu,
    /// A CPU each; the server has a quota of half of it.
    Quota,
    /// A stock pair with a request every 200 µs, whose CPUs the arm's pair uses with the pauses of the column.
    Neighbour,
}

impl Situation {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Shared => "shared",
            Self::Pinned => "pinned",
            Self::OneCpu => "one-cpu",
            Self::Quota => "quota",
            Self::Neighbour => "neighbour",
        }
    }

    /// For a person.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Own => "a CPU each",
            Self::Shared => "shared CPUs, no cpusets",
            Self::Pinned => "shared CPUs, each program bound to one of them",
            Self::OneCpu => "both on one CPU",
            Self::Quota => "a CPU each, server under a quota of 0.5",
            Self::Neighbour => "a stock pair, a request every 200 µs, beside a pair of the arm",
        }
    }

    /// The pauses that are measured in it.
    pub(crate) fn gaps(self, all: &[u32]) -> Vec<u32> {
        match self {
            // Four containers each: two pauses tell what there is to know.
            Self::Neighbour => all
                .iter()
                .copied()
                .filter(|g| *g == 0 || *g == 1000)
                .collect(),
            _ => all.to_vec(),
        }
    }
}

/// Which measurement.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Key {
    pub(crate) situation: Situation,
    /// `stock`, or the value of `kbp.io/busy-poll`.
    pub(crate) window: String,
    /// `kbp.io/worker`.
    pub(crate) worker: String,
    /// Pause after an answer.
    pub(crate) gap_us: u32,
    pub(crate) round: u32,
}

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) key: Key,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p99_9_us: f64,
    pub(crate) samples: u64,
    pub(crate) lost: u64,
    /// Periods of the server's quota in which it was stopped.
    pub(crate) throttled_periods: u64,
    /// Busy seconds of all CPUs, the start of the client included.
    pub(crate) cpu_seconds: f64,
    /// How late threads were that waited for timers, median and 99th percentile.
    #[serde(default)]
    pub(crate) late_us: [Option<f64>; 2],
}

/// All measurements of a directory.
#[derive(Debug)]
pub(crate) struct Records {
    file: File,
    all: BTreeMap<Key, Record>,
}

impl Records {
    /// Reads what an earlier run has left, if any. A line that was cut off in the middle is measured again.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("create {}", directory.display()))?;
        let path = directory.join("raw.jsonl");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        };
        let records = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Record>(line).ok());
        let all: BTreeMap<Key, Record> = records.map(|r| (r.key.clone(), r)).collect();
        // Written anew, so that the end of a line that was cut off does not spoil the next one.
        let mut file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        for record in all.values() {
            writeln!(file, "{}", serde_json::to_string(record)?)?;
        }
        Ok(Self { file, all })
    }

    pub(crate) fn has(&self, key: &Key) -> bool {
        self.all.contains_key(key)
    }

    pub(crate) fn add(&mut self, record: Record) -> Result<()> {
        writeln!(self.file, "{}", serde_json::to_string(&record)?).context("write raw.jsonl")?;
        self.all.insert(record.key.clone(), record);
        Ok(())
    }

    /// The rounds of each measurement, by situation, arm and pause.
    pub(crate) fn groups(&self) -> BTreeMap<(Situation, Arm, u32), Vec<&Record>> {
        let mut groups: BTreeMap<_, Vec<&Record>> = BTreeMap::new();
        for (key, record) in &self.all {
            groups
                .entry((key.situation, Arm::of(key), key.gap_us))
                .or_default()
                .push(record);
        }
        groups
    }
}

/// A line of a table: stock first, then by length of the window.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arm {
    order: (u8, u32),
    /// As in the tables.
    pub(crate) name: String,
}

impl Arm {
    fn of(key: &Key) -> Self {
        let order = match (key.window.as_str(), key.window.parse()) {
            (crate::STOCK, _) => (0, 0),
            ("off", _) => (1, 0),
            (_, Ok(window)) => (2, window),
            _ => (3, 0),
        };
        let name = match key.worker.as_str() {
            "none" => key.window.clone(),
            worker => format!("{} + {worker}", key.window),
        };
        Self { order, name }
    }

    pub(crate) fn is_stock(&self) -> bool {
        self.order.0 == 0
    }
}

/// The median of what `of` picks.
pub(crate) fn median(records: &[&Record], of: impl Fn(&Record) -> f64) -> f64 {
    over(records.iter().copied(), of)
}

/// In how many periods the quota of a process' cgroup has stopped it so far; 0 without a quota.
pub(crate) fn throttled(pid: u32) -> u64 {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let read = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let root = match controllers {
            // Version 2.
            "" => "/sys/fs/cgroup".to_owned(),
            c if c.split(',').any(|c| c == "cpu") => format!("/sys/fs/cgroup/{c}"),
            _ => return None,
        };
        let text = std::fs::read_to_string(format!("{root}{path}/cpu.stat")).ok()?;
        text.lines()
            .find_map(|l| l.strip_prefix("nr_throttled "))?
            .trim()
            .parse()
            .ok()
    };
    groups.lines().filter_map(read).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(window: &str, round: u32, p50_us: f64) -> Record {
        Record {
            key: Key {
                situation: Situation::Own,
                window: window.to_owned(),
                worker: "none".to_owned(),
                gap_us: 0,
                round,
            },
            p50_us,
            p99_us: 0.0,
            p99_9_us: 0.0,
            samples: 1,
            lost: 0,
            throttled_periods: 0,
            cpu_seconds: 0.0,
            late_us: [None; 2],
        }
    }

    #[test]
    fn a_run_goes_on_where_it_was_broken_off() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut records = Records::open(dir.path()).expect("a new one");
        let first = record("20", 1, 5.0);
        records.add(first.clone()).expect("add");
        drop(records);
        let path = dir.path().join("raw.jsonl");
        let mut text = std::fs::read_to_string(&path).expect("read");
        text.push_str("{\"situation\":\"own\",\"win");
        std::fs::write(&path, text).expect("write");
        let mut records = Records::open(dir.path()).expect("again");
        assert!(records.has(&first.key));
        assert!(!records.has(&record("20", 2, 0.0).key));
        records.add(record("stock", 1, 7.0)).expect("add");
        drop(records);
        let records = Records::open(dir.path()).expect("a third time");
        let arms: Vec<String> = records.groups().keys().map(|k| k.1.name.clone()).collect();
        assert_eq!(arms, ["stock", "20"]);
    }

    #[test]
    fn the_median_is_that_of_the_rounds() {
        let all = [
            record("20", 1, 5.0),
            record("20", 2, 90.0),
            record("20", 3, 7.0),
        ];
        let all: Vec<&Record> = all.iter().collect();
        assert!((median(&all, |r| r.p50_us) - 7.0).abs() < 1e-9);
    }
}
