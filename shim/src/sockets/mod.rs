//! The supervisor of a pod's trapped system calls: gives its sockets and epoll instances their busy-poll window.
//!
//! The OCI runtime sends the listener of every filter that it installs, for a container's first process and again for each
//! exec'd one, to a unix socket ([`handshake`]). One thread a pod ([`thread`]) waits for calls on all of them and answers
//! each ([`answer`]): a call of an unmodified program runs on as if it had not been trapped, and its socket busy-polls.
//!
//! What holds for everything here: a trapped call hangs until it is answered, so the thread always answers, and waits for
//! nothing but new work. When the listeners are closed, with the notifier or with a killed shim, trapped calls fail with
//! ENOSYS; the notifier therefore has to live as long as any process of the pod.

mod answer;
mod copies;
mod crowd;
mod handshake;
mod home;
pub mod node_wide;
mod noted;
mod pollers;
mod retune;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod thread;
mod waiting;

pub use home::{directory, remove};
pub use noted::Noted;
pub use pollers::Pollers;
pub use retune::Retuned;
pub(crate) use waiting::{BUSY, SLEEPS};
pub use waiting::{Look, Step, Watch};

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_poller::state::{Degraded, SocketCounters};
use nix::sys::eventfd::{EfdFlags, EventFd};

use home::Home;
use node_wide::NodeWide;

/// Longest path of a unix socket: sun_path with its final zero byte (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The thread calls a handful of functions and keeps its buffers on the heap.
const STACK_SIZE: usize = 128 * 1024;

/// How long the thread may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Why a notifier could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path of the socket does not fit a socket address, or config.json.
    #[error("{} is no path for a notifier socket: {reason}; choose a shorter, plain state-dir", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The thread could not be started.
    #[error("start the notifier thread: {0}")]
    Thread(io::Error),
}

/// What a container's sockets and epoll instances are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Treatment {
    /// Busy-poll window; None: leave everything alone.
    pub window: Option<Micros>,
    /// Whether epoll instances get the window too.
    pub epoll: bool,
    /// Whether only as many processes as have CPUs are given them ([`crowd`]): so where nobody asked for this window.
    pub bounded: bool,
    /// Which of them packets are to wait for.
    pub prefer: Prefer,
}

/// What packets are to wait for, instead of being handled on the CPU of their sender.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefer {
    /// Sockets, while a blocking call polls.
    pub sockets: bool,
    /// Epoll instances.
    pub epolls: bool,
}

/// Something that whoever owns the notifier may want to log or show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The runtime handed over the listener of a process.
    Listening {
        /// Container of the process.
        container: String,
        /// Its process id, as the runtime told it.
        pid: i64,
    },
    /// A connection was refused.
    Refused(String),
    /// A part did not work for a socket; told once for each part of a container.
    Degraded(Degraded),
    /// Calls were answered since [`Notifier::counters`] was read last, or the limits of a container have changed.
    Active,
}

/// The notifier of a pod. Dropping it ends the thread and removes the socket.
#[derive(Debug)]
pub struct Notifier {
    /// Goes last: what is in it belongs to the thread.
    _home: Home,
    node_wide: Option<NodeWide>,
    socket: String,
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    /// The second is closed when the first has ended; behind a lock only to be shared.
    thread: Option<(JoinHandle<()>, Mutex<mpsc::Receiver<()>>)>,
}

/// What the thread and its owner both see.
struct Shared {
    metadata: String,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    counters: AtomicCounters,
    crowd: crowd::Crowd,
    notes: noted::Notes,
    /// Whether [`Event::Active`] was sent and nobody has looked since.
    told_active: AtomicBool,
    events: Box<dyn Fn(Event) + Send + Sync>,
}

/// A container's treatment, as it is now: its listeners look at it at every call.
#[derive(Debug)]
struct Container {
    id: String,
    /// Window in µs; 0: leave everything alone.
    window: AtomicU32,
    epoll: AtomicBool,
    bounded: AtomicBool,
    prefer_sockets: AtomicBool,
    prefer_epolls: AtomicBool,
    told_degraded: [AtomicBool; 3],
}

#[derive(Debug, Default)]
struct AtomicCounters {
    calls_handled: AtomicU64,
    sockets_set: AtomicU64,
    epolls_given: AtomicU64,
    epolls_crowded: AtomicU64,
    errors: AtomicU64,
}

impl Notifier {
    /// Binds the pod's socket, for root only, and starts the thread: when this returns, a runtime may connect.
    ///
    /// `events` is called by the thread that answers calls and must not block.
    pub fn start(
        state_dir: &Path,
        namespace: &str,
        pod_id: &str,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let path = directory(state_dir, namespace, pod_id).join("seccomp.sock");
        let unfit = |reason: String| Error::Path {
            path: path.clone(),
            reason,
        };
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(unfit(format!(
                "{length} bytes long, at most {MAX_SOCKET_PATH} fit"
            )));
        }
        let socket = path
            .to_str()
            .ok_or_else(|| unfit("not UTF-8".to_owned()))?
            .to_owned();

