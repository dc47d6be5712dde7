//! The way from a pod to its node, seen by one thread.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kbp_kernel::{CpuId, sockopt};
use serde::Serialize;

use crate::veths::{Node, Pod};

const BYTES: usize = 64;
/// A datagram that takes longer is lost. Where the worker is the only one to take it, it waits for the worker to be scheduled.
const LOST: Duration = Duration::from_secs(2);

/// Latencies in µs.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p99_9_us: f64,
}

impl std::fmt::Display for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.1} / {:.1} / {:.0}",
            self.p50_us, self.p99_us, self.p99_9_us
        )
    }
}

impl Latency {
    /// Of a histogram of nanoseconds.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let micros = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self {
            p50_us: micros(0.5),
            p99_us: micros(0.99),
            p99_9_us: micros(0.999),
        }
    }
}

/// A pod's socket and the node's, connected over the veth. One thread sends on the one and looks at the other: nobody sleeps and nobody
/// is woken, so what it sees is the way of the packet alone.
#[derive(Debug)]
pub(crate) struct Road {
    source: UdpSocket,
    sink: UdpSocket,
    worker: CpuId,
    latency: Histogram<u64>,
    taken: u64,
}

impl Road {
    pub(crate) fn new(node: &Node, pod: &Pod, worker: CpuId) -> Result<Self> {
        let (source, sink) = pod.sockets(node)?;
        sink.set_nonblocking(true)?;
        Ok(Self {
            source,
            sink,
            worker,
            latency: Self::histogram()?,
            taken: 0,
        })
    }

    /// For nanoseconds.
    pub(crate) fn histogram() -> Result<Histogram<u64>> {
        Histogram::new(3).context("histogram")
    }

    /// Nanoseconds from `send` until the node's socket has the datagram.
    pub(crate) fn one(&mut self) -> Result<u64> {
        let mut received = [0u8; BYTES];
        let sent = Instant::now();
        self.source.send(&[0; BYTES]).context("send")?;
        while self.sink.recv(&mut received).is_err() {
            ensure!(sent.elapsed() < LOST, "a datagram was lost");
        }
        Ok(u64::try_from(sent.elapsed().as_nanos())?)
    }

    /// One datagram after the other; what was counted before is forgotten.
    pub(crate) fn singles(&mut self, seconds: f64) -> Result<()> {
        self.latency.reset();
        self.taken = 0;
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < end {
            let nanoseconds = self.one()?;
            self.latency.record(nanoseconds)?;
            let cpu = sockopt::incoming_cpu(self.sink.as_fd())?;
            self.taken += u64::from(cpu == Some(self.worker));
        }
        Ok(())
    }

    pub(crate) fn latency(&self) -> Latency {
        Latency::of(&self.latency)
    }

    /// Share of the single datagrams that were handled on the worker's CPU.
    pub(crate) fn taken(&self) -> f64 {
        self.taken as f64 / self.latency.len().max(1) as f64
    }

    /// The node's socket, for somebody else to read.
    pub(crate) fn reader(&self) -> Result<UdpSocket> {
        self.sink.set_nonblocking(false)?;
        self.sink
            .set_read_timeout(Some(Duration::from_millis(20)))?;
        self.sink.try_clone().context("a second handle")
    }

    /// Reads what the flood left.
    pub(crate) fn drain(&self) {
        let mut received = [0u8; BYTES];
        while self.sink.recv(&mut received).is_ok() {}
    }

    /// As many as will go: how many, and the seconds. Nobody reads them: they count as they come to the socket.
    pub(crate) fn flood(&self, seconds: f64) -> (u64, f64) {
        let begin = Instant::now();
        let mut sent = 0u64;
        while begin.elapsed().as_secs_f64() < seconds {
            for _ in 0..64 {
                sent += u64::from(self.source.send(&[0; BYTES]).is_ok());
            }
        }
        (sent, begin.elapsed().as_secs_f64())
    }
}
