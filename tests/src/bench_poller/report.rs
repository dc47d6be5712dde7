//! Tables, and the medians as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use kbp_plot::median;
use kbp_tests::bench::clients::Latency;
use kbp_tests::bench::{Machine, over};
use serde_json::{Value, json};

use crate::directions::{self, Ends};
use crate::node::{self, Call};
use crate::programs::{Arm, Sample, Situation, Workload};
use crate::road;
use crate::workers::{self, Kind};

/// Everything that was measured, a sample a round.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    /// Share of the CPU time before the start.
    pub(crate) other_work: f64,
    pub(crate) rounds: u32,
    pub(crate) programs: BTreeMap<(Situation, Workload, Arm), Vec<Sample>>,
    pub(crate) workers: BTreeMap<(Kind, u8), Vec<workers::Sample>>,
    /// By the number of rules.
    pub(crate) filters: BTreeMap<(u16, Kind), Vec<workers::Sample>>,
    /// Why this kernel has it not.
    pub(crate) wanting: BTreeMap<Kind, String>,
    pub(crate) ends: BTreeMap<(Ends, u32), Vec<directions::Sample>>,
    pub(crate) daemon: Vec<node::Sample>,
}

impl Results {
    /// By how much a round of the ring is longer for each NAPI that it goes over: from the workers that packets wait for.
    fn round_us_a_napi(&self) -> Option<f64> {
        let p50 = |veths| {
            let samples = self.workers.get(&(Kind::SqpollPrefer, veths))?;
            median(samples.iter().map(|s| s.latency.p50_us))
        };
        let exclusive = self.workers.keys().filter(|k| k.0 == Kind::SqpollPrefer);
        let most = exclusive
            .map(|(_, veths)| *veths)
            .max()
            .filter(|m| *m > 1)?;
        // A packet comes in the middle of a round, on average.
        Some(2.0 * (p50(most)? - p50(1)?) / f64::from(most - 1))
    }

    /// The first packets of all rounds: on stock veths and attached.
    fn first_packets(&self) -> Option<[road::Latency; 2]> {
        let (first, rest) = self.daemon.split_first()?;
        let mut all = first.first.clone();
        for sample in rest {
            for (sum, one) in all.iter_mut().zip(&sample.first) {
                sum.add(one).ok()?;
            }
        }
        Some(all.each_ref().map(road::Latency::of))
    }

    /// For the file: each measurement with its medians and its rounds.
    pub(crate) fn json(&self) -> Value {
        let programs: Vec<_> = self
            .programs
            .iter()
            .map(|((situation, workload, arm), samples)| {
                json!({
                    "situation": situation, "workload": workload.name(), "arm": arm.name(),
                    "p50_us": of(samples, |l| l.p50), "p99_us": of(samples, |l| l.p99),
                    "p99_9_us": of(samples, |l| l.p99_9),
                    "gbit_per_second": median(samples.iter().filter_map(|s| s.gbit_per_second)),
                    "cpus": over(samples, |s| s.cpus),
                    "rounds": samples,
                })
            })
            .collect();
        let workers: Vec<_> = self
            .workers
            .iter()
            .map(|((kind, veths), samples)| {
                json!({
                    "kind": kind.name(), "veths": veths,
                    "p50_us": over(samples, |s| s.latency.p50_us),
                    "p99_us": over(samples, |s| s.latency.p99_us),
                    "p99_9_us": over(samples, |s| s.latency.p99_9_us),
                    "taken": over(samples, |s| s.taken),
                    "sent_per_second": over(samples, |s| s.sent_per_second),
                    "delivered_per_second": over(samples, |s| s.delivered_per_second),
                    "lost": over(samples, |s| s.lost as f64),
                    "cpus": over(samples, |s| s.cpus),
                    "rounds": samples,
                })
            })
            .collect();
        let filters: Vec<_> = self
            .filters
            .iter()
            .map(|((rules, kind), samples)| {
                json!({
                    "kind": kind.name(), "rules": rules,
                    "p50_us": over(samples, |s| s.latency.p50_us),
                    "p99_us": over(samples, |s| s.latency.p99_us),
                    "delivered_per_second": over(samples, |s| s.delivered_per_second),
                    "read_per_second": median(samples.iter().filter_map(|s| s.read_per_second)),
                    "lost": over(samples, |s| s.lost as f64),
                    "cpus": over(samples, |s| s.cpus),
                    "rounds": samples,
                })
            })
            .collect();
        let ends: Vec<_> = self
            .ends
            .iter()
            .map(|((ends, pause), samples)| {
                json!({
                    "polled": ends.name(), "pause_us": pause,
                    "p50_us": over(samples, |s| s.latency.p50_us),
                    "p99_us": over(samples, |s| s.latency.p99_us),
                    "p99_9_us": over(samples, |s| s.latency.p99_9_us),
                    "cpus": over(samples, |s| s.cpus),
                    "rounds": samples,
                })
            })
            .collect();
        let wanting: BTreeMap<&str, &String> = self
            .wanting
            .iter()
            .map(|(kind, why)| (kind.name(), why))
            .collect();
        json!({
            "machine": self.machine, "other_work": self.other_work, "rounds": self.rounds,
            "programs": programs, "workers": workers, "round_us_a_napi": self.round_us_a_napi(), "filters": filters, "wanting": wanting, "ends": ends,
            "daemon": self.daemon,
            "first_packets": self.first_packets().map(|[stock, attached]| json!({ "stock": stock, "attached": attached })),
        })
    }
}

