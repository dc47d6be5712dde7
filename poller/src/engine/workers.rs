//! The workers of one process, and which pods each polls.
//!
//! Shared and idle-class workers take any number of pods: one worker a CPU. A dedicated one has a CPU and a pod of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use kbp_kernel::netns::Netns;
use kbp_kernel::{CpuId, IfIndex, NapiId};

use super::Pod;
use super::accounts::Booked;
use crate::claim::Claim;
use crate::config::Feature;
use crate::place::{Placed, Placing};
use crate::policy::{Profile, WorkerPolicy};
use crate::record::{End, Findings, Napis};
use crate::state::WorkerState;
use crate::tune::Tuner;
use crate::worker::{self, Plan, Target, Worker};

/// Names a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum WorkerKey {
    /// The shared one of a CPU.
    Shared(CpuId),
    /// The shared one of a CPU for pods of the profile `throughput`.
    Throughput(CpuId),
    /// The idle-class one of a CPU.
    Idle(CpuId),
    /// The dedicated one of a CPU.
    Dedicated(CpuId),
}

impl WorkerKey {
    fn new(policy: WorkerPolicy, profile: Profile, cpu: CpuId) -> Self {
        match (policy, profile) {
            (WorkerPolicy::Dedicated, _) => Self::Dedicated(cpu),
            (WorkerPolicy::Idle, _) => Self::Idle(cpu),
            (_, Profile::Throughput) => Self::Throughput(cpu),
            (_, Profile::Latency) => Self::Shared(cpu),
        }
    }

    /// Its CPU.
    pub(super) fn cpu(self) -> CpuId {
        match self {
            Self::Shared(cpu) | Self::Throughput(cpu) | Self::Idle(cpu) | Self::Dedicated(cpu) => {
                cpu
            }
        }
    }

    /// The CPU of a shared one.
    pub(super) fn shared_cpu(self) -> Option<CpuId> {
        match self {
            Self::Shared(cpu) | Self::Throughput(cpu) => Some(cpu),
            Self::Idle(_) | Self::Dedicated(_) => None,
        }
    }
}

/// A worker and its accounts.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) worker: Worker,
    pub(super) made: Instant,
    /// Leases started.
    pub(super) renewals: u64,
    /// Pods and uplinks that it polls.
    users: usize,
    /// Instances of uplinks among what it polls.
    uplink_napis: usize,
    lease_asked: bool,
    pub(super) booked: Booked,
}

impl Slot {
    pub(super) fn users(&self) -> usize {
        self.users
    }

    /// Whether it polls uplinks, too.
    pub(super) fn polls_uplinks(&self) -> bool {
        self.uplink_napis > 0
    }
}

/// Every worker of the process.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    pub(super) slots: BTreeMap<WorkerKey, Slot>,
    /// Packets a second on each CPU with a shared worker, at the last look.
    pub(super) loads: BTreeMap<CpuId, u64>,
}

impl Workers {
    /// Has `plan` done for one pod more: an existing worker, or a new one. Undone by [`Workers::leave`].
    pub(crate) fn join(&mut self, plan: Plan, placing: &Placing) -> Placed {
        let (policy, cpu, claim, reason) = match plan {
            Plan::None { reason } => return Placed::none(reason),
            Plan::Failed { reason } => return Placed::failed(reason),
            Plan::On {
                policy,
                cpu,
                claim,
                reason,
            } => (policy, cpu, claim, reason),
        };
        match self.slot(policy, cpu, claim, placing) {
            Ok((key, state)) => {
                let caveat = self.slots.get(&key).and_then(|s| s.worker.caveat.as_ref());
                Placed {
                    reason: match caveat {
                        Some(caveat) => format!("{reason}; {caveat}"),
                        None => reason,
                    },
                    worker: Some((key, state)),
                    degraded: None,
                }
            }
            Err(reason) => Placed::failed(reason),
        }
    }

