//! One pod: its links, what polls them, and when to look at it again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kbp_kernel::link::{LinkEvents, RouteSocket};
use kbp_kernel::netns::{Netns, NetnsId};
use kbp_kernel::{IfIndex, Micros};

use super::Workers;
use super::accounts::Account;
use super::workers::WorkerKey;
use crate::endpoint::{self, Endpoint, Found};
use crate::pace::{self, Pace};
use crate::place::Placing;
use crate::policy::WorkerPolicy;
use crate::record::{Findings, Napis, Record};
use crate::state::{Degraded, Part};
use crate::tune::Tuner;

/// Link events come in flocks, and another program may set back what kbp sets: this long between two looks bounds both.
const SETTLE: Duration = Duration::from_millis(50);

/// When a worker could not take over a NAPI, it is tried again: a link that has just come up may lose the packet that primes a
/// socket. Then less and less often, since a firewall may be the cause.
const RETRY: Duration = Duration::from_millis(250);
const MOST_RETRY: Duration = Duration::from_secs(32);

/// Names a pod within its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodKey(pub(super) u64);

impl PodKey {
    /// Lower numbers name the engine's own descriptors.
    pub(super) const FIRST: Self = Self(16);
}

/// A look at a pod's links and the mending of what is not as it should be: half a millisecond of questions to the kernel, so it is done
/// without the engine's lock.
#[derive(Debug)]
pub(super) struct Look {
    tuner: Tuner,
    /// Nothing is mended any more once the pod is let go.
    ended: Mutex<bool>,
}

/// What a look has found.
pub(super) type Seen = crate::Result<Option<(Vec<Endpoint>, Findings)>>;

impl Look {
    pub(super) fn tuner(&self) -> &Tuner {
        &self.tuner
    }

    /// Looks, unless the pod has been let go.
    pub(super) fn take(&self) -> Option<Seen> {
        let ended = self.ended();
        (!*ended).then(|| self.look())
    }

    /// Waits for the look that is under way; there is none after it.
    pub(super) fn end(&self) {
        *self.ended() = true;
    }

    /// Waits for the look that is under way.
    pub(super) fn wait(&self) {
        drop(self.ended());
    }

    fn ended(&self) -> MutexGuard<'_, bool> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) -> Seen {
        Ok(match endpoint::find(&self.tuner.host, &self.tuner.pod)? {
            Found::Endpoints {
                veths,
                not_pollable,
            } => {
                let findings = Findings::gather(&self.tuner, &veths, not_pollable);
                Some((veths, findings))
            }
            Found::Empty | Found::HostNetwork => None,
        })
    }
}

/// A kept pod.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(super) look: Arc<Look>,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) record: Arc<Record>,
    pub(crate) placing: Placing,
    /// Who polls it.
    pub(crate) worker: Option<WorkerKey>,
    /// What that one polls.
    pub(crate) polled: Napis,
    /// What its owner wants of the CPUs' sleep states.
    pub(crate) cpu_latency: Option<Micros>,
    /// Where its namespace was found, when it is to be let go once it is not there any more.
    pub(crate) path: Option<(PathBuf, NetnsId)>,
    pub(super) rate: u64,
    /// The CPU of its worker has gone offline, and there is no other yet.
    pub(super) displaced: bool,
    /// Until the next try, when a worker could not take over a NAPI.
    retry: Duration,
    events: LinkEvents,
    pace: Pace,
    /// What its worker has done for it, and the packets up to which.
    pub(super) account: Account,
    pub(super) booked_packets: u64,
    /// Packets at the last count, and all since the attach.
    counted: u64,
    packets: u64,
    /// All at the last tick: others count in between.
    at_tick: u64,
    ticked: Instant,
    tick_at: Option<Instant>,
    refreshed: Instant,
    refresh_at: Option<Instant>,
}

