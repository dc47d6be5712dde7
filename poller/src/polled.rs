//! A pod that is polled by whoever does it best now: the node's daemon while there is one, else this process.
//!
//! One thread follows the daemon. When one begins to serve, the pod is handed over: this process lets go first, then the daemon
//! attaches, so that nothing is polled twice; should the daemon refuse, this process takes the pod back. When the daemon ends,
//! however it does, the connection to it closes, its workers have ended by then, and this process attaches at once. In between,
//! for some milliseconds, softirq takes the packets, as on any veth.

mod hands;
mod notice;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::CpuSet;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::api;
use crate::attach::{AttachRequest, Attachment, Outcome, Terms};
use crate::client::{Attached, Client, ClientError};
use crate::due::timeout_until;
use crate::engine::Engine;
use crate::state::{Degraded, SocketCounters};
use crate::window::Window;
use crate::{Error, Result, state};

use hands::{attach_at, copy, socket_of};
use notice::Notice;

/// Longest that a start may wait for the daemon. It takes milliseconds.
const ATTACH_LIMIT: Duration = Duration::from_secs(1);

/// Longest that a hand-over may take: after the start of a daemon every pod of the node comes at the same time.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(5);

/// Longest that telling the daemon of sockets may take.
const UPDATE_LIMIT: Duration = Duration::from_millis(500);

/// How long to wait before something is tried again that did not work.
const RETRY: Duration = Duration::from_secs(1);

/// Enough for an attach and a log line; only what is touched becomes resident.
const STACK: usize = 128 * 1024;

/// What became of an attach.
#[derive(Debug)]
pub enum PolledOutcome {
    /// Attached, perhaps with degraded parts.
    Attached(Polled),
    /// The namespace has only a loopback (yet): try again before the first process starts.
    NoInterface,
    /// Host network: nothing is touched.
    HostNetwork,
}

/// A polled pod; detached when it is dropped.
#[derive(Debug)]
pub struct Polled {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: EventFd,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    who: Who,
    /// As it is to be attached when it changes hands.
    request: AttachRequest,
    counters: SocketCounters,
    /// Why packets pass by the pod's NAPI; None: they are not to.
    short_way: Option<String>,
}

/// Who polls it.
#[derive(Debug)]
enum Who {
    Own(Attachment),
    Daemon {
        client: Client,
        pid: u32,
    },
    /// It could not be attached when it changed hands; `previous` may still own its state file.
    Nobody {
        previous: Option<u32>,
    },
}

/// Has a pod polled, by the daemon if there is one. Call it on a thread that is in the host's network namespace.
///
/// # Errors
/// As [`Engine::attach`]: what the daemon cannot do is tried here.
pub fn attach(request: AttachRequest) -> Result<PolledOutcome> {
    let who = match Client::connect(&socket_of(&request), ATTACH_LIMIT) {
        Ok(mut client) => match attach_at(&mut client, &request) {
            Ok(Attached::Pod(pod)) => Some(Who::Daemon {
                client,
                pid: pod.owner_pid,
            }),
            Ok(Attached::Waiting) => None,
            Ok(Attached::NoInterface) => return Ok(PolledOutcome::NoInterface),
            Ok(Attached::HostNetwork) => return Ok(PolledOutcome::HostNetwork),
            Err(error) => {
                tracing::warn!("this process polls for itself: {error}");
                None
            }
        },
        Err(ClientError::NotRunning { .. }) => None,
        Err(error) => {
            tracing::warn!("this process polls for itself: {error}");
            None
        }
    };
    let who = match who {
        Some(who) => who,
        None => match Engine::start()?.attach(copy(&request)?, Terms::default())? {
            Outcome::Attached(attachment) => Who::Own(attachment),
            Outcome::NoInterface => return Ok(PolledOutcome::NoInterface),
            Outcome::HostNetwork => return Ok(PolledOutcome::HostNetwork),
        },
    };
    Polled::follow(who, request).map(PolledOutcome::Attached)
}

