//! The one thread of an attachment. It renews the worker's lease while packets flow, lets the worker park when they do
//! not, and on link events reads the NAPI ids anew and tunes what changed.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::link::{LinkEvents, RouteSocket};
use kbp_kernel::{IfIndex, NapiId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::endpoint::{self, Endpoint, Found};
use crate::pace::Pace;
use crate::policy::WorkerPolicy;
use crate::record::{Findings, Record};
use crate::state::{Degraded, Part};
use crate::tune::Tuner;
use crate::worker::Worker;
use crate::{Error, Result};

/// Link events come in flocks, and another program may set back what kbp sets: this long between two rounds bounds both.
const SETTLE: Duration = Duration::from_millis(50);

/// The kernel may wake the thread this much later than asked, together with others. Leases are far longer.
const TIMER_SLACK: Duration = Duration::from_millis(10);

/// Enough for a netlink answer and a log line; only what is touched becomes resident.
const STACK: usize = 128 * 1024;

/// The running thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Keeper {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works on.
pub(crate) struct Job {
    pub(crate) tuner: Tuner,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) worker: Option<Worker>,
    /// NAPIs that the worker polls already.
    pub(crate) polled: BTreeSet<NapiId>,
    pub(crate) record: Arc<Record>,
}

impl Keeper {
    /// Starts the thread. Subscribe before reading what the events are about: see [`Watch`].
    pub(crate) fn start(job: Job, watch: Watch) -> Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("make an eventfd", e.into()))?;
        let stop = Arc::new(stop);
        let stopped = Arc::clone(&stop);
        let counters = RouteSocket::open_in(&job.tuner.host)?;
        let own_cpu = job
            .worker
            .as_ref()
            .is_some_and(|w| w.state.policy == WorkerPolicy::Dedicated);
        let thread = std::thread::Builder::new()
            .name("kbp-keeper".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let mut keeper = Keeping {
                    job,
                    watch,
                    counters,
                    own_cpu,
                };
                keeper.run(stopped.as_fd());
            })
            .map_err(|e| Error::io("start the thread that keeps a worker's lease", e))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // An eventfd refuses a write only when it is full, and then the thread is awake already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps a worker's lease had panicked");
        }
    }
}

/// Link events of both namespaces. On the host, where every pod of the node makes some, only those of this pod's links
/// wake the thread.
#[derive(Debug)]
pub(crate) struct Watch {
    host: LinkEvents,
    pod: LinkEvents,
}

impl Watch {
    /// Subscribes to the events of both namespaces, on the host to those of `veths`. Look at the veths afterwards:
    /// then nothing is missed.
    pub(crate) fn subscribe(tuner: &Tuner, veths: &[Endpoint]) -> Result<Self> {
        let mut watch = Self {
            host: LinkEvents::subscribe(&tuner.host)?,
            pod: LinkEvents::subscribe(&tuner.pod)?,
        };
        watch.follow(veths)?;
        Ok(watch)
    }

    /// Follows the host ends of `veths` from now on.
    fn follow(&mut self, veths: &[Endpoint]) -> Result<()> {
        let links: Vec<IfIndex> = veths.iter().map(|v| v.host_index).collect();
        Ok(self.host.watch_only(&links)?)
    }

    /// Reads what has come; whether there was anything.
    fn drain(&mut self) -> kbp_kernel::Result<bool> {
        // Both are read to the end, or poll would return at once.
        let in_pod = !self.pod.read()?.is_empty();
        let on_host = !self.host.read()?.is_empty();
        Ok(in_pod || on_host)
    }
}

struct Keeping {
    job: Job,
    watch: Watch,
    counters: RouteSocket,
    own_cpu: bool,
}

