//! What is promised of pods whose CPUs are not their own: nobody is worse off than by so much.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use kbp_tests::bench::{Interval, write_json};

use serde::Serialize;

use crate::beside::Row;
use crate::record::{Record, Records, Situation, median};

/// The arms that are compared.
pub(crate) const ARMS: [&str; 2] = [crate::STOCK, "auto"];
/// Seconds before a measurement: some more than it takes until windows that hurt are taken away.
pub(crate) const WARM: f64 = 2.0;
/// Pause of requests that never stop coming, in µs.
pub(crate) const STEADY: u32 = 200;
/// Pause of requests after which everybody sleeps, in µs.
const RARE: u32 = 1000;

/// Pauses of those that disturb a stock pair, in µs.
pub(crate) const DISTURBERS: [u32; 2] = [0, RARE];

/// The situations with their pauses, but for the neighbours, which are measured by turns.
pub(crate) fn plan(asked: &[Situation]) -> Vec<(Situation, Vec<u32>)> {
    let mut plan = vec![
        (Situation::OneCpu, vec![0]),
        (Situation::Quota, vec![STEADY]),
        (Situation::Shared, vec![RARE]),
        (Situation::Pinned, vec![RARE]),
        (Situation::Own, vec![RARE]),
    ];
    plan.retain(|(situation, _)| asked.contains(situation));
    plan
}

/// One promise and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Promise {
    what: &'static str,
    unit: &'static str,
    stock: f64,
    kbp: f64,
    /// Where it was measured by turns: kbp's to stock's turn beside it.
    ratio: Option<Interval>,
    /// How many times stock's figure kbp's may be.
    limit: f64,
    kept: bool,
}

/// Judges by the medians over the rounds what was measured of the promises.
pub(crate) fn judge(records: &Records, beside: &[Row]) -> Vec<Promise> {
    let groups = records.groups();
    let figure = |situation, gap, arm: &str, of: fn(&Record) -> f64| {
        let (_, rounds) = groups
            .iter()
            .find(|(key, _)| key.0 == situation && key.2 == gap && key.1.name == arm)?;
        Some(median(rounds, of))
    };
    let judge = |what, unit, limit, situation, gap, of: fn(&Record) -> f64| {
        let [stock, kbp] = ARMS.map(|arm| figure(situation, gap, arm, of));
        let (stock, kbp) = (stock?, kbp?);
        Some(Promise {
            what,
            unit,
            stock,
            kbp,
            ratio: None,
            limit,
            kept: kbp <= limit * stock,
        })
    };
    let p50 = |r: &Record| r.p50_us;
    let neighbour = |what, gap| {
        let of = |arm: &str| beside.iter().find(|r| r.gap_us == gap && r.arm == arm);
        let [stock, kbp] = ARMS.map(of);
        let (stock, kbp) = (stock?, kbp?);
        let ratio = kbp.p99_ratio?;
        Some(Promise {
            what,
            unit: "µs",
            stock: stock.p99_us,
            kbp: kbp.p99_us,
            ratio: Some(ratio),
            limit: 1.2,
            kept: ratio.median <= 1.2,
        })
    };
    [
        judge(
            "p50, both pods on one CPU",
            "µs",
            4.0,
            Situation::OneCpu,
            0,
            p50,
        ),
        judge(
            "periods throttled, server with a quota of 0.5",
            "",
            1.0,
            Situation::Quota,
            STEADY,
            |r| r.throttled_periods as f64,
        ),
        neighbour("p99 of a stock pair beside a busy pair", 0),
        neighbour(
            "p99 of a stock pair beside a pair with a request every ms",
            RARE,
        ),
        judge(
            "p50, a request every ms, shared CPUs",
            "µs",
            0.4,
            Situation::Shared,
            RARE,
            p50,
        ),
        judge(
            "p50, a request every ms, shared CPUs, each program bound to one",
            "µs",
            0.4,
            Situation::Pinned,
            RARE,
            p50,
        ),
        judge(
            "p50, a request every ms, a CPU each",
            "µs",
            0.4,
            Situation::Own,
            RARE,
            p50,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A row a promise.
pub(crate) fn table(promises: &[Promise]) -> String {
    let mut text = String::from(
        "| promise | stock | kbp | ratio | limit | |\n|---|---:|---:|---:|---:|---|\n",
    );
    for p in promises {
        let ratio = match p.ratio {
            Some(ratio) => ratio.to_string(),
            None if p.stock > 0.0 => format!("{:.2}", p.kbp / p.stock),
            None => "–".to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {:.1} {unit} | {:.1} {unit} | {ratio} | {:.1} | {} |",
            p.what,
            p.stock,
            p.kbp,
            p.limit,
            if p.kept { "kept" } else { "NOT kept" },
            unit = p.unit,
        );
    }
    text
}

/// Writes `harm.json`.
pub(crate) fn write(directory: &Path, promises: &[Promise]) -> Result<()> {
    write_json(&directory.join("harm.json"), promises)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Key;

    fn record(
        situation: Situation,
        window: &str,
        gap_us: u32,
        p50_us: f64,
        throttled: u64,
    ) -> Record {
        Record {
            key: Key {
                situation,
                window: window.to_owned(),
                worker: "none".to_owned(),
                gap_us,
                round: 1,
            },
            p50_us,
            p99_us: 2.0 * p50_us,
            p99_9_us: 3.0 * p50_us,
            samples: 1,
            lost: 0,
            throttled_periods: throttled,
            cpu_seconds: 0.0,
            late_us: [None; 2],
        }
    }

    #[test]
    fn a_promise_is_kept_up_to_its_limit_and_one_without_figures_is_not_judged() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut records = Records::open(dir.path()).expect("records");
        for record in [
            record(Situation::OneCpu, "stock", 0, 10.0, 0),
            record(Situation::OneCpu, "auto", 0, 41.0, 0),
            record(Situation::Quota, "stock", STEADY, 10.0, 2),
            record(Situation::Quota, "auto", STEADY, 10.0, 2),
            record(Situation::Shared, "stock", RARE, 10.0, 0),
        ] {
            records.add(record).expect("add");
        }
        let promises = judge(&records, &[]);
        let kept: Vec<(&str, bool)> = promises.iter().map(|p| (p.what, p.kept)).collect();
        assert_eq!(
            kept,
            [
                ("p50, both pods on one CPU", false),
                ("periods throttled, server with a quota of 0.5", true)
            ]
        );
        let text = table(&promises);
        assert!(text.contains("| 4.10 | 4.0 | NOT kept |"), "{text}");
        write(dir.path(), &promises).expect("harm.json");
    }
}
