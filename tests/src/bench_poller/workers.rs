//! Each kind of worker on bare veths: packets a second, and latency as one polls many.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kbp_kernel::napi::{NapiSettings, NetdevSocket};
use kbp_kernel::napi_thread::NapiThread;
use kbp_kernel::poll_socket::{Ends, PollSockets, PollSocketsOptions, prime};
use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::ring::{PollRing, RingOptions};
use kbp_kernel::{CpuId, CpuSet, probe};
use kbp_tests::bench::cpu::{Placement, busy_seconds};
use serde::Serialize;

use crate::road::{Latency, Road};
use crate::spinner::Spinners;
use crate::veths::{Node, Pod};

/// Longer than any measurement.
const LEASE: Duration = Duration::from_secs(60);

/// For the rounds that are timed.
const ROUND_LIMIT: Duration = Duration::from_millis(20);

/// How many rules the nodes of [`super::What::Filters`] have.
pub(crate) const RULES: [u16; 3] = [0, 30, 100];

/// Who polls the host ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// The veth as the kernel makes it.
    Stock,
    /// The same, and an idle-class spinner on the worker's CPU.
    Spinner,
    /// kbp's veth, and no worker.
    Softirq,
    Sqpoll,
    /// With prefer-busy-poll and deferred interrupts: nobody else takes a packet.
    SqpollPrefer,
    Socket,
    Kthread,
    /// The NAPI's own thread, which sleeps between packets.
    Threaded,
    /// The ring on a veth of the profile `throughput`: TSO is left on, datagrams are chained.
    SqpollChained,
    /// The NAPI's own thread on such a veth.
    ThreadedChained,
}

impl Kind {
    pub(crate) const ALL: [Self; 8] = [
        Self::Stock,
        Self::Spinner,
        Self::Softirq,
        Self::Sqpoll,
        Self::SqpollPrefer,
        Self::Socket,
        Self::Kthread,
        Self::Threaded,
    ];

    /// For [`super::What::Filters`].
    pub(crate) const FILTERED: [Self; 6] = [
        Self::Stock,
        Self::Softirq,
        Self::Sqpoll,
        Self::Threaded,
        Self::SqpollChained,
        Self::ThreadedChained,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Spinner => "spinner",
            Self::Softirq => "softirq",
            Self::Sqpoll => "sqpoll",
            Self::SqpollPrefer => "sqpoll, prefer",
            Self::Socket => "socket",
            Self::Kthread => "kthread",
            Self::Threaded => "threaded",
            Self::SqpollChained => "sqpoll, chained",
            Self::ThreadedChained => "threaded, chained",
        }
    }

    /// Why this kernel has it not.
    pub(crate) fn wanting(self) -> Option<String> {
        let probed = match self {
            Self::Sqpoll | Self::SqpollPrefer | Self::SqpollChained => probe::sqpoll_napi(),
            Self::Socket => probe::socket_busy_poll(),
            Self::Kthread => probe::threaded_busy_poll(),
            Self::Threaded | Self::ThreadedChained => probe::threaded(),
            _ => Ok(()),
        };
        probed.err().map(|e| e.to_string())
    }

    fn is_chained(self) -> bool {
        matches!(self, Self::SqpollChained | Self::ThreadedChained)
    }

    fn is_pollable(self) -> bool {
        !matches!(self, Self::Stock | Self::Spinner)
    }
}

/// What polls, until it is dropped.
#[expect(dead_code, reason = "held for what their ends undo")]
enum Worker {
    Nobody,
    Spinners(Spinners),
    Ring(Box<PollRing>),
    Sockets(PollSockets),
    Threads(Vec<NapiThread>),
}

/// What one kind does with this many veths.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Sample {
    /// From the pod's `send` until the node's socket has the datagram.
    #[serde(flatten)]
    pub(crate) latency: Latency,
    /// Share of the datagrams that were handled on the worker's CPU.
    pub(crate) taken: f64,
    pub(crate) sent_per_second: f64,
    pub(crate) delivered_per_second: f64,
    pub(crate) lost: u64,
    /// What a program of the node reads that shares the worker's CPU, where it was tried.
    pub(crate) read_per_second: Option<f64>,
    /// How long a ring takes to go over all its NAPIs once, with nothing to be done.
    pub(crate) round_us: Option<f64>,
    /// CPUs that were busy on average during the flood.
    pub(crate) cpus: f64,
}

/// What is measured of a kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    /// Veths, with the traffic over one of them.
    pub(crate) count: u8,
    /// Rules that the node looks at for each packet, beside connection tracking and masquerading; None: it has no filter at all.
    pub(crate) rules: Option<u16>,
}

