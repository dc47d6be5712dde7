//! Which ends of the veths an idle-class worker had better poll, beside sockets that poll for themselves.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::ring::{PollRing, RingOptions};
use kbp_kernel::{CpuId, CpuSet, Micros, NapiId, sockopt};
use kbp_tests::bench::cpu::{Placement, busy_seconds};
use serde::Serialize;

use crate::road::{Latency, Road};
use crate::veths::{Node, Pod};

const PORT: u16 = 7;
/// The window that `auto` gives pods on shared CPUs.
const WINDOW: Micros = Micros(20);
const LEASE: Duration = Duration::from_secs(60);
const LOST: Duration = Duration::from_secs(2);

/// What the workers poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ends {
    /// Stock veths, and sockets that sleep.
    Stock,
    /// There are none: the sockets poll.
    Sockets,
    /// Host ends: pod → host.
    Host,
    /// Pod ends: host → pod.
    Pod,
    /// All of them.
    Both,
}

impl Ends {
    pub(crate) const ALL: [Self; 5] = [
        Self::Stock,
        Self::Sockets,
        Self::Host,
        Self::Pod,
        Self::Both,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Sockets => "sockets alone",
            Self::Host => "and workers on host ends",
            Self::Pod => "and workers on pod ends",
            Self::Both => "and workers on both",
        }
    }

    fn of(self, [host, pod]: [NapiId; 2]) -> Vec<NapiId> {
        match self {
            Self::Stock | Self::Sockets => Vec::new(),
            Self::Host => vec![host],
            Self::Pod => vec![pod],
            Self::Both => vec![host, pod],
        }
    }
}

/// Requests that may go unanswered at the beginning, each for [`LOST`].
const FIRST_TRIES: u64 = 10;

/// Round trips between two pods.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Sample {
    #[serde(flatten)]
    pub(crate) latency: Latency,
    /// CPUs that were busy on average.
    pub(crate) cpus: f64,
}

/// A blocking client and a blocking server, in a pod and on a CPU each, and an idle-class worker on each of these CPUs.
pub(crate) fn measure(
    ends: Ends,
    pause: Duration,
    place: Placement,
    seconds: f64,
) -> Result<Sample> {
    let node = Node::new()?;
    let pollable = ends != Ends::Stock;
    let [client, server] = [node.pod(1, pollable)?, node.pod(2, pollable)?];
    let mut rings = Vec::new();
    if !matches!(ends, Ends::Stock | Ends::Sockets) {
        for (pod, cpu) in [(&client, place.client), (&server, place.server)] {
            let mut ring = PollRing::new(&RingOptions {
                cpu,
                scheduling: Scheduling::Idle,
                lease: LEASE,
                prefer: false,
            })?;
            for napi in ends.of(pod.napis(&node)?) {
                ring.add(napi)?;
            }
            ring.wake()?;
            rings.push(ring);
        }
    }
    let socket = |pod: &Pod, port: u16| -> Result<UdpSocket> {
        let socket = pod.netns.run(|| UdpSocket::bind((pod.address(), port)))?;
        let socket = socket.context("bind")?;
        if pollable {
            sockopt::set_busy_poll(socket.as_fd(), WINDOW)?;
        }
        Ok(socket)
    };
    let (source, sink) = (socket(&client, 0)?, socket(&server, PORT)?);
    source
        .connect((server.address(), PORT))
        .context("connect")?;
    source.set_read_timeout(Some(LOST))?;
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| echo(&sink, place.server));
        let measured = scope.spawn(|| ping(&source, place.client, pause, seconds));
        let measured = measured.join();
        // An empty datagram ends the server, however the client ended.
        source.send(&[]).context("end the server")?;
        echo.join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        measured.map_err(|_| anyhow::anyhow!("the client panicked"))?
    })
}

fn echo(socket: &UdpSocket, cpu: CpuId) -> Result<()> {
    process::set_affinity(0, &CpuSet::from_iter([cpu]))?;
    let mut datagram = [0; 64];
    loop {
        let (length, from) = socket.recv_from(&mut datagram).context("receive")?;
        if length == 0 {
            return Ok(());
        }
        socket
            .send_to(&datagram[..length], from)
            .context("answer")?;
    }
}

fn ping(socket: &UdpSocket, cpu: CpuId, pause: Duration, seconds: f64) -> Result<Sample> {
    process::set_affinity(0, &CpuSet::from_iter([cpu]))?;
    let mut latency = Road::histogram()?;
    // A link may take a moment to carry its first datagram.
    let mut number = 0;
    while let Err(error) = exchange(socket, number) {
        number += 1;
        if number == FIRST_TRIES {
            return Err(error).context("no answer to the first requests");
        }
    }
    let (begin, busy) = (Instant::now(), busy_seconds()?);
    while begin.elapsed().as_secs_f64() < seconds {
        number += 1;
        let sent = Instant::now();
        exchange(socket, number).context("receive the answer")?;
        latency.record(u64::try_from(sent.elapsed().as_nanos())?)?;
        if !pause.is_zero() {
            // The pause between requests is part of the load.
            std::thread::sleep(pause);
        }
    }
    let cpus = (busy_seconds()? - busy) / begin.elapsed().as_secs_f64();
    Ok(Sample {
        latency: Latency::of(&latency),
        cpus,
    })
}

/// A request and its own answer; one to an earlier request, that came too late, is passed over.
fn exchange(socket: &UdpSocket, number: u64) -> std::io::Result<()> {
    let mut datagram = [0; 64];
    datagram[..8].copy_from_slice(&number.to_ne_bytes());
    socket.send(&datagram)?;
    loop {
        let mut answer = [0; 64];
        socket.recv(&mut answer)?;
        if answer == datagram {
            return Ok(());
        }
    }
}
