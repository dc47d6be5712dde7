//! What was measured, as it is written to `result.json` and read from there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kbp_tests::apps::Figures;
use kbp_tests::bench::{Interval, write_json};
use serde::{Deserialize, Serialize};

/// One turn of one pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Turn {
    /// What the load found.
    #[serde(flatten)]
    pub(crate) figures: Figures,
    /// Busy seconds of all CPUs meanwhile, the start of the load and what came before its figures included.
    pub(crate) cpu_seconds: f64,
    /// Share of a CPU that the other pairs' containers had meanwhile, whose turn it was not.
    pub(crate) others: f64,
    /// Of the two kbp pods, how many had packets take the short way before and after the part that counts.
    pub(crate) short_way: [u32; 2],
}

/// Turns side by side: the first stock pair, kbp and the second stock pair, in this order or the other way round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cycle {
    pub(crate) stock: [Turn; 2],
    pub(crate) kbp: Turn,
}

/// A workload with a number of clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) workload: String,
    pub(crate) clients: u32,
    pub(crate) cycles: Vec<Cycle>,
}

impl Row {
    /// kbp's turns against the stock turns on both sides of them, the geometric mean of which they are compared with.
    pub(crate) fn ratio(&self, figure: impl Fn(&Turn) -> f64) -> Option<Interval> {
        Interval::of(self.cycles.iter().map(|c| {
            let [a, b] = [&c.stock[0], &c.stock[1]].map(&figure);
            figure(&c.kbp) / (a * b).sqrt()
        }))
    }

    /// The second stock pair against the first: how much is chance.
    pub(crate) fn control(&self, figure: impl Fn(&Turn) -> f64) -> Option<Interval> {
        Interval::of(
            self.cycles
                .iter()
                .map(|c| figure(&c.stock[1]) / figure(&c.stock[0])),
        )
    }

    pub(crate) fn stock(&self) -> impl Iterator<Item = &Turn> {
        self.cycles.iter().flat_map(|c| &c.stock)
    }

    pub(crate) fn kbp(&self) -> impl Iterator<Item = &Turn> {
        self.cycles.iter().map(|c| &c.kbp)
    }
}

/// A row with what follows from its turns.
#[derive(Debug, Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    row: &'a Row,
    p50_ratio: Option<Interval>,
    p99_ratio: Option<Interval>,
    rate_ratio: Option<Interval>,
    p50_control: Option<Interval>,
    p99_control: Option<Interval>,
    rate_control: Option<Interval>,
}

/// The row of a workload, made where there is none.
pub(crate) fn of<'a>(rows: &'a mut Vec<Row>, workload: &str, clients: u32) -> &'a mut Row {
    let is = |row: &Row| row.workload == workload && row.clients == clients;
    let place = rows.iter().position(is).unwrap_or_else(|| {
        rows.push(Row {
            workload: workload.to_owned(),
            clients,
            cycles: Vec::new(),
        });
        rows.len() - 1
    });
    &mut rows[place]
}

/// The file in that directory.
pub(crate) fn file(directory: &Path) -> PathBuf {
    directory.join("result.json")
}

/// Reads what is there; nothing where there is no file.
pub(crate) fn read(directory: &Path) -> Result<Vec<Row>> {
    let file = file(directory);
    match std::fs::read(&file) {
        Ok(text) => {
            serde_json::from_slice(&text).with_context(|| format!("read {}", file.display()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("read {}", file.display())),
    }
}

/// Writes it with the ratios and their intervals.
pub(crate) fn write(directory: &Path, rows: &[Row]) -> Result<()> {
    let written: Vec<Written<'_>> = rows
        .iter()
        .map(|row| Written {
            row,
            p50_ratio: row.ratio(|t| t.figures.p50_us),
            p99_ratio: row.ratio(|t| t.figures.p99_us),
            rate_ratio: row.ratio(|t| t.figures.per_second),
            p50_control: row.control(|t| t.figures.p50_us),
            p99_control: row.control(|t| t.figures.p99_us),
            rate_control: row.control(|t| t.figures.per_second),
        })
        .collect();
    write_json(&file(directory), &written)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn turn(p50_us: f64, per_second: f64) -> Turn {
        Turn {
            figures: Figures {
                samples: 100,
                per_second,
                p50_us,
                p99_us: 2.0 * p50_us,
                fewest_answers: 1.0,
            },
            cpu_seconds: 1.0,
            others: 0.001,
            short_way: [2, 2],
        }
    }

    /// As many cycles as there are figures, in which kbp has that rate against 100 and 121 of the stock pairs.
    pub(crate) fn row(workload: &str, clients: u32, rates: &[f64]) -> Row {
        let cycles = rates.iter().map(|rate| Cycle {
            stock: [turn(10.0, 100.0), turn(10.0, 121.0)],
            kbp: turn(3.0, *rate),
        });
        Row {
            workload: workload.to_owned(),
            clients,
            cycles: cycles.collect(),
        }
    }

    #[test]
    fn each_turn_is_compared_with_those_beside_it() {
        let row = row("redis", 50, &[110.0, 99.0, 121.0]);
        let rate = row.ratio(|t| t.figures.per_second).expect("cycles");
        assert!((rate.median - 1.0).abs() < 1e-9, "{rate:?}");
        assert!((rate.low - 0.9).abs() < 1e-9 && (rate.high - 1.1).abs() < 1e-9);
        let control = row.control(|t| t.figures.per_second).expect("cycles");
        assert!((control.median - 1.21).abs() < 1e-9);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(read(dir.path()).expect("nothing"), []);
        let rows = vec![row("redis", 1, &[110.0, 99.0]), row("redis", 50, &[])];
        write(dir.path(), &rows).expect("write");
        let mut read = read(dir.path()).expect("read");
        assert_eq!(read, rows);
        of(&mut read, "redis", 50);
        assert_eq!(read.len(), 2);
        of(&mut read, "redis", 7);
        assert_eq!(read.len(), 3);
        std::fs::write(file(dir.path()), "{").expect("write");
        assert!(super::read(dir.path()).is_err());
    }
}