impl Pod {
    pub(crate) fn new(
        tuner: Tuner,
        endpoints: Vec<Endpoint>,
        record: Arc<Record>,
        placing: Placing,
        events: LinkEvents,
    ) -> Self {
        let now = Instant::now();
        let own_cpu = placing.asked == WorkerPolicy::Dedicated;
        Self {
            look: Arc::new(Look {
                tuner,
                ended: Mutex::new(false),
            }),
            endpoints,
            record,
            placing,
            worker: None,
            polled: Napis::new(),
            cpu_latency: None,
            path: None,
            rate: 0,
            displaced: false,
            events,
            pace: Pace::new(0, own_cpu),
            account: Account::default(),
            booked_packets: 0,
            counted: 0,
            packets: 0,
            at_tick: 0,
            ticked: now,
            tick_at: None,
            retry: RETRY,
            // The first look was now, and the second need not wait.
            refreshed: now,
            refresh_at: None,
        }
    }

    /// Takes the counters as they are for where to count from.
    pub(super) fn start_counting(&mut self, counters: &mut RouteSocket) {
        self.counted = self.read_counters(counters);
        let own_cpu = self.placing.asked == WorkerPolicy::Dedicated;
        self.pace = Pace::new(self.counted, own_cpu);
    }

    pub(super) fn tuner(&self) -> &Tuner {
        self.look.tuner()
    }

    pub(super) fn look(&self) -> Arc<Look> {
        Arc::clone(&self.look)
    }

    pub(super) fn events(&self) -> &LinkEvents {
        &self.events
    }

    pub(super) fn host_ends(&self) -> impl Iterator<Item = IfIndex> {
        self.endpoints.iter().map(|e| e.host_index)
    }

    pub(super) fn has_host_end(&self, index: IfIndex) -> bool {
        self.endpoints.iter().any(|e| e.host_index == index)
    }

    pub(super) fn has_path(&self) -> bool {
        self.path.is_some()
    }

    pub(super) fn is_displaced(&self) -> bool {
        self.displaced
    }

    /// Whether another worker could take over what it does.
    pub(super) fn is_movable(&self) -> bool {
        self.rate > 0 && self.worker.and_then(WorkerKey::shared_cpu).is_some()
    }

    pub(super) fn packets(&self) -> u64 {
        self.packets
    }

    pub(super) fn due(&self) -> Option<Instant> {
        [self.tick_at, self.refresh_at].into_iter().flatten().min()
    }

    pub(super) fn is_refresh_due(&self, now: Instant) -> bool {
        self.refresh_at.is_some_and(|at| now >= at)
    }

    pub(super) fn is_tick_due(&self, now: Instant) -> bool {
        self.tick_at.is_some_and(|at| now >= at)
    }

    pub(super) fn refresh_soon(&mut self) {
        let soon = self.refreshed + SETTLE;
        self.refresh_at = Some(self.refresh_at.map_or(soon, |at| at.min(soon)));
    }

    /// Reads its events to the end, or the wait would return at once.
    pub(super) fn read_events(&mut self) {
        match self.events.read() {
            Ok(events) if events.is_empty() => {}
            Ok(_) => self.refresh_soon(),
            Err(error) => {
                tracing::warn!(%error, "link events could not be read");
                self.refresh_soon();
            }
        }
    }

    /// Without a worker there is no lease to keep: only events matter.
    pub(super) fn start_ticking(&mut self, epoch: Instant) {
        match self.worker {
            None => self.tick_at = None,
            Some(_) if self.tick_at.is_none() => {
                self.ticked = Instant::now();
                self.tick_at = Some(pace::aligned(epoch, self.ticked, self.pace.interval()));
            }
            Some(_) => {}
        }
    }

    /// Takes the counters; true when the worker's lease is to be renewed.
    pub(super) fn tick(
        &mut self,
        counters: &mut RouteSocket,
        now: Instant,
        epoch: Instant,
    ) -> bool {
        let elapsed = now - self.ticked;
        self.count(counters);
        self.rate = pace::per_second(self.packets - self.at_tick, elapsed);
        self.at_tick = self.packets;
        let renew = self.pace.tick(self.counted, elapsed);
        self.ticked = now;
        self.tick_at = Some(pace::aligned(epoch, now, self.pace.interval()));
        renew
    }

