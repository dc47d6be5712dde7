//! What a pair of pods does to a stock pair that uses the same CPUs, well enough to tell a fifth more.
//!
//! All pairs are there at the same time, and take turns in disturbing the one that is measured: forwards and then backwards, so that a
//! drift of the machine favours nobody. One of the arms is stock a second time: what it comes to is what the procedure itself scatters.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use kbp_poller::state;
use kbp_tests::Sandbox;
use kbp_tests::bench::{Interval, over, write_json};
use serde::Serialize;
use serde_json::Value;

use crate::record::Situation;
use crate::{Bench, Pair, STOCK, pause};

/// The arm that is stock once more.
const CONTROL: &str = "stock again";
/// How much longer somebody disturbs than is measured, in seconds: starting a client takes some time.
const LONGER: f64 = 1.0;

/// One turn.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Turn {
    /// Who disturbs.
    arm: String,
    /// Pause of the one that disturbs, in µs.
    gap_us: u32,
    /// Pause of the one that is measured, in µs.
    measured_gap_us: u32,
    sweep: u32,
    p50_us: f64,
    p99_us: f64,
    samples: u64,
    lost: u64,
    /// Windows of the disturbing client and server at the end of the turn, in µs; 0: none.
    windows: [u32; 2],
}

/// What one arm does to the stock pair.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) arm: String,
    pub(crate) gap_us: u32,
    measured_gap_us: u32,
    p50_us: f64,
    pub(crate) p99_us: f64,
    samples: u64,
    /// To the turns of stock of the same sweep.
    p50_ratio: Option<Interval>,
    pub(crate) p99_ratio: Option<Interval>,
    /// Windows that were seen, client and server, and how often.
    windows: Vec<([u32; 2], usize)>,
}

impl Bench<'_, '_> {
    /// Measures a stock pair beside each of `arms` by turns, and gives a row for each arm and pair of pauses.
    pub(crate) fn beside(
        &self,
        sandbox: &Sandbox,
        arms: &[String],
        gaps: &[u32],
        measured_gaps: &[u32],
    ) -> Result<Vec<Row>> {
        let shape = self.options.shape;
        let mut names = vec![STOCK.to_owned()];
        names.extend(arms.iter().filter(|a| *a != STOCK).cloned());
        names.push(CONTROL.to_owned());
        let place = match shape {
            Situation::Shared => shape,
            _ => Situation::Neighbour,
        };
        let measured = self.pair("m-", place, STOCK, "none")?;
        let mut pairs = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let window = if name == CONTROL { STOCK } else { name };
            let prefix = format!("a{number}-");
            let worker = &self.options.workers[0];
            let worker = if window == STOCK { "none" } else { worker };
            pairs.push((prefix.clone(), self.pair(&prefix, shape, window, worker)?));
        }
        let mut turns = Vec::new();
        for gap in gaps {
            for measured_gap in measured_gaps {
                for sweep in 0..self.options.sweeps {
                    let mut order: Vec<usize> = (0..names.len()).collect();
                    if sweep % 2 == 1 {
                        order.reverse();
                    }
                    for at in order {
                        let (prefix, pair) = &pairs[at];
                        let name = format!("noise-{gap}-{measured_gap}-{sweep}");
                        let mut turn = self.turn(pair, &measured, &name, [*gap, *measured_gap])?;
                        turn.arm.clone_from(&names[at]);
                        turn.sweep = sweep;
                        turn.windows = windows(sandbox, prefix);
                        turns.push(turn);
                    }
                }
                // What is there stays when the rest is broken off.
                write_json(&self.options.out.join("beside-turns.json"), &turns)?;
                eprintln!("beside pauses of {gap} µs, measured with {measured_gap} µs: done");
            }
        }
        let all = pairs.into_iter().map(|(_, pair)| pair).chain([measured]);
        for pair in all {
            pair.client.remove()?;
            pair.server.remove()?;
        }
        Ok(rows(&turns))
    }

    fn turn(
        &self,
        pair: &Pair<'_, '_>,
        measured: &Pair<'_, '_>,
        name: &str,
        [gap, measured_gap]: [u32; 2],
    ) -> Result<Turn> {
        let [seconds, warm] = self.seconds();
        let spread = self.options.jitter;
        let load = pair.load(&pause(gap, spread), [seconds + LONGER, warm]);
        let mut noise = pair.client.exec_start(name, &load)?;
        let text = measured
            .client
            .exec(&measured.load(&measured_gap.to_string(), [seconds, warm]))?
            .stdout;
        let limit = Duration::from_secs_f64(seconds + warm + 20.0);
        noise.wait(limit).context("end of the noise")?.success()?;
        let value: Value = serde_json::from_str(text.trim()).context("what udp-rr printed")?;
        let number = |name: &str| value[name].as_f64().unwrap_or(f64::NAN);
        Ok(Turn {
            arm: String::new(),
            gap_us: gap,
            measured_gap_us: measured_gap,
            sweep: 0,
            p50_us: number("p50_us"),
            p99_us: number("p99_us"),
            samples: number("samples") as u64,
            lost: number("lost") as u64,
            windows: [0; 2],
        })
    }
}

