//! The result for a terminal.

use super::result::{ArmResult, Bench, QUANTILES, Summary};
use crate::text;

/// Tables and what to know about them.
pub(crate) fn render(bench: &Bench) -> String {
    let mut out = format!("{}\n\n{}", bench.description, text::table(&rows(bench)));
    out.push('\n');
    for note in notes(bench) {
        out += &format!("{}\n", text::fold(&note, 2, 110));
    }
    out
}

/// Header and one row an arm, then one row an arm that is compared with the base.
pub(crate) fn rows(bench: &Bench) -> Vec<Vec<String>> {
    let summaries: Vec<(&ArmResult, Summary)> =
        bench.arms.iter().map(|a| (a, a.summary())).collect();
    let base = bench.base().map(|a| (a, a.summary()));
    let columns = columns(bench);
    let mut rows = vec![
        std::iter::once("arm".to_owned())
            .chain(columns.iter().map(|c| c.head.to_owned()))
            .collect::<Vec<_>>(),
    ];
    for (arm, summary) in &summaries {
        rows.push(
            std::iter::once(arm.name.clone())
                .chain(
                    columns
                        .iter()
                        .map(|c| format_number((c.value)(summary), c.decimals)),
                )
                .collect(),
        );
    }
    if let Some((base, of_base)) = base {
        for (arm, summary) in summaries.iter().filter(|(a, _)| a.name != base.name) {
            rows.push(
                std::iter::once(format!("{} / {}", arm.name, base.name))
                    .chain(columns.iter().map(|c| {
                        let (value, base) = ((c.value)(summary), (c.value)(&of_base));
                        match (value, base) {
                            (Some(value), Some(base)) if base > 0.0 => {
                                format!("{:.2}×", value / base)
                            }
                            _ => "-".to_owned(),
                        }
                    }))
                    .collect(),
            );
        }
    }
    rows
}

/// A figure of an arm; None where it has none.
type Figure = Box<dyn Fn(&Summary) -> Option<f64>>;

/// One column.
pub(crate) struct Column {
    pub(crate) head: &'static str,
    decimals: usize,
    pub(crate) value: Figure,
}

/// The columns that this workload has.
pub(crate) fn columns(bench: &Bench) -> Vec<Column> {
    let column = |head, decimals, value: Figure| Column {
        head,
        decimals,
        value,
    };
    let mut columns = Vec::new();
    match bench.workload.as_str() {
        "bulk" => {
            columns.push(column("Gbit/s", 2, Box::new(|s| Some(s.gbit))));
            columns.push(column("low", 2, Box::new(|s| Some(s.gbit_range.0))));
            columns.push(column("high", 2, Box::new(|s| Some(s.gbit_range.1))));
            columns.push(column(
                "retransmits",
                0,
                Box::new(|s| Some(s.retransmits as f64)),
            ));
            columns.push(column("CPU s/GB", 3, Box::new(|s| s.cpu_s_per_gbyte)));
        }
        "pps" => {
            columns.push(column("sent/s", 0, Box::new(|s| Some(s.offered_rate))));
            columns.push(column("arrived/s", 0, Box::new(|s| Some(s.achieved_rate))));
            columns.push(column("low", 0, Box::new(|s| Some(s.rate_range.0))));
            columns.push(column("high", 0, Box::new(|s| Some(s.rate_range.1))));
            columns.push(column("lost", 0, Box::new(|s| Some(s.lost as f64))));
            columns.push(column("CPU µs each", 2, Box::new(|s| s.cpu_us_each)));
        }
        _ => {
            for (n, (_, head)) in QUANTILES.iter().enumerate() {
                columns.push(column(
                    head,
                    1,
                    Box::new(move |s: &Summary| s.quantiles.and_then(|q| q[n])),
                ));
            }
            columns.push(column("max µs", 0, Box::new(|s| Some(s.max_us))));
            columns.push(column("samples", 0, Box::new(|s| Some(s.samples as f64))));
            if bench.asked.rate.is_some() {
                columns.push(column("offered/s", 0, Box::new(|s| Some(s.offered_rate))));
            }
            columns.push(column("achieved/s", 0, Box::new(|s| Some(s.achieved_rate))));
            columns.push(column("lost", 0, Box::new(|s| Some(s.lost as f64))));
            columns.push(column("CPU µs each", 1, Box::new(|s| s.cpu_us_each)));
        }
    }
    columns.push(column("CPUs busy", 2, Box::new(|s| Some(s.cpus_busy))));
    columns.push(column("switches/s", 0, Box::new(|s| Some(s.switches_rate))));
    columns
}

fn format_number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.decimals$}"))
}

