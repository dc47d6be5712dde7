//! The rules together, over random lives of a container: windows come back, and do not go to and fro.

use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_poller::window::{LONG, SHORT, Window};

use super::super::adapt::{NEAR, Pace};
use super::{Course, Neighbours};
use crate::sockets::{Look, Step};

const WIDEST: Micros = Micros(2_000);
const SERVER: (u32, u32) = (7, 7);
const LIVES: u64 = 300;

/// A random number, and the next one.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn seconds(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(1000 * most) + 1)
    }
}

/// What a container does for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Nothing; also one that is paused.
    Nothing,
    /// A window hurts.
    Harm,
    /// The same, with ever other numbers of requests.
    FitfulHarm,
    /// Requests without pause on a CPU that nobody else wants.
    Steady,
    /// A request every ms, on a CPU that nobody else wants.
    Paced,
    /// The same, beside others.
    PacedBeside,
    /// A thread that waits for a timer.
    Timer,
}

const ALL: [Doing; 7] = [
    Doing::Nothing,
    Doing::Harm,
    Doing::FitfulHarm,
    Doing::Steady,
    Doing::Paced,
    Doing::PacedBeside,
    Doing::Timer,
];

/// A container, its pod's pace and a clock.
struct Life {
    random: Random,
    course: Course,
    pace: Pace,
    now: Instant,
    /// When its window was another one than at the look before, but for what was decided.
    turns: Vec<Instant>,
    /// How long it had a window in harmful times.
    hurt: Duration,
}

impl Life {
    fn new(seed: u64, micros: Micros) -> Self {
        Self {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            course: Course::new(window(Some(micros), "a")),
            pace: Pace::default(),
            now: Instant::now(),
            turns: Vec::new(),
            hurt: Duration::ZERO,
        }
    }

    /// What a look sees of it.
    fn look(&mut self, doing: Doing) -> Look {
        let micros = self.course.window().micros;
        let wide = micros == Some(WIDEST);
        let step = |ran: f64, slept: f64| Step {
            ran,
            slept,
            turns: slept,
            ..Step::default()
        };
        let step = match doing {
            Doing::Nothing => return Look::default(),
            Doing::Steady => step(0.97, 10.0),
            Doing::Paced if wide => step(0.97, 5.0),
            Doing::Paced | Doing::PacedBeside | Doing::Timer => step(0.12, 950.0),
            Doing::Harm => step(0.4, 4_000.0),
            Doing::FitfulHarm => step(0.4, 400.0 * (1 << self.random.below(8)) as f64),
        };
        let hurts = matches!(doing, Doing::Harm | Doing::FitfulHarm) && micros.is_some();
        Look {
            cpus: step.ran,
            turns: step.turns,
            slept: step.slept,
            harm: hurts.then(|| "harm".to_owned()),
            steps: [(SERVER, step)].into(),
        }
    }

    /// Lives on for so long, looked at as often as a pod is.
    fn live(&mut self, doing: Doing, time: Duration) {
        let until = self.now + time;
        // Calls are answered at times when something begins.
        if self.random.below(2) == 0 {
            self.pace.wake(self.now);
        }
        while self.now < until {
            let look = self.look(doing);
            let neighbours = Neighbours {
                share: if doing == Doing::PacedBeside {
                    0.3
                } else {
                    0.01
                },
                cpus: 1,
            };
            let before = self.course.window().micros;
            let turned = self
                .course
                .step(&look, Some(neighbours), Some(WIDEST), self.now);
            let after = self.course.window().micros;
            assert_eq!(
                turned,
                before != after,
                "{doing:?}: {before:?} and {after:?}"
            );
            if turned {
                self.turns.push(self.now);
            }
            let adaptive = [self.course.adaptive()];
            let mut pause = self.pace.next(adaptive.into_iter(), look.cpus, self.now);
            if self.course.tries() {
                pause = pause.min(NEAR);
            }
            let hurts = matches!(doing, Doing::Harm | Doing::FitfulHarm);
            if hurts && after.is_some() {
                self.hurt += pause;
            }
            self.now += pause;
        }
    }

    /// A random life.
    fn chance(&mut self) {
        for _ in 0..self.random.below(30) {
            let doing = ALL[self.random.below(ALL.len() as u64) as usize];
            let time = match self.random.below(3) {
                0 => self.random.seconds(2),
                1 => self.random.seconds(20),
                _ => self.random.seconds(400),
            };
            self.live(doing, time);
            self.happens();
        }
    }

