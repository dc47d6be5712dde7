//! Whether packets for the pod take the short way past its NAPI: while there are many of them and nobody polls.
//!
//! With many requests under way a program finds the next one whenever it asks, so it neither polls nor sleeps, and the ring and the NAPI of
//! the pod end are only a way round. Then the host end has TSO and packets come over the backlog, as on any veth, until threads sleep
//! for packets again or there are few of them. A pod whose threads sleep again each time is left on the long way for longer each time;
//! one whose clients have only gone, and may be back any moment, is not.
//!
//! Where a process or a thread serves each connection they all sleep, and yet polling receives next to nothing: there is always another
//! one to run. What polling would receive cannot be told from their sleeps then, so the short way is taken on trial.

use std::time::{Duration, Instant};

use kbp_kernel::netstat::{self, Received};

/// CPUs that a pod has to use for it to be asked for.
pub(super) const BUSY: f64 = 0.05;
/// Packets a second from which on it may be taken.
const MANY: f64 = 20_000.0;
/// Below which it is left.
const FEW: f64 = 10_000.0;
/// Share of the packets that busy polling may have received at most for it to bring nothing.
const POLLED: f64 = 0.05;
/// Sleeps for each packet of threads that wait for packets.
const SLEEPS: f64 = 0.1;
/// How long it is taken on trial where threads sleep anyway: then polling is looked at again. Twice as long after each that was right, up
/// to the longest pause.
const TRIAL: Duration = Duration::from_secs(30);
/// Share of the most packets on trial below which it is another load.
const SAME: f64 = 0.5;
/// Looks in a row that have to show that nobody polls, or that few packets come.
const LOOKS: u32 = 2;
/// What is counted over less tells nothing.
const SPAN: Duration = Duration::from_millis(300);
/// How long it is not taken after it was left because threads slept.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How long it has to have been taken until what was before is forgotten.
const PROVEN: Duration = Duration::from_secs(60);

/// What came to the pod since the look before, and what its threads did.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Packets a second.
    packets: f64,
    /// Share that busy polling has received.
    polled: f64,
    /// Sleeps of its threads for each packet.
    slept: f64,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing.
    Stay,
    /// It is to be taken, for this reason.
    Take(String),
    /// It is to be left.
    Leave,
}

/// The way of a pod's packets over time.
#[derive(Debug)]
pub(super) struct ShortWay {
    counted: Option<(Received, Instant)>,
    /// Sleeps since then.
    slept: f64,
    looked: Option<Instant>,
    strikes: u32,
    taken: Option<Taken>,
    not_before: Option<Instant>,
    pause: Duration,
    trial: Duration,
}

/// That it is taken.
#[derive(Debug, Clone, Copy)]
struct Taken {
    since: Instant,
    /// Most packets a second since then, where it is on trial.
    trial: Option<f64>,
}

impl Default for ShortWay {
    fn default() -> Self {
        Self {
            counted: None,
            slept: 0.0,
            looked: None,
            strikes: 0,
            taken: None,
            not_before: None,
            pause: FIRST_PAUSE,
            trial: TRIAL,
        }
    }
}

