//! Unmodified programs in a pair of containers, under each policy.

use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result};
use kbp_kernel::cpu::Topology;
use kbp_poller::state;
use kbp_tests::Runtime;
use kbp_tests::apps::{AppNode, AppPod, Guest};
use kbp_tests::bench::clients::{self, Latency};
use kbp_tests::bench::cpu::{Placement, busy_seconds};
use serde::Serialize;

use crate::spinner::{Group, Spinners};

const ECHO: u16 = 7;
const REDIS: u16 = 6379;
const IPERF: u16 = 5201;
/// Requests by which redis-benchmark's rate is found out.
const WARM_UP: u64 = 5_000;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Arm {
    /// The stock runtime.
    Stock,
    /// The stock runtime, and a spinner in the idle class on each CPU.
    Spinner,
    /// kbp with that worker.
    Kbp(&'static str, Place),
}

/// Where the worker's thread is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// Where kbp has it.
    Left,
    /// In a cgroup of ordinary weight.
    Ordinary,
    /// In a cgroup that is idle as a whole.
    Idle,
}

const WORKERS: [&str; 5] = ["none", "idle", "shared", "dedicated", "auto"];

impl FromStr for Arm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (worker, place) = match text.split_once('@') {
            None => (text, Place::Left),
            Some((worker, "ordinary")) => (worker, Place::Ordinary),
            Some((worker, "idle")) => (worker, Place::Idle),
            Some((_, place)) => return Err(format!("no place {place:?}: ordinary, idle")),
        };
        Ok(match worker {
            "stock" => Self::Stock,
            "spinner" => Self::Spinner,
            _ => Self::Kbp(
                WORKERS.into_iter().find(|w| *w == worker).ok_or_else(|| {
                    format!("no arm {text:?}: stock, spinner, {}", WORKERS.join(", "))
                })?,
                place,
            ),
        })
    }
}

impl Arm {
    /// Whether it wants a CPU of the node's pool.
    pub(crate) fn is_pooled(self) -> bool {
        matches!(self, Self::Kbp("shared" | "dedicated", _))
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Stock => "stock".to_owned(),
            Self::Spinner => "spinner".to_owned(),
            Self::Kbp(worker, Place::Left) => worker.to_owned(),
            Self::Kbp(worker, Place::Ordinary) => format!("{worker}@ordinary"),
            Self::Kbp(worker, Place::Idle) => format!("{worker}@idle"),
        }
    }
}

/// Whose CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Situation {
    /// Client and server have a CPU each.
    Own,
    /// No cpusets: the scheduler decides.
    Shared,
    /// Both on the first CPU; the other is the pool's.
    Beside,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    /// Of a request/response pair.
    pub(crate) latency: Option<Latency>,
    /// Of a stream.
    pub(crate) gbit_per_second: Option<f64>,
    /// CPUs that were busy on average, those of pollers included.
    pub(crate) cpus: f64,
}

/// What is measured in a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Workload {
    Redis,
    Echo { pause_us: u32 },
    Stream,
}

impl Workload {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Redis => "redis GET".to_owned(),
            Self::Echo { pause_us: 0 } => "UDP echo".to_owned(),
            Self::Echo { pause_us } => format!("UDP echo, {pause_us} µs pause"),
            Self::Stream => "TCP stream".to_owned(),
        }
    }
}

/// A pair of containers and what is measured in it.
pub(crate) struct Bench<'a, 's> {
    pub(crate) seconds: f64,
    pub(crate) pauses: &'a [u32],
    pub(crate) node: &'a AppNode<'s>,
    pub(crate) topology: &'a Topology,
    pub(crate) place: Placement,
}

