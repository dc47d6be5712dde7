//! What runs inside the containers of a bench: ordinary clients and servers on POSIX sockets that know nothing of busy polling
//! (but for the arm that is about that), and the processes that disturb them.

mod client;
mod cost;
mod exchange;
mod flood;
mod open_loop;
mod server;
mod spin;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use kbp_kernel::{CpuId, process};
use serde::{Deserialize, Serialize};

/// What a client says, and what it expects back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Talk {
    /// A datagram that comes back.
    UdpEcho,
    /// Bytes of a stream that come back.
    TcpEcho,
    /// Datagrams that are counted.
    UdpSink,
    /// A stream that is counted.
    TcpSink,
    /// `GET` to redis.
    Redis,
    /// `get` to memcached.
    Memcached,
    /// `GET /` over one HTTP/1.1 connection.
    Http,
}

/// The processes of a bench. Not for people.
#[derive(Debug, Subcommand)]
pub(crate) enum Load {
    /// Answers until it is killed.
    Server(ServerArgs),
    /// Asks, measures, writes what it found.
    Client(ClientArgs),
    /// Does nothing until it is killed.
    Pause,
    /// Spins on one CPU until its parent dies.
    Spin(SpinArgs),
    /// Sends datagrams at a rate until it is killed.
    Flood(FloodArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    #[arg(long)]
    pub(crate) talk: Talk,
    #[arg(long)]
    pub(crate) bind: SocketAddr,
    /// A port beside whose datagrams are thrown away: what a flood is aimed at.
    #[arg(long)]
    pub(crate) discard: Option<u16>,
    /// Reads without ever sleeping.
    #[arg(long)]
    pub(crate) spin: bool,
    /// Written when it listens.
    #[arg(long)]
    pub(crate) ready: PathBuf,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    #[arg(long)]
    pub(crate) talk: Talk,
    #[arg(long)]
    pub(crate) to: SocketAddr,
    #[arg(long)]
    pub(crate) seconds: f64,
    /// Seconds before that whose figures are thrown away.
    #[arg(long)]
    pub(crate) warm_up: f64,
    /// Requests a second, sent when they are due whether or not answers came; without it each waits for the answer before.
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    #[arg(long)]
    pub(crate) size: usize,
    #[arg(long)]
    pub(crate) spin: bool,
    #[arg(long)]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Args)]
pub(crate) struct SpinArgs {
    /// Only on cycles that nobody else wants: in the idle class, and in this cgroup, which is idle as a whole.
    #[arg(long)]
    pub(crate) idle_group: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Args)]
pub(crate) struct FloodArgs {
    #[arg(long)]
    pub(crate) to: SocketAddr,
    #[arg(long)]
    pub(crate) rate: f64,
    #[arg(long)]
    pub(crate) size: usize,
}

/// Where it runs when no container says so.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Place {
    #[arg(long)]
    pub(crate) cpu: Option<u32>,
}

impl Place {
    /// Pins the calling process; it ends with its parent then, since no container ends it.
    fn take(self) -> Result<()> {
        let Some(cpu) = self.cpu else {
            return Ok(());
        };
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
            .context("ask for the parent's death")?;
        process::set_affinity(0, &[CpuId(cpu)].into_iter().collect())?;
        Ok(())
    }
}

/// What one client found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Seconds that it measured.
    pub(crate) seconds: f64,
    /// Latencies: nanoseconds and how often. An open loop counts from when a request was due, not from when it was sent.
    pub(crate) histogram: Vec<(u64, u64)>,
    /// Requests that were due, or datagrams that were sent.
    pub(crate) offered: u64,
    /// Requests that were answered, or datagrams that arrived.
    pub(crate) achieved: u64,
    /// Requests without an answer within half a second.
    pub(crate) lost: u64,
    /// Of an open loop: how late the later 1 % of the requests were sent, in nanoseconds.
    pub(crate) late_p99_ns: u64,
    /// Bytes of a stream.
    pub(crate) bytes: u64,
    /// TCP segments sent again, by everybody in the client's network namespace.
    pub(crate) retransmits: u64,
    /// What the whole machine spent meanwhile, pollers included.
    pub(crate) cost: cost::Cost,
}

/// Runs one of them.
pub(crate) fn run(load: Load) -> Result<()> {
    match load {
        Load::Server(args) => server::run(&args),
        Load::Client(args) => {
            args.place.take()?;
            let measured = client::run(&args)?;
            write_whole(&args.out, &serde_json::to_vec(&measured)?)
        }
        Load::Pause => loop {
            std::thread::park();
        },
        Load::Spin(args) => spin::run(&args),
        Load::Flood(args) => flood::forever(&args),
    }
}

/// Who waits for the file sees all of it or nothing.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("part");
    std::fs::write(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("write {}", path.display()))
}

pub(crate) use cost::Cost;
