//! Keeps the pods of one process: one thread for all of them, whether the process is a shim with one pod or the daemon
//! with hundreds.
//!
//! The thread renews the leases of [`workers`] while packets flow and lets them park when they do not; on link events it
//! looks at a [`pod`]'s links anew and tunes what changed; once a second it looks whether namespaces have vanished or CPUs gone [`offline`], and
//! [`balance`]s the load. What it keeps is behind one lock, which it takes for one pod at a time, and not while it asks the kernel for
//! a pod's links: whoever attaches does not wait until it has been through all of them.

mod accounts;
mod balance;
mod latency;
mod offline;
mod pod;
mod snapshot;
mod workers;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::link::{LinkEvent, LinkEvents, RouteSocket};
use kbp_kernel::netns::Netns;
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_kernel::{CpuSet, IfIndex};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::due::timeout_until;
use crate::state::{PodState, WorkerState};
use crate::{Error, Result};
pub use accounts::Account;
pub(crate) use latency::Latency;
use pod::Seen;
pub(crate) use pod::{Pod, PodKey};
pub use snapshot::{PodSnapshot, Snapshot, WorkerSnapshot};
pub(crate) use workers::{WorkerKey, Workers};

/// The kernel may wake the thread this much later than asked, together with others. Leases are far longer.
const TIMER_SLACK: Duration = Duration::from_millis(10);

/// Enough for a netlink answer and a log line; only what is touched becomes resident.
const STACK: usize = 128 * 1024;

/// How often namespaces and loads are looked at.
const SURVEY: Duration = Duration::from_secs(1);

const WAKE: u64 = 0;
const HOST_EVENTS: u64 = 1;

/// Handle of the thread and what it keeps; the thread ends with the last one.
#[derive(Debug, Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    host: Netns,
    epoll: Epoll,
    wake: EventFd,
    /// Written to when the state of any pod changes.
    changed: Arc<EventFd>,
    stop: AtomicBool,
    /// Held by who waits for `kept`, so that whoever takes that again and again does not overtake him.
    turn: Mutex<()>,
    kept: Mutex<Kept>,
}

/// What the lock protects.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) pods: BTreeMap<PodKey, Pod>,
    pub(crate) workers: Workers,
    pub(crate) latency: Latency,
    events: LinkEvents,
    counters: RouteSocket,
    next_key: PodKey,
    /// Ticks happen at whole multiples of a fraction of the lease from here on, so that one wake-up serves all pods.
    epoch: Instant,
    survey_at: Option<Instant>,
    /// The CPUs of the last survey.
    online: CpuSet,
    cleared: Option<Instant>,
    moves: u64,
}

