//! `kbp-bench-shim`: what a shim costs, in memory and in time, against containerd's own shim on this machine.
//!
//! Every arm runs the same containers in the same pod networks under one containerd of the bench's own. Time is taken around containerd's
//! Tasks service, without a client that would have to be started, and the arms take turns. Memory is that of shims whose
//! container sleeps. All of it is gone when the bench ends, however it ends.

mod memory;
mod phases;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use kbp_tests::bench::{Interrupt, Machine, Rounds, in_sandbox, write_json};
use kbp_tests::{Containerd, Generation, Network, Pod, Rootfs, Run, Runtime, Sandbox, Tasks};
use serde::Serialize;

use phases::Phases;
use report::{Quantiles, Report, Scale};

/// After this time no further round begins.
const LIMIT: Duration = Duration::from_secs(240);

/// Compares kbp's shim with containerd's.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// A few samples of each, in under half a minute.
    #[arg(long)]
    quick: bool,
    /// Rounds of one `true` an arm.
    #[arg(long, default_value_t = 41, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Pods in the second part.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(2..=200))]
    pods: u32,
    /// Which containerd.
    #[arg(long, value_enum, default_value = "machine")]
    containerd: Version,
    /// File for the figures.
    #[arg(long, default_value = "target/bench/shim.json")]
    out: PathBuf,
}

/// Which containerd.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Version {
    /// The one in PATH.
    Machine,
    /// 1.7, unpacked by tests/scripts/fetch-containerd.
    #[value(name = "1.7")]
    V1_7,
    /// 2.x, unpacked likewise.
    #[value(name = "2")]
    V2,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Arm {
    /// containerd's own shim.
    Stock,
    /// kbp's shim, with nothing of kbp asked for.
    KbpOff,
    /// kbp's shim as it comes.
    KbpOn,
}

impl Arm {
    const ALL: [Self; 3] = [Self::Stock, Self::KbpOff, Self::KbpOn];

    fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::KbpOff => "kbp off",
            Self::KbpOn => "kbp on",
        }
    }

    /// The start of its containers' ids.
    fn prefix(self) -> &'static str {
        match self {
            Self::Stock => "s",
            Self::KbpOff => "f",
            Self::KbpOn => "n",
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    in_sandbox("kbp-bench-shim", |sandbox, interrupt| {
        run(&options, sandbox, interrupt)
    })
}

fn run(options: &Options, sandbox: &Sandbox, interrupt: &Interrupt) -> Result<ExitCode> {
    let (rounds, pods) = match options.quick {
        true => (3, 3),
        false => (options.rounds as usize, options.pods as usize),
    };
    let generation = match options.containerd {
        Version::Machine => Generation::Machine,
        Version::V1_7 => Generation::V1_7,
        Version::V2 => Generation::V2,
    };
    let machine = Machine::read()?;
    let rootfs = Rootfs::busybox(&sandbox.dir().join("rootfs"))?;
    let containerd = Containerd::start(sandbox, generation)?;
    let network = Network::kbp(sandbox);
    let networks = (0..pods)
        .map(|n| Pod::new(sandbox, &format!("pod{n}"), &network))
        .collect::<kbp_tests::Result<Vec<_>>>()?;
    let bench = Bench {
        tasks: Tasks::of(&containerd),
        containerd: &containerd,
        rootfs: &rootfs,
        pods: &networks,
        rounds,
        turns: Rounds::new(interrupt, LIMIT),
    };
    let version = containerd.ctr(["version"])?.success()?.stdout;
    let version = version.lines().find_map(|l| {
        let (name, value) = l.trim().split_once(':')?;
        (name == "Version").then(|| value.trim().to_owned())
    });
    let report = Report {
        machine,
        containerd: version.unwrap_or_default(),
        scales: vec![bench.scale(1)?, bench.scale(pods)?],
    };
    println!("{}", report.text());
    write_json(&options.out, &report)?;
    println!("figures: {}", options.out.display());
    Ok(ExitCode::SUCCESS)
}

/// The measurements.
struct Bench<'a> {
    tasks: Tasks,
    containerd: &'a Containerd<'a>,
    rootfs: &'a Rootfs,
    pods: &'a [Pod<'a>],
    rounds: usize,
    turns: Rounds<'a>,
}

impl Bench<'_> {
    /// A container of an arm in a pod's network.
    fn make(&self, arm: Arm, id: &str, pod: &Pod<'_>, command: &[&str]) -> Result<()> {
        let run = Run::new(id, self.rootfs, command.iter().copied())
            .netns(&pod.netns.path())
            .seccomp();
        let run = match arm {
            Arm::Stock => run.runtime(Runtime::Stock),
            Arm::KbpOff => run
                .runtime(Runtime::Kbp)
                .annotation("kbp.io/busy-poll", "off")
                .annotation("kbp.io/worker", "none"),
            Arm::KbpOn => run.runtime(Runtime::Kbp),
        };
        self.containerd.ctr(run.create_arguments())?.success()?;
        Ok(())
    }

    /// Both measurements beside `pods` sleeping pods of each arm.
    fn scale(&self, pods: usize) -> Result<Scale> {
        eprintln!("{pods} sleeping pods an arm");
        let mut sleeping = Vec::new();
        for (n, pod) in self.pods.iter().take(pods).enumerate() {
            for arm in Arm::ALL {
                self.turns.check()?;
                let id = format!("{}{n}", arm.prefix());
                self.make(arm, &id, pod, &["sleep", "100000"])?;
                let pid = self.tasks.create(&id)?;
                self.tasks.start(&id)?;
                sleeping.push((arm, id, pid));
            }
        }
        let (mut memory, mut silent) = (Vec::new(), Vec::new());
        for arm in Arm::ALL {
            let inits = sleeping.iter().filter(|(of, ..)| *of == arm);
            let inits: Vec<u32> = inits.map(|(_, _, pid)| *pid).collect();
            let shims = memory::shims_of(&inits)?;
            memory.push((arm, memory::of_shims(&shims)?));
            silent.push((arm, memory::silent_share(&shims)?));
        }
        let times = self.times()?;
        for (_, id, _) in &sleeping {
            self.tasks.kill(id)?;
            self.tasks.delete(id)?;
        }
        let ids: Vec<&str> = sleeping.iter().map(|(_, id, _)| id.as_str()).collect();
        let delete = ["containers", "delete"].into_iter().chain(ids);
        self.containerd.ctr(delete)?.success()?;
        Ok(Scale::new(pods, &memory, &silent, &times))
    }

    /// `true` under each arm, by turns.
    fn times(&self) -> Result<Vec<(Arm, Quantiles<Phases>)>> {
        let mut took = Arm::ALL.map(|arm| (arm, Vec::new()));
        for arm in Arm::ALL {
            self.make(arm, &format!("{}t", arm.prefix()), &self.pods[0], &["true"])?;
        }
        for round in 0..self.rounds {
            if !self.turns.goes_on(round)? {
                break;
            }
            for turn in 0..took.len() {
                let at = (round + turn) % took.len();
                let (arm, took) = &mut took[at];
                self.turns.check()?;
                took.push(Phases::of(&self.tasks, &format!("{}t", arm.prefix()))?);
            }
        }
        let ids = Arm::ALL.map(|arm| format!("{}t", arm.prefix()));
        let delete = ["containers", "delete"].into_iter().map(str::to_owned);
        self.containerd.ctr(delete.chain(ids))?.success()?;
        Ok(took.map(|(arm, took)| (arm, Quantiles::of(&took))).into())
    }
}
