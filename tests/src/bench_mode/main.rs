//! `kbp-bench-mode`: servers on epoll under the stock runtime and under kbp with each busy-poll mode, at several loads, on CPUs of their
//! own and on shared ones.
//!
//! Only the server's arm changes: both kbp arms have the same client, which spins. The arms take turns within a round; medians over
//! the rounds go to a table and to `result.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kbp_kernel::cpu::Topology;
use kbp_tests::apps::{App, AppNode, AppPod, Guest, PORT};
use kbp_tests::bench::cpu::{self, Placement};
use kbp_tests::bench::{Interrupt, in_sandbox, over, write_json};
use kbp_tests::{Runtime, Sandbox, Settings};
use serde::Serialize;

/// `/proc/PID/stat` counts in these.
const TICKS_PER_SECOND: f64 = 100.0;
/// The name of the arm without kbp.
const STOCK: &str = "stock";
/// Connections that share the requests of a rate.
const CONNECTIONS: u32 = 16;

/// Compares the busy-poll modes.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Rounds; each measures every load once under each arm.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Milliseconds of a measurement.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(100..=20_000))]
    milliseconds: u64,
    /// Servers.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "redis,memcached,static-c"
    )]
    servers: Vec<String>,
    /// Loads: `N` clients that ask again when they are answered, or `N/s` requests a second over 16 connections.
    #[arg(long, value_delimiter = ',', default_value = "1,1000/s,5000/s,20000/s,50", value_parser = load)]
    loads: Vec<Load>,
    /// Arms, by what the server's pod asks for: `stock`, or `KEY=VALUE` pairs joined by `+`, such as `busy-poll-mode=suspend`.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "stock,busy-poll-mode=spin,busy-poll-mode=suspend",
        value_parser = arm
    )]
    arms: Vec<String>,
    /// Whether CPUs are the pods' own or everybody's.
    #[arg(long, value_delimiter = ',', default_value = "own,shared")]
    cpus: Vec<Cpus>,
    /// Directory for result.json.
    #[arg(long, default_value = "target/bench-mode")]
    out: PathBuf,
}

/// Where the pods run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Cpus {
    /// Client and server each on a CPU of its own.
    Own,
    /// Both on every CPU.
    Shared,
}

/// What the client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Load {
    /// That many connections, each with one request under way.
    Closed(u32),
    /// That many requests a second.
    Rate(u32),
}

fn load(text: &str) -> Result<Load, String> {
    let number = |text: &str| match text.parse::<u32>() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text}: not a number, as in 50 or 5000/s")),
    };
    match text.strip_suffix("/s") {
        Some(rate) => number(rate).map(Load::Rate),
        None => number(text).map(Load::Closed),
    }
}

/// As it is, if every part is one that a pod can ask for.
fn arm(text: &str) -> Result<String, String> {
    let is_asked = |pair: &str| {
        let parts = pair.split_once('=');
        parts.is_some_and(|(key, value)| !key.is_empty() && !value.is_empty())
    };
    match text == STOCK || text.split('+').all(is_asked) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "{text}: neither {STOCK} nor KEY=VALUE, as in busy-poll-mode=suspend or busy-poll=50+worker=idle"
        )),
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match self {
            Self::Closed(1) => "1 client".to_owned(),
            Self::Closed(clients) => format!("{clients} clients"),
            Self::Rate(rate) => format!("{rate}/s"),
        };
        f.pad(&text)
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sample {
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// Share of a CPU that the server's process took.
    server_cpu: f64,
    /// Busy time of all CPUs for one answer, in µs.
    cpu_us: f64,
}

/// By server, CPUs, load and arm.
type Key = (usize, Cpus, Load, usize);

fn main() -> ExitCode {
    let options = Options::parse();
    in_sandbox("kbp-bench-mode", |sandbox, interrupt| {
        run(&options, sandbox, interrupt)
    })
}