impl Engine {
    /// Starts the thread; the calling thread's network namespace is the host's.
    ///
    /// # Errors
    /// When the process has no descriptors or threads left.
    pub fn start() -> Result<Self> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: Errno| Error::io(what, e.into())
        };
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(failed("make an eventfd"))
        };
        let host = Netns::current()?;
        let mut events = LinkEvents::subscribe(&host)?;
        events.watch_only(&[])?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(failed("make an epoll instance"))?;
        let wake = event()?;
        let readable = |data| EpollEvent::new(EpollFlags::EPOLLIN, data);
        epoll
            .add(&wake, readable(WAKE))
            .and_then(|()| epoll.add(&events, readable(HOST_EVENTS)))
            .map_err(failed("watch descriptors"))?;
        let shared = Arc::new(Shared {
            kept: Mutex::new(Kept {
                pods: BTreeMap::new(),
                workers: Workers::default(),
                latency: Latency::default(),
                events,
                counters: RouteSocket::open_in(&host)?,
                next_key: PodKey::FIRST,
                epoch: Instant::now(),
                survey_at: None,
                online: CpuSet::default(),
                cleared: None,
                moves: 0,
            }),
            host,
            epoll,
            wake,
            changed: Arc::new(event()?),
            stop: AtomicBool::new(false),
            turn: Mutex::new(()),
        });
        let run = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kbp-keeper".to_owned())
            .stack_size(STACK)
            .spawn(move || run.run())
            .map_err(|e| Error::io("start the thread that keeps the leases of workers", e))?;
        Ok(Self {
            handle: Arc::new(Handle {
                shared,
                thread: Some(thread),
            }),
        })
    }

    /// Readable when the state of a pod has changed; read it to wait for the next change.
    pub fn changed(&self) -> &EventFd {
        &self.handle.shared.changed
    }

    pub(crate) fn host(&self) -> &Netns {
        &self.handle.shared.host
    }

    /// Whether leftovers of the dead are to be looked for: when many pods come at once, once a second is enough.
    pub(crate) fn may_clear(&self) -> bool {
        let mut kept = self.lock();
        let now = Instant::now();
        let due = kept.cleared.is_none_or(|at| now - at >= SURVEY);
        if due {
            kept.cleared = Some(now);
        }
        due
    }

    pub(crate) fn changed_handle(&self) -> Arc<EventFd> {
        Arc::clone(&self.handle.shared.changed)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Kept> {
        self.handle.shared.lock()
    }

    /// Keeps a pod from now on.
    pub(crate) fn insert(&self, kept: &mut Kept, mut pod: Pod) -> Result<PodKey> {
        pod.start_counting(&mut kept.counters);
        // What its worker did before is not its own.
        if let Some(worker) = pod.worker {
            kept.book(worker, Instant::now());
        }
        let key = kept.next_key;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, key.0);
        if let Err(errno) = self.handle.shared.epoll.add(pod.events(), event) {
            return Err(Error::io("watch the links of a pod", errno.into()));
        }
        kept.next_key = PodKey(key.0 + 1);
        kept.pods.insert(key, pod);
        kept.follow_hosts();
        kept.latency_of_pods();
        // Its first look was before the host's events were asked for: look again, and set the timers.
        kept.refresh_soon(key);
        self.wake();
        Ok(key)
    }

    /// Keeps it no longer: its NAPIs are polled by nobody when this returns.
    pub(crate) fn remove(&self, key: PodKey) {
        let mut kept = self.lock();
        if let Some(worker) = kept.pods.get(&key).and_then(|pod| pod.worker) {
            kept.book(worker, Instant::now());
        }
        let Some(mut pod) = kept.pods.remove(&key) else {
            return;
        };
        let _ = self.handle.shared.epoll.delete(pod.events());
        kept.workers.release(&mut pod);
        kept.follow_hosts();
        kept.latency_of_pods();
        drop(kept);
        pod.look.end();
        self.changed_handle().write(1).ok();
    }

    /// Returns only when the lock can be had and the look that is under way has come to an end.
    pub(crate) fn touch(&self) {
        let looks: Vec<_> = self.lock().pods.values().map(Pod::look).collect();
        looks.iter().for_each(|look| look.wait());
    }

    /// Has a pod's links looked at again.
    pub(crate) fn refresh_soon(&self, key: PodKey) {
        self.lock().refresh_soon(key);
        self.wake();
    }

    /// What is true now.
    pub fn snapshot(&self) -> Snapshot {
        self.lock().snapshot()
    }

    /// How long workers that are awake take to go over their NAPIs once, where that can be timed, by what [`WorkerSnapshot::state`] says of them.
    pub(crate) fn round_times(&self) -> Vec<(WorkerState, Duration)> {
        /// Hundreds of NAPIs take tens of microseconds.
        const LIMIT: Duration = Duration::from_millis(1);
        let keys: Vec<WorkerKey> = self.lock().workers.slots.keys().copied().collect();
        let time = |key| {
            // The lock is free between two of them.
            let kept = self.lock();
            let worker = &kept.workers.slots.get(&key)?.worker;
            Some((worker.state.clone(), worker.round_time(LIMIT)?))
        };
        keys.into_iter().filter_map(time).collect()
    }

    /// Packets that busy polling took in each pod's namespace, by namespace and id of the pod, and those in the host's.
    /// None where the kernel does not tell.
    pub(crate) fn busy_polled(&self) -> (Vec<(PodState, u64)>, Option<u64>) {
        let handles: Vec<(PodState, Netns)> = {
            let kept = self.lock();
            let of = |pod: &Pod| Some((pod.record.state(), pod.tuner().pod.try_clone().ok()?));
            kept.pods.values().filter_map(of).collect()
        };
        // Without the lock: a namespace is entered for each.
        let of =
            |(state, netns): (PodState, Netns)| Some((state, busy_poll_rx_packets(&netns).ok()?));
        let pods = handles.into_iter().filter_map(of).collect();
        (pods, busy_poll_rx_packets(self.host()).ok())
    }

    fn wake(&self) {
        // An eventfd refuses a write only when it is full, and then the thread is awake already.
        let _ = self.handle.shared.wake.write(1);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps the leases of workers had panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // A panic in between leaves at worst a pod half looked at; the next look mends it.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        // Best effort: without it the kernel's default of 50 µs only wakes the CPU more often than needed.
        let _ = nix::sys::prctl::set_timerslack(TIMER_SLACK.as_nanos() as u64);
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let due = self.lock().next_due();
            let count = match self.epoll.wait(&mut ready, timeout_until(due)) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => {
                    tracing::error!(%errno, "waiting for link events failed; the workers park");
                    return;
                }
            };
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            for event in ready.iter().take(count) {
                match event.data() {
                    WAKE => drop(self.wake.read()),
                    HOST_EVENTS => self.lock().host_events(),
                    key => self.lock().pod_events(PodKey(key)),
                }
            }
            self.work(Instant::now());
        }
    }

    fn work(&self, now: Instant) {
        let mut moved_ends = false;
        for key in self.due(|pod| pod.is_refresh_due(now)) {
            let Some(look) = self.of(key, |pod| pod.begin_look(now)) else {
                continue;
            };
            if let Some(seen) = look.take() {
                moved_ends |= self.lock().seen(key, seen);
            }
        }
        if moved_ends {
            self.lock().follow_hosts();
        }
        for key in self.due(|pod| pod.is_tick_due(now)) {
            self.lock().tick(key, now);
        }
        if self.lock().renew(now) {
            for key in self.due(Pod::has_path) {
                self.of(key, Pod::look_for_namespace);
            }
            self.lock().end_survey(now);
        }
    }

    fn due(&self, is_due: impl Fn(&Pod) -> bool) -> Vec<PodKey> {
        let kept = self.lock();
        let due = kept.pods.iter().filter(|(_, pod)| is_due(pod));
        due.map(|(key, _)| *key).collect()
    }

    /// What `act` says of a pod; None when it has gone meanwhile.
    fn of<T>(&self, key: PodKey, act: impl FnOnce(&mut Pod) -> T) -> Option<T> {
        self.lock().pods.get_mut(&key).map(act)
    }
}

