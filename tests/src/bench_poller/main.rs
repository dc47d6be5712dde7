//! `kbp-bench-poller`: what each kind of worker and each policy is worth, and what it costs.
//!
//! * *Programs*: redis, a UDP echo with pauses and a TCP stream in a pair of containers, under each policy, against the stock runtime and
//!   against its control, a spinner in the idle class that does nothing but keep the CPUs from halting.
//! * *Workers*: each kind on bare veths: packets a second from pod to host, and latency as one worker polls 1, 10 and 100 of them.
//! * *Filters*: the same flood on a node with connection tracking, masquerading and rules, as nodes have them.
//! * *Ends*: round trips of sockets that poll, with idle-class workers on the host ends, the pod ends, both or none.
//! * *Daemon*: 100 pods on one shared worker: attach, detach, memory, silence, and its death.
//!
//! In each round every arm takes its turn, every other round backwards, so that a drift of the machine favours none.

mod directions;
mod node;
mod programs;
mod report;
mod road;
mod spinner;
mod veths;
mod workers;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use kbp_kernel::cpu::Topology;
use kbp_tests::apps::AppNode;
use kbp_tests::bench::cpu::{self, Placement};
use kbp_tests::bench::{Interrupt, Machine, Rounds, in_sandbox, write_json};
use kbp_tests::{Sandbox, Settings};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use directions::Ends;
use programs::Bench;
use report::Results;
use workers::{Case, Kind};

/// After this time no further round begins; one takes about a minute and a half.
const LIMIT: Duration = Duration::from_secs(200);

/// Measures workers and their policies.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// One round of the shortest measurements.
    #[arg(long)]
    quick: bool,
    /// What is measured.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "programs,workers,filters,ends,daemon"
    )]
    parts: Vec<What>,
    /// Most rounds; none begins after 200 seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of a measurement.
    #[arg(long, default_value_t = 0.6)]
    seconds: f64,
    /// Arms of the programs: stock, spinner, and values of kbp.io/worker.
    #[arg(long, value_delimiter = ',', default_value = "stock,spinner,none,idle")]
    arms: Vec<programs::Arm>,
    /// Pauses between an answer and the next request of the UDP echo, in µs.
    #[arg(long, value_delimiter = ',', default_value = "0,200,1000,5000")]
    pauses: Vec<u32>,
    /// Whose CPUs the programs use: own (one each), shared (no cpusets), beside (both on one, and the other is the pool of the arms shared and dedicated).
    #[arg(long, value_delimiter = ',', default_value = "own,shared")]
    situations: Vec<programs::Situation>,
    /// File for the figures.
    #[arg(long, default_value = "target/bench/poller.json")]
    out: PathBuf,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Programs,
    Workers,
    Filters,
    Ends,
    Daemon,
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if options.quick {
        options.rounds = 1;
        options.seconds = 0.1;
        options.pauses = vec![0];
        options.situations.truncate(1);
    }
    in_sandbox("kbp-bench-poller", |sandbox, interrupt| {
        run(&options, sandbox, interrupt)
    })
}