/// What a reader has to know.
pub(crate) fn notes(bench: &Bench) -> Vec<String> {
    let asked = &bench.asked;
    let mut notes = vec![format!(
        "{} of {} s after {} s of warm-up, arms in alternating order, a fresh pair of containers each; times in µs over all rounds together; CPU is that of the whole machine, pollers included.",
        match asked.rounds {
            1 => "1 round".to_owned(),
            rounds => format!("{rounds} rounds"),
        },
        asked.seconds,
        asked.warm_up
    )];
    notes.extend(bench.machine.warning().map(|w| format!("! {w}")));
    let (client, server) = (bench.machine.client_cpu, bench.machine.server_cpu);
    if client == server {
        notes.push(
            "! client and server share one CPU: who polls keeps the other from running".to_owned(),
        );
    }
    for arm in &bench.arms {
        let summary = arm.summary();
        if summary.quantiles.is_some() && asked.rounds > 1 {
            let (low, high) = summary.p50_range;
            if low > 0.0 && high / low > 1.25 {
                notes.push(format!(
                    "! the medians of {} differ between rounds: {low:.1} to {high:.1} µs",
                    arm.name
                ));
            }
        }
        if asked.rate.is_some() && summary.achieved_rate < 0.98 * summary.offered_rate {
            notes.push(format!(
                "! {} answered {:.0} of {:.0} requests a second: it could not keep up, and its latencies are those of a growing queue",
                arm.name, summary.achieved_rate, summary.offered_rate
            ));
        }
        if asked.rate.is_some() {
            notes.push(format!(
                "{}: 1 % of the requests were sent {:.0} µs late or later (that is part of their latency)",
                arm.name, summary.late_p99_us
            ));
        }
        if summary.stolen > 0.02 {
            notes.push(format!(
                "! during {} the hypervisor took {:.2} CPUs away",
                arm.name, summary.stolen
            ));
        }
        for part in &arm.inactive {
            notes.push(format!(
                "! {}: not active: {part} (kbpctl doctor tells more)",
                arm.name
            ));
        }
    }
    notes.extend(sockperf(bench));
    notes
}

/// How far this tool's ratios and sockperf's agree.
fn sockperf(bench: &Bench) -> Vec<String> {
    let Some((base, (own_base, their_base))) =
        bench.base().and_then(|a| Some((a, a.beside_sockperf()?)))
    else {
        return Vec::new();
    };
    let mut notes = vec![format!(
        "sockperf in the same containers: p50 of {} {their_base:.1} µs, kbpctl {own_base:.1} µs",
        base.name
    )];
    for arm in bench.arms.iter().filter(|a| a.name != base.name) {
        if let Some((own, theirs)) = arm.beside_sockperf() {
            let (own_ratio, their_ratio) = (own / own_base, theirs / their_base);
            notes.push(format!(
                "  {}: sockperf {theirs:.1} µs, kbpctl {own:.1} µs; ratio to {} {their_ratio:.3} and {own_ratio:.3}, {:+.0} %",
                arm.name,
                base.name,
                // Never a minus before a zero.
                (100.0 * (own_ratio / their_ratio - 1.0)).round() + 0.0
            ));
        }
    }
    notes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::machine::Machine;
    use super::super::result::tests::arm;
    use super::super::result::{Asked, FORMAT};
    use super::*;

    pub(crate) fn bench() -> Bench {
        Bench {
            format: FORMAT,
            workload: "rtt".to_owned(),
            description: "a <test>".to_owned(),
            started: 1_700_000_000,
            machine: Machine {
                cpus: 2,
                server_cpu: 1,
                ..Machine::default()
            },
            asked: Asked {
                rounds: 2,
                seconds: 1.0,
                warm_up: 0.1,
                rate: None,
                size: 64,
                hog: false,
                flood: None,
            },
            arms: vec![arm("stock", 80), arm("kbp", 8)],
        }
    }

    #[test]
    fn every_arm_is_compared_with_stock() {
        let mut bench = bench();
        bench.arms[1]
            .inactive
            .push("worker: no io_uring".to_owned());
        bench.machine.other_work = 0.5;
        let text = render(&bench);
        let ratio = text
            .lines()
            .find(|l| l.starts_with("kbp / stock"))
            .expect("ratio");
        assert!(ratio.contains("0.10×"), "{text}");
        let notes = notes(&bench).join("\n");
        for part in [
            "not active: worker: no io_uring",
            "other work took up to 50 %",
            "ratio to stock 0.100 and 0.100",
        ] {
            assert!(notes.contains(part), "{part}: {notes}");
        }
    }

    #[test]
    fn each_workload_has_columns_of_its_own() {
        let mut bench = bench();
        for (workload, head) in [("rtt", "p99.99"), ("pps", "arrived/s"), ("bulk", "Gbit/s")] {
            bench.workload = workload.to_owned();
            assert!(rows(&bench)[0].contains(&head.to_owned()), "{workload}");
            let width = rows(&bench)[0].len();
            assert!(rows(&bench).iter().all(|r| r.len() == width));
        }
    }
}
