//! The NAPIs' own kernel threads. Those that poll without a pause (6.19+) spin until they are told otherwise, and those that packets wake
//! (6.17+) cost single packets a wake-up; so a thread of ours keeps their lease: it gives the NAPIs back to softirq when the lease runs out.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::napi_thread::NapiThread;
use kbp_kernel::netns::Netns;
use kbp_kernel::{Error, IfIndex, NapiId, Result, probe, process};

use super::LEASE;
use super::kind::{Poller, Seat, Target};

/// Enough for a netlink request.
const STACK: usize = 128 * 1024;

/// How the threads find packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// They poll without a pause.
    Polls,
    /// They sleep until a packet wakes them.
    Sleeps,
}

#[derive(Debug)]
pub(super) struct Kthreads {
    seat: Seat,
    mode: Mode,
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    napis: BTreeMap<NapiId, Polled>,
    until: Option<Instant>,
    end: bool,
    last_thread: u32,
    /// CPU time of the threads that have ended.
    spent: Duration,
}

#[derive(Debug)]
struct Polled {
    netns: Netns,
    link: IfIndex,
    thread: Option<NapiThread>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change leaves a whole state behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self) {
        let mut state = self.lock();
        while !state.end {
            let now = Instant::now();
            match state.until {
                None => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Some(until) if now < until => {
                    let waited = self.changed.wait_timeout(state, until - now);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Some(_) => {
                    state.until = None;
                    state.park();
                }
            }
        }
        state.park();
    }
}

impl State {
    /// Has every NAPI polled; the first error, after all of them.
    fn unpark(&mut self, seat: Seat, mode: Mode) -> Result<()> {
        let start = match mode {
            Mode::Polls => NapiThread::start,
            Mode::Sleeps => NapiThread::start_sleeping,
        };
        let mut outcome = Ok(());
        for (napi, polled) in &mut self.napis {
            if polled.thread.is_some() {
                continue;
            }
            match start(&polled.netns, polled.link, *napi, seat.cpu, seat.scheduling) {
                Ok(thread) => {
                    self.last_thread = thread.thread_id();
                    polled.thread = Some(thread);
                }
                // The link has gone down meanwhile: its event is on the way.
                Err(Error::NotFound { .. }) => {}
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    fn park(&mut self) {
        let ended = self.napis.values_mut().filter_map(|p| p.thread.take());
        self.spent += ended.map(|thread| spent(&thread)).sum::<Duration>();
    }
}

fn spent(thread: &NapiThread) -> Duration {
    let tid = thread.thread_id();
    process::cpu_time(tid, tid).unwrap_or_default()
}

impl Kthreads {
    pub(super) fn new(seat: Seat, mode: Mode) -> Result<Self> {
        match mode {
            Mode::Polls => probe::threaded_busy_poll()?,
            Mode::Sleeps => probe::threaded()?,
        }
        let shared = Arc::new(Shared::default());
        let of_keeper = Arc::clone(&shared);
        let keeper = std::thread::Builder::new()
            .name("kbp-lease".to_owned())
            .stack_size(STACK)
            .spawn(move || of_keeper.keep())
            .map_err(|source| Error::Syscall {
                what: "start the thread that keeps a lease".to_owned(),
                source,
            })?;
        Ok(Self {
            seat,
            mode,
            shared,
            keeper: Some(keeper),
        })
    }
}

impl Poller for Kthreads {
    fn add(&mut self, target: &Target<'_>) -> Result<()> {
        let mut state = self.shared.lock();
        if let Entry::Vacant(entry) = state.napis.entry(target.napi) {
            entry.insert(Polled {
                netns: target.netns.try_clone()?,
                link: target.link,
                thread: None,
            });
        }
        if state.until.is_some() {
            state.unpark(self.seat, self.mode)?;
        }
        Ok(())
    }

    fn remove(&mut self, napi: NapiId) -> Result<()> {
        let mut state = self.shared.lock();
        let removed = state.napis.remove(&napi).and_then(|p| p.thread);
        state.spent += removed.as_ref().map(spent).unwrap_or_default();
        Ok(())
    }

    fn wake(&mut self) -> Result<()> {
        let mut state = self.shared.lock();
        state.until = Some(Instant::now() + LEASE);
        self.shared.changed.notify_one();
        state.unpark(self.seat, self.mode)
    }

    fn is_asleep(&self) -> bool {
        self.shared.lock().until.is_none()
    }

    fn thread_id(&self) -> u32 {
        self.shared.lock().last_thread
    }

    fn busy(&self) -> Duration {
        let state = self.shared.lock();
        let running = state.napis.values().filter_map(|p| p.thread.as_ref());
        state.spent + running.map(spent).sum::<Duration>()
    }
}

impl Drop for Kthreads {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.changed.notify_one();
        if let Some(keeper) = self.keeper.take()
            && keeper.join().is_err()
        {
            tracing::error!("the thread that keeps a lease had panicked");
        }
    }
}