fn run(options: &Options, sandbox: &Sandbox, interrupt: &Interrupt) -> Result<ExitCode> {
    // A file descriptor holds each pod.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let topology = Topology::read()?;
    let place = cpu::place(&topology)?;
    let mut results = Results {
        machine: Machine::read()?,
        other_work: cpu::other_work(topology.online.len())?,
        ..Results::default()
    };
    let wanted = |part: What| options.parts.contains(&part);
    let mut settings = Settings::default();
    if options.arms.iter().any(|arm| arm.is_pooled()) {
        settings.kbp_config = format!("cpus = \"{}\"\n", place.server);
    }
    let node = wanted(What::Programs)
        .then(|| AppNode::start(sandbox, settings))
        .transpose()?;
    let turns = Rounds::new(interrupt, LIMIT);
    for round in 0..options.rounds {
        if !turns.goes_on(round as usize)? {
            break;
        }
        let begin = Instant::now();
        let turn = Turn {
            options,
            place,
            turns: &turns,
            backwards: round % 2 == 1,
        };
        if let Some(node) = &node {
            turn.programs(node, &topology, &mut results)?;
        }
        if wanted(What::Workers) {
            turn.workers(&mut results)?;
        }
        if wanted(What::Filters) {
            turn.filters(&mut results)?;
        }
        if wanted(What::Ends) {
            turn.ends(&mut results)?;
        }
        if wanted(What::Daemon) {
            let sample = node::measure(sandbox, place, options.seconds).context("the daemon")?;
            results.daemon.push(sample);
        }
        results.rounds += 1;
        eprintln!(
            "round {} · {:.0} s",
            round + 1,
            begin.elapsed().as_secs_f64()
        );
        // What is there after each round stays when a later one is broken off.
        write_json(&options.out, &results.json())?;
    }
    println!("{}", report::tables(&results));
    println!(
        "Medians of {} rounds; client on CPU {}, server or worker on CPU {} where pinned ({:?}); other work took {:.0} % of the CPU time before the start.\nWritten: {}",
        results.rounds,
        place.client,
        place.server,
        place.relation,
        100.0 * results.other_work,
        options.out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// One round.
struct Turn<'a> {
    options: &'a Options,
    place: Placement,
    turns: &'a Rounds<'a>,
    backwards: bool,
}

impl Turn<'_> {
    fn order<T>(&self, arms: impl IntoIterator<Item = T>) -> Vec<T> {
        let mut arms: Vec<T> = arms.into_iter().collect();
        if self.backwards {
            arms.reverse();
        }
        arms
    }

    fn programs(
        &self,
        node: &AppNode<'_>,
        topology: &Topology,
        results: &mut Results,
    ) -> Result<()> {
        let bench = Bench {
            seconds: self.options.seconds,
            pauses: &self.options.pauses,
            node,
            topology,
            place: self.place,
        };
        for situation in &self.options.situations {
            for arm in self.order(self.options.arms.iter().copied()) {
                self.turns.check()?;
                eprintln!("programs · {situation:?} · {}", arm.name());
                let samples = bench
                    .arm(*situation, arm)
                    .with_context(|| format!("{} on {situation:?} CPUs", arm.name()))?;
                for (workload, sample) in samples {
                    let key = (*situation, workload, arm);
                    results.programs.entry(key).or_default().push(sample);
                }
            }
        }
        Ok(())
    }

    /// Those of `kinds` that this kernel has, in the order of this round. Why it lacks the others is noted.
    fn kinds(&self, kinds: impl IntoIterator<Item = Kind>, results: &mut Results) -> Vec<Kind> {
        let mut there = self.order(kinds);
        there.retain(|kind| match kind.wanting() {
            Some(why) => {
                results.wanting.insert(*kind, why);
                false
            }
            None => true,
        });
        there
    }

    fn workers(&self, results: &mut Results) -> Result<()> {
        for kind in self.kinds(Kind::ALL, results) {
            self.turns.check()?;
            eprintln!("workers · {}", kind.name());
            let most = if self.options.quick { 10 } else { 100 };
            for count in [1, 10, 100].into_iter().filter(|c| *c <= most) {
                let case = Case {
                    kind,
                    count,
                    rules: None,
                };
                let sample = workers::measure(case, self.place, self.options.seconds / 2.0)
                    .with_context(|| format!("{} on {count} veths", kind.name()))?;
                results
                    .workers
                    .entry((kind, count))
                    .or_default()
                    .push(sample);
            }
        }
        Ok(())
    }

    fn filters(&self, results: &mut Results) -> Result<()> {
        for kind in self.kinds(Kind::FILTERED, results) {
            self.turns.check()?;
            eprintln!("filters · {}", kind.name());
            for rules in workers::RULES {
                let case = Case {
                    kind,
                    count: 1,
                    rules: Some(rules),
                };
                let sample = workers::measure(case, self.place, self.options.seconds / 2.0)
                    .with_context(|| format!("{} with {rules} rules", kind.name()))?;
                results
                    .filters
                    .entry((rules, kind))
                    .or_default()
                    .push(sample);
            }
        }
        Ok(())
    }

    fn ends(&self, results: &mut Results) -> Result<()> {
        if Kind::Sqpoll.wanting().is_some() {
            return Ok(());
        }
        for ends in self.order(Ends::ALL) {
            self.turns.check()?;
            eprintln!("ends · {}", ends.name());
            for pause_us in [0, 1000] {
                let pause = Duration::from_micros(u64::from(pause_us));
                let sample = directions::measure(ends, pause, self.place, self.options.seconds)
                    .with_context(|| ends.name())?;
                results
                    .ends
                    .entry((ends, pause_us))
                    .or_default()
                    .push(sample);
            }
        }
        Ok(())
    }
}
