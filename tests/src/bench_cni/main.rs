//! `kbp-bench-cni`: how long ADD and DEL take, against the reference plugins, on this machine.
//!
//! The node and the pods are network namespaces of its own; whatever ends it, they end with it. The plugins take turns,
//! so that whatever else the machine does meets all of them.

mod node;
mod plugin;
mod report;
mod stats;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use kbp_kernel::netns::Netns;
use kbp_tests::Sandbox;
use kbp_tests::bench::{Interrupt, Machine, Rounds, in_sandbox, write_json};
use kbp_tests::binaries::kbp_binary;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use node::{Node, Plugins, Pod};
use plugin::{Arm, Variant, config};
use report::{Report, Row, Scale};
use stats::Summary;

/// How many calls at once are measured.
const AT_ONCE: usize = 30;
/// After this time no further round begins; the longest takes some ten seconds.
const LIMIT: Duration = Duration::from_secs(200);

/// Compares ADD and DEL of kbp with the reference plugins.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// A few samples of each, in under half a minute.
    #[arg(long)]
    quick: bool,
    /// Only IPv4 without masquerading, one call at a time: what the comparison with ptp needs, in a quarter of a minute.
    #[arg(long, conflicts_with = "quick")]
    alone: bool,
    /// The plugin to measure [default: that of the release build, or in KBP_BIN_DIR].
    #[arg(long)]
    kbp: Option<PathBuf>,
    /// File for the figures.
    #[arg(long, default_value = "target/bench/cni.json")]
    out: PathBuf,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Amount {
    sequential: usize,
    sequential_dual: usize,
    at_once: usize,
    at_once_dual: usize,
    few_pods: usize,
    many_pods: usize,
    scale: usize,
}

const WHOLE: Amount = Amount {
    sequential: 100,
    sequential_dual: 6,
    at_once: 4,
    at_once_dual: 1,
    few_pods: 10,
    many_pods: 500,
    scale: 100,
};

const QUICK: Amount = Amount {
    sequential: 10,
    sequential_dual: 1,
    at_once: 1,
    at_once_dual: 0,
    few_pods: 10,
    many_pods: 100,
    scale: 20,
};

const ALONE: Amount = Amount {
    sequential: 120,
    at_once: 0,
    ..WHOLE
};

fn main() -> ExitCode {
    let options = Options::parse();
    in_sandbox("kbp-bench-cni", |sandbox, interrupt| {
        run(&options, sandbox, interrupt)
    })
}

fn run(options: &Options, sandbox: &Sandbox, interrupt: &Interrupt) -> Result<ExitCode> {
    // A file descriptor holds each pod.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;

    let kbp = match &options.kbp {
        Some(path) => path.clone(),
        None => kbp_binary("kbp")?,
    };
    let plugins = Plugins::find(kbp)?;
    let bench = Bench {
        amount: match options {
            Options { quick: true, .. } => QUICK,
            Options { alone: true, .. } => ALONE,
            _ => WHOLE,
        },
        node: Node::new(
            Netns::of_process(sandbox.pid())?,
            &plugins,
            sandbox.dir().join("leases"),
        ),
        pods: Pod::several("pod", AT_ONCE)?,
        turns: Rounds::new(interrupt, LIMIT),
    };
    let mut report = Report {
        machine: Machine::read()?,
        ..Report::default()
    };
    report.start_only = bench.start_only()?;
    if options.alone {
        let variant = Variant {
            dual_stack: false,
            masquerade: false,
        };
        report.calls = bench.compare(variant)?;
        return finish(options, &report);
    }
    for dual_stack in [false, true] {
        for masquerade in [false, true] {
            let variant = Variant {
                dual_stack,
                masquerade,
            };
            // A quick run shows what the reference plugins' wait for IPv6 costs once.
            if options.quick && dual_stack && masquerade {
                continue;
            }
            report.calls.extend(bench.compare(variant)?);
        }
    }
    for dual_stack in [false, true] {
        report.work.extend(bench.own_work(Variant {
            dual_stack,
            masquerade: false,
        })?);
    }
    report.scale = bench.scale(&plugins, sandbox.dir())?;
    finish(options, &report)
}

fn finish(options: &Options, report: &Report) -> Result<ExitCode> {
    let text = report.text();
    println!("{text}");
    write_json(&options.out, report)?;
    println!("figures: {}", options.out.display());
    Ok(ExitCode::SUCCESS)
}

/// The measurements.
#[derive(Debug)]
struct Bench<'a> {
    amount: Amount,
    node: Node,
    pods: Vec<Pod>,
    turns: Rounds<'a>,
}