/// All tables.
pub(crate) fn tables(results: &Results) -> String {
    let parts = [
        programs(results),
        workers(results),
        filters(results),
        ends(results),
        daemon(results),
    ];
    parts.concat()
}

fn programs(results: &Results) -> String {
    let results = &results.programs;
    let mut text = String::new();
    let situations: BTreeSet<Situation> = results.keys().map(|k| k.0).collect();
    for situation in situations {
        let arms: BTreeSet<Arm> = results.keys().map(|k| k.2).collect();
        let workloads: BTreeSet<Workload> = results.keys().map(|k| k.1).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{situation:?} CPUs: p50 / p99 / p99.9 in µs, or Gbit/s; in brackets the CPUs that were busy\n"
        );
        let head: Vec<String> = arms.iter().map(|a| a.name()).collect();
        let _ = writeln!(text, "| workload | {} |", head.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(arms.len()));
        for workload in workloads {
            let cells: Vec<String> = arms
                .iter()
                .map(|arm| {
                    let samples = results.get(&(situation, workload, *arm));
                    samples.map_or_else(|| "–".to_owned(), |s| cell(s))
                })
                .collect();
            let _ = writeln!(text, "| {} | {} |", workload.name(), cells.join(" | "));
        }
        text.push('\n');
    }
    text
}

fn of(samples: &[Sample], field: fn(&Latency) -> f64) -> Option<f64> {
    median(samples.iter().filter_map(|s| s.latency.as_ref()).map(field))
}

fn cell(samples: &[Sample]) -> String {
    let cpus = over(samples, |s| s.cpus);
    match (
        of(samples, |l| l.p50),
        of(samples, |l| l.p99),
        of(samples, |l| l.p99_9),
        median(samples.iter().filter_map(|s| s.gbit_per_second)),
    ) {
        (Some(p50), Some(p99), Some(p99_9), _) => {
            format!("{p50:.1} / {p99:.0} / {p99_9:.0} ({cpus:.2})")
        }
        (_, _, _, Some(rate)) => format!("{rate:.1} ({cpus:.2})"),
        _ => "–".to_owned(),
    }
}

fn latency<T>(samples: &[T], field: impl Fn(&T) -> road::Latency) -> String {
    format!(
        "{:.1} / {:.1} / {:.0}",
        over(samples, |s| field(s).p50_us),
        over(samples, |s| field(s).p99_us),
        over(samples, |s| field(s).p99_9_us)
    )
}

fn workers(results: &Results) -> String {
    if results.workers.is_empty() {
        return String::new();
    }
    let mut text = "64-byte datagrams, pod → host, the sender on one CPU and the worker on another; latency in µs from send to receive, p50 / p99 / p99.9\n\n\
        | worker | veths | latency | taken by the worker | sent a second | delivered a second | lost | CPUs | a round, µs |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for ((kind, veths), samples) in &results.workers {
        let _ = writeln!(
            text,
            "| {} | {veths} | {} | {:.0} % | {:.0} | {:.0} | {:.0} | {:.2} | {} |",
            kind.name(),
            latency(samples, |s| s.latency),
            100.0 * over(samples, |s| s.taken),
            over(samples, |s| s.sent_per_second),
            over(samples, |s| s.delivered_per_second),
            over(samples, |s| s.lost as f64),
            over(samples, |s| s.cpus),
            median(samples.iter().filter_map(|s| s.round_us))
                .map_or_else(|| "–".to_owned(), |round| format!("{round:.2}")),
        );
    }
    if let Some(each) = results.round_us_a_napi() {
        let _ = writeln!(
            text,
            "\nA NAPI more makes a round of the ring {each:.2} µs longer (from {} with one and with most veths, where packets wait for the round).",
            Kind::SqpollPrefer.name()
        );
    }
    for (kind, why) in &results.wanting {
        let _ = writeln!(text, "\nNo {}: {why}", kind.name());
    }
    text.push('\n');
    text
}