impl Keeping {
    fn run(&mut self, stop: BorrowedFd<'_>) {
        // Best effort: without it the kernel's default of 50 µs only wakes the CPU more often than needed.
        let _ = nix::sys::prctl::set_timerslack(TIMER_SLACK.as_nanos() as u64);
        let mut pace = Pace::new(self.packets(), self.own_cpu);
        let mut ticked = Instant::now();
        let mut refreshed = ticked;
        let mut refresh_at: Option<Instant> = None;
        loop {
            // Without a worker there is no lease to keep: only events matter.
            let tick_at = self.job.worker.as_ref().map(|_| ticked + pace.interval());
            let until = [tick_at, refresh_at].into_iter().flatten().min();
            let woken = match self.wait(stop, until) {
                Ok(woken) => woken,
                Err(errno) => {
                    tracing::error!(%errno, "waiting for link events failed; the worker parks");
                    return;
                }
            };
            if woken.stop {
                return;
            }
            let now = Instant::now();
            if woken.events && self.drain_events() {
                refresh_at = refresh_at.or(Some((refreshed + SETTLE).max(now)));
            }
            if refresh_at.is_some_and(|at| now >= at) {
                refresh_at = None;
                refreshed = now;
                if !self.refresh() {
                    return;
                }
            }
            if tick_at.is_some_and(|at| now >= at) {
                let packets = self.packets();
                if pace.tick(packets, now - ticked) {
                    self.renew();
                }
                ticked = now;
            }
        }
    }

    fn wait(&self, stop: BorrowedFd<'_>, until: Option<Instant>) -> Result<Woken, Errno> {
        let timeout = match until {
            None => PollTimeout::NONE,
            // Rounded up, so that what is due is due when poll returns.
            Some(at) => at
                .saturating_duration_since(Instant::now())
                .as_micros()
                .div_ceil(1000)
                .try_into()
                .unwrap_or(PollTimeout::MAX),
        };
        let mut fds = [
            PollFd::new(stop, PollFlags::POLLIN),
            PollFd::new(self.watch.host.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.watch.pod.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        Ok(Woken {
            stop: ready(&fds[0]),
            events: ready(&fds[1]) || ready(&fds[2]),
        })
    }

    fn drain_events(&mut self) -> bool {
        self.watch.drain().unwrap_or_else(|error| {
            tracing::warn!(%error, "link events could not be read");
            true
        })
    }

    /// Packets that went over the host ends, both ways.
    fn packets(&mut self) -> u64 {
        let mut sum = 0u64;
        for endpoint in &self.job.endpoints {
            match self.counters.link_by_index(endpoint.host_index) {
                Ok(Some(link)) => sum += link.rx_packets + link.tx_packets,
                // Gone: the event for that comes, or is here.
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "counters could not be read"),
            }
        }
        sum
    }

    fn renew(&self) {
        if let Some(worker) = &self.job.worker
            && let Err(error) = worker.ring.wake()
        {
            tracing::warn!(%error, "the worker could not be woken");
        }
    }

    /// Looks at the pod's links anew; false when the pod has none any more.
    fn refresh(&mut self) -> bool {
        let job = &mut self.job;
        let findings = match endpoint::find(&job.tuner.host, &job.tuner.pod) {
            Ok(Found::Endpoints {
                veths,
                not_pollable,
            }) => {
                if let Err(error) = self.watch.follow(&veths) {
                    tracing::warn!(%error, "changes of the host ends may go unseen");
                }
                let findings = Findings::gather(&job.tuner, &veths, not_pollable);
                job.endpoints = veths;
                findings
            }
            Ok(Found::Empty | Found::HostNetwork) => {
                job.record.gone();
                return false;
            }
            Err(error) => {
                tracing::warn!(%error, "the pod's links could not be read");
                return true;
            }
        };
        let mut degraded = findings.degraded.clone();
        if let Some(worker) = &mut job.worker
            && let Err(error) = follow(worker, &mut job.polled, &findings.host_napis())
        {
            degraded.push(Degraded {
                part: Part::Worker,
                reason: error.to_string(),
            });
        }
        job.record.found(findings.interfaces, degraded);
        // New NAPIs begin their life in softirq; the worker takes over at once if it is awake, else at the next tick.
        true
    }
}

struct Woken {
    stop: bool,
    events: bool,
}

/// Has the worker poll exactly `wanted`. Goes on after an error and tells the first.
pub(crate) fn follow(
    worker: &mut Worker,
    polled: &mut BTreeSet<NapiId>,
    wanted: &BTreeSet<NapiId>,
) -> kbp_kernel::Result<()> {
    let mut outcome = Ok(());
    for old in polled.difference(wanted).copied().collect::<Vec<_>>() {
        match worker.ring.remove(old) {
            Ok(()) => {
                polled.remove(&old);
            }
            Err(e) => outcome = outcome.and(Err(e)),
        }
    }
    for new in wanted.difference(polled).copied().collect::<Vec<_>>() {
        match worker.ring.add(new) {
            Ok(()) => {
                polled.insert(new);
            }
            Err(e) => outcome = outcome.and(Err(e)),
        }
    }
    outcome
}
