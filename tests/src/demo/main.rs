//! `kbp-demo`: the same unmodified programs in real containers, under the stock runtime and under kbp, on this machine.
//!
//! It starts a containerd of its own in a private network and mount namespace, builds an image from the machine's own binaries, and
//! measures pairs of containers in alternating rounds. All of it is gone when it ends, however it ends.

mod node;
mod progress;
mod report;
mod stats;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use kbp_kernel::cpu::Topology;
use kbp_plot::RGBColor;
use kbp_tests::Sandbox;
use kbp_tests::bench::cpu::{self, Placement, Relation};
use kbp_tests::bench::machine::cpu_model;
use kbp_tests::bench::{self, Machine};

use node::{Arm, Node};
use progress::{Progress, human};
use stats::{LatencyRow, ThroughputRow};
use workload::{Sample, Workload};

const STOCK_COLOUR: RGBColor = RGBColor(200, 86, 52);
const KBP_COLOUR: RGBColor = RGBColor(38, 96, 164);

/// Compares containers under the stock runtime with the same containers under kbp.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Rounds; each measures every pair once under each arm.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds of a measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    seconds: u32,
    /// Only this arm; without it both, which is what makes a comparison.
    #[arg(long)]
    arm: Option<Arm>,
    /// Directory for result.json, throughput.json and the plots.
    #[arg(long, default_value = "target/demo")]
    out: PathBuf,
}

/// Everything that was measured.
#[derive(Default)]
struct Results {
    latency: BTreeMap<(Workload, Arm), Vec<stats::LatencySample>>,
    throughput: BTreeMap<(Workload, Arm), Vec<stats::ThroughputSample>>,
    inactive: BTreeSet<String>,
    status: Option<String>,
    /// The largest share of the CPU time that other work took when a round began; 0 to 1.
    other_work: f64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    bench::in_sandbox("kbp-demo", |sandbox, _| run(&options, sandbox))
}

