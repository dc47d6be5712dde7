//! Uplinks: interfaces of the node itself, physical or virtio, whose NAPIs are polled by the workers that poll the pods. A packet from
//! outside then meets no sleeping hop.
//!
//! Nothing of the interface is changed: offloads, queues and interrupts stay as they are. While its worker is parked, and when the
//! uplink is let go, interrupts and softirq do the work as ever.

mod state;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::link::{Link, LinkEvents, RouteSocket};
use kbp_kernel::napi::NetdevSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::{IfIndex, NapiId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::config::Config;
use crate::due::timeout_until;
use crate::engine::{Engine, WorkerKey};
use crate::pace::Pace;
use crate::place::Placing;
use crate::policy::{Profile, WorkerPolicy};
use crate::state::WorkerState;
use crate::worker::Sockets;
use crate::{Error, Result};
pub(crate) use state::clear;
pub use state::{UplinkState, read_all};

/// Link events come in flocks: this long between two looks.
const SETTLE: Duration = Duration::from_millis(50);

/// Enough for a netlink answer and a log line.
const STACK: usize = 128 * 1024;

/// A polled uplink. Dropping it lets the interface go.
#[derive(Debug)]
pub struct Uplink {
    stop: Arc<EventFd>,
    state: Arc<Mutex<UplinkState>>,
    host: Netns,
    state_dir: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Has an interface of the engine's namespace polled, as the node's `worker` says: `dedicated`, `idle`, or else `shared`. An interface that
    /// is not there, or down, is polled once it is.
    ///
    /// # Errors
    /// When the process has no descriptors or threads left. What keeps it from being polled is in [`Uplink::state`].
    pub fn uplink(&self, interface: &str, config: &Config) -> Result<Uplink> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("make an eventfd", e.into()))?;
        let stop = Arc::new(stop);
        let asked = match config.policy.worker {
            Some(policy @ (WorkerPolicy::Dedicated | WorkerPolicy::Idle)) => policy,
            // It was asked for by name, so it is not left to the sockets.
            _ => WorkerPolicy::Shared,
        };
        let host = self.host().try_clone()?;
        let state = Arc::new(Mutex::new(UplinkState::new(interface)));
        let state_dir = config.state_dir.clone();
        let mut keeping = Keeping {
            engine: self.clone(),
            events: LinkEvents::subscribe(&host)?,
            route: RouteSocket::open_in(&host)?,
            host: host.try_clone()?,
            placing: Placing {
                asked,
                profile: Profile::Latency,
                cpuset: None,
                sockets: Sockets::Poll,
                config: config.clone(),
            },
            state: Arc::clone(&state),
            link: None,
            worker: None,
            polled: BTreeSet::new(),
        };
        keeping.look();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("kbp-uplink".to_owned())
            .stack_size(STACK)
            .spawn(move || keeping.run(&stopped))
            .map_err(|e| Error::io("start the thread that keeps an uplink", e))?;
        Ok(Uplink {
            stop,
            state,
            host,
            state_dir,
            thread: Some(thread),
        })
    }
}

impl Uplink {
    /// What is true now.
    pub fn state(&self) -> UplinkState {
        lock(&self.state).clone()
    }

    /// Packets that the interface has received since it exists; 0 while there is none of that name.
    pub fn packets(&self) -> u64 {
        let name = self.state().interface;
        let link = RouteSocket::open_in(&self.host).and_then(|mut s| s.link_by_name(&name));
        link.ok().flatten().map_or(0, |link| link.rx_packets)
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        // An eventfd refuses a write only when it is full, and then the thread is awake already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps an uplink had panicked");
        }
        if let Err(error) = state::remove(&self.state_dir, &lock(&self.state).interface) {
            tracing::warn!("{error}");
        }
    }
}

fn lock(state: &Mutex<UplinkState>) -> MutexGuard<'_, UplinkState> {
    // Every change leaves a whole state behind.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Keeping {
    engine: Engine,
    host: Netns,
    events: LinkEvents,
    route: RouteSocket,
    placing: Placing,
    state: Arc<Mutex<UplinkState>>,
    /// The link that `events` is about; None: it is about all.
    link: Option<IfIndex>,
    worker: Option<(WorkerKey, WorkerState)>,
    polled: BTreeSet<NapiId>,
}