/// Measures one case.
pub(crate) fn measure(case: Case, place: Placement, seconds: f64) -> Result<Sample> {
    let Case { kind, count, rules } = case;
    let node = Node::new()?;
    let pods: Result<Vec<Pod>> = (0..count)
        .map(|number| node.pod(number, kind.is_pollable()))
        .collect();
    let pods = pods?;
    if kind.is_chained() {
        pods.iter().try_for_each(|pod| node.chain(pod))?;
    }
    if let Some(rules) = rules {
        node.filter(rules)?;
    }
    let worker = worker(kind, &node, &pods, place.server)?;
    let pod = pods.first().context("at least one pod")?;
    let ring = match &worker {
        Worker::Ring(ring) => Some(&**ring),
        _ => None,
    };
    // A thread of its own, since its CPU stays with it.
    let sample = std::thread::scope(|scope| {
        let measured = scope.spawn(|| -> Result<Sample> {
            process::set_affinity(0, &CpuSet::from_iter([place.client]))?;
            let round = ring.and_then(|ring| ring.round_time(ROUND_LIMIT));
            let mut sample = traffic(&node, pod, place.server, seconds)?;
            sample.round_us = round.map(|time| time.as_secs_f64() * 1e6);
            if rules.is_some() {
                sample.read_per_second = Some(read(&node, pod, place.server, seconds)?);
            }
            Ok(sample)
        });
        measured
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))?
    });
    // It ends before the pods do.
    drop(worker);
    sample
}

fn worker(kind: Kind, node: &Node, pods: &[Pod], cpu: CpuId) -> Result<Worker> {
    let scheduling = Scheduling::Other(0);
    Ok(match kind {
        Kind::Stock | Kind::Softirq => Worker::Nobody,
        Kind::Spinner => Worker::Spinners(Spinners::start(
            &CpuSet::from_iter([cpu]),
            &format!("kbp-bench-{}", std::process::id()),
        )?),
        Kind::Sqpoll | Kind::SqpollPrefer | Kind::SqpollChained => {
            let prefer = kind == Kind::SqpollPrefer;
            let mut ring = PollRing::new(&RingOptions {
                cpu,
                scheduling,
                lease: LEASE,
                prefer,
            })?;
            let mut netdev = NetdevSocket::open_in(&node.netns)?;
            for pod in pods {
                let [napi, _] = pod.napis(node)?;
                if prefer {
                    let settings = NapiSettings {
                        gro_flush_timeout: Some(20_000_000),
                        defer_hard_irqs: Some(100),
                        ..NapiSettings::default()
                    };
                    netdev.set(napi, settings)?;
                }
                ring.add(napi)?;
            }
            ring.wake()?;
            Worker::Ring(Box::new(ring))
        }
        Kind::Socket => {
            let mut sockets = PollSockets::new(&PollSocketsOptions {
                cpu,
                scheduling,
                lease: LEASE,
            })?;
            for pod in pods {
                let [napi, _] = pod.napis(node)?;
                let ends = Ends {
                    polled: &node.netns,
                    other: &pod.netns,
                    other_name: "eth0",
                    addresses: &[format!("10.77.{}.1", pod.number).parse()?],
                };
                sockets.add(prime(&ends, Some(napi))?);
            }
            sockets.wake();
            Worker::Sockets(sockets)
        }
        Kind::Kthread | Kind::Threaded | Kind::ThreadedChained => {
            let start = match kind {
                Kind::Kthread => NapiThread::start,
                _ => NapiThread::start_sleeping,
            };
            let threads: Result<Vec<NapiThread>> = pods
                .iter()
                .map(|pod| {
                    let [napi, _] = pod.napis(node)?;
                    Ok(start(&node.netns, pod.host_index, napi, cpu, scheduling)?)
                })
                .collect();
            Worker::Threads(threads?)
        }
    })
}

fn traffic(node: &Node, pod: &Pod, worker: CpuId, seconds: f64) -> Result<Sample> {
    let mut road = Road::new(node, pod, worker)?;
    // What is measured must not be a start from cold.
    road.singles(0.05)?;
    road.singles(seconds)?;
    let (before, busy) = (node.datagrams()?, busy_seconds()?);
    let (sent, elapsed) = road.flood(seconds);
    let cpus = (busy_seconds()? - busy) / elapsed;
    settled(node)?;
    // What the socket had room for is counted when it is read.
    road.drain();
    let delivered = node.datagrams()? - before;
    Ok(Sample {
        latency: road.latency(),
        taken: road.taken(),
        sent_per_second: sent as f64 / elapsed,
        delivered_per_second: delivered as f64 / elapsed,
        lost: sent.saturating_sub(delivered),
        read_per_second: None,
        round_us: None,
        cpus,
    })
}

/// Datagrams a second that a program reads on the worker's CPU during a flood.
fn read(node: &Node, pod: &Pod, cpu: CpuId, seconds: f64) -> Result<f64> {
    let road = Road::new(node, pod, cpu)?;
    let sink = road.reader()?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<u64> {
            process::set_affinity(0, &CpuSet::from_iter([cpu]))?;
            let mut received = [0u8; 64];
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                // It waits a moment at most, so that it sees the end.
                count += u64::from(sink.recv(&mut received).is_ok());
            }
            Ok(count)
        });
        let (_, elapsed) = road.flood(seconds);
        stop.store(true, Ordering::Relaxed);
        let count = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        Ok(count as f64 / elapsed)
    })
}

/// Waits until what is still in the queues has come.
fn settled(node: &Node) -> Result<()> {
    const QUIET: Duration = Duration::from_millis(10);
    let mut last = node.datagrams()?;
    let mut since = Instant::now();
    while since.elapsed() < QUIET {
        let now = node.datagrams()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(())
}