    /// Has its packets take the short way while its worker is not wanted. The next look sees to it: it asks the kernel without the lock.
    pub(super) fn choose_way(&mut self, may_rest: bool) {
        if self.tuner().set_resting(may_rest && self.pace.rests()) {
            self.refresh_soon();
        }
    }

    pub(super) fn count(&mut self, counters: &mut RouteSocket) {
        let now = self.read_counters(counters);
        // A link that was made anew counts from 0.
        self.packets += now.checked_sub(self.counted).unwrap_or(now);
        self.counted = now;
    }

    /// Packets that went over the host ends, both ways.
    fn read_counters(&self, counters: &mut RouteSocket) -> u64 {
        let mut sum = 0u64;
        for endpoint in &self.endpoints {
            match counters.link_by_index(endpoint.host_index) {
                Ok(Some(link)) => sum += link.rx_packets + link.tx_packets,
                // Gone: the event for that comes, or is here.
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "counters could not be read"),
            }
        }
        sum
    }

    /// A look at its links begins: what happens from now on wants another.
    pub(super) fn begin_look(&mut self, now: Instant) -> Arc<Look> {
        self.refresh_at = None;
        self.refreshed = now;
        self.look()
    }

    /// Has its worker poll what there is now. Whether its host ends are others.
    pub(super) fn seen(&mut self, workers: &mut Workers, seen: Seen) -> bool {
        let before: Vec<IfIndex> = self.host_ends().collect();
        match seen {
            Ok(Some((veths, findings))) => {
                self.endpoints = veths;
                self.follow(workers, findings);
            }
            Ok(None) => {
                // Only its worker goes: another interface may come.
                self.endpoints.clear();
                workers.release(self);
                self.tick_at = None;
                self.record.gone();
            }
            Err(error) => {
                // What has happened is not known, and no second event may come for it.
                tracing::warn!(%error, "the pod's links could not be read");
                self.retry_later();
            }
        }
        !self.host_ends().eq(before)
    }

    /// Its links could not be read, or its worker could not take over all of it.
    fn retry_later(&mut self) {
        let later = Instant::now() + self.retry;
        self.refresh_at = Some(self.refresh_at.map_or(later, |at| at.min(later)));
        self.retry = (self.retry * 2).min(MOST_RETRY);
    }

    fn follow(&mut self, workers: &mut Workers, findings: Findings) {
        let mut degraded = findings.degraded.clone();
        let wanted = findings.host_napis();
        if self.worker.is_none() && self.record.is_gone() && !wanted.is_empty() {
            workers.place(self);
        }
        let wanted = match self.worker {
            Some(key) => workers.wanted(key, &findings),
            None => wanted,
        };
        let outcome = workers.follow(self, &wanted);
        // Where ids are learnt from packets, one may have been lost.
        let unknown = findings.ids_unknown.filter(|_| self.worker.is_some());
        match outcome.and(unknown.map_or(Ok(()), Err)) {
            Ok(()) => self.retry = RETRY,
            Err(reason) => {
                degraded.push(Degraded {
                    part: Part::Worker,
                    reason,
                });
                self.retry_later();
            }
        }
        // New NAPIs begin their life in softirq; the worker takes over at once if it is awake, else at the next tick.
        self.record
            .found(findings.interfaces, findings.rests, degraded);
    }

    /// Holding a namespace open keeps it, and its veth with it, so whoever registered it has to be looked for.
    pub(super) fn look_for_namespace(&mut self) {
        let Some((path, id)) = &self.path else {
            return;
        };
        let is_there = Netns::open(path).and_then(|netns| netns.id());
        if !is_there.is_ok_and(|found| found == *id) {
            self.path = None;
            self.record.vanished();
        }
    }
}
