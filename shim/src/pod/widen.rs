//! How wide the window is of a container that has CPUs of its own.
//!
//! A thread that is asked something every millisecond sleeps in between where the window ends before the next request, and half of an
//! answer's time is its waking up. On a CPU that nobody else wants it may as well poll until then. So where threads sleep often and
//! shortly, the container's window is made as wide as is allowed, and stays so while they sleep less by that: which they do not where they
//! wait for a timer, or where the requests come less often than that. Not where others run on its CPUs: they would wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kbp_kernel::Micros;

use super::course::Neighbours;
use crate::sockets::{BUSY, Look, SLEEPS, Step};

/// CPUs that others are on from which they are neighbours.
const COME: f64 = 0.12;
/// The same for each further CPU: the kernel's own threads are on all.
const EACH: f64 = 0.01;
/// What a wake-up costs beside the thread that wakes up, in seconds: interrupt, softirq, leaving and entering idle.
const WAKE_UP: f64 = 10e-6;
/// Looks in a row that have to show something.
const LOOKS: u32 = 2;
/// Switches a second to other threads that mean, on a CPU where the container polls all the time, that somebody wants it often.
const FORCED: f64 = 100.0;
/// Share of its sleeps that a thread may still have with the wide window.
const LEFT: f64 = 0.5;
/// Share of the time that may be polled for nothing, each time until the end of the window.
const IN_VAIN: f64 = 0.4;
/// Share of the time that a thread may sleep which is to gain.
const ASLEEP: f64 = 0.5;
/// Share of the time that the container's threads may wait for each other.
const IN_ITS_OWN_WAY: f64 = 0.05;
/// Between a trial that brought nothing and the next one, at first and at most; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// After a window that was worth it, until the requests stopped.
const SHORT_PAUSE: Duration = Duration::from_secs(2);

type Thread = (u32, u32);

/// What became of a container's window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Width {
    /// The one that was decided for it.
    Plain,
    /// The widest, for this reason.
    Wide(String),
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Plain,
    /// Wide; how often those threads slept without.
    Trial {
        looks: u32,
        before: BTreeMap<Thread, f64>,
    },
    /// Wide, and worth it for those.
    Wide { worth: BTreeSet<Thread> },
}

/// A container's window over time.
#[derive(Debug)]
pub(super) struct Widening {
    state: State,
    /// Looks in a row that have shown short sleeps.
    sleepers: u32,
    /// No trial before.
    until: Option<Instant>,
    pause: Duration,
}

impl Default for Widening {
    fn default() -> Self {
        Self {
            state: State::Plain,
            sleepers: 0,
            until: None,
            pause: FIRST_PAUSE,
        }
    }
}

impl Widening {
    /// Judges by what was seen of a container and of others on its CPUs; None: nothing new.
    pub(super) fn judge(
        &mut self,
        look: &Look,
        Neighbours {
            share: others,
            cpus,
        }: Neighbours,
        widest: Option<Micros>,
        now: Instant,
    ) -> Option<Width> {
        let slept: f64 = look.steps.values().map(|s| s.slept).sum();
        let others = others - WAKE_UP * slept - EACH * cpus.saturating_sub(1) as f64;
        if others >= COME {
            self.sleepers = 0;
            return match self.state {
                State::Plain => None,
                _ => {
                    self.until = Some(now + FIRST_PAUSE);
                    Some(self.plain())
                }
            };
        }
        let Some(widest) = widest else {
            return match self.state {
                State::Plain => None,
                _ => Some(self.plain()),
            };
        };
        let running = look.steps.values().filter(|s| s.ran >= BUSY).count();
        match &mut self.state {
            State::Plain => {
                let sleepers = sleepers(look, widest);
                let quiet = running <= cpus && self.until.is_none_or(|u| now >= u);
                self.sleepers = match quiet && !sleepers.is_empty() {
                    true => self.sleepers + 1,
                    false => 0,
                };
                if self.sleepers < LOOKS {
                    return None;
                }
                let most = sleepers.values().copied().fold(0.0, f64::max);
                let before = sleepers;
                self.sleepers = 0;
                self.state = State::Trial { looks: 0, before };
                Some(Width::Wide(format!(
                    "a thread slept {most:.0} times a second and had nothing else to do"
                )))
            }
            State::Trial { looks, before } => {
                *looks += 1;
                // The first one has seen both windows.
                if *looks < LOOKS {
                    return None;
                }
                let worth: BTreeSet<Thread> = before
                    .iter()
                    .filter(|(thread, before)| {
                        let step = look.steps.get(thread).copied().unwrap_or_default();
                        step.slept <= LEFT * *before && gains(&step, widest)
                    })
                    .map(|(thread, _)| *thread)
                    .collect();
                if worth.is_empty() || is_in_the_way(look) {
                    self.until = Some(now + self.pause);
                    self.pause = (2 * self.pause).min(LONGEST_PAUSE);
                    return Some(self.plain());
                }
                self.pause = FIRST_PAUSE;
                self.state = State::Wide { worth };
                None
            }
            State::Wide { worth } => {
                let step = |thread| look.steps.get(thread).copied().unwrap_or_default();
                let pays = worth.iter().any(|t| gains(&step(t), widest));
                let in_the_way = is_in_the_way(look);
                if pays && running <= cpus && !in_the_way {
                    return None;
                }
                let pause = if in_the_way { FIRST_PAUSE } else { SHORT_PAUSE };
                self.until = Some(now + pause);
                Some(self.plain())
            }
        }
    }

