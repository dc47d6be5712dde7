//! A pod that is polled by whoever does it best now: the node's daemon while there is one, else this process.
//!
//! One thread follows the daemon. When one begins to serve, the pod is handed over: this process lets go first, then the daemon
//! attaches, so that nothing is polled twice; should the daemon refuse, this process takes the pod back. When the daemon ends,
//! however it does, the connection to it closes, its workers have ended by then, and this process attaches at once. In between,
//! for some milliseconds, softirq takes the packets, as on any veth.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::CpuSet;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{MsgFlags, recv};

use crate::api::{self, UpdateRequest};
use crate::attach::{AttachRequest, Attachment, Outcome, Terms};
use crate::client::{Attached, Client, ClientError};
use crate::due::timeout_until;
use crate::engine::Engine;
use crate::state::{Degraded, SocketCounters};
use crate::window::Window;
use crate::{Error, Result, state};

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

/// How one learns that a daemon has begun to serve.
#[derive(Debug)]
enum Notice {
    /// The kernel tells.
    Events(Inotify),
    /// By looking: a user has 128 inotify instances unless the node allows more (fs.inotify.max_user_instances), and a node
    /// can have more pods than that.
    Looks { file: PathBuf, seen: Option<Stamp> },
}

/// What makes a file another one under the same name.
type Stamp = (u64, i64, i64);

impl Notice {
    fn new(state_dir: &Path) -> Self {
        let watched = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).and_then(|i| {
            i.add_watch(state_dir, AddWatchFlags::IN_MOVED_TO)
                .map(|_| i)
        });
        match watched {
            Ok(inotify) => Self::Events(inotify),
            Err(errno) => {
                tracing::info!(%errno, "the state directory is looked at once a second instead of being watched");
                Self::looks(state_dir)
            }
        }
    }

    fn looks(state_dir: &Path) -> Self {
        let file = state_dir.join(api::READY);
        Self::Looks {
            seen: stamp(&file),
            file,
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Events(inotify) => Some(inotify.as_fd()),
            Self::Looks { .. } => None,
        }
    }

    fn interval(&self) -> Option<Duration> {
        match self {
            Self::Events(_) => None,
            Self::Looks { .. } => Some(RETRY),
        }
    }

    /// Whether a daemon has begun to serve since the last call.
    fn is_ready(&mut self) -> bool {
        match self {
            Self::Events(inotify) => {
                let mut ready = false;
                while let Ok(events) = inotify.read_events() {
                    // Some were lost: look.
                    ready |= events.iter().any(|e| {
                        e.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
                            || e.name.as_deref() == Some(api::READY.as_ref())
                    });
                }
                ready
            }
            Self::Looks { file, seen } => {
                let now = stamp(file);
                let changed = now.is_some() && now != *seen;
                *seen = now;
                changed
            }
        }
    }
}