impl Kept {
    fn next_due(&self) -> Option<Instant> {
        let pods = self.pods.values().filter_map(Pod::due);
        pods.chain(self.survey_at).min()
    }

    fn host_events(&mut self) {
        let events = match self.events.read() {
            Ok(events) => events,
            Err(error) => {
                tracing::warn!(%error, "link events could not be read");
                vec![LinkEvent::Lost]
            }
        };
        for event in events {
            let (all, index) = match event {
                LinkEvent::Changed(index) | LinkEvent::Removed(index) => (false, index),
                LinkEvent::Lost => (true, IfIndex(0)),
            };
            for pod in self.pods.values_mut() {
                if all || pod.has_host_end(index) {
                    pod.refresh_soon();
                }
            }
        }
    }

    fn pod_events(&mut self, key: PodKey) {
        if let Some(pod) = self.pods.get_mut(&key) {
            pod.read_events();
        }
    }

    fn refresh_soon(&mut self, key: PodKey) {
        if let Some(pod) = self.pods.get_mut(&key) {
            pod.refresh_soon();
            pod.start_ticking(self.epoch);
        }
        self.survey_at
            .get_or_insert_with(|| Instant::now() + SURVEY);
    }

    /// On the host, where every pod of the node makes events, only those of the kept pods' links wake the thread.
    fn follow_hosts(&mut self) {
        let links: Vec<IfIndex> = self.pods.values().flat_map(Pod::host_ends).collect();
        if let Err(error) = self.events.watch_only(&links) {
            tracing::warn!(%error, "changes of the host ends may go unseen");
        }
    }

    fn latency_of_pods(&mut self) {
        let asked = self.pods.values().filter_map(|pod| pod.cpu_latency).min();
        self.latency.hold(asked);
    }

    /// Whether the host ends of a pod are others.
    fn seen(&mut self, key: PodKey, seen: Seen) -> bool {
        let Some(pod) = self.pods.get_mut(&key) else {
            return false;
        };
        let before = pod.worker;
        if before.is_none() || matches!(seen, Ok(None)) {
            // It may come to a worker, or leave its own.
            self.book_all(Instant::now());
        }
        let Some(pod) = self.pods.get_mut(&key) else {
            return false;
        };
        let moved = pod.seen(&mut self.workers, seen);
        if pod.worker != before {
            pod.booked_packets = pod.packets();
        }
        pod.start_ticking(self.epoch);
        moved
    }

    fn tick(&mut self, key: PodKey, now: Instant) {
        let Some(pod) = self.pods.get_mut(&key) else {
            return;
        };
        if pod.tick(&mut self.counters, now, self.epoch) {
            self.workers.ask_for_lease(pod);
        }
        pod.choose_way(self.workers.allow_rest(pod));
    }

    /// Starts the leases that were asked for; true when namespaces and loads are to be looked at.
    fn renew(&mut self, now: Instant) -> bool {
        self.workers.loads = self.loads();
        self.workers.renew();
        self.book_now_and_then(now);
        if self.survey_at.is_none() && self.is_survey_wanted() {
            self.survey_at = Some(now + SURVEY);
        }
        self.survey_at.is_some_and(|at| now >= at)
    }

    fn end_survey(&mut self, now: Instant) {
        self.follow_cpus();
        self.moves += self.rebalance();
        self.survey_at = self.is_survey_wanted().then_some(now + SURVEY);
    }

    /// Nothing of it is of use while no pod can vanish or has packets to be moved for, and no worker is awake: then nobody is woken for it.
    fn is_survey_wanted(&self) -> bool {
        self.pods
            .values()
            .any(|pod| pod.has_path() || pod.is_movable())
            || self.are_cpus_wanted()
    }

    /// What is true of the pods whose state files are in this directory.
    pub(crate) fn states(&self, state_dir: &Path) -> Vec<PodState> {
        self.pods
            .values()
            .filter(|pod| pod.placing.config.state_dir == state_dir)
            .map(|pod| pod.record.state())
            .collect()
    }

    /// Reads every pod's counters.
    fn count(&mut self) {
        for pod in self.pods.values_mut() {
            pod.count(&mut self.counters);
        }
    }
}
