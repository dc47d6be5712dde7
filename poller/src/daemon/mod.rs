//! The node's daemon: `kbp-poller serve`.
//!
//! One thread serves the [`socket`]s: it reads requests from [`connection`]s, has the [`service`] answer them, and writes
//! [`metrics`]. The pods themselves are kept by an [`Engine`] and its thread, so that no request delays a lease. There is no
//! async runtime: at most a few requests come a second.

mod capabilities;
mod connection;
mod metrics;
mod netns;
mod notify;
mod registration;
mod service;
mod socket;

pub use capabilities::NEEDED;
pub use socket::{Inherited, take_inherited};

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signalfd::SignalFd;

use crate::config::Config;
use crate::due::timeout_until;
use crate::engine::Engine;
use crate::uplink;
use connection::{Connections, Http};
use notify::Notifier;
use service::Service;
use socket::Sockets;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// It is not root.
    #[error(
        "kbp-poller serve needs root: it changes links and enters network namespaces of others"
    )]
    NotRoot,
    /// There is one already.
    #[error("another kbp-poller serves {lock} (process {pid}): stop that one first")]
    AlreadyRunning {
        /// The lock.
        lock: PathBuf,
        /// Who holds it, as far as it says.
        pid: String,
    },
    /// Somebody else could have put things in our place.
    #[error("{path} cannot be trusted: {reason}")]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the remedy.
        reason: String,
    },
    /// The metrics would be open to the network.
    #[error(
        "metrics at {address}: only loopback addresses are allowed, since nobody is asked who reads them"
    )]
    NotLoopback {
        /// As asked.
        address: SocketAddr,
    },
    /// The node did not let something be done.
    #[error(transparent)]
    Poller(#[from] crate::Error),
}

impl DaemonError {
    fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Poller(crate::Error::io(what, source.into()))
    }
}

type Result<T, E = DaemonError> = std::result::Result<T, E>;

/// How the daemon is run.
#[derive(Debug)]
pub struct Options {
    /// The node's settings.
    pub config: Config,
    /// Where metrics are served besides `<state-dir>/metrics.sock`.
    pub metrics: Option<SocketAddr>,
    /// Sockets of the init system.
    pub inherited: Inherited,
}

/// Serves until one of `signals` comes. Call it while the process has no other thread: capabilities are dropped for the
/// calling thread and those that it starts.
///
/// # Errors
/// When it cannot start; see [`DaemonError`].
pub fn serve(options: Options, signals: &SignalFd) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(DaemonError::NotRoot);
    }
    let notifier = Notifier::from_environment();
    let sockets = Sockets::open(&options)?;
    capabilities::drop_others()?;
    raise_descriptor_limit();
    reserve_descriptors();
    let engine = Engine::start()?;
    uplink::clear(&options.config.state_dir)?;
    let mut uplinks = Vec::new();
    for interface in &options.config.uplinks {
        // What keeps it from being polled is told in the log, and mended when the interface changes.
        uplinks.push(engine.uplink(interface, &options.config)?);
    }
    let mut service = Service::new(engine, uplinks, options.config);
    service.take_up();
    sockets.announce()?;
    notifier.ready();
    tracing::info!("serving {}", sockets.path().display());
    let outcome = Daemon {
        sockets: &sockets,
        service: &mut service,
        connections: Connections::default(),
        readers: Vec::new(),
        notifier: &notifier,
    }
    .run(signals);
    notifier.stopping();
    // First the pods, then the connections: who learns of the end must not find our state files.
    service.end();
    drop(sockets);
    outcome
}

/// A pod takes half a dozen descriptors, and the usual soft limit is 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        tracing::warn!(%errno, "the limit of open files could not be raised");
    }
}

/// Has the kernel make the table of descriptors as large as it may get, while there is one thread. Later each doubling would have the
/// attach that needs it wait for an RCU grace period (expand_fdtable in fs/file.c), and with it every other thread that opens something.
fn reserve_descriptors() {
    use nix::fcntl::{FcntlArg, fcntl};
    const EACH: usize = 8;
    let most = i32::try_from(service::MAX_PODS * EACH).unwrap_or(i32::MAX);
    // A hard limit below that is as much as there will be.
    let reserved = fcntl(std::io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(most - 1));
    let closed = reserved.and_then(nix::unistd::close);
    if let Err(errno) = closed {
        tracing::debug!(%errno, "the table of open files grows as it is needed");
    }
}

struct Daemon<'a> {
    sockets: &'a Sockets,
    service: &'a mut Service,
    connections: Connections,
    readers: Vec<Http>,
    notifier: &'a Notifier,
}

impl Daemon<'_> {
    fn run(mut self, signals: &SignalFd) -> Result<()> {
        let mut ping_at = self.notifier.interval().map(|every| Instant::now() + every);
        loop {
            let due = [ping_at, self.first_deadline()].into_iter().flatten().min();
            if self.wait(signals, due)? {
                return Ok(());
            }
            let now = Instant::now();
            if ping_at.is_some_and(|at| now >= at) {
                // Waits for the engine's lock: a thread that is stuck with it is what the watchdog is for.
                self.service.touch();
                self.notifier.watchdog();
                ping_at = self.notifier.interval().map(|every| now + every);
            }
            self.readers.retain(|reader| !reader.is_overdue(now));
        }
    }

    fn first_deadline(&self) -> Option<Instant> {
        self.readers.iter().map(Http::deadline).min()
    }

    /// Waits for one thing to happen and does what follows from it; true when it was a signal.
    fn wait(&mut self, signals: &SignalFd, due: Option<Instant>) -> Result<bool> {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        let fixed = [
            readable(signals.as_fd()),
            readable(self.service.changed().as_fd()),
        ];
        let listeners = self.sockets.listeners();
        let connections = self.connections.waits();
        let readers = self.readers.iter().map(Http::waits);
        let all = fixed
            .into_iter()
            .chain(listeners.iter().map(|l| readable(l.as_fd())))
            .chain(connections)
            .chain(readers);
        fds.extend(all.map(|(fd, flags)| PollFd::new(fd, flags)));
        match poll(&mut fds, timeout_until(due)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(DaemonError::io("wait for requests", errno)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(fds);
        let (fixed, rest) = ready.split_at(2);
        let (listening, rest) = rest.split_at(listeners.len());
        let (connected, reading) = rest.split_at(self.connections.len());
        if fixed.first() == Some(&true) {
            return Ok(true);
        }
        self.connections.serve(connected, self.service);
        for (reader, ready) in self.readers.iter_mut().zip(reading) {
            if *ready {
                reader.go_on(self.service);
            }
        }
        self.readers.retain(|reader| !reader.is_done());
        for (listener, ready) in listeners.iter().zip(listening) {
            if *ready {
                listener.accept(&mut self.connections, &mut self.readers);
            }
        }
        if fixed.get(1) == Some(&true) {
            for event in self.service.changes() {
                self.connections.tell(&event);
            }
        }
        Ok(false)
    }
}

/// How long a reader of metrics may take.
const METRICS_LIMIT: Duration = Duration::from_secs(5);

fn readable(fd: BorrowedFd<'_>) -> (BorrowedFd<'_>, PollFlags) {
    (fd, PollFlags::POLLIN)
}
