//! `kbp-bench-window`: what a busy-poll window is worth, and whom it hurts, over the pauses between requests.
//!
//! A UDP echo server on epoll and a blocking client, each in a pod, with pauses from 0 to 10 ms, in five situations: CPUs of their own,
//! shared CPUs (also with each program bound to one of them), one CPU for both, a server under a CPU quota, and a stock pair whose CPUs
//! such a pair uses as well. The arms are the
//! stock runtime and kbp with each window. Every measurement is kept in `raw.jsonl` at once, and what is there is not measured again: a
//! run that was broken off goes on where it was.

mod beside;
mod harm;
mod plot;
mod record;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use kbp_kernel::CpuId;
use kbp_kernel::cpu::Topology;
use kbp_tests::apps::{AppNode, AppPod, Guest};
use kbp_tests::bench::{cpu, in_sandbox};
use kbp_tests::{Runtime, Sandbox, Settings};
use serde_json::Value;

use record::{Key, Record, Records, Situation};

const PORT: u16 = 7;
/// The name of the arm without kbp.
const STOCK: &str = "stock";

/// Measures busy-poll windows over pauses between requests.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Rounds; with the defaults one takes about six minutes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of a measurement.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Seconds before each measurement in which the same is done and does not count. With --harm two, so that windows have been taken
    /// away from those who harm others by then.
    #[arg(long, default_value_t = 0.0)]
    warm: f64,
    /// Pauses between an answer and the next request, in µs.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0,50,200,1000,5000,10000"
    )]
    gaps: Vec<u32>,
    /// Whether pauses are as long on average only, with exponential spread.
    #[arg(long)]
    jitter: bool,
    /// Arms: stock, and values of kbp.io/busy-poll; CLIENT/SERVER where they differ.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "stock,off,10,20,50,100,200,auto"
    )]
    windows: Vec<String>,
    /// Threads in the server's container that wait for timers of 1, 2, 3 ms and so on; how late they are is in the records.
    #[arg(long, default_value_t = 0)]
    timers: u32,
    /// Values of kbp.io/worker.
    #[arg(long, value_delimiter = ',', default_value = "none")]
    workers: Vec<String>,
    /// Other annotations of the kbp pods, KEY=VALUE.
    #[arg(long, value_parser = annotation)]
    annotation: Vec<(String, String)>,
    /// Situations: own, shared, pinned, one-cpu, quota, neighbour.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "own,shared,pinned,one-cpu,quota,neighbour"
    )]
    situations: Vec<Situation>,
    /// Only what shows that nobody is harmed: stock against auto, with a table of what is promised and `harm.json`. The options for
    /// pauses, windows and situations do not count then.
    #[arg(long)]
    harm: bool,
    /// Only what pairs with each window do to a stock pair, by turns, with a table of ratios and `beside.json`; rounds and situations do
    /// not count then.
    #[arg(long, conflicts_with = "harm")]
    beside: bool,
    /// With --beside and --harm: turns of each arm beside a stock pair.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000))]
    sweeps: u32,
    /// With --beside: pauses of the stock pair, in µs.
    #[arg(long, value_delimiter = ',', default_value = "200")]
    measured_gaps: Vec<u32>,
    /// With --beside: where the others are: neighbour (a cpuset each, those of the stock pair), pinned, shared.
    #[arg(long, default_value = "neighbour")]
    shape: Situation,
    /// Directory for raw.jsonl, result.json and the curves.
    #[arg(long, default_value = "target/bench-window")]
    out: PathBuf,
}

fn annotation(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("not KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if (options.harm || options.beside) && options.warm == 0.0 {
        options.warm = harm::WARM;
    }
    in_sandbox("kbp-bench-window", |sandbox, _| run(&options, sandbox))
}

