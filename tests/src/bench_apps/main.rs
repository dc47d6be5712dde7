//! `kbp-bench-apps`: real programs in pairs of containers, under the stock runtime and under kbp, with 1 and with 50 clients.
//!
//! Two pairs under the stock runtime and one under kbp are there at the same time, on the same CPUs and under containerd's default
//! seccomp profile, and take short turns: stock, kbp, stock, and back. What counts is the ratio of each turn to those beside it, so
//! that neither a machine that drifts nor its scatter from minute to minute favours an arm; the ratio of the two stock pairs, taken the
//! same way, shows how much is chance.

mod report;
mod row;
mod turns;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use kbp_kernel::cpu::Topology;
use kbp_tests::apps::{App, AppNode};
use kbp_tests::bench::cpu::{self, Relation};
use kbp_tests::bench::{Interrupt, in_sandbox};
use kbp_tests::{Sandbox, Settings};

use crate::row::Row;
use crate::turns::Trio;

/// Connections of the workload that makes a new one for each request.
const CONNECTIONS: u32 = 10_000;
/// Clients of the throughput figure.
const MANY: u32 = 50;

/// Compares real programs under the stock runtime with the same programs under kbp.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Times that everything is started afresh: how a program happens to be laid out in memory is part of the scatter.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Cycles of three turns in each round: stock, kbp, stock, and the next one back.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    cycles: u32,
    /// The same for loads of one client, where there is more to see.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    cycles_one: u32,
    /// Milliseconds of a turn that count.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u64).range(100..=20_000))]
    turn: u64,
    /// Milliseconds of the same load before them. With many clients kbp sees by then that nobody polls.
    #[arg(long, default_value_t = 1200, value_parser = clap::value_parser!(u64).range(0..=20_000))]
    lead: u64,
    /// The same for loads of one client.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(0..=20_000))]
    lead_one: u64,
    /// Only workloads of these names, or whose name contains one of them where none is called so.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Connections of the programs' loads, each with one request under way.
    #[arg(long, value_delimiter = ',', default_values_t = [1, MANY], value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: Vec<u32>,
    /// Begin with no further workload after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Annotation of both kbp pods, e.g. kbp.io/busy-poll=50.
    #[arg(long, value_parser = annotation)]
    annotation: Vec<(String, String)>,
    /// Lines for the config of kbp's shim, e.g. node-busy-poll = 100.
    #[arg(long, default_value = "")]
    config: String,
    /// Directory for result.json.
    #[arg(long, default_value = "target/bench-apps")]
    out: PathBuf,
    /// Add to the result.json there instead of replacing it: a long run in parts. Without --only, only what it lacks.
    #[arg(long)]
    add: bool,
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

    /// The server that it talks to.
    fn server(self) -> Option<App> {
        match self {
            Self::App(app) => Some(app),
            Self::ShortConnections => Some(App::StaticC),
            Self::NoSockets | Self::TrappedCalls => None,
        }
    }

    /// The command of a turn.
    fn load(
        self,
        address: &str,
        clients: u32,
        [lead, length]: [Duration; 2],
    ) -> Result<Vec<String>> {
        let words = |text: String| text.split_whitespace().map(str::to_owned).collect();
        let ms = length.as_millis();
        Ok(match self {
            Self::App(app) => app.load_after(address, clients, lead, length)?,
            Self::ShortConnections => words(format!(
                "/kbp/app-load connect {address}:{} {CONNECTIONS}",
                kbp_tests::apps::PORT
            )),
            Self::TrappedCalls => words(format!("/kbp/app-load calls {ms}")),
            Self::NoSockets => words(format!("/kbp/app-load syscalls {ms}")),
        })
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    in_sandbox("kbp-bench-apps", |sandbox, interrupt| {
        run(&options, sandbox, interrupt)
    })
}

/// The workloads that are meant and can be run here.
fn chosen(options: &Options, there: &[Row]) -> Result<Vec<Workload>> {
    let mut workloads = Workload::all();
    let exact = |w: &Workload| options.only.iter().any(|only| w.name() == only);
    let within = |w: &Workload| options.only.iter().any(|only| w.name().contains(only));
    if workloads.iter().any(exact) {
        workloads.retain(exact);
    } else if !options.only.is_empty() {
        workloads.retain(within);
    } else {
        workloads.retain(|w| !there.iter().any(|row| row.workload == w.name()));
    }
    if workloads.is_empty() {
        bail!(
            "no workload to measure: none is called like {:?}, or all are there",
            options.only
        );
    }
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
    Ok(workloads)
}

fn run(options: &Options, sandbox: &Sandbox, interrupt: &Interrupt) -> Result<ExitCode> {
    let begun = Instant::now();
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("create {}", options.out.display()))?;
    let topology = Topology::read()?;
    let place = cpu::place(&topology)?;
    let mut rows = match options.add {
        true => row::read(&options.out)?,
        false => Vec::new(),
    };
    let settings = Settings {
        kbp_config: format!("{}\n", options.config),
        ..Settings::default()
    };
    let node = AppNode::start(sandbox, settings)?;
    let other_work = cpu::other_work(topology.online.len())?;
    for workload in chosen(options, &rows)? {
        let late = |s: u64| begun.elapsed() >= Duration::from_secs(s);
        if options.seconds.is_some_and(late) {
            eprintln!("{}: left out: no time", workload.name());
            continue;
        }
        let again = workload.clients(options);
        rows.retain(|row| row.workload != workload.name() || !again.contains(&row.clients));
        for round in 1..=options.rounds {
            let begin = Instant::now();
            let mut trio = Trio::start(options, &node, sandbox, workload, place)
                .with_context(|| format!("start {}", workload.name()))?;
            for clients in workload.clients(options) {
                let row = row::of(&mut rows, workload.name(), *clients);
                let cycles = match clients {
                    1 => options.cycles_one,
                    _ => options.cycles,
                };
                for cycle in 0..cycles {
                    interrupt_check(interrupt)?;
                    let cycle = trio
                        .cycle(options, *clients, (round + cycle) % 2 == 0)
                        .with_context(|| format!("{} with {clients}", workload.name()))?;
                    row.cycles.push(cycle);
                }
            }
            trio.remove()?;
            // What is there stays when the rest is broken off.
            row::write(&options.out, &rows)?;
            eprintln!(
                "round {round} of {} · {} · {:.1} s",
                options.rounds,
                workload.name(),
                begin.elapsed().as_secs_f64()
            );
        }
    }
    println!("{}", report::table(&rows));
    let relation = match place.relation {
        Relation::Cores => "different cores",
        Relation::Threads => "two threads of one core",
        Relation::Same => "the same CPU, for want of another",
    };
    println!(
        "Client on CPU {}, server on CPU {} ({relation}); turns of {} ms after {} ms of the same (1 client: {} ms); other work took {:.0} % of the CPU time at the start.\nWritten: {}",
        place.client,
        place.server,
        options.turn,
        options.lead,
        options.lead_one,
        100.0 * other_work,
        row::file(&options.out).display()
    );
    Ok(ExitCode::SUCCESS)
}

fn interrupt_check(interrupt: &Interrupt) -> Result<()> {
    if interrupt.came() {
        bail!("interrupted");
    }
    Ok(())
}