        let home = Home::create(state_dir, namespace, pod_id)?;
        let listener = bind(&path)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::Thread(e.into()))?;
        let mut notifier = Self {
            _home: home,
            node_wide: None,
            socket,
            shared: Arc::new(Shared {
                metadata: format!("kbp {namespace}/{pod_id}"),
                containers: Mutex::default(),
                counters: AtomicCounters::default(),
                crowd: crowd::Crowd::default(),
                notes: noted::Notes::new(),
                told_active: AtomicBool::new(false),
                events: Box::new(events),
            }),
            stop: Arc::new(stop),
            thread: None,
        };
        let (shared, stop) = (notifier.shared.clone(), notifier.stop.clone());
        // Closed when the thread ends.
        let (living, ended) = mpsc::channel();
        let work = move || {
            let _living: mpsc::Sender<()> = living;
            thread::Supervisor::new(listener, stop, shared).run();
        };
        let thread = std::thread::Builder::new()
            .name("kbp-notify".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(work)
            .map_err(Error::Thread)?;
        notifier.thread = Some((thread, Mutex::new(ended)));
        Ok(notifier)
    }

    /// Has the node-wide setting for programs in `poll` and `select` set for as long as the notifier lives.
    pub fn set_node_wide(&mut self, state_dir: &Path, window: Micros) -> Result<(), Error> {
        if self.node_wide.is_none() {
            let sysctl = Path::new(node_wide::SYSCTL);
            self.node_wide = Some(NodeWide::set(state_dir, window, sysctl)?);
        }
        Ok(())
    }

    /// Path of the socket, for `listenerPath`.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// What the runtime has to send along, for `listenerMetadata`.
    pub fn metadata(&self) -> &str {
        &self.shared.metadata
    }

    /// Accepts the listeners of a container from now on. For a container that is there already, its calls get the new
    /// treatment from now on.
    pub fn admit(&self, container: &str, treatment: Treatment) {
        let mut containers = self.shared.containers();
        let entry = containers
            .entry(container.to_owned())
            .or_insert_with(|| Arc::new(Container::new(container)));
        entry.treat(treatment);
    }

    /// Has what `processes` of a container have already, and has the window `from`, treated as what they make from now on. Takes as
    /// long as that takes, and does not get in the way of calls. `open`: a handle on one of the processes, if the container still has it.
    pub fn retune(
        &self,
        processes: &[u32],
        open: impl Fn(u32) -> Option<PidFd>,
        from: Option<Micros>,
        to: Treatment,
    ) -> Retuned {
        retune::retune(processes, open, from, to, &self.shared.crowd)
    }

    /// The processes that have come to listen or make epoll instances, of containers whose windows are bounded.
    pub fn noted(&self) -> Vec<Noted> {
        self.shared.notes.take()
    }

    /// Counts what of a container's processes polls, where it is time, and gives each the window that `now` says or none; whether
    /// that has changed for any. `soon`: also of those that were counted lately.
    pub fn count_pollers(&self, pollers: &mut Pollers, now: Treatment, soon: bool) -> bool {
        pollers.look(now, &self.shared.crowd, soon)
    }

    /// Accepts no further listener of a container; those that are there are answered on.
    pub fn dismiss(&self, container: &str) {
        self.shared.containers().remove(container);
    }

    /// How much it has done. The next call that is answered tells [`Event::Active`] again.
    pub fn counters(&self) -> SocketCounters {
        self.shared.told_active.store(false, Ordering::Release);
        let counters = &self.shared.counters;
        SocketCounters {
            calls_handled: counters.calls_handled.load(Ordering::Relaxed),
            sockets_set: counters.sockets_set.load(Ordering::Relaxed),
            epolls_given: counters.epolls_given.load(Ordering::Relaxed),
            epolls_crowded: counters.epolls_crowded.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        if let Some((thread, ended)) = self.thread.take() {
            // An eventfd's counter overflows only after 2^64 - 2 of these.
            let _ = self.stop.write(1);
            let ended = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
            // Whatever keeps it must not keep the pod from ending; it goes with the shim.
            if ended.recv_timeout(END_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                tracing::error!("the notifier thread hangs; calls may have had no answer");
            } else if thread.join().is_err() {
                tracing::error!("the notifier thread had panicked");
            }
        }
    }
}

fn bind(path: &Path) -> Result<UnixListener, Error> {
    let failed = |what| {
        move |source| Error::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    // The directory is private, so nobody gets between bind and chmod.
    let listener = UnixListener::bind(path).map_err(failed("bind"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("make private"))?;
    listener
        .set_nonblocking(true)
        .map_err(failed("make non-blocking"))?;
    Ok(listener)
}

impl Shared {
    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        // The map is whole between any two operations on it.
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Event) {
        (self.events)(event);
    }

    fn tell_active(&self) {
        if !self.told_active.swap(true, Ordering::AcqRel) {
            self.tell(Event::Active);
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("metadata", &self.metadata)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Container {
    fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            window: AtomicU32::new(0),
            epoll: AtomicBool::new(false),
            bounded: AtomicBool::new(true),
            prefer_sockets: AtomicBool::new(false),
            prefer_epolls: AtomicBool::new(false),
            told_degraded: [const { AtomicBool::new(false) }; 3],
        }
    }

    fn treat(&self, treatment: Treatment) {
        self.window
            .store(treatment.window.map_or(0, |w| w.0), Ordering::Relaxed);
        self.epoll.store(treatment.epoll, Ordering::Relaxed);
        self.bounded.store(treatment.bounded, Ordering::Relaxed);
        let Prefer { sockets, epolls } = treatment.prefer;
        self.prefer_sockets.store(sockets, Ordering::Relaxed);
        self.prefer_epolls.store(epolls, Ordering::Relaxed);
    }

    fn treatment(&self) -> Treatment {
        let window = self.window.load(Ordering::Relaxed);
        Treatment {
            window: (window > 0).then_some(Micros(window)),
            epoll: self.epoll.load(Ordering::Relaxed),
            bounded: self.bounded.load(Ordering::Relaxed),
            prefer: Prefer {
                sockets: self.prefer_sockets.load(Ordering::Relaxed),
                epolls: self.prefer_epolls.load(Ordering::Relaxed),
            },
        }
    }
}