fn filters(results: &Results) -> String {
    if results.filters.is_empty() {
        return String::new();
    }
    let mut text = "64-byte datagrams, pod → host, on a node with connection tracking, masquerading and so many rules that each packet is held against; in brackets the ratio to stock\n\n\
        | rules | worker | latency | delivered a second | lost | CPUs | read a second on the worker's CPU |\n|---:|---|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for ((rules, kind), samples) in &results.filters {
        let delivered = |samples: &[workers::Sample]| over(samples, |s| s.delivered_per_second);
        let read = |samples: &[workers::Sample]| {
            median(samples.iter().filter_map(|s| s.read_per_second)).unwrap_or(f64::NAN)
        };
        let stock = results.filters.get(&(*rules, Kind::Stock));
        let ratio = |of: &dyn Fn(&[workers::Sample]) -> f64| {
            stock.map_or(f64::NAN, |stock| of(samples) / of(stock))
        };
        let _ = writeln!(
            text,
            "| {rules} | {} | {} | {:.0} ({:.2}) | {:.0} | {:.2} | {:.0} ({:.2}) |",
            kind.name(),
            latency(samples, |s| s.latency),
            delivered(samples),
            ratio(&delivered),
            over(samples, |s| s.lost as f64),
            over(samples, |s| s.cpus),
            read(samples),
            ratio(&read),
        );
    }
    text.push('\n');
    text
}

fn ends(results: &Results) -> String {
    if results.ends.is_empty() {
        return String::new();
    }
    let mut text = "Round trips between two pods on a CPU each, sockets with a window of 20 µs, idle-class workers on both CPUs: p50 / p99 / p99.9 in µs (CPUs)\n\n\
        | polled | no pause | 1 ms pause |\n|---|---:|---:|\n"
        .to_owned();
    for ends in Ends::ALL {
        let cells: Vec<String> = [0, 1000]
            .iter()
            .map(|pause| match results.ends.get(&(ends, *pause)) {
                None => "–".to_owned(),
                Some(samples) => format!(
                    "{} ({:.2})",
                    latency(samples, |s| s.latency),
                    over(samples, |s| s.cpus)
                ),
            })
            .collect();
        let _ = writeln!(text, "| {} | {} |", ends.name(), cells.join(" | "));
    }
    text.push('\n');
    text
}

/// The times of calls, and of the slow ones how much of it was a wait for a CPU.
fn calls(calls: impl Iterator<Item = Call>) -> String {
    let mut calls: Vec<Call> = calls.collect();
    calls.sort_by(|a, b| a.ms.total_cmp(&b.ms));
    let at = |quantile: f64| {
        let rank = (quantile * calls.len() as f64).ceil() as usize;
        calls
            .get(rank.saturating_sub(1))
            .map_or(0.0, |call| call.ms)
    };
    let slow: Vec<String> = calls
        .iter()
        .filter(|call| call.is_slow())
        .map(|call| format!("{:.1} ({:.1})", call.ms, call.waited_ms))
        .collect();
    format!(
        "{:.2} / {:.2} / {:.2} ms; over the goal {} of {}{}",
        at(0.5),
        at(0.99),
        at(1.0),
        slow.len(),
        calls.len(),
        match slow.len() {
            0 => String::new(),
            _ => format!(", ms (of it waiting for a CPU): {}", slow.join(", ")),
        }
    )
}

fn daemon(results: &Results) -> String {
    let samples = &results.daemon[..];
    let Some([first_stock, first]) = results.first_packets() else {
        return String::new();
    };
    let mut text = "100 pods on one shared worker of the daemon\n\n| | |\n|---|---:|\n".to_owned();
    let mut row = |what: &str, value: String| {
        let _ = writeln!(text, "| {what} | {value} |");
    };
    let attaches = samples.iter().flat_map(|s| s.attaches.iter().copied());
    row("attach, all rounds, p50 / p99 / max", calls(attaches));
    let detaches = samples.iter().flat_map(|s| s.detaches.iter().copied());
    row("detach, all rounds, p50 / p99 / max", calls(detaches));
    row(
        "memory a pod",
        format!("{:.1} KiB", over(samples, |s| s.kib_a_pod)),
    );
    row(
        "50 silent pods",
        format!(
            "{:.2} % of a core",
            100.0 * over(samples, |s| s.silent_50_pods)
        ),
    );
    let ratio = |a: fn(&node::Sample) -> f64, b: fn(&node::Sample) -> f64| {
        format!("{:.2}", over(samples, |s| a(s) / b(s)))
    };
    row(
        "first packet after a silence, stock, all rounds",
        first_stock.to_string(),
    );
    row(
        "first packet after a silence, attached, all rounds",
        first.to_string(),
    );
    row(
        "its p99 to stock's",
        format!("{:.2}", first.p99_us / first_stock.p99_us),
    );
    row("packet on a stock veth", latency(samples, |s| s.stock));
    row(
        "packet after kill -9 of the daemon",
        latency(samples, |s| s.killed),
    );
    row(
        "its p99 to stock's",
        ratio(|s| s.killed.p99_us, |s| s.stock.p99_us),
    );
    text.push('\n');
    text
}