fn run(options: &Options, sandbox: &Sandbox) -> Result<ExitCode> {
    let begin = Instant::now();
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("create {}", options.out.display()))?;
    let topology = Topology::read()?;
    let place = cpu::place(&topology)?;
    println!("{}", describe_placement(place));
    let cpus = topology.online.len();
    let before = cpu::other_work(cpus)?;
    eprintln!(
        "{}\nstarting a private containerd and building the image",
        describe_other_work(before)
    );
    let node = Node::start(sandbox)?;
    let environment = format!(
        "Linux {}, {cpus} CPUs ({}), {}",
        Machine::read()?.kernel,
        cpu_model(),
        node.versions()?
    );
    let results = measure(options, &node, place, cpus)?;
    drop(node);
    let other_work = describe_other_work(results.other_work.max(before));

    let latency = rows(&results.latency, LatencyRow::of);
    let throughput = rows(&results.throughput, ThroughputRow::of);
    bench::write_json(&options.out.join("result.json"), &latency)?;
    bench::write_json(&options.out.join("throughput.json"), &throughput)?;
    let title = format!(
        "Round trip between two containers of one node: median of {} rounds, band from the best to the worst",
        options.rounds
    );
    kbp_plot::write(&options.out, &title, &panels(&results))?;

    println!(
        "\n{}\n{}",
        report::latency_table(&latency),
        report::throughput_table(&throughput)
    );
    println!("{}", explain(options, &environment, place, &other_work));
    if let Some(status) = &results.status {
        println!("\nkbpctl status, while the containers ran:\n{status}");
    }
    println!("{}", written(&options.out, begin.elapsed()));
    if results.inactive.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    // Not a failure of the demo: the figures are what this kernel gets out of kbp.
    println!(
        "\nNot all of kbp was active, so the arm kbp shows less than kbp (kbpctl doctor tells what this machine lacks):"
    );
    for part in &results.inactive {
        println!("  {part}");
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(options: &Options, node: &Node<'_>, place: Placement, cpus: usize) -> Result<Results> {
    let mut results = Results::default();
    let arms = options
        .arm
        .map_or_else(|| vec![Arm::Stock, Arm::Kbp], |arm| vec![arm]);
    let steps = options.rounds as usize * arms.len() * Workload::ALL.len();
    let mut progress = Progress::new(steps, Duration::from_secs(u64::from(options.seconds) + 4));
    for round in 1..=options.rounds {
        // No container runs at this moment, so what the CPUs do is somebody else's.
        results.other_work = results.other_work.max(cpu::other_work(cpus)?);
        for workload in Workload::ALL {
            // The arms take turns in who goes first, so that a drift of the machine favours neither.
            let order: Vec<Arm> = if round % 2 == 1 {
                arms.clone()
            } else {
                arms.iter().rev().copied().collect()
            };
            for arm in order {
                progress.step(&format!(
                    "round {round} of {} · {} · {}",
                    options.rounds,
                    workload.name(),
                    arm.name()
                ));
                let measured = workload
                    .measure(node, arm, place, options.seconds)
                    .with_context(|| format!("{} under {}", workload.name(), arm.name()))?;
                match measured.sample {
                    Sample::Latency(sample) => results
                        .latency
                        .entry((workload, arm))
                        .or_default()
                        .push(sample),
                    Sample::Throughput(sample) => results
                        .throughput
                        .entry((workload, arm))
                        .or_default()
                        .push(sample),
                }
                results.inactive.extend(measured.inactive);
                results.status = results.status.or(measured.status);
            }
        }
    }
    progress.finish();
    if results.latency.is_empty() {
        bail!("nothing was measured");
    }
    Ok(results)
}

fn rows<S, R>(
    samples: &BTreeMap<(Workload, Arm), Vec<S>>,
    row: fn(&str, &str, &[S]) -> Option<R>,
) -> Vec<R> {
    samples
        .iter()
        .filter_map(|((workload, arm), samples)| row(workload.name(), arm.name(), samples))
        .collect()
}

fn panels(results: &Results) -> Vec<kbp_plot::Panel> {
    let panel = |workload: Workload| {
        let curve = |(arm, colour): (Arm, RGBColor)| {
            let samples = results.latency.get(&(workload, arm))?;
            let rounds: Vec<_> = samples.iter().map(|s| &s.latency.curve[..]).collect();
            Some(kbp_plot::Curve {
                label: arm.name().to_owned(),
                colour,
                points: kbp_plot::over_rounds(&rounds),
            })
        };
        let curves: Vec<_> = [(Arm::Stock, STOCK_COLOUR), (Arm::Kbp, KBP_COLOUR)]
            .into_iter()
            .filter_map(curve)
            .collect();
        (!curves.is_empty()).then(|| kbp_plot::Panel {
            title: workload.title().to_owned(),
            curves,
        })
    };
    Workload::ALL.into_iter().filter_map(panel).collect()
}

fn describe_other_work(share: f64) -> String {
    let percent = 100.0 * share;
    let weight = match percent {
        p if p < 2.0 => "so nothing else disturbed it",
        p if p < 10.0 => "which disturbs the tail of the figures",
        _ => "which disturbs every figure: take them again on a quiet machine",
    };
    format!(
        "Other work took up to {percent:.0} % of the CPU time in the seconds before the rounds, {weight}"
    )
}

fn describe_placement(place: Placement) -> String {
    let (client, server) = (place.client, place.server);
    match place.relation {
        Relation::Cores => format!("client on CPU {client}, server on CPU {server}"),
        Relation::Threads => format!(
            "client on CPU {client}, server on CPU {server}: two threads of one core, for want of another; they slow each other down"
        ),
        Relation::Same => {
            "this machine has one CPU, which client and server share: busy polling cannot help there, and the figures will show it"
                .to_owned()
        }
    }
}

fn explain(options: &Options, environment: &str, place: Placement, other_work: &str) -> String {
    let text = format!(
        "How these figures were got: {environment}. {rounds} rounds; in each, every pair of containers was made anew, warmed up and \
         measured for about {seconds} s, once under io.containerd.runc.v2 with the reference CNI plugin ptp (stock) and once under \
         io.containerd.kbp.v1 with the CNI plugin kbp (kbp), in changing order. Same binaries, same spec, same cpusets ({placement}); \
         kbp with its defaults, no annotations. Each figure is the median over the rounds. CPU s is the busy time of all CPUs of the \
         machine during one measurement, so kbp's pollers and the start of the client are in it. redis-benchmark counts in steps of \
         8 µs and shows a step's upper edge; its p99.9 is an upper bound. {other_work}.",
        rounds = options.rounds,
        seconds = options.seconds,
        placement = describe_placement(place),
    );
    report::wrap(&text, 110)
}

fn written(out: &Path, elapsed: Duration) -> String {
    let files = [
        "result.json",
        "throughput.json",
        "latency.svg",
        "latency.png",
    ]
    .map(|name| out.join(name).display().to_string());
    format!("Written in {}: {}", human(elapsed), files.join(", "))
}