fn run(options: &Options, sandbox: &Sandbox, interrupt: &Interrupt) -> Result<ExitCode> {
    let topology = Topology::read()?;
    let place = cpu::place(&topology)?;
    let other_work = cpu::other_work(topology.online.len())?;
    let apps = options.servers.iter().map(|name| {
        let app = App::ALL.into_iter().find(|app| app.name() == name);
        app.with_context(|| format!("{name} is no server of bench-apps"))
    });
    let apps = apps.collect::<Result<Vec<App>>>()?;
    let node = AppNode::start(sandbox, Settings::default())?;
    let mut results: BTreeMap<Key, Vec<Sample>> = BTreeMap::new();
    for round in 0..options.rounds as usize {
        for (number, app) in apps.iter().enumerate() {
            for cpus in &options.cpus {
                for turn in 0..options.arms.len() {
                    if interrupt.came() {
                        bail!("interrupted");
                    }
                    // Whoever goes first is another one in each round.
                    let arm = (turn + round) % options.arms.len();
                    let samples = measure(options, &node, *app, *cpus, &options.arms[arm], place)
                        .with_context(|| {
                        format!("{} under {}", app.name(), options.arms[arm])
                    })?;
                    for (load, sample) in options.loads.iter().zip(samples) {
                        let key = (number, *cpus, *load, arm);
                        results.entry(key).or_default().push(sample);
                    }
                    eprintln!(
                        "round {} · {} · {cpus:?} · {}",
                        round + 1,
                        app.name(),
                        options.arms[arm]
                    );
                }
            }
        }
        // What is there after each round stays when a later one is broken off.
        write_json(&options.out.join("result.json"), &rows(options, &results))?;
    }
    print(options, &results);
    println!(
        "Other work took {:.0} % of the CPU time before the start.",
        100.0 * other_work
    );
    Ok(ExitCode::SUCCESS)
}

/// Measures every load on one server.
fn measure(
    options: &Options,
    node: &AppNode<'_>,
    app: App,
    cpus: Cpus,
    arm: &str,
    place: Placement,
) -> Result<Vec<Sample>> {
    let runtime = match arm {
        STOCK => Runtime::Stock,
        _ => Runtime::Kbp,
    };
    let on = |mut guest: Guest, cpu: kbp_kernel::CpuId| {
        guest.cpus = (cpus == Cpus::Own).then(|| cpu.to_string());
        guest
    };
    let server = app.serve(node, runtime, |guest| {
        let mut guest = on(guest, place.server);
        for (key, value) in arm.split('+').filter_map(|pair| pair.split_once('=')) {
            guest = guest.annotation(&format!("kbp.io/{key}"), value);
        }
        guest
    })?;
    let client = node.pod(
        runtime,
        &on(Guest::idle("client"), place.client),
        |_| Ok(()),
    )?;
    let samples = options
        .loads
        .iter()
        .map(|load| one(app, &client, &server, *load, options.milliseconds))
        .collect::<Result<Vec<Sample>>>();
    client.remove()?;
    server.remove()?;
    samples
}

fn one(
    app: App,
    client: &AppPod<'_, '_>,
    server: &AppPod<'_, '_>,
    load: Load,
    milliseconds: u64,
) -> Result<Sample> {
    let protocol = match app {
        App::Redis => "resp",
        App::Memcached | App::MemcachedThreads => "memcache",
        App::Haproxy | App::HaproxyThreads | App::Node | App::Nginx => "http",
        _ => "echo",
    };
    let address = format!("{}:{PORT}", server.address());
    let (clients, rate) = match load {
        Load::Closed(clients) => (clients, None),
        Load::Rate(rate) => (CONNECTIONS, Some(rate)),
    };
    let mut command: Vec<String> = ["/kbp/app-load", protocol, &address]
        .map(str::to_owned)
        .into();
    command.extend([clients.to_string(), milliseconds.to_string()]);
    command.extend(rate.map(|rate| rate.to_string()));
    let pid = server.pid()?;
    let before = (cpu::busy_seconds()?, process_seconds(pid)?);
    let output = client.exec(&command)?;
    let busy = cpu::busy_seconds()? - before.0;
    let of_server = process_seconds(pid)? - before.1;
    let figures = app.figures(&output.stdout, client.root(), std::time::Duration::ZERO)?;
    Ok(Sample {
        per_second: figures.per_second,
        p50_us: figures.p50_us,
        p99_us: figures.p99_us,
        server_cpu: of_server / (milliseconds as f64 / 1e3),
        cpu_us: 1e6 * busy / figures.samples as f64,
    })
}

