//! When to look at a pod's counters and when to renew its worker's lease: pure arithmetic, no clock of its own.

use std::time::Duration;

use crate::worker::LEASE;

/// How often the counters are read while packets flow: the lease is renewed twice before it would end.
const BUSY: Duration = Duration::from_millis(LEASE.as_millis() as u64 / 2);

/// How often they are read at least, however long the pod is silent: the longest that a pod which wakes up goes
/// without its worker. (Softirq does the work until then, as on any veth.)
const QUIET: Duration = Duration::from_millis(LEASE.as_millis() as u64 * 2);

/// Packets a second below which a worker on borrowed cycles is not worth keeping awake: it would spin for more than
/// 10 ms for each packet it gets.
const WORTHWHILE: u64 = 100;

/// The pace of one pod's worker.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Packets a second from which on the lease is renewed.
    threshold: u64,
    packets: u64,
    interval: Duration,
}

impl Pace {
    /// Starts with counters at `packets`. A CPU of its own polls for every packet, borrowed cycles only for
    /// [`WORTHWHILE`] ones.
    pub(crate) fn new(packets: u64, own_cpu: bool) -> Self {
        Self {
            threshold: if own_cpu { 0 } else { WORTHWHILE },
            packets,
            interval: BUSY,
        }
    }

    /// How long to wait before the counters are read again.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// Takes the counters `elapsed` after they were taken last; true when the lease is to be renewed.
    pub(crate) fn tick(&mut self, packets: u64, elapsed: Duration) -> bool {
        // A link that was made anew counts from 0.
        let new = packets.checked_sub(self.packets).unwrap_or(packets);
        self.packets = packets;
        if new == 0 {
            self.interval = (self.interval * 2).min(QUIET);
            return false;
        }
        // Traffic that has just begun has no rate yet that a long interval could tell: look again soon.
        self.interval = BUSY;
        u128::from(new) * 1000 >= u128::from(self.threshold) * elapsed.as_millis()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_lease_is_renewed_twice_while_packets_flow() {
        let mut pace = Pace::new(1000, false);
        for round in 1..10 {
            assert!(pace.interval() * 2 <= LEASE);
            assert!(pace.tick(1000 + round * 50, pace.interval()), "{round}");
        }
    }

    #[test]
    fn a_silent_pod_is_looked_at_less_and_less_often_and_quickly_again_once_it_speaks() {
        let mut pace = Pace::new(0, false);
        let mut intervals = Vec::new();
        for _ in 0..5 {
            assert!(!pace.tick(0, pace.interval()));
            intervals.push(pace.interval().as_millis());
        }
        assert_eq!(intervals, [200, 400, 400, 400, 400]);
        assert!(!pace.tick(5, pace.interval()), "5 packets in 400 ms");
        assert_eq!(pace.interval(), BUSY);
        assert!(pace.tick(55, pace.interval()));
    }

    #[test]
    fn a_trickle_wakes_only_a_worker_with_a_cpu_of_its_own() {
        let (mut borrowed, mut own) = (Pace::new(0, false), Pace::new(0, true));
        assert!(!borrowed.tick(9, MS * 100));
        assert!(borrowed.tick(19, MS * 100));
        assert!(own.tick(1, MS * 400));
        assert!(!own.tick(1, MS * 400), "no packet, no polling");
    }

    #[test]
    fn counters_that_start_anew_are_not_taken_for_a_flood_nor_for_silence() {
        let mut pace = Pace::new(1_000_000, false);
        assert!(!pace.tick(3, MS * 100));
        assert!(pace.tick(103, MS * 100));
    }
}