/// Windows of the client and the server with that prefix.
fn windows(sandbox: &Sandbox, prefix: &str) -> [u32; 2] {
    let states = state::read_all(&sandbox.dir().join("run/kbp")).unwrap_or_default();
    ["client", "server"].map(|name| {
        let id = format!("{prefix}{name}");
        let state = states.iter().find(|s| s.id == id);
        state.and_then(|s| s.busy_poll_us).unwrap_or(0)
    })
}

/// A row for each arm and pair of pauses, stock first, as they came.
fn rows(turns: &[Turn]) -> Vec<Row> {
    let mut keys: Vec<(u32, u32, &str)> = Vec::new();
    for turn in turns {
        let key = (turn.gap_us, turn.measured_gap_us, turn.arm.as_str());
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    // Sweeps that go backwards have the arms the other way round.
    keys.sort_by_key(|k| (k.0, k.1, k.2 != STOCK, k.2 == CONTROL));
    let of = |key: &(u32, u32, &str)| -> Vec<&Turn> {
        let fits = |t: &&Turn| (t.gap_us, t.measured_gap_us, t.arm.as_str()) == *key;
        turns.iter().filter(fits).collect()
    };
    keys.iter()
        .map(|key| {
            let (own, stock) = (of(key), of(&(key.0, key.1, STOCK)));
            let ratio = |figure: fn(&Turn) -> f64| {
                let base = |t: &Turn| stock.iter().find(|s| s.sweep == t.sweep).map(|s| figure(s));
                let ratios = own.iter().filter_map(|t| Some(figure(t) / base(t)?));
                Interval::of(ratios.collect::<Vec<_>>()).filter(|_| key.2 != STOCK)
            };
            let mut windows: Vec<([u32; 2], usize)> = Vec::new();
            for turn in &own {
                match windows.iter_mut().find(|(seen, _)| *seen == turn.windows) {
                    Some((_, times)) => *times += 1,
                    None => windows.push((turn.windows, 1)),
                }
            }
            Row {
                arm: key.2.to_owned(),
                gap_us: key.0,
                measured_gap_us: key.1,
                p50_us: over(own.iter().copied(), |t| t.p50_us),
                p99_us: over(own.iter().copied(), |t| t.p99_us),
                samples: own.iter().map(|t| t.samples).sum(),
                p50_ratio: ratio(|t| t.p50_us),
                p99_ratio: ratio(|t| t.p99_us),
                windows,
            }
        })
        .collect()
}

/// A line an arm.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| pause of the others, µs | of the stock pair | others | p50 µs | p99 µs | p50, ratio | p99, ratio | samples | windows of the others |\n|---:|---:|---|---:|---:|---:|---:|---:|---|\n",
    );
    let shown = |interval: &Option<Interval>| {
        interval
            .as_ref()
            .map_or_else(|| "–".to_owned(), Interval::to_string)
    };
    for row in rows {
        let windows: Vec<String> = row
            .windows
            .iter()
            .map(|(w, times)| format!("{}+{} {times}×", w[0], w[1]))
            .collect();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.1} | {:.0} | {} | {} | {} | {} |",
            row.gap_us,
            row.measured_gap_us,
            row.arm,
            row.p50_us,
            row.p99_us,
            shown(&row.p50_ratio),
            shown(&row.p99_ratio),
            row.samples,
            windows.join(", ")
        );
    }
    text
}

/// Writes `beside.json`.
pub(crate) fn write(directory: &Path, rows: &[Row]) -> Result<()> {
    write_json(&directory.join("beside.json"), rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arm_is_held_against_the_stock_turn_of_its_own_sweep() {
        let turn = |arm: &str, sweep: u32, p99_us: f64, windows| Turn {
            arm: arm.to_owned(),
            gap_us: 0,
            measured_gap_us: 200,
            sweep,
            p50_us: 1.0,
            p99_us,
            samples: 10,
            lost: 0,
            windows,
        };
        // The machine is twice as slow in the second sweep.
        let turns = [
            turn(STOCK, 0, 100.0, [0; 2]),
            turn("auto", 0, 110.0, [100, 0]),
            turn(CONTROL, 0, 100.0, [0; 2]),
            turn(CONTROL, 1, 200.0, [0; 2]),
            turn("auto", 1, 220.0, [100, 0]),
            turn(STOCK, 1, 200.0, [0; 2]),
        ];
        let rows = rows(&turns);
        let arms: Vec<&str> = rows.iter().map(|r| r.arm.as_str()).collect();
        assert_eq!(arms, [STOCK, "auto", CONTROL]);
        assert_eq!(rows[0].p99_ratio, None);
        let auto = rows[1].p99_ratio.expect("a ratio");
        assert!((auto.low - 1.1).abs() < 1e-9 && (auto.high - 1.1).abs() < 1e-9);
        assert_eq!(
            (rows[1].samples, rows[1].windows.as_slice()),
            (20, &[([100, 0], 2)][..])
        );
        assert!((rows[2].p99_ratio.expect("a ratio").median - 1.0).abs() < 1e-9);
        let text = table(&rows);
        assert!(
            text.contains("| auto | 1.0 | 165 | 1.00 (1.00 to 1.00) | 1.10 (1.10 to 1.10) |"),
            "{text}"
        );
    }
}