    fn slot(
        &mut self,
        policy: WorkerPolicy,
        cpu: CpuId,
        claim: Option<Claim>,
        placing: &Placing,
    ) -> Result<(WorkerKey, WorkerState), String> {
        let key = WorkerKey::new(policy, placing.profile, cpu);
        let slot = match self.slots.remove(&key) {
            // Its own claim holds the CPU; the second one of this process goes.
            Some(slot) => slot,
            None => Slot {
                worker: worker::make(policy, placing.profile, cpu, claim, &placing.config)?,
                made: Instant::now(),
                renewals: 0,
                users: 0,
                uplink_napis: 0,
                lease_asked: false,
                booked: Booked::nothing(Instant::now()),
            },
        };
        let slot = self.slots.entry(key).or_insert(slot);
        slot.users += 1;
        Ok((key, slot.worker.state.clone()))
    }

    /// The pod that has joined is not kept after all.
    pub(crate) fn leave(&mut self, key: WorkerKey, polled: &Napis) {
        let Some(slot) = self.slots.get_mut(&key) else {
            return;
        };
        for napi in polled.keys() {
            if let Err(error) = slot.worker.remove(*napi) {
                tracing::warn!(%error, "a NAPI is still in the list of a worker");
            }
        }
        slot.users = slot.users.saturating_sub(1);
        if slot.users == 0 {
            self.slots.remove(&key);
        }
    }

    /// Takes the pod from its worker.
    pub(super) fn release(&mut self, pod: &mut Pod) {
        if let Some(key) = pod.worker.take() {
            self.leave(key, &std::mem::take(&mut pod.polled));
        }
    }

    /// Finds a worker for a pod whose interfaces have come back.
    pub(super) fn place(&mut self, pod: &mut Pod) {
        let plan = pod.placing.plan(&self.loads);
        let placed = self.join(plan, &pod.placing);
        pod.worker = placed.worker.as_ref().map(|(key, _)| *key);
        pod.record.placed(&placed);
    }

    /// Moves a pod whole: the new worker polls all of it before the old one lets go.
    pub(super) fn move_to(
        &mut self,
        pod: &mut Pod,
        to: CpuId,
        loads: &BTreeMap<CpuId, u64>,
    ) -> Result<(), String> {
        let plan = pod.placing.plan_on(to, loads);
        let placed = self.join(plan, &pod.placing);
        let Some((key, _)) = placed.worker else {
            return Err(placed.reason);
        };
        let mut polled = Napis::new();
        if let Err(reason) = self.poll(key, &mut polled, &pod.polled, pod.tuner()) {
            self.leave(key, &polled);
            return Err(reason);
        }
        // Awake before it is relied on: the pod is not silent, or its core would not be hot.
        if let Some(slot) = self.slots.get_mut(&key) {
            slot.lease_asked = true;
        }
        self.renew();
        let old = pod.worker.replace(key);
        let old_polled = std::mem::replace(&mut pod.polled, polled);
        if let Some(old) = old {
            self.leave(old, &old_polled);
        }
        pod.record.placed(&placed);
        Ok(())
    }

    /// What of a pod's a worker is to poll.
    pub(crate) fn wanted(&self, key: WorkerKey, findings: &Findings) -> Napis {
        match self.slots.get(&key) {
            Some(slot) if slot.worker.polls_pod_ends() => findings.napis(),
            _ => findings.host_napis(),
        }
    }

    /// Has the pod's worker poll exactly `wanted`. Goes on after an error and tells the first.
    pub(crate) fn follow(&mut self, pod: &mut Pod, wanted: &Napis) -> Result<(), String> {
        match pod.worker {
            Some(key) => {
                let look = pod.look();
                self.poll(key, &mut pod.polled, wanted, look.tuner())
            }
            None => Ok(()),
        }
    }