    /// Perhaps another pod comes or goes, or its limits are updated.
    fn happens(&mut self) {
        let micros = self.course.decided().micros;
        match self.random.below(6) {
            0 => drop(
                self.course
                    .decide(window(micros, "others come and go"), false),
            ),
            1 => {
                // A quota, and none again.
                self.course.decide(window(None, "quota"), true);
                self.live(Doing::Nothing, Duration::from_secs(1));
                self.course.decide(window(micros, "b"), true);
            }
            2 => drop(self.course.decide(window(micros, "another cpuset"), true)),
            3 => {
                let other = if micros == Some(LONG) { SHORT } else { LONG };
                self.course
                    .decide(window(Some(other), "a neighbour"), false);
                let time = self.random.seconds(30);
                self.live(Doing::Steady, time);
                self.course.decide(window(micros, "a"), false);
            }
            _ => {}
        }
    }

    /// Most turns in any span of that length.
    fn most_turns(&self, span: Duration) -> usize {
        let from = self.turns.iter();
        from.map(|from| {
            let within = |turn: &&Instant| **turn >= *from && **turn < *from + span;
            self.turns.iter().filter(within).count()
        })
        .max()
        .unwrap_or(0)
    }
}

fn window(micros: Option<Micros>, reason: &str) -> Window {
    Window {
        micros,
        reason: reason.to_owned(),
    }
}

#[test]
fn a_window_comes_back_when_it_no_longer_hurts_and_stays() {
    for seed in 0..LIVES {
        let micros = if seed % 2 == 0 { LONG } else { SHORT };
        let mut life = Life::new(seed, micros);
        life.chance();
        // Longest pause, and a look.
        life.live(Doing::Steady, Duration::from_secs(310));
        // Who was asked with pauses before, and now without, may have kept the wide one.
        assert!(life.course.window().micros >= Some(micros), "{seed}");
        life.turns.clear();
        life.live(Doing::Steady, Duration::from_secs(1000));
        assert!(life.turns.is_empty(), "{seed}: {:?}", life.turns);
    }
}

#[test]
fn a_window_is_wide_where_that_pays_whatever_was_before() {
    for seed in 0..LIVES {
        let mut life = Life::new(seed, LONG);
        life.chance();
        // After harm and after a trial in vain.
        life.live(Doing::Paced, Duration::from_secs(620));
        assert_eq!(life.course.window().micros, Some(WIDEST), "{seed}");
        life.turns.clear();
        life.live(Doing::Paced, Duration::from_secs(1000));
        assert!(life.turns.is_empty(), "{seed}: {:?}", life.turns);
        life.live(Doing::Nothing, Duration::from_secs(5));
        assert_eq!(life.course.window(), life.course.decided(), "{seed}");
    }
}

#[test]
fn harm_lasts_for_moments_and_nothing_goes_to_and_fro() {
    for seed in 0..LIVES {
        let mut life = Life::new(seed, if seed % 2 == 0 { LONG } else { SHORT });
        life.chance();
        life.turns.clear();
        for doing in [Doing::Harm, Doing::FitfulHarm] {
            let before = life.hurt;
            life.live(doing, Duration::from_secs(1000));
            let hurt = life.hurt - before;
            // A second until the first look at one that did nothing; 50 ms a trial from then on.
            assert!(hurt < Duration::from_secs(4), "{seed}, {doing:?}: {hurt:?}");
        }
        for doing in ALL {
            life.live(doing, Duration::from_secs(200));
        }
        let most = life.most_turns(Duration::from_secs(60));
        assert!(most <= 16, "{seed}: {most} turns in a minute");
    }
}

/// Requests that come for a second and stop for one are what a wide window turns most often for.
#[test]
fn requests_in_bursts_do_not_turn_a_window_all_the_time() {
    let mut life = Life::new(3, LONG);
    for _ in 0..300 {
        life.live(Doing::Paced, Duration::from_secs(1));
        life.live(Doing::Nothing, Duration::from_secs(1));
    }
    let most = life.most_turns(Duration::from_secs(60));
    assert!(most <= 40, "{most} turns in a minute");
}