    /// Judges where nobody knows who else is on its CPUs, as of a container at rest, which is seldom looked at: one that does nothing has no
    /// wide window, whoever may be there.
    pub(super) fn rests(&mut self, look: &Look, now: Instant) -> Option<Width> {
        let runs = look.steps.values().any(|step| step.ran >= BUSY);
        if runs || matches!(self.state, State::Plain) {
            return None;
        }
        self.until = Some(now + SHORT_PAUSE);
        Some(self.plain())
    }

    /// Not everything could be given the new window: whether that was a wide one, which is not tried again soon.
    pub(super) fn gives_up(&mut self, now: Instant) -> bool {
        let wide = self.is_unsettled();
        if wide {
            self.plain();
            self.until = Some(now + LONGEST_PAUSE);
        }
        wide
    }

    fn plain(&mut self) -> Width {
        self.state = State::Plain;
        self.sleepers = 0;
        Width::Plain
    }

    /// Whether it should be looked at again soon.
    pub(super) fn is_unsettled(&self) -> bool {
        matches!(self.state, State::Trial { .. })
    }
}

/// The threads that a window of `widest` may keep from sleeping, and how often they sleep.
fn sleepers(look: &Look, widest: Micros) -> BTreeMap<Thread, f64> {
    let short = |step: &Step| asleep(step) <= step.slept * f64::from(widest.0) * 1e-6;
    let often = |step: &Step| step.slept >= SLEEPS && step.ran >= BUSY;
    let steps = look.steps.iter();
    steps
        .filter(|(_, step)| often(step) && short(step))
        .map(|(thread, step)| (*thread, step.slept))
        .collect()
}

/// Whether a thread with that window polls for something.
fn gains(step: &Step, window: Micros) -> bool {
    step.ran >= BUSY && asleep(step) < ASLEEP && step.slept * f64::from(window.0) * 1e-6 < IN_VAIN
}

fn asleep(step: &Step) -> f64 {
    (1.0 - step.ran - step.waited).max(0.0)
}