    /// Has a worker poll exactly `wanted` of what was or is `polled`, of a pod of `tuner`'s. Goes on after an error and tells the first.
    pub(crate) fn poll(
        &mut self,
        key: WorkerKey,
        polled: &mut Napis,
        wanted: &Napis,
        tuner: &Tuner,
    ) -> Result<(), String> {
        let Some(slot) = self.slots.get_mut(&key) else {
            return Ok(());
        };
        let mut outcome = Ok(());
        polled.retain(|old, _| {
            if wanted.contains_key(old) {
                return true;
            }
            let removed = slot.worker.remove(*old).map_err(|e| e.to_string());
            let stays = removed.is_err();
            outcome = outcome.clone().and(removed);
            stays
        });
        for (napi, instance) in wanted {
            if polled.contains_key(napi) {
                continue;
            }
            let veth = &instance.veth;
            let (netns, link, other) = match instance.end {
                End::Host => (
                    &tuner.host,
                    veth.host_index,
                    (&tuner.pod, veth.pod_name.as_str()),
                ),
                End::Pod => (
                    &tuner.pod,
                    veth.pod_index,
                    (&tuner.host, veth.host_name.as_str()),
                ),
            };
            let target = Target {
                napi: *napi,
                netns,
                link,
                other: Some(other),
            };
            match slot.worker.add(&target) {
                Ok(()) => drop(polled.insert(*napi, instance.clone())),
                Err(e) => outcome = outcome.and(Err(e.to_string())),
            }
        }
        outcome
    }

    /// Has a worker poll exactly `wanted` of an uplink in `netns`. Goes on after an error and tells the first.
    pub(crate) fn poll_uplink(
        &mut self,
        key: WorkerKey,
        polled: &mut BTreeSet<NapiId>,
        wanted: &BTreeSet<NapiId>,
        netns: &Netns,
        link: IfIndex,
    ) -> Result<(), String> {
        let Some(slot) = self.slots.get_mut(&key) else {
            return Ok(());
        };
        let mut outcome = Ok(());
        for old in polled.difference(wanted) {
            outcome = outcome.and(slot.worker.remove(*old).map_err(|e| e.to_string()));
        }
        slot.uplink_napis -= polled.len();
        polled.retain(|napi| wanted.contains(napi));
        for napi in wanted {
            let target = Target {
                napi: *napi,
                netns,
                link,
                other: None,
            };
            match slot.worker.add(&target) {
                Ok(()) => drop(polled.insert(*napi)),
                Err(e) => outcome = outcome.and(Err(e.to_string())),
            }
        }
        slot.uplink_napis += polled.len();
        outcome
    }

    /// An uplink has traffic.
    pub(crate) fn lease(&mut self, key: WorkerKey) {
        if let Some(slot) = self.slots.get_mut(&key) {
            slot.lease_asked = true;
        }
        self.renew();
    }

    /// Takes an uplink from its worker.
    pub(crate) fn leave_uplink(&mut self, key: WorkerKey, polled: &mut BTreeSet<NapiId>) {
        if let Some(slot) = self.slots.get_mut(&key) {
            slot.uplink_napis -= polled.len();
            for napi in std::mem::take(polled) {
                if let Err(error) = slot.worker.remove(napi) {
                    tracing::warn!(%error, "a NAPI is still in the list of a worker");
                }
            }
        }
        self.leave(key, &Napis::new());
    }

    /// Whether any of them polls now.
    pub(super) fn are_awake(&self) -> bool {
        self.slots.values().any(|slot| !slot.worker.is_parked())
    }

    /// Whether the pod's packets may take the short way while its worker sleeps.
    pub(super) fn allow_rest(&self, pod: &Pod) -> bool {
        let slot = pod.worker.and_then(|key| self.slots.get(&key));
        slot.is_some_and(|slot| slot.worker.can_do_without_packets())
            && !pod.placing.config.disable.contains(&Feature::ShortWay)
    }

    /// The pod has traffic.
    pub(super) fn ask_for_lease(&mut self, pod: &Pod) {
        if let Some(slot) = pod.worker.and_then(|key| self.slots.get_mut(&key)) {
            slot.lease_asked = true;
        }
    }

    /// Starts the leases that were asked for, one wake-up a worker however many pods asked.
    pub(super) fn renew(&mut self) {
        for slot in self.slots.values_mut() {
            if !std::mem::take(&mut slot.lease_asked) {
                continue;
            }
            slot.renewals += 1;
            if let Err(error) = slot.worker.wake() {
                tracing::warn!(%error, "the worker could not be woken");
            }
        }
    }
}