impl Polled {
    fn follow(who: Who, request: AttachRequest) -> Result<Self> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: Errno| Error::io(what, e.into())
        };
        let state_dir = &request.config.state_dir;
        state::create_dir(state_dir)?;
        let notice = Notice::new(state_dir);
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(failed("make an eventfd"))?;
        let missed = matches!(who, Who::Own(_)) && state_dir.join(api::READY).exists();
        let shared = Arc::new(Shared {
            stop,
            inner: Mutex::new(Inner {
                who,
                request,
                counters: SocketCounters::default(),
                short_way: None,
            }),
        });
        let followed = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kbp-owner".to_owned())
            .stack_size(STACK)
            .spawn(move || followed.run(notice, missed))
            .map_err(|e| Error::io("start the thread that follows the daemon", e))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Whether the daemon polls it now.
    pub fn is_at_daemon(&self) -> bool {
        matches!(self.shared.lock().who, Who::Daemon { .. })
    }

    /// Adds a degraded part that was found out later; it goes into the state file.
    pub fn degrade(&self, degraded: Degraded) {
        let mut inner = self.shared.lock();
        if inner.request.degraded.contains(&degraded) {
            return;
        }
        inner.request.degraded.push(degraded.clone());
        match &inner.who {
            Who::Own(attachment) => attachment.degrade(degraded),
            Who::Daemon { .. } => inner.update(&[degraded]),
            Who::Nobody { .. } => {}
        }
    }

    /// What holds for the pod's sockets from now on, and what was done to them so far; it goes into the state file.
    pub fn set_sockets(&self, window: &Window, cpuset: Option<&CpuSet>, counters: SocketCounters) {
        let mut inner = self.shared.lock();
        let request = &inner.request;
        if request.window == *window
            && request.cpuset.as_ref() == cpuset
            && inner.counters == counters
        {
            return;
        }
        inner.request.window = window.clone();
        inner.request.cpuset = cpuset.cloned();
        inner.counters = counters;
        match &inner.who {
            Who::Own(attachment) => attachment.set_sockets(window, cpuset, counters),
            Who::Daemon { .. } => inner.update(&[]),
            Who::Nobody { .. } => {}
        }
    }

    /// Has packets for the pod pass by its NAPI, for this reason, or not any more; see [`Attachment::set_short_way`].
    pub fn set_short_way(&self, why: Option<&str>) {
        let mut inner = self.shared.lock();
        if inner.short_way.as_deref() == why {
            return;
        }
        inner.short_way = why.map(str::to_owned);
        match &inner.who {
            Who::Own(attachment) => attachment.set_short_way(why),
            Who::Daemon { .. } => inner.update(&[]),
            Who::Nobody { .. } => {}
        }
    }
}

impl Drop for Polled {
    fn drop(&mut self) {
        // An eventfd refuses a write only when it is full, and then the thread is awake already.
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that follows the daemon had panicked");
        }
        let mut inner = self.shared.lock();
        let previous = None;
        if let Who::Daemon { mut client, .. } =
            std::mem::replace(&mut inner.who, Who::Nobody { previous })
        {
            // Closing would do, but then nobody knew when the state file is gone.
            client.renew(ATTACH_LIMIT);
            let request = &inner.request;
            if let Err(error) = client.detach(&request.namespace, &request.id, false) {
                tracing::debug!("{error}");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // At worst a panic leaves nobody polling, which the follower mends.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut notice: Notice, mut try_daemon: bool) {
        let mut retry_at: Option<Instant> = None;
        loop {
            if try_daemon || retry_at.is_some_and(|at| Instant::now() >= at) {
                let mut inner = self.lock();
                let ready = inner.request.config.state_dir.join(api::READY);
                let worked = inner.settle(try_daemon || ready.exists());
                drop(inner);
                retry_at = (!worked).then(|| Instant::now() + RETRY);
            }
            // A copy, since the lock is not held while waiting.
            let daemon = match &self.lock().who {
                Who::Daemon { client, .. } => client.as_fd().try_clone_to_owned().ok(),
                _ => None,
            };
            let look_at = notice.interval().map(|every| Instant::now() + every);
            let due = [retry_at, look_at].into_iter().flatten().min();
            let watched = [
                Some(self.stop.as_fd()),
                daemon.as_ref().map(AsFd::as_fd),
                notice.fd(),
            ];
            let mut fds: Vec<PollFd<'_>> = watched
                .iter()
                .flatten()
                .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
                .collect();
            match poll(&mut fds, timeout_until(due)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the daemon is no longer followed");
                    return;
                }
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            drop(fds);
            if ready.first() == Some(&true) {
                return;
            }
            try_daemon = notice.is_ready();
            if daemon.is_some() && ready.get(1) == Some(&true) {
                // Between two calls nothing comes but the end.
                let mut inner = self.lock();
                if inner.has_lost_daemon() {
                    inner.lose_daemon();
                    retry_at = (!inner.settle(false)).then(|| Instant::now() + RETRY);
                }
            }
        }
    }
}
