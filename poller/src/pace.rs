//! When to look at a pod's counters and when to renew its worker's lease: pure arithmetic, no clock of its own.

use std::time::{Duration, Instant};

use crate::worker::LEASE;

/// How often the counters are read while packets flow: the lease is renewed twice before it would end.
const BUSY: Duration = Duration::from_millis(LEASE.as_millis() as u64 / 2);

/// How often they are read while the pod is silent for now: the longest that a pod which speaks now and then goes without its
/// worker. (Softirq does the work until then, as on any veth.)
const QUIET: Duration = Duration::from_millis(LEASE.as_millis() as u64 * 2);

/// How often they are read once the pod has been silent for [`LULL`], unless its worker has a CPU of its own: a node whose pods
/// have nothing to do is hardly ever woken.
const DEEP: Duration = Duration::from_millis(LEASE.as_millis() as u64 * 16);

/// Silence after which nothing is expected soon.
const LULL: Duration = Duration::from_secs(10);

/// How long a worker has not been wanted when the packets of its pod are to take the short way, around the NAPI that nobody polls.
const REST: Duration = Duration::from_secs(1);

/// To change the way is half a millisecond of work, so a pod that its worker is wanted for every few seconds is left as it is: each rest that was
/// shorter than this makes the next one begin later, up to this late.
const LONG_REST: Duration = Duration::from_secs(30);

/// Packets a second below which a worker on borrowed cycles is not worth keeping awake: it would spin for more than
/// 10 ms for each packet it gets.
const WORTHWHILE: u64 = 100;

/// The last moment in `interval` from `now` on that is a whole number of intervals after `epoch`: then one wake-up serves every
/// pod that is due, whenever it was attached.
pub(crate) fn aligned(epoch: Instant, now: Instant, interval: Duration) -> Instant {
    let since = (now + interval).saturating_duration_since(epoch);
    let steps = since.as_micros() / interval.as_micros().max(1);
    epoch + interval * u32::try_from(steps).unwrap_or(u32::MAX)
}

/// `packets` in `elapsed` as packets a second.
pub(crate) fn per_second(packets: u64, elapsed: Duration) -> u64 {
    let rate = u128::from(packets) * 1000 / elapsed.as_millis().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// The pace of one pod's worker.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Packets a second from which on the lease is renewed.
    threshold: u64,
    packets: u64,
    interval: Duration,
    /// How long no packet has come.
    silent: Duration,
    /// Longest interval.
    longest: Duration,
    /// Time since the lease was renewed last.
    unwanted: Duration,
    /// How much of that makes a rest.
    rest_after: Duration,
}

impl Pace {
    /// Starts with counters at `packets`. A CPU of its own polls for every packet, borrowed cycles only for
    /// [`WORTHWHILE`] ones.
    pub(crate) fn new(packets: u64, own_cpu: bool) -> Self {
        Self {
            threshold: if own_cpu { 0 } else { WORTHWHILE },
            packets,
            interval: BUSY,
            silent: Duration::ZERO,
            // Who gives it a CPU wants it back soon.
            longest: if own_cpu { QUIET } else { DEEP },
            unwanted: Duration::ZERO,
            rest_after: REST,
        }
    }

    /// Whether the worker has not been wanted for so long that packets need not come its way.
    pub(crate) fn rests(&self) -> bool {
        self.unwanted >= self.rest_after
    }

    /// How long to wait before the counters are read again.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// Takes the counters `elapsed` after they were taken last; true when the lease is to be renewed.
    pub(crate) fn tick(&mut self, packets: u64, elapsed: Duration) -> bool {
        let renew = self.is_wanted(packets, elapsed);
        if !renew {
            self.unwanted += elapsed;
            return false;
        }
        if self.rests() {
            self.rest_after = if self.unwanted >= LONG_REST {
                REST
            } else {
                (self.rest_after * 2).min(LONG_REST)
            };
        }
        self.unwanted = Duration::ZERO;
        true
    }