/// Time that a process has run so far.
fn process_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let (_, after_name) = stat.rsplit_once(')').context("no name in it")?;
    let ticks = after_name.split_whitespace().skip(11).take(2);
    let ticks: Result<Vec<u64>, _> = ticks.map(str::parse).collect();
    Ok(ticks?.iter().sum::<u64>() as f64 / TICKS_PER_SECOND)
}

fn median(samples: &[Sample]) -> Sample {
    let of = |value: fn(&Sample) -> f64| over(samples, value);
    Sample {
        per_second: of(|s| s.per_second),
        p50_us: of(|s| s.p50_us),
        p99_us: of(|s| s.p99_us),
        server_cpu: of(|s| s.server_cpu),
        cpu_us: of(|s| s.cpu_us),
    }
}

fn print(options: &Options, results: &BTreeMap<Key, Vec<Sample>>) {
    println!(
        "| server | CPUs | load | arm | answers/s | p50 µs | p99 µs | server CPU | CPU µs/answer |"
    );
    println!("|---|---|---|---|---:|---:|---:|---:|---:|");
    for ((app, cpus, load, arm), samples) in results {
        let m = median(samples);
        println!(
            "| {} | {} | {load} | {} | {:.0} | {:.1} | {:.1} | {:.0} % | {:.1} |",
            options.servers[*app],
            format!("{cpus:?}").to_lowercase(),
            options.arms[*arm],
            m.per_second,
            m.p50_us,
            m.p99_us,
            100.0 * m.server_cpu,
            m.cpu_us
        );
    }
    println!(
        "\nMedians of {} rounds of {} ms. Written: {}",
        options.rounds,
        options.milliseconds,
        options.out.join("result.json").display()
    );
}

/// The figures, for `result.json`.
fn rows(options: &Options, results: &BTreeMap<Key, Vec<Sample>>) -> Vec<serde_json::Value> {
    results
        .iter()
        .map(|((app, cpus, load, arm), samples)| {
            serde_json::json!({
                "server": options.servers[*app],
                "cpus": format!("{cpus:?}").to_lowercase(),
                "load": load.to_string(),
                "arm": options.arms[*arm],
                "samples": samples,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arm_that_asks_for_nothing_is_refused() {
        for text in ["stock", "busy-poll=50", "busy-poll=50+worker=idle"] {
            assert_eq!(arm(text).as_deref(), Ok(text));
        }
        for text in [
            "",
            "suspend",
            "busy-poll=",
            "=50",
            "busy-poll=50+idle",
            "stock+x",
        ] {
            assert!(arm(text).is_err(), "{text}");
        }
    }

    #[test]
    fn loads_are_read() {
        assert_eq!(load("50"), Ok(Load::Closed(50)));
        assert_eq!(load("5000/s"), Ok(Load::Rate(5000)));
        for text in ["", "0", "0/s", "x/s", "5/m", "-1"] {
            assert!(load(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_middle_one_counts() {
        let of = |p50_us| Sample {
            per_second: 1.0,
            p50_us,
            p99_us: 1.0,
            server_cpu: 1.0,
            cpu_us: 1.0,
        };
        assert_eq!(median(&[of(9.0), of(1.0), of(3.0)]).p50_us, 3.0);
    }
}