impl Bench<'_, '_> {
    /// Measures every workload under one arm, with a fresh pair.
    pub(crate) fn arm(&self, situation: Situation, arm: Arm) -> Result<Vec<(Workload, Sample)>> {
        let sandbox = self.node.containerd().sandbox();
        let runtime = match arm {
            Arm::Kbp(..) => Runtime::Kbp,
            _ => Runtime::Stock,
        };
        let shape = |id: &str, script: &str, cpu: kbp_kernel::CpuId| {
            let mut guest = Guest::new(id, ["sh", "-c", script]);
            guest.cpus = match situation {
                Situation::Own => Some(cpu.to_string()),
                Situation::Beside => Some(self.place.client.to_string()),
                Situation::Shared => None,
            };
            match arm {
                Arm::Kbp(worker, _) => guest.annotation("kbp.io/worker", worker),
                _ => guest,
            }
        };
        let mut samples = Vec::new();
        // One polling server a pod: a pod with more of them than CPUs lets the others sleep.
        for (script, ports, workloads) in self.servers() {
            let server = shape("server", &script, self.place.server);
            let server = self.node.pod(runtime, &server, |_| Ok(()))?;
            for port in ports {
                server.wait_for_port(port)?;
            }
            let client = shape("client", "exec sleep infinity", self.place.client);
            let client = self.node.pod(runtime, &client, |_| Ok(()))?;
            let group = match arm {
                Arm::Kbp(_, Place::Ordinary) => Some(false),
                Arm::Kbp(_, Place::Idle) => Some(true),
                _ => None,
            };
            let group = group
                .map(|idle| Group::new(&format!("{}-worker", sandbox.name()), idle))
                .transpose()?;
            if let Some(group) = &group {
                for pod in state::read_all(&sandbox.dir().join("run/kbp"))? {
                    let worker = pod.worker.context("the pod has no worker")?;
                    group.take(worker.tid)?;
                }
            }
            let spinners = match arm {
                Arm::Spinner => Some(Spinners::start(
                    &self.topology.online,
                    &format!("{}-spinner", sandbox.name()),
                )?),
                _ => None,
            };
            for workload in workloads {
                let sample = self
                    .one(workload, &client, server.address())
                    .with_context(|| workload.name())?;
                samples.push((workload, sample));
            }
            drop(spinners);
            client.remove()?;
            server.remove()?;
            drop(group);
        }
        Ok(samples)
    }

    /// The servers of a pod, by which ports they are known to be ready, and what is measured with them.
    fn servers(&self) -> [(String, Vec<u16>, Vec<Workload>); 2] {
        let redis = format!(
            "exec redis-server --port {REDIS} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no"
        );
        let others =
            format!("/kbp/udp-echo 0.0.0.0:{ECHO} & exec iperf3 -s -p {IPERF} >/dev/null 2>&1");
        let echo = self.pauses.iter().map(|pause_us| Workload::Echo {
            pause_us: *pause_us,
        });
        [
            (redis, vec![REDIS], vec![Workload::Redis]),
            (
                others,
                vec![ECHO, IPERF],
                echo.chain([Workload::Stream]).collect(),
            ),
        ]
    }

    fn one(&self, workload: Workload, client: &AppPod<'_, '_>, server: &str) -> Result<Sample> {
        let exec = |text: String| -> Result<(String, f64)> {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            let (begin, before) = (Instant::now(), busy_seconds()?);
            let stdout = client.exec(&words)?.stdout;
            let cpus = (busy_seconds()? - before) / begin.elapsed().as_secs_f64();
            Ok((stdout, cpus))
        };
        let seconds = self.seconds;
        let (latency, gbit, cpus) = match workload {
            Workload::Redis => {
                let load = |n: u64| {
                    format!("redis-benchmark -h {server} -t get -c 1 -n {n} --precision 3")
                };
                let rate = clients::redis_benchmark_rate(&exec(load(WARM_UP))?.0)?;
                let requests = ((rate * seconds) as u64).max(WARM_UP);
                let (text, cpus) = exec(load(requests))?;
                (Some(clients::redis_benchmark(&text)?), None, cpus)
            }
            Workload::Echo { pause_us } => {
                let (text, cpus) = exec(format!(
                    "/kbp/udp-rr {server}:{ECHO} {seconds} 64 {pause_us}"
                ))?;
                (Some(clients::udp_rr(&text)?), None, cpus)
            }
            Workload::Stream => {
                let (text, cpus) = exec(format!(
                    "iperf3 --client {server} --json --time {}",
                    seconds.ceil()
                ))?;
                (None, Some(clients::iperf3(&text)?.0), cpus)
            }
        };
        Ok(Sample {
            latency,
            gbit_per_second: gbit,
            cpus,
        })
    }
}
