//! Whose time a worker has used.
//!
//! A worker goes over all its instances in one loop, and the kernel does not tell the time of one from that of the next. What is told of a
//! pod is therefore: all rounds of its worker, since each is one over this pod too; all time that its worker did not run; and of the time
//! that it ran, which it would not have done without packets, the pod's part by packets. So the busy times of a worker's pods add up to
//! the worker's.
//!
//! The books are closed when they are read, when a pod comes or goes, and else once a second while there is anything to do.

use std::time::{Duration, Instant};

use super::workers::{Slot, WorkerKey};
use super::{Kept, Pod, SURVEY};

/// What a worker has done for a pod since it has polled it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// Its part of the time that the worker has run; nothing while that polls uplinks, too.
    pub busy: Duration,
    /// Time that the worker has not run.
    pub idle: Duration,
    /// Rounds of the worker, where they are counted.
    pub rounds: Option<u64>,
}

/// What of a worker's doings is in the accounts of its pods.
#[derive(Debug, Clone, Copy)]
pub(super) struct Booked {
    pub(super) busy: Duration,
    pub(super) rounds: Option<u64>,
    pub(super) at: Instant,
}

impl Booked {
    /// Of a worker that is made now.
    pub(super) fn nothing(now: Instant) -> Self {
        Self {
            busy: Duration::ZERO,
            rounds: None,
            at: now,
        }
    }
}

/// Divides `whole` by weights; equally where all are zero. The parts add up to the whole.
fn divide(whole: Duration, weights: &[u64]) -> Vec<Duration> {
    let sum: u128 = weights.iter().map(|w| u128::from(*w)).sum();
    let (weights, sum): (Vec<u128>, u128) = match sum {
        0 => (vec![1; weights.len()], weights.len() as u128),
        _ => (weights.iter().map(|w| u128::from(*w)).collect(), sum),
    };
    let upto = |share: u128| {
        let nanos = whole.as_nanos() * share / sum.max(1);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    };
    let mut share = 0;
    let parts = weights.into_iter().map(|weight| {
        let before = upto(share);
        share += weight;
        upto(share) - before
    });
    parts.collect()
}

impl Slot {
    /// Books what it has done until now; what of it was not booked yet.
    fn book(&mut self, now: Instant) -> Account {
        let before = self.booked;
        self.booked = Booked {
            // A thread's time is read from a file that may be gone already.
            busy: self.worker.busy().max(before.busy),
            rounds: self.worker.rounds(),
            at: now,
        };
        let busy = self.booked.busy - before.busy;
        Account {
            busy,
            idle: now
                .saturating_duration_since(before.at)
                .saturating_sub(busy),
            rounds: self
                .booked
                .rounds
                .map(|rounds| rounds - before.rounds.unwrap_or_default()),
        }
    }
}

impl Kept {
    /// Closes the books of one worker. What it did before its first pod is that one's: it was made for it.
    pub(super) fn book(&mut self, key: WorkerKey, now: Instant) {
        let pods = self.pods.values_mut().filter(|p| p.worker == Some(key));
        let pods: Vec<&mut Pod> = pods.collect();
        let Some(slot) = self.workers.slots.get_mut(&key) else {
            return;
        };
        if pods.is_empty() {
            return;
        }
        let done = slot.book(now);
        let weights: Vec<u64> = pods
            .iter()
            .map(|pod| pod.packets() - pod.booked_packets)
            .collect();
        // An uplink's packets are not known here, and no pod is charged with them.
        let whole = if slot.polls_uplinks() {
            Duration::ZERO
        } else {
            done.busy
        };
        for (pod, part) in pods.into_iter().zip(divide(whole, &weights)) {
            pod.booked_packets = pod.packets();
            let account = &mut pod.account;
            account.busy += part;
            account.idle += done.idle;
            account.rounds = done
                .rounds
                .map(|rounds| account.rounds.unwrap_or_default() + rounds);
        }
    }

    /// Closes those of all.
    pub(super) fn book_all(&mut self, now: Instant) {
        let keys: Vec<WorkerKey> = self.workers.slots.keys().copied().collect();
        keys.into_iter().for_each(|key| self.book(key, now));
    }

    /// Closes them so often that packets and time belong together.
    pub(super) fn book_now_and_then(&mut self, now: Instant) {
        let is_late = |slot: &Slot| now.saturating_duration_since(slot.booked.at) >= SURVEY;
        let slots = self.workers.slots.iter();
        let late = slots.filter(|(_, slot)| is_late(slot)).map(|(key, _)| *key);
        let late: Vec<WorkerKey> = late.collect();
        late.into_iter().for_each(|key| self.book(key, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_by_packets_and_add_up() {
        let whole = Duration::from_nanos(1_000_000_007);
        for weights in [
            &[1, 2, 4][..],
            &[0, 0],
            &[0, 5, 0],
            &[u64::MAX, u64::MAX, 3],
            &[7; 13],
        ] {
            let parts = divide(whole, weights);
            assert_eq!(parts.len(), weights.len());
            assert_eq!(parts.iter().sum::<Duration>(), whole, "{weights:?}");
        }
        let ms = Duration::from_millis;
        assert_eq!(divide(ms(70), &[1, 2, 4]), [ms(10), ms(20), ms(40)]);
        assert_eq!(divide(ms(70), &[0, 3]), [ms(0), ms(70)]);
        assert_eq!(divide(ms(70), &[0, 0]), [ms(35), ms(35)]);
        assert_eq!(divide(ms(70), &[]), []);
    }
}