fn run(options: &Options, sandbox: &Sandbox) -> Result<ExitCode> {
    let mut records = Records::open(&options.out)?;
    let topology = Topology::read()?;
    let place = cpu::place(&topology)?;
    let busy = cpu::other_work(topology.online.len())?;
    let node = AppNode::start(sandbox, Settings::default())?;
    let bench = Bench {
        options,
        node: &node,
        cpus: [place.client, place.server],
    };
    if options.beside {
        let (gaps, measured) = (&options.gaps, &options.measured_gaps);
        let rows = bench.beside(sandbox, &options.windows, gaps, measured)?;
        println!("{}", beside::table(&rows));
        beside::write(&options.out, &rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (plan, arms) = match options.harm {
        true => (
            harm::plan(&options.situations),
            harm::ARMS.map(str::to_owned).to_vec(),
        ),
        false => {
            let gaps = |s: &Situation| (*s, s.gaps(&options.gaps));
            let plan = options.situations.iter().map(gaps).collect();
            (plan, options.windows.clone())
        }
    };
    for round in 1..=options.rounds {
        for (situation, gaps) in &plan {
            for worker in &options.workers {
                // Every other round backwards, so that a drift of the machine favours no window.
                let mut windows: Vec<&String> = arms.iter().collect();
                if round % 2 == 0 {
                    windows.reverse();
                }
                for window in windows {
                    let worker = if window == STOCK { "none" } else { worker };
                    bench
                        .arm(&mut records, round, *situation, gaps, [window, worker])
                        .with_context(|| format!("{} with window {window}", situation.name()))?;
                }
            }
        }
    }
    let mut beside = Vec::new();
    if options.harm && options.situations.contains(&Situation::Neighbour) {
        let arms = harm::ARMS.map(str::to_owned);
        beside = bench.beside(sandbox, &arms, &harm::DISTURBERS, &[harm::STEADY])?;
        println!("{}", beside::table(&beside));
        beside::write(&options.out, &beside)?;
    }
    let tables = report::tables(&records);
    println!("{tables}");
    report::write_results(&options.out, &records)?;
    plot::write(&options.out, &records)?;
    if options.harm {
        let promises = harm::judge(&records, &beside);
        println!("{}", harm::table(&promises));
        harm::write(&options.out, &promises)?;
    }
    println!(
        "Medians over the rounds; client on CPU {}, server on CPU {} where pinned ({:?}); other work took {:.0} % of the CPU time before the start.\nWritten: raw.jsonl, result.json, window.svg and window.png in {}",
        place.client,
        place.server,
        place.relation,
        100.0 * busy,
        options.out.display()
    );
    Ok(ExitCode::SUCCESS)
}

struct Bench<'a, 's> {
    options: &'a Options,
    node: &'a AppNode<'s>,
    cpus: [CpuId; 2],
}

/// Two pods of one arm that talk to each other.
struct Pair<'n, 's> {
    server: AppPod<'n, 's>,
    client: AppPod<'n, 's>,
    /// What the load's command begins with.
    bound: String,
}

impl<'s> Bench<'_, 's> {
    /// Measures what is not there yet of one arm in one situation.
    fn arm(
        &self,
        records: &mut Records,
        round: u32,
        situation: Situation,
        gaps: &[u32],
        [window, worker]: [&str; 2],
    ) -> Result<()> {
        let key = |gap: u32| Key {
            situation,
            window: window.to_owned(),
            worker: worker.to_owned(),
            gap_us: gap,
            round,
        };
        let wanting: Vec<u32> = gaps
            .iter()
            .copied()
            .filter(|gap| !records.has(&key(*gap)))
            .collect();
        if wanting.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let spread = self.options.jitter;
        let pair = self.pair("", situation, window, worker)?;
        // In this one a stock pair is measured, and the arm's own pair is what disturbs it.
        let measured = match situation {
            Situation::Neighbour => Some(self.pair("stock-", situation, STOCK, "none")?),
            _ => None,
        };
        for gap in &wanting {
            let record = match &measured {
                None => self.alone(&pair, key(*gap), &pause(*gap, spread))?,
                Some(stock) => {
                    let [seconds, warm] = self.seconds();
                    let longer = [seconds + 1.0, warm];
                    let mut noise = pair.client.exec_start(
                        &format!("noise-{gap}"),
                        &pair.load(&pause(*gap, spread), longer),
                    )?;
                    let record = stock.measure(key(*gap), "200", self.seconds())?;
                    let limit = Duration::from_secs_f64(seconds + warm + 20.0);
                    noise.wait(limit).context("end of the noise")?.success()?;
                    record
                }
            };
            records.add(record)?;
        }
        for pair in [Some(pair), measured].into_iter().flatten() {
            pair.client.remove()?;
            pair.server.remove()?;
        }
        eprintln!(
            "round {round} of {} · {} · window {window} · worker {worker} · {} pauses · {:.1} s",
            self.options.rounds,
            situation.name(),
            wanting.len(),
            begin.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Measures a pair, beside threads that wait for timers where they are asked for.
    fn alone(&self, pair: &Pair<'_, '_>, key: Key, pause: &str) -> Result<Record> {
        let [seconds, warm] = self.seconds();
        let name = format!("ticks-{}", key.gap_us);
        let command = format!("/kbp/ticks {} {}", self.options.timers, seconds + warm);
        let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        let ticks = (self.options.timers > 0).then(|| pair.server.exec_start(&name, &command));
        let mut record = pair.measure(key, pause, [seconds, warm])?;
        if let Some(ticks) = ticks {
            let limit = Duration::from_secs_f64(seconds + warm + 20.0);
            let output = ticks?.wait(limit).context("end of the timers")?.success()?;
            let value: Value = serde_json::from_str(output.stdout.trim())
                .with_context(|| format!("read what ticks printed: {output}"))?;
            record.late_us = ["p50_us", "p99_us"].map(|name| value[name].as_f64());
        }
        Ok(record)
    }

    /// Those that count, and those before.
    fn seconds(&self) -> [f64; 2] {
        [self.options.seconds, self.options.warm]
    }

    fn pair(
        &self,
        prefix: &str,
        situation: Situation,
        window: &str,
        worker: &str,
    ) -> Result<Pair<'_, 's>> {
        let runtime = if window == STOCK {
            Runtime::Stock
        } else {
            Runtime::Kbp
        };
        let [client_cpu, server_cpu] = self.cpus;
        let shape = |id: &str, command: &[&str], cpu: CpuId| {
            let mut guest = Guest::new(&format!("{prefix}{id}"), command.iter().copied());
            guest.cpus = match situation {
                Situation::Shared | Situation::Pinned => None,
                Situation::OneCpu => Some(client_cpu.to_string()),
                _ => Some(cpu.to_string()),
            };
            if situation == Situation::Quota && id == "server" {
                guest.quota = Some(0.5);
            }
            if runtime == Runtime::Kbp {
                let (of_client, of_server) = window.split_once('/').unwrap_or((window, window));
                let own = if id == "server" { of_server } else { of_client };
                guest = guest
                    .annotation("kbp.io/busy-poll", own)
                    .annotation("kbp.io/worker", worker);
                for (key, value) in &self.options.annotation {
                    guest = guest.annotation(key, value);
                }
            }
            guest
        };
        let bound = |cpu: CpuId| match situation {
            Situation::Pinned => format!("taskset --cpu-list {cpu} "),
            _ => String::new(),
        };
        let echo = format!("{}/kbp/udp-echo 0.0.0.0:{PORT}", bound(server_cpu));
        let echo: Vec<&str> = echo.split_whitespace().collect();
        let server = shape("server", &echo, server_cpu);
        let server = self.node.pod(runtime, &server, |_| Ok(()))?;
        server.wait_for_port(PORT)?;
        let client = shape("client", &["sleep", "infinity"], client_cpu);
        let client = self.node.pod(runtime, &client, |_| Ok(()))?;
        Ok(Pair {
            server,
            client,
            bound: bound(client_cpu),
        })
    }
}

/// A pause as the client takes it.
fn pause(gap: u32, spread: bool) -> String {
    let mark = if spread { "~" } else { "" };
    format!("{mark}{gap}")
}

impl Pair<'_, '_> {
    fn load(&self, gap: &str, [seconds, warm]: [f64; 2]) -> Vec<String> {
        let text = format!(
            "{}/kbp/udp-rr {}:{PORT} {seconds} 64 {gap} {warm}",
            self.bound,
            self.server.address()
        );
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn measure(&self, key: Key, gap: &str, seconds: [f64; 2]) -> Result<Record> {
        let server = self.server.pid()?;
        let throttled = record::throttled(server);
        let busy = cpu::busy_seconds()?;
        let output = self.client.exec(&self.load(gap, seconds))?;
        let cpu_seconds = cpu::busy_seconds()? - busy;
        let value: Value = serde_json::from_str(output.stdout.trim())
            .with_context(|| format!("read what udp-rr printed: {output}"))?;
        let number = |name: &str| {
            value[name]
                .as_f64()
                .with_context(|| format!("udp-rr printed no {name}"))
        };
        Ok(Record {
            key,
            p50_us: number("p50_us")?,
            p99_us: number("p99_us")?,
            p99_9_us: number("p99_9_us")?,
            samples: number("samples")? as u64,
            lost: number("lost")? as u64,
            throttled_periods: record::throttled(server).saturating_sub(throttled),
            cpu_seconds,
            late_us: [None; 2],
        })
    }
}