fn stamp(file: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(file).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

impl Inner {
    /// Sees to it that somebody polls, the daemon rather than this process when `try_daemon`. False: to be tried again.
    fn settle(&mut self, try_daemon: bool) -> bool {
        let previous = match &self.who {
            Who::Daemon { .. } if !self.has_lost_daemon() => return true,
            Who::Daemon { pid, .. } => Some(*pid),
            Who::Own(_) if !try_daemon => return true,
            Who::Own(_) => None,
            Who::Nobody { previous } => *previous,
        };
        let mut again = false;
        if try_daemon {
            match Client::connect(&socket_of(&self.request), HAND_OVER_LIMIT) {
                // Nothing is let go for a daemon that does not answer: an end of what is not there is a question that costs
                // nothing.
                Ok(mut client) => match client
                    .detach(&self.request.namespace, &self.request.id, false)
                    .and_then(|_| self.hand_over(client, previous))
                {
                    Ok(()) if matches!(self.who, Who::Daemon { .. }) => return true,
                    Ok(()) => {}
                    Err(error) => {
                        // What it refuses now it would refuse again.
                        again = !matches!(error, ClientError::Refused { .. });
                        tracing::warn!("this process polls for itself: {error}");
                    }
                },
                Err(error) => tracing::debug!("{error}"),
            }
        }
        if matches!(self.who, Who::Own(_)) {
            return !again;
        }
        self.take_back() && !again
    }

    fn hand_over(&mut self, mut client: Client, previous: Option<u32>) -> Result<(), ClientError> {
        let own = std::mem::replace(&mut self.who, Who::Nobody { previous });
        if let Who::Own(attachment) = own {
            attachment.hand_over();
        }
        match attach_at(&mut client, &self.request)? {
            Attached::Pod(pod) => {
                tracing::info!("the daemon, process {}, polls the pod", pod.owner_pid);
                let pid = pod.owner_pid;
                self.who = Who::Daemon { client, pid };
                self.update(&[]);
            }
            Attached::Waiting | Attached::NoInterface | Attached::HostNetwork => {
                tracing::debug!("the pod has no interface to hand over");
            }
        }
        Ok(())
    }

    /// Attaches in this process.
    fn take_back(&mut self) -> bool {
        let previous = match &self.who {
            Who::Nobody { previous } => *previous,
            Who::Daemon { pid, .. } => Some(*pid),
            Who::Own(_) => None,
        };
        // First of all: what is bound to the connection ends with it, should the daemon be alive after all.
        self.who = Who::Nobody { previous };
        let terms = Terms {
            previous_owner: previous,
            ..Terms::default()
        };
        let attached = Engine::start().and_then(|engine| {
            copy(&self.request).and_then(|request| engine.attach(request, terms))
        });
        match attached {
            Ok(Outcome::Attached(attachment)) => {
                let cpuset = self.request.cpuset.as_ref();
                attachment.set_sockets(&self.request.window, cpuset, self.counters);
                self.who = Who::Own(attachment);
                true
            }
            Ok(Outcome::NoInterface | Outcome::HostNetwork) => false,
            Err(error) => {
                tracing::warn!("nobody polls the pod for now: {error}");
                false
            }
        }
    }

    fn has_lost_daemon(&self) -> bool {
        let Who::Daemon { client, .. } = &self.who else {
            return false;
        };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let peeked = recv(client.as_fd().as_raw_fd(), &mut [0], flags);
        !matches!(peeked, Err(Errno::EAGAIN | Errno::EINTR))
    }

    fn lose_daemon(&mut self) {
        if let Who::Daemon { pid, .. } = self.who {
            tracing::warn!("the daemon, process {pid}, is gone: this process polls for itself");
            let previous = Some(pid);
            self.who = Who::Nobody { previous };
        }
    }

    /// Tells the daemon what has changed; one that does not listen is left.
    fn update(&mut self, degraded: &[Degraded]) {
        let message = UpdateRequest {
            id: self.request.id.clone(),
            namespace: self.request.namespace.clone(),
            sockets: Some(api::sockets(&self.request.window, self.counters)),
            cpuset: text_of(self.request.cpuset.as_ref()),
            degraded: api::degraded(degraded),
        };
        let Who::Daemon { client, .. } = &mut self.who else {
            return;
        };
        client.renew(UPDATE_LIMIT);
        if let Err(error) = client.update(&message) {
            tracing::warn!("{error}");
            self.lose_daemon();
            // The follower tries again if this does not work.
            let _ = self.take_back();
        }
    }
}

fn socket_of(request: &AttachRequest) -> PathBuf {
    request.config.state_dir.join(api::SOCKET)
}

fn text_of(cpuset: Option<&CpuSet>) -> String {
    cpuset.map(ToString::to_string).unwrap_or_default()
}

fn attach_at(client: &mut Client, request: &AttachRequest) -> Result<Attached, ClientError> {
    client.attach(&api::AttachRequest {
        id: request.id.clone(),
        namespace: request.namespace.clone(),
        // The handle is open as long as the call takes, whatever becomes of the process that the namespace was found by.
        netns: format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            request.netns.as_fd().as_raw_fd()
        ),
        worker: request.policy.worker.to_string(),
        profile: request.policy.profile.to_string(),
        required: request.policy.required,
        cpuset: text_of(request.cpuset.as_ref()),
        sockets: Some(api::sockets(&request.window, SocketCounters::default())),
        degraded: api::degraded(&request.degraded),
        bound: true,
        cpu_latency_us: request.policy.cpu_latency.map(|m| m.0),
        prefer_busy_poll: request.policy.prefer_busy_poll,
        busy_poll_mode: request.policy.busy_poll_mode.to_string(),
    })
}

fn copy(request: &AttachRequest) -> Result<AttachRequest> {
    Ok(AttachRequest {
        id: request.id.clone(),
        namespace: request.namespace.clone(),
        netns: request.netns.try_clone()?,
        policy: request.policy,
        cpuset: request.cpuset.clone(),
        window: request.window.clone(),
        degraded: request.degraded.clone(),
        config: request.config.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_begins_to_serve_is_noticed_once_with_and_without_events() {
        let dir = tempfile::tempdir().expect("directory");
        let rename = |name: &str| {
            let temporary = dir.path().join(".new");
            std::fs::write(&temporary, "1\n").expect("write");
            std::fs::rename(&temporary, dir.path().join(name)).expect("rename");
        };
        let mut notices = [Notice::new(dir.path()), Notice::looks(dir.path())];
        assert!(matches!(notices[0], Notice::Events(_)), "{notices:?}");
        let mut ready = || notices.each_mut().map(Notice::is_ready);
        assert_eq!(ready(), [false, false]);
        rename("other");
        assert_eq!(ready(), [false, false]);
        rename(api::READY);
        assert_eq!(ready(), [true, true]);
        assert_eq!(ready(), [false, false]);
        // Another one in its place, and one after the file was away.
        rename(api::READY);
        assert_eq!(ready(), [true, true]);
        std::fs::remove_file(dir.path().join(api::READY)).expect("remove");
        assert_eq!(ready(), [false, false]);
        rename(api::READY);
        assert_eq!(ready(), [true, true]);
    }
}
