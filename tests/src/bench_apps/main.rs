//! `kbp-bench-apps`: real programs in pairs of containers, under the stock runtime and under kbp, with 1 and with 50 clients.
//!
//! Both arms alternate within a round, on the same CPUs and under containerd's default seccomp profile. Medians over the rounds go to
//! a table and to `result.json`.

mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use kbp_kernel::cpu::Topology;
use kbp_tests::apps::{App, AppNode, AppPod, Figures, Guest, PORT};
use kbp_tests::bench::cpu::{self, Placement, Relation};
use kbp_tests::bench::in_sandbox;
use kbp_tests::{Runtime, Sandbox, Settings};
use serde::Serialize;

/// Connections of the workload that makes a new one for each request.
const CONNECTIONS: u32 = 10_000;
/// Clients of the throughput figure.
const MANY: u32 = 50;
/// Before a measurement.
const WARM: Duration = Duration::from_millis(300);
/// Before one with many clients, with as many: kbp takes so long to see that nobody polls for packets then.
const WARM_MANY: Duration = Duration::from_secs(2);

/// Compares real programs under the stock runtime with the same programs under kbp.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Rounds; each measures every workload once under each arm. One takes about four minutes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of a measurement.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=20))]
    seconds: u64,
    /// Only workloads whose name contains one of these texts.
    #[arg(long, value_delimiter = ',', default_value = "")]
    only: Vec<String>,
    /// Connections of the programs' loads, each with one request under way.
    #[arg(long, value_delimiter = ',', default_values_t = [1, MANY], value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: Vec<u32>,
    /// Annotation of both kbp pods, e.g. kbp.io/busy-poll=50.
    #[arg(long, value_parser = annotation)]
    annotation: Vec<(String, String)>,
    /// Directory for result.json.
    #[arg(long, default_value = "target/bench-apps")]
    out: PathBuf,
}