impl ShortWay {
    /// Looks at the network namespace of process `pid`, whose pod's threads have slept so often a second since the look before.
    pub(super) fn look(&mut self, pid: u32, slept: f64, now: Instant) -> Turn {
        let passed = |since: Instant| now.saturating_duration_since(since);
        let last = self.looked.replace(now).map_or(Duration::ZERO, passed);
        self.slept += slept * last.as_secs_f64();
        if self.counted.is_some_and(|(_, at)| passed(at) < SPAN) {
            return Turn::Stay;
        }
        let received = match netstat::received_by(pid) {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!("{error}");
                return Turn::Stay;
            }
        };
        let slept = std::mem::take(&mut self.slept);
        let Some((before, at)) = self.counted.replace((received, now)) else {
            return Turn::Stay;
        };
        // An interface that is gone takes its packets along.
        let packets = received.packets.saturating_sub(before.packets) as f64;
        let polled = received.polled.saturating_sub(before.polled) as f64;
        let seen = Seen {
            packets: packets / passed(at).as_secs_f64(),
            polled: polled / packets.max(1.0),
            slept: slept / packets.max(1.0),
        };
        self.judge(&seen, now)
    }

    /// Whether it is taken.
    pub(super) fn is_taken(&self) -> bool {
        self.taken.is_some()
    }

    fn judge(&mut self, seen: &Seen, now: Instant) -> Turn {
        if let Some(taken) = &mut self.taken {
            let age = now.saturating_duration_since(taken.since);
            if age >= PROVEN {
                self.pause = FIRST_PAUSE;
            }
            let few = seen.packets < FEW;
            let ended = match &mut taken.trial {
                Some(most) => {
                    *most = most.max(seen.packets);
                    let another = seen.packets < SAME * *most;
                    let over = age >= self.trial;
                    if another {
                        self.trial = TRIAL;
                    } else if over {
                        self.trial = (2 * self.trial).min(LONGEST_PAUSE);
                    }
                    over || another
                }
                None => !few && seen.slept > SLEEPS,
            };
            let on_trial = taken.trial.is_some();
            self.strikes = if few { self.strikes + 1 } else { 0 };
            if !ended && self.strikes < LOOKS {
                return Turn::Stay;
            }
            if ended && !on_trial {
                self.not_before = Some(now + self.pause);
                self.pause = (2 * self.pause).min(LONGEST_PAUSE);
            }
            self.strikes = 0;
            self.taken = None;
            return Turn::Leave;
        }
        let in_vain = seen.packets >= MANY && seen.polled <= POLLED;
        if seen.polled > POLLED {
            self.trial = TRIAL;
        }
        if !in_vain || self.not_before.is_some_and(|at| now < at) {
            self.strikes = 0;
            return Turn::Stay;
        }
        self.strikes += 1;
        if self.strikes < LOOKS {
            return Turn::Stay;
        }
        self.strikes = 0;
        self.taken = Some(Taken {
            since: now,
            trial: (seen.slept > SLEEPS).then_some(seen.packets),
        });
        Turn::Take(format!(
            "{:.0} packets a second came, of which polling received {:.0} %, and threads slept {:.0} times",
            seen.packets,
            100.0 * seen.polled,
            seen.slept * seen.packets
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CROWD: Seen = Seen {
        packets: 100_000.0,
        polled: 0.01,
        slept: 0.01,
    };

    fn taken(way: &mut ShortWay, now: Instant) -> bool {
        way.judge(&CROWD, now);
        matches!(way.judge(&CROWD, now), Turn::Take(why) if why.contains("100000 packets"))
    }

    #[test]
    fn it_is_taken_when_many_packets_come_and_nobody_waits_for_them() {
        let now = Instant::now();
        for other in [
            Seen {
                packets: 15_000.0,
                ..CROWD
            },
            Seen {
                polled: 0.2,
                ..CROWD
            },
        ] {
            let mut way = ShortWay::default();
            for _ in 0..3 {
                assert_eq!(way.judge(&other, now), Turn::Stay, "{other:?}");
                assert_eq!(way.judge(&CROWD, now), Turn::Stay, "one look is not enough");
            }
            assert!(matches!(way.judge(&CROWD, now), Turn::Take(_)));
            assert!(way.is_taken());
        }
    }

    #[test]
    fn where_threads_sleep_and_polling_is_in_vain_it_is_taken_on_trial() {
        let asleep = Seen {
            slept: 0.8,
            ..CROWD
        };
        let one = Seen {
            packets: 14_000.0,
            ..asleep
        };
        let start = Instant::now();
        for (then, after, left) in [
            (asleep, TRIAL / 2, false),
            (asleep, TRIAL, true),
            (one, TRIAL / 2, true),
        ] {
            let mut way = ShortWay::default();
            assert_eq!(way.judge(&asleep, start), Turn::Stay);
            assert!(matches!(way.judge(&asleep, start), Turn::Take(_)));
            assert_eq!(way.judge(&asleep, start), Turn::Stay);
            let now = start + after;
            assert_eq!(way.judge(&then, now) == Turn::Leave, left, "{then:?}");
            // Polling is looked at again, and what it brings decides.
            let polled = Seen {
                polled: 0.9,
                ..then
            };
            if left {
                assert_eq!(way.judge(&polled, now), Turn::Stay);
                assert_eq!(way.judge(&asleep, now), Turn::Stay);
                assert!(matches!(way.judge(&asleep, now), Turn::Take(_)));
            }
        }
    }

    #[test]
    fn trials_are_longer_each_time_that_they_were_right() {
        let asleep = Seen {
            slept: 0.8,
            ..CROWD
        };
        let mut way = ShortWay::default();
        let mut now = Instant::now();
        for length in [30, 60, 120, 240, 300, 300] {
            way.judge(&asleep, now);
            assert!(matches!(way.judge(&asleep, now), Turn::Take(_)));
            now += Duration::from_secs(length - 1);
            assert_eq!(way.judge(&asleep, now), Turn::Stay, "{length}");
            now += Duration::from_secs(1);
            assert_eq!(way.judge(&asleep, now), Turn::Leave, "{length}");
        }
        let polled = Seen {
            polled: 0.9,
            ..asleep
        };
        assert_eq!(way.judge(&polled, now), Turn::Stay);
        assert_eq!(way.trial, TRIAL);
    }

    #[test]
    fn it_is_left_at_once_when_threads_sleep_and_soon_when_few_packets_come() {
        let now = Instant::now();
        for (other, stays) in [
            (
                Seen {
                    packets: 15_000.0,
                    ..CROWD
                },
                true,
            ),
            (
                Seen {
                    packets: 9_000.0,
                    ..CROWD
                },
                false,
            ),
            (
                Seen {
                    slept: 0.3,
                    ..CROWD
                },
                false,
            ),
        ] {
            let mut way = ShortWay::default();
            assert!(taken(&mut way, now));
            let first = way.judge(&other, now);
            assert_eq!(first == Turn::Leave, other.slept > SLEEPS, "{other:?}");
            way.judge(&other, now);
            assert_eq!(way.is_taken(), stays, "{other:?}");
        }
    }

    #[test]
    fn one_that_goes_to_and_fro_stays_on_the_long_way_for_longer_each_time() {
        let asleep = Seen {
            slept: 1.0,
            ..CROWD
        };
        let mut way = ShortWay::default();
        let mut now = Instant::now();
        for pause in [2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            assert!(taken(&mut way, now), "{pause}");
            assert_eq!(way.judge(&asleep, now), Turn::Leave);
            assert!(!taken(&mut way, now + Duration::from_secs(pause - 1)));
            now += Duration::from_secs(pause);
        }
        assert!(taken(&mut way, now));
        now += PROVEN;
        assert_eq!(way.judge(&asleep, now), Turn::Leave);
        assert!(taken(&mut way, now + FIRST_PAUSE));
    }

    /// Whatever was before, it is taken where nobody waits for packets, left when none come, and does not go to and fro with every look: loads
    /// that come and go have it taken and left once each, and a trial that was begun ends once.
    #[test]
    fn whatever_comes_it_settles() {
        for seed in 1..200u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut next = || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random >> 32
            };
            let (mut way, mut now, mut turns) = (ShortWay::default(), Instant::now(), 0);
            let mut look = |way: &mut ShortWay, seen: &Seen| {
                now += Duration::from_millis(500);
                way.judge(seen, now) != Turn::Stay
            };
            // Ten minutes.
            for _ in 0..1200 {
                let packets = [0.0, 9_000.0, 15_000.0, 100_000.0][next() as usize % 4];
                let slept = [0.01, 0.01, 0.01, 0.5][next() as usize % 4];
                let polled = [0.0, 0.0, 0.5][next() as usize % 3];
                let seen = Seen {
                    packets,
                    polled,
                    slept,
                };
                turns += u32::from(look(&mut way, &seen));
            }
            assert!(turns <= 100, "{seed}: {turns} turns");
            let settles = (0..602).filter(|_| look(&mut way, &CROWD)).count();
            assert!(way.is_taken() && settles <= 3, "{seed}: {settles}");
            let stays = (0..1000).filter(|_| look(&mut way, &CROWD)).count();
            assert_eq!(stays, 0, "{seed}");
            let nothing = Seen {
                packets: 0.0,
                ..CROWD
            };
            let left = (0..10).filter(|_| look(&mut way, &nothing)).count();
            assert!(!way.is_taken() && left == 1, "{seed}: {left}");
        }
    }

    #[test]
    fn one_whose_clients_come_and_go_takes_it_each_time() {
        // What few packets come when a load has ended, somebody sleeps for.
        let ended = Seen {
            packets: 10.0,
            polled: 0.5,
            slept: 3.0,
        };
        let mut way = ShortWay::default();
        let now = Instant::now();
        for _ in 0..10 {
            assert!(taken(&mut way, now));
            assert_eq!(way.judge(&ended, now), Turn::Stay);
            assert_eq!(way.judge(&ended, now), Turn::Leave);
        }
    }

    #[test]
    fn what_is_gone_or_has_just_been_counted_tells_nothing() {
        let mut way = ShortWay::default();
        let now = Instant::now();
        assert_eq!(way.look(u32::MAX, 0.0, now), Turn::Stay);
        assert!(way.counted.is_none());
        let own = std::process::id();
        assert_eq!(way.look(own, 0.0, now), Turn::Stay);
        let counted = way.counted;
        let soon = now + SPAN / 2;
        assert_eq!(way.look(own, 100.0, soon), Turn::Stay);
        assert_eq!(way.counted, counted);
        assert!((way.slept - 100.0 * (SPAN / 2).as_secs_f64()).abs() < 1e-9);
        assert_eq!(way.look(own, 100.0, now + SPAN), Turn::Stay);
        assert_ne!(way.counted, counted);
    }
}