    fn is_wanted(&mut self, packets: u64, elapsed: Duration) -> bool {
        // A link that was made anew counts from 0.
        let new = packets.checked_sub(self.packets).unwrap_or(packets);
        self.packets = packets;
        if new == 0 {
            self.silent += elapsed;
            let most = if self.silent < LULL {
                QUIET
            } else {
                self.longest
            };
            self.interval = (self.interval * 2).min(most);
            return false;
        }
        self.silent = Duration::ZERO;
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
    fn a_pod_that_has_long_been_silent_is_hardly_looked_at_unless_its_worker_has_a_cpu_of_its_own()
    {
        for (own_cpu, longest) in [(false, DEEP), (true, QUIET)] {
            let mut pace = Pace::new(0, own_cpu);
            let mut passed = Duration::ZERO;
            while passed < LULL {
                assert!(pace.interval() <= QUIET, "{passed:?}");
                passed += pace.interval();
                assert!(!pace.tick(0, pace.interval()));
            }
            for _ in 0..4 {
                assert!(!pace.tick(0, pace.interval()));
            }
            assert_eq!(pace.interval(), longest);
            pace.tick(1, pace.interval());
            assert_eq!(pace.interval(), BUSY);
            pace.tick(1, BUSY);
            pace.tick(1, BUSY * 2);
            assert_eq!(pace.interval(), QUIET, "a pause is not the end");
        }
    }

    #[test]
    fn pods_are_looked_at_together_and_never_later_than_the_lease_allows() {
        let epoch = Instant::now();
        for late in [0, 1, 9, 49, 99] {
            // Having been woken late does not add up.
            let now = epoch + BUSY * 7 + MS * late;
            assert_eq!(aligned(epoch, now, BUSY), epoch + BUSY * 8, "{late}");
        }
        for interval in [BUSY, QUIET, DEEP] {
            for phase in 0..100 {
                let now = epoch + MS * phase * 37;
                let at = aligned(epoch, now, interval);
                assert!(at > now && at <= now + interval, "{phase}");
                // All that have the same interval are due at the same moments, whenever they began.
                let since = at - epoch;
                assert_eq!(since.as_micros() % interval.as_micros(), 0, "{phase}");
            }
        }
    }

    #[test]
    fn rates_are_by_the_second() {
        assert_eq!(per_second(50, MS * 100), 500);
        assert_eq!(per_second(50, Duration::ZERO), 50_000);
    }

    #[test]
    fn a_trickle_wakes_only_a_worker_with_a_cpu_of_its_own() {
        let (mut borrowed, mut own) = (Pace::new(0, false), Pace::new(0, true));
        assert!(!borrowed.tick(9, MS * 100));
        assert!(borrowed.tick(19, MS * 100));
        assert!(own.tick(1, MS * 400));
        assert!(!own.tick(1, MS * 400), "no packet, no polling");
    }

    /// A pod that is silent, or trickles, for `rest` and then speaks; whether it rested.
    fn rest_of(pace: &mut Pace, packets: &mut u64, rest: Duration) -> bool {
        let mut passed = Duration::ZERO;
        while passed < rest {
            passed += pace.interval();
            *packets += 1;
            assert!(!pace.tick(*packets, pace.interval()));
        }
        let rested = pace.rests();
        *packets += 1000;
        assert!(pace.tick(*packets, pace.interval()));
        assert!(!pace.rests());
        rested
    }

    #[test]
    fn a_pod_that_its_worker_is_not_wanted_for_rests_and_one_that_speaks_again_and_again_does_not()
    {
        let (mut pace, mut packets) = (Pace::new(0, false), 0);
        assert!(!pace.rests());
        let second = Duration::from_secs(1);
        assert!(!rest_of(&mut pace, &mut packets, second / 2));
        let rests: Vec<bool> = (0..6)
            .map(|_| rest_of(&mut pace, &mut packets, second * 5))
            .collect();
        assert_eq!(rests, [true, true, true, false, false, false]);
        // A long silence is no flutter.
        assert!(rest_of(&mut pace, &mut packets, LONG_REST));
        assert!(rest_of(&mut pace, &mut packets, second * 2));
    }

    #[test]
    fn counters_that_start_anew_are_not_taken_for_a_flood_nor_for_silence() {
        let mut pace = Pace::new(1_000_000, false);
        assert!(!pace.tick(3, MS * 100));
        assert!(pace.tick(103, MS * 100));
    }
}
