//! What an engine keeps, at one moment.

use std::time::{Duration, Instant};

use kbp_kernel::Micros;

use super::{Account, Kept};
use crate::state::{PodState, WorkerState};

/// A pod.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSnapshot {
    /// What its state file says.
    pub state: PodState,
    /// Packets over its host ends since the attach, both ways.
    pub packets: u64,
    /// Packets a second, at the last look.
    pub rate: u64,
    /// What its workers have done for it.
    pub account: Account,
}

/// A worker.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerSnapshot {
    /// Kind, CPU, thread.
    pub state: WorkerState,
    /// Pods that it polls.
    pub pods: usize,
    /// Uplinks that it polls.
    pub uplinks: usize,
    /// Leases started.
    pub renewals: u64,
    /// Whether it is parked now.
    pub parked: bool,
    /// How often it has gone over its pods: of a `socket` only, since the kernel does not count the rounds of the others.
    pub rounds: Option<u64>,
    /// Time its thread has run, which is the time it was not parked.
    pub busy: Duration,
    /// Time since it was made.
    pub age: Duration,
    /// Packets a second of its pods, at the last look.
    pub rate: u64,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Its pods.
    pub pods: Vec<PodSnapshot>,
    /// Its workers.
    pub workers: Vec<WorkerSnapshot>,
    /// Pods that were moved from a hot core.
    pub moves: u64,
    /// What is held of the CPUs' sleep states.
    pub cpu_latency: Option<Micros>,
}

impl Kept {
    pub(super) fn snapshot(&mut self) -> Snapshot {
        self.count();
        let now = Instant::now();
        self.book_all(now);
        let pods = self.pods.values().map(|pod| PodSnapshot {
            state: pod.record.state(),
            packets: pod.packets(),
            rate: pod.rate,
            account: pod.account,
        });
        let workers = self.workers.slots.iter().map(|(key, slot)| {
            let of = || self.pods.values().filter(|p| p.worker == Some(*key));
            let pods = of().count();
            // Of the moment in which its pods' accounts were closed; without pods it has no books.
            let (busy, rounds) = match pods {
                0 => (slot.worker.busy(), slot.worker.rounds()),
                _ => (slot.booked.busy, slot.booked.rounds),
            };
            WorkerSnapshot {
                state: slot.worker.state.clone(),
                pods,
                uplinks: slot.users().saturating_sub(pods),
                renewals: slot.renewals,
                parked: slot.worker.is_parked(),
                rounds,
                busy,
                age: now - slot.made,
                rate: of().map(|p| p.rate).sum(),
            }
        });
        Snapshot {
            pods: pods.collect(),
            workers: workers.collect(),
            moves: self.moves,
            cpu_latency: self.latency.micros(),
        }
    }
}