impl Bench<'_> {
    fn start_only(&self) -> Result<Option<Summary>> {
        let config = serde_json::json!({});
        let mut took = Vec::new();
        for _ in 0..self.amount.sequential {
            took.push(
                self.node
                    .call(Arm::KbpLocal, "VERSION", &self.pods[0], &config)?,
            );
        }
        Ok(Summary::of(&took))
    }

    /// What kbp itself does in an ADD, its built-in IPAM included: without the start of the process.
    fn own_work(&self, variant: Variant) -> Result<Vec<Row>> {
        let arm = Arm::KbpLocal;
        let config = config(arm, variant, self.node.leases());
        let mut rows = Vec::new();
        for (rounds, pods) in [
            (self.amount.sequential, &self.pods[..1]),
            (self.amount.at_once, &self.pods[..]),
        ] {
            let (family, at_once) = (variant.family(), pods.len());
            eprintln!("{family}, own work, {at_once} at once");
            let mut took = Vec::new();
            for round in 0..rounds {
                if !self.turns.goes_on(round)? {
                    break;
                }
                took.extend(match pods {
                    [pod] => vec![self.node.work(arm, "ADD", pod, &config)?],
                    pods => self.node.work_all(arm, "ADD", pods, &config)?,
                });
                self.node.call_all(arm, "DEL", pods, &config)?;
            }
            rows.extend(Summary::of(&took).map(|summary| Row {
                plugin: arm,
                family,
                masquerade: variant.masquerade,
                at_once,
                verb: "ADD",
                summary,
            }));
        }
        Ok(rows)
    }

    /// Every plugin, one call at a time and many at once.
    fn compare(&self, variant: Variant) -> Result<Vec<Row>> {
        let (one, many) = match variant.dual_stack {
            false => (self.amount.sequential, self.amount.at_once),
            true => (self.amount.sequential_dual, self.amount.at_once_dual),
        };
        // No plugin shall have to make or remove what all pods of a node share: its bridge, its nftables table.
        let configs = Arm::ALL.map(|arm| (arm, config(arm, variant, self.node.leases())));
        let residents = Pod::several("resident", configs.len())?;
        let each = || configs.iter().zip(&residents);
        for ((arm, config), resident) in each() {
            self.node.call(*arm, "ADD", resident, config)?;
        }
        let mut rows = Vec::new();
        for (rounds, pods) in [(one, &self.pods[..1]), (many, &self.pods[..])] {
            rows.extend(self.rounds(variant, rounds, pods)?);
        }
        for ((arm, config), resident) in each() {
            self.node.call(*arm, "DEL", resident, config)?;
        }
        Ok(rows)
    }

    fn rounds(&self, variant: Variant, rounds: usize, pods: &[Pod]) -> Result<Vec<Row>> {
        let masquerade = if variant.masquerade {
            ", masquerade"
        } else {
            ""
        };
        eprintln!("{}{masquerade}, {} at once", variant.family(), pods.len());
        let mut took: BTreeMap<(Arm, &'static str), Vec<Duration>> = BTreeMap::new();
        for round in 0..rounds {
            if !self.turns.goes_on(round)? {
                break;
            }
            for arm in Arm::turns(round) {
                self.turns.check()?;
                let config = config(arm, variant, self.node.leases());
                for verb in ["ADD", "DEL"] {
                    let calls = self.node.call_all(arm, verb, pods, &config)?;
                    took.entry((arm, verb)).or_default().extend(calls);
                }
            }
        }
        let rows = took.iter().filter_map(|((arm, verb), took)| {
            Some(Row {
                plugin: *arm,
                family: variant.family(),
                masquerade: variant.masquerade,
                at_once: pods.len(),
                verb,
                summary: Summary::of(took)?,
            })
        });
        Ok(rows.collect())
    }

    /// ADD on two nodes by turns, one of which has many pods. What grows with them for ptp, too, is the kernel's share.
    fn scale(&self, plugins: &Plugins, dir: &Path) -> Result<Vec<Scale>> {
        let variant = Variant {
            dual_stack: false,
            masquerade: true,
        };
        let mut nodes = Vec::new();
        for count in [self.amount.few_pods, self.amount.many_pods] {
            eprintln!("v4, masquerade, a node with {count} pods");
            let node = Node::new(
                Netns::create()?,
                plugins,
                dir.join(format!("leases-{count}")),
            );
            let config = config(Arm::KbpLocal, variant, node.leases());
            let pods = Pod::several("existing", count)?;
            for pod in &pods {
                self.turns.check()?;
                node.call(Arm::KbpLocal, "ADD", pod, &config)?;
            }
            let plain = Variant {
                masquerade: false,
                ..variant
            };
            let arms = [
                (Arm::KbpLocal, config),
                // Its masquerading is a chain of iptables for each pod, which is not the kernel's doing.
                (Arm::Ptp, plugin::config(Arm::Ptp, plain, node.leases())),
            ]
            .map(|(arm, config)| (arm, config, Vec::new()));
            nodes.push((count, node, pods, arms));
        }
        let pod = &self.pods[0];
        for round in 0..self.amount.scale {
            if !self.turns.goes_on(round)? {
                break;
            }
            for (_, node, _, arms) in &mut nodes {
                for (arm, config, took) in arms {
                    took.push(node.call(*arm, "ADD", pod, config)?);
                    node.call(*arm, "DEL", pod, config)?;
                }
            }
        }
        let mut scale = Vec::new();
        for (count, _, _, arms) in &nodes {
            scale.extend(arms.iter().filter_map(|(arm, _, took)| {
                Some(Scale {
                    plugin: *arm,
                    existing_pods: *count,
                    summary: Summary::of(took)?,
                })
            }));
        }
        Ok(scale)
    }
}