/// Whether its threads wait for each other, or others often want a CPU on which one polls.
fn is_in_the_way(look: &Look) -> bool {
    let (polling, others): (Vec<&Step>, Vec<&Step>) =
        look.steps.values().partition(|step| step.ran >= ASLEEP);
    let forced: f64 = polling.iter().map(|step| step.forced).sum();
    let waited: f64 = others.iter().map(|step| step.waited).sum();
    forced >= FORCED || waited >= IN_ITS_OWN_WAY
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDEST: Micros = Micros(2_000);
    const SERVER: Thread = (7, 7);

    fn step(ran: f64, slept: f64) -> Step {
        Step {
            ran,
            slept,
            turns: slept,
            ..Step::default()
        }
    }

    fn look(steps: &[(Thread, Step)]) -> Look {
        Look {
            steps: steps.iter().copied().collect(),
            ..Look::default()
        }
    }

    /// One look, on one CPU.
    fn judge(
        widening: &mut Widening,
        steps: &[(Thread, Step)],
        others: f64,
        now: Instant,
    ) -> Option<Width> {
        let neighbours = Neighbours {
            share: others,
            cpus: 1,
        };
        widening.judge(&look(steps), neighbours, Some(WIDEST), now)
    }

    fn is_wide(width: Option<&Width>) -> bool {
        matches!(width, Some(Width::Wide(_)))
    }

    /// A server that is asked something every millisecond, up to its trial.
    fn tried(widening: &mut Widening, now: Instant) {
        let served = [(SERVER, step(0.12, 950.0))];
        assert_eq!(judge(widening, &served, 0.01, now), None);
        assert!(is_wide(judge(widening, &served, 0.01, now).as_ref()));
        assert!(widening.is_unsettled());
    }

    #[test]
    fn a_window_is_wide_while_that_keeps_a_thread_from_sleeping() {
        let mut widening = Widening::default();
        let mut now = Instant::now();
        tried(&mut widening, now);
        // Requests at random distances: a seventh of them outlast the window.
        for step in [step(0.6, 500.0), step(0.85, 135.0), step(0.85, 135.0)] {
            assert_eq!(judge(&mut widening, &[(SERVER, step)], 0.01, now), None);
        }
        assert!(!widening.is_unsettled());
        // Nobody asks any more.
        assert_eq!(judge(&mut widening, &[], 0.0, now), Some(Width::Plain));
        // And again, but not at once.
        let served = [(SERVER, step(0.12, 950.0))];
        for _ in 0..4 {
            assert_eq!(judge(&mut widening, &served, 0.01, now), None);
        }
        now += SHORT_PAUSE;
        tried(&mut widening, now);
    }

    #[test]
    fn one_at_rest_has_no_wide_window_though_nobody_knows_its_neighbours() {
        let mut widening = Widening::default();
        let now = Instant::now();
        assert_eq!(widening.rests(&look(&[]), now), None, "it has none");
        tried(&mut widening, now);
        let polls = look(&[(SERVER, step(0.85, 135.0))]);
        assert_eq!(widening.rests(&polls, now), None, "it does something");
        assert!(widening.is_unsettled());
        let sleeps = look(&[(SERVER, step(0.001, 1.0))]);
        assert_eq!(widening.rests(&sleeps, now), Some(Width::Plain));
        assert!(!widening.is_unsettled());
    }

    #[test]
    fn what_brings_nothing_is_tried_ever_more_rarely() {
        let mut widening = Widening::default();
        let mut now = Instant::now();
        // A timer; requests that come every 2.5 ms; every 10 ms.
        let in_vain = [step(0.12, 950.0), step(0.8, 400.0), step(0.2, 100.0)];
        for (pause, step) in [10, 20, 40, 80, 160, 300, 300]
            .into_iter()
            .zip(in_vain.into_iter().cycle())
        {
            tried(&mut widening, now);
            let steps = [(SERVER, step)];
            assert_eq!(judge(&mut widening, &steps, 0.0, now), None);
            assert_eq!(
                judge(&mut widening, &steps, 0.0, now),
                Some(Width::Plain),
                "{step:?}"
            );
            let served = [(SERVER, self::step(0.12, 950.0))];
            let before = now + Duration::from_secs(pause - 1);
            for _ in 0..3 {
                assert_eq!(judge(&mut widening, &served, 0.0, before), None, "{pause}");
            }
            now += Duration::from_secs(pause);
        }
    }

    #[test]
    fn who_sleeps_rarely_or_long_is_left_alone() {
        for (what, step) in [
            ("10 ms between requests", step(0.02, 100.0)),
            ("3 ms", step(0.06, 330.0)),
            ("a busy server", step(0.99, 20.0)),
            ("a timer that does next to nothing", step(0.005, 1000.0)),
        ] {
            let mut widening = Widening::default();
            for _ in 0..5 {
                let width = judge(&mut widening, &[(SERVER, step)], 0.0, Instant::now());
                assert_eq!(width, None, "{what}");
            }
        }
        // More threads than CPUs.
        let mut widening = Widening::default();
        let steps = [(SERVER, step(0.12, 950.0)), ((7, 8), step(0.05, 300.0))];
        for _ in 0..5 {
            assert_eq!(judge(&mut widening, &steps, 0.0, Instant::now()), None);
        }
    }

    #[test]
    fn it_is_not_wide_where_others_run() {
        let mut widening = Widening::default();
        let mut now = Instant::now();
        let served = [(SERVER, step(0.12, 950.0))];
        for _ in 0..5 {
            assert_eq!(judge(&mut widening, &served, 0.2, now), None);
        }
        now += FIRST_PAUSE;
        tried(&mut widening, now);
        let width = judge(&mut widening, &served, 0.2, now);
        assert_eq!(width, Some(Width::Plain));
        assert!(!widening.is_unsettled());
    }

    #[test]
    fn a_pod_in_its_own_way_and_one_that_may_not_are_narrow() {
        let mut widening = Widening::default();
        let now = Instant::now();
        tried(&mut widening, now);
        let served = [(SERVER, step(0.9, 0.0))];
        for _ in 0..3 {
            assert_eq!(judge(&mut widening, &served, 0.0, now), None);
        }
        let waiting = Step {
            waited: 0.1,
            ..step(0.005, 100.0)
        };
        let steps = [served[0], ((7, 9), waiting)];
        assert_eq!(judge(&mut widening, &steps, 0.0, now), Some(Width::Plain));

        // Somebody else wants the CPU for moments.
        let mut widening = Widening::default();
        tried(&mut widening, now);
        let pressed = Step {
            forced: 150.0,
            waited: 0.08,
            ..step(0.9, 0.0)
        };
        assert_eq!(judge(&mut widening, &[(SERVER, pressed)], 0.08, now), None);
        let width = judge(&mut widening, &[(SERVER, pressed)], 0.08, now);
        assert_eq!(width, Some(Width::Plain));

        let mut widening = Widening::default();
        let served = look(&[(SERVER, step(0.12, 950.0))]);
        for _ in 0..5 {
            let alone = Neighbours {
                share: 0.0,
                cpus: 1,
            };
            assert_eq!(widening.judge(&served, alone, None, now), None);
        }
    }
}
