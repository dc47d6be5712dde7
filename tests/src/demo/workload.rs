//! The pairs of unmodified programs, and one measurement of one of them under one arm.

use anyhow::{Context, Result};
use kbp_tests::bench::clients;
use kbp_tests::bench::cpu::{Placement, busy_seconds};

use crate::node::{Arm, Container, Node, Pod, inactive_parts};
use crate::stats::{LatencySample, ThroughputSample};

/// A pair of programs in two containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Workload {
    /// `redis-server` and `redis-benchmark`: GET, one client, one request under way.
    RedisGet,
    /// A plain epoll echo server and a blocking client: 64 bytes, one request under way.
    UdpEcho,
    /// `iperf3`: one TCP stream from client to server.
    BulkTcp,
}

/// What one measurement yields.
#[derive(Debug, Clone)]
pub(crate) enum Sample {
    /// Of a request/response pair.
    Latency(LatencySample),
    /// Of a stream.
    Throughput(ThroughputSample),
}

/// One measurement, with what kbp said of its pods while they ran.
pub(crate) struct Measured {
    /// The figures.
    pub(crate) sample: Sample,
    /// Parts of kbp that were not active; always empty for the stock arm.
    pub(crate) inactive: Vec<String>,
    /// `kbpctl status`, for the kbp arm.
    pub(crate) status: Option<String>,
}

impl Workload {
    /// All, in the order of the report.
    pub(crate) const ALL: [Self; 3] = [Self::RedisGet, Self::UdpEcho, Self::BulkTcp];

    /// As in the tables and in the JSON files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RedisGet => "redis-get",
            Self::UdpEcho => "udp-echo",
            Self::BulkTcp => "bulk-tcp",
        }
    }

    /// For a person.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::RedisGet => "Redis GET, one client",
            Self::UdpEcho => "UDP echo, 64 bytes",
            Self::BulkTcp => "TCP stream",
        }
    }

    fn server(self) -> &'static [&'static str] {
        match self {
            Self::RedisGet => &[
                "redis-server",
                "--bind",
                "0.0.0.0",
                "--protected-mode",
                "no",
                "--save",
                "",
                "--appendonly",
                "no",
            ],
            Self::UdpEcho => &["udp-echo", "0.0.0.0:7"],
            Self::BulkTcp => &["iperf3", "--server"],
        }
    }

    /// Table below `/proc/net` and port by which the server is known to be ready.
    fn port(self) -> (&'static str, u16) {
        match self {
            Self::RedisGet => ("tcp", 6379),
            Self::UdpEcho => ("udp", 7),
            // iperf3 listens on the IPv6 wildcard, which takes IPv4 too.
            Self::BulkTcp => ("tcp6", 5201),
        }
    }

    /// Starts the pair under `arm`, warms it up, measures for about `seconds`, and removes it.
    pub(crate) fn measure(
        self,
        node: &Node<'_>,
        arm: Arm,
        place: Placement,
        seconds: u32,
    ) -> Result<Measured> {
        let server = node.pod(
            arm,
            Container {
                id: "server",
                command: self.server(),
                cpu: place.server,
            },
        )?;
        let client = node.pod(
            arm,
            Container {
                id: "client",
                command: &["sleep", "infinity"],
                cpu: place.client,
            },
        )?;
        let (table, port) = self.port();
        server.wait_for_port(table, port)?;
        let sample = match self {
            Self::RedisGet => Sample::Latency(redis_get(&client, server.address(), seconds)?),
            Self::UdpEcho => Sample::Latency(udp_echo(&client, server.address(), seconds)?),
            Self::BulkTcp => Sample::Throughput(bulk_tcp(&client, server.address(), seconds)?),
        };
        let (inactive, status) = match arm {
            Arm::Stock => (Vec::new(), None),
            Arm::Kbp => (inactive_parts(&node.states()?, 2)?, Some(node.status()?)),
        };
        client.remove().context("remove the client")?;
        server.remove().context("remove the server")?;
        Ok(Measured {
            sample,
            inactive,
            status,
        })
    }
}

fn redis_get(client: &Pod<'_, '_>, server: &str, seconds: u32) -> Result<LatencySample> {
    let benchmark = |requests: u64| {
        let requests = requests.to_string();
        client.exec(&[
            "redis-benchmark",
            "-h",
            server,
            "-t",
            "get",
            "-c",
            "1",
            "-n",
            &requests,
            "--precision",
            "3",
        ])
    };
    // redis-benchmark takes a number of requests; the warm-up says how many fill the time.
    const WARM_UP: u64 = 10_000;
    let rate = clients::redis_benchmark_rate(&benchmark(WARM_UP)?)?;
    let requests = (rate * f64::from(seconds)) as u64;
    let (text, cpu_seconds) = with_cost(|| benchmark(requests.max(WARM_UP)))?;
    Ok(LatencySample {
        latency: clients::redis_benchmark(&text)?,
        cpu_seconds,
    })
}

fn udp_echo(client: &Pod<'_, '_>, server: &str, seconds: u32) -> Result<LatencySample> {
    let address = format!("{server}:7");
    client.exec(&["udp-rr", &address, "0.5"])?;
    let (text, cpu_seconds) =
        with_cost(|| client.exec(&["udp-rr", &address, &seconds.to_string()]))?;
    Ok(LatencySample {
        latency: clients::udp_rr(&text)?,
        cpu_seconds,
    })
}

fn bulk_tcp(client: &Pod<'_, '_>, server: &str, seconds: u32) -> Result<ThroughputSample> {
    let stream = |seconds: u32| {
        client.exec(&[
            "iperf3",
            "--client",
            server,
            "--json",
            "--time",
            &seconds.to_string(),
        ])
    };
    stream(1)?;
    let (text, cpu_seconds) = with_cost(|| stream(seconds))?;
    let (gbit_per_second, retransmits) = clients::iperf3(&text)?;
    Ok(ThroughputSample {
        gbit_per_second,
        retransmits,
        cpu_seconds,
    })
}

/// Runs something and says how long the machine's CPUs were busy meanwhile.
fn with_cost<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let before = busy_seconds()?;
    let result = run()?;
    Ok((result, busy_seconds()? - before))
}