impl Keeping {
    fn run(&mut self, stop: &EventFd) {
        let own_cpu = self.placing.asked == WorkerPolicy::Dedicated;
        let mut pace = Pace::new(self.packets(), own_cpu);
        let mut ticked = Instant::now();
        let mut look_at: Option<Instant> = None;
        loop {
            let tick_at = self.worker.as_ref().map(|_| ticked + pace.interval());
            let due = [tick_at, look_at].into_iter().flatten().min();
            let (ended, changed) = match self.wait(stop, due) {
                Ok(woken) => woken,
                Err(errno) => {
                    tracing::error!(%errno, "waiting for link events failed; an uplink is let go");
                    break;
                }
            };
            if ended {
                break;
            }
            let now = Instant::now();
            if changed {
                self.drain();
                look_at = look_at.or(Some(now + SETTLE));
            }
            if look_at.is_some_and(|at| now >= at) {
                look_at = None;
                self.look();
            }
            if tick_at.is_some_and(|at| now >= at) {
                let packets = self.packets();
                if pace.tick(packets, now - ticked)
                    && let Some((key, _)) = &self.worker
                {
                    self.engine.lock().workers.lease(*key);
                }
                ticked = now;
            }
        }
        self.let_go();
    }

    /// Whether it is to end, and whether links have changed.
    fn wait(&self, stop: &EventFd, due: Option<Instant>) -> Result<(bool, bool), Errno> {
        let mut fds = [
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout_until(due)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        Ok((ready(&fds[0]), ready(&fds[1])))
    }

    fn drain(&mut self) {
        if let Err(error) = self.events.read() {
            tracing::warn!(%error, "link events could not be read");
        }
    }

    /// Packets that came over it.
    fn packets(&mut self) -> u64 {
        let found = self.link.map(|index| self.route.link_by_index(index));
        match found {
            Some(Ok(Some(link))) => link.rx_packets,
            _ => 0,
        }
    }

    /// Looks at the interface, and has polled what is there.
    fn look(&mut self) {
        let outcome = self.find().and_then(|(link, napis)| {
            let key = self.worker()?;
            let mut kept = self.engine.lock();
            kept.workers
                .poll_uplink(key, &mut self.polled, &napis, &self.host, link)
        });
        if outcome.is_err() {
            self.let_go();
        }
        let mut state = lock(&self.state);
        let before = state.clone();
        state.napis = self.polled.iter().map(|napi| napi.0).collect();
        state.worker = self.worker.as_ref().map(|(_, state)| state.clone());
        if state.degraded != outcome.clone().err()
            && let Err(reason) = &outcome
        {
            tracing::warn!("uplink {} is not polled: {reason}", state.interface);
        }
        state.degraded = outcome.err();
        if *state != before
            && let Err(error) = state.write(&self.placing.config.state_dir)
        {
            tracing::warn!("{error}");
        }
    }

    fn find(&mut self) -> Result<(IfIndex, BTreeSet<NapiId>), String> {
        let name = lock(&self.state).interface.clone();
        let link: Option<Link> = self.route.link_by_name(&name).map_err(|e| e.to_string())?;
        let index = link.as_ref().map(|l| l.index);
        if index != self.link {
            // What it is about cannot be widened: a new subscription is about all links.
            self.events = LinkEvents::subscribe(&self.host).map_err(|e| e.to_string())?;
            if let Some(index) = index {
                self.events
                    .watch_only(&[index])
                    .map_err(|e| e.to_string())?;
            }
            self.link = index;
        }
        let link = link.ok_or_else(|| {
            format!("there is no interface {name} in the node's network namespace")
        })?;
        if !link.up {
            return Err(format!("{name} is down; it is polled once it is up"));
        }
        let napis = NetdevSocket::open_in(&self.host)
            .and_then(|mut netdev| netdev.napis(link.index))
            .map_err(|e| e.to_string())?;
        if napis.is_empty() {
            return Err(format!("{name} has no NAPI instance that can be polled"));
        }
        Ok((link.index, napis.into_iter().map(|n| n.id).collect()))
    }

    fn worker(&mut self) -> Result<WorkerKey, String> {
        if let Some((key, _)) = &self.worker {
            return Ok(*key);
        }
        let mut kept = self.engine.lock();
        let plan = self.placing.plan(&kept.loads());
        let placed = kept.workers.join(plan, &self.placing);
        let (key, state) = placed.worker.ok_or(placed.reason)?;
        self.worker = Some((key, state));
        Ok(key)
    }

    fn let_go(&mut self) {
        if let Some((key, _)) = self.worker.take() {
            self.engine
                .lock()
                .workers
                .leave_uplink(key, &mut self.polled);
        }
    }
}