fn annotation(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("not KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Workload {
    /// A program with its load.
    App(App),
    /// Short connections, one after the other, to the static echo server.
    ShortConnections,
    /// System calls of a program that makes no socket.
    NoSockets,
    /// Calls that kbp's shim answers.
    TrappedCalls,
}

impl Workload {
    fn all() -> Vec<Self> {
        let apps = App::ALL.into_iter().map(Self::App);
        apps.chain([Self::ShortConnections, Self::NoSockets, Self::TrappedCalls])
            .collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::App(app) => app.name(),
            Self::ShortConnections => "short-connections",
            Self::NoSockets => "no-sockets",
            Self::TrappedCalls => "trapped-calls",
        }
    }

    fn clients(self, options: &Options) -> &[u32] {
        match self {
            Self::App(_) => &options.clients,
            _ => &[1],
        }
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sample {
    #[serde(flatten)]
    figures: Figures,
    /// Busy seconds of all CPUs meanwhile, the start of the load included.
    cpu_seconds: f64,
}

/// By workload, number of clients and arm (false: stock).
type Results = BTreeMap<(Workload, u32, bool), Vec<Sample>>;

fn main() -> ExitCode {
    let options = Options::parse();
    in_sandbox("kbp-bench-apps", |sandbox, _| run(&options, sandbox))
}

fn run(options: &Options, sandbox: &Sandbox) -> Result<ExitCode> {
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("create {}", options.out.display()))?;
    let topology = Topology::read()?;
    let place = cpu::place(&topology)?;
    let mut workloads = Workload::all();
    let named = |w: &Workload| options.only.iter().any(|only| w.name().contains(only));
    workloads.retain(named);
    workloads.retain(|w| match w {
        Workload::App(app) => match app.wanting() {
            Some(reason) => {
                eprintln!("{}: left out: {reason}", app.name());
                false
            }
            None => true,
        },
        _ => true,
    });
    if workloads.is_empty() {
        bail!("no workload's name contains one of {:?}", options.only);
    }
    let node = AppNode::start(sandbox, Settings::default())?;
    let mut results = Results::new();
    let mut busiest = 0.0f64;
    for round in 1..=options.rounds {
        busiest = busiest.max(cpu::other_work(topology.online.len())?);
        for workload in &workloads {
            // The arms take turns in who goes first, so that a drift of the machine favours neither.
            for kbp in [round % 2 == 0, round % 2 == 1] {
                let begin = Instant::now();
                let samples = measure(options, &node, *workload, kbp, place)
                    .with_context(|| format!("{} under {}", workload.name(), report::arm(kbp)))?;
                eprintln!(
                    "round {round} of {} · {} · {} · {:.1} s",
                    options.rounds,
                    workload.name(),
                    report::arm(kbp),
                    begin.elapsed().as_secs_f64()
                );
                for (clients, sample) in samples {
                    results
                        .entry((*workload, clients, kbp))
                        .or_default()
                        .push(sample);
                }
            }
            // What is there stays when the rest is broken off.
            report::write_results(&options.out, &results)?;
        }
    }
    println!("{}", report::table(&results));
    let relation = match place.relation {
        Relation::Cores => "different cores",
        Relation::Threads => "two threads of one core",
        Relation::Same => "the same CPU, for want of another",
    };
    println!(
        "Medians of {} rounds of {} s; client on CPU {}, server on CPU {} ({relation}); other work took up to {:.0} % of the CPU time before a round.\nWritten: {}",
        options.rounds,
        options.seconds,
        place.client,
        place.server,
        100.0 * busiest,
        options.out.join("result.json").display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Measures one workload under one arm, for each of its numbers of clients.
fn measure(
    options: &Options,
    node: &AppNode<'_>,
    workload: Workload,
    kbp: bool,
    place: Placement,
) -> Result<Vec<(u32, Sample)>> {
    let runtime = if kbp { Runtime::Kbp } else { Runtime::Stock };
    let on = |cpu: kbp_kernel::CpuId| {
        move |mut guest: Guest| {
            guest.cpus = Some(cpu.to_string());
            guest.annotations = options.annotation.clone();
            guest
        }
    };
    let server = match workload {
        Workload::App(app) => Some(app.serve(node, runtime, on(place.server))?),
        Workload::ShortConnections => Some(App::StaticC.serve(node, runtime, on(place.server))?),
        Workload::NoSockets | Workload::TrappedCalls => None,
    };
    let client = node.pod(
        runtime,
        &on(place.client)(Guest::idle("client")),
        |_| Ok(()),
    )?;
    // What is measured must not be a start from cold.
    one(workload, &client, server.as_ref(), 1, WARM)?;
    let mut samples = Vec::new();
    for clients in workload.clients(options) {
        let length = Duration::from_secs(options.seconds);
        if *clients > 1 {
            one(workload, &client, server.as_ref(), *clients, WARM_MANY)?;
        }
        let measured = one(workload, &client, server.as_ref(), *clients, length).or_else(|error| {
            // Fifty backends may take longer to start than they are measured for, on a busy machine.
            eprintln!("{}: once more: {error:#}", workload.name());
            one(workload, &client, server.as_ref(), *clients, 2 * length)
        });
        samples.push((*clients, measured?));
    }
    client.remove()?;
    if let Some(server) = server {
        server.remove()?;
    }
    Ok(samples)
}

fn one(
    workload: Workload,
    client: &AppPod<'_, '_>,
    server: Option<&AppPod<'_, '_>>,
    clients: u32,
    length: Duration,
) -> Result<Sample> {
    let address = server.map_or("", AppPod::address);
    let words = |text: String| text.split_whitespace().map(str::to_owned).collect();
    let command: Vec<String> = match workload {
        Workload::App(app) => app.load_command(address, clients, length)?,
        Workload::ShortConnections => {
            let count = if length > WARM { CONNECTIONS } else { 100 };
            words(format!("/kbp/app-load connect {address}:{PORT} {count}"))
        }
        Workload::TrappedCalls => words(format!("/kbp/app-load calls {}", length.as_millis())),
        Workload::NoSockets => words(format!("/kbp/app-load syscalls {}", length.as_millis())),
    };
    let before = cpu::busy_seconds()?;
    let output = client.exec(&command)?;
    let cpu_seconds = cpu::busy_seconds()? - before;
    let app = match workload {
        Workload::App(app) => app,
        _ => App::StaticC,
    };
    let figures = app.figures(&output.stdout, client.root())?;
    Ok(Sample {
        figures,
        cpu_seconds,
    })
}
