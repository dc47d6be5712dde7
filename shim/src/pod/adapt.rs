//! Whether a container keeps the window that was decided for it: not while it hurts.
//!
//! It is taken away when looks in a row show harm ([`Look::harm`]) for half a second, or two where there was some lately, and given back after a pause that doubles each time, or when
//! the container does something else by then. What a trial costs those who are harmed is a twentieth of a second.

use std::time::{Duration, Instant};

use crate::sockets::Look;

/// Looks in a row that have to show harm.
const STRIKES: u32 = 2;
/// How long they have to show it where none was seen lately. Whatever starts a program beside it, a client that is executed in a pod for one, is
/// in the way of who polls for some tenths of a second, and that is no neighbour.
const LASTING: Duration = Duration::from_millis(450);
/// Pause before the first trial.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
/// Longest pause between two trials.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How long a window has to do no harm until what was before is forgotten.
const PROVEN: Duration = Duration::from_secs(60);
/// How long a window stays away at least: this part of the pause. Else one that comes and goes with its requests would bring it back, and
/// be in others' way for a moment, each time.
const SETTLED: u32 = 10;
/// How long after a turn, or a call, something may have changed.
const LATELY: Duration = Duration::from_secs(2);
/// Factor of the turns a second by which a container does something else.
const CHANGED: f64 = 4.0;
/// CPUs from which a container does anything.
pub(super) const BUSY: f64 = 0.01;
/// Between looks while something may have changed.
pub(super) const NEAR: Duration = Duration::from_millis(100);
/// Between the first looks at a window that was given back: a trial is to hurt for a short time only.
const TRIAL: Duration = Duration::from_millis(25);
/// How long that is.
const TRIED: Duration = Duration::from_millis(250);
/// Between looks at a busy container otherwise.
const FAR: Duration = Duration::from_millis(500);
/// Most between looks at one that does nothing.
const RARE: Duration = Duration::from_secs(1);
/// Most between looks at one that does nothing that are more than one at what it has run.
pub(super) const WHOLE: Duration = Duration::from_secs(16);

/// Time between looks in that which one took: of a container with many threads it is not little, and is taken from its own CPUs.
const REST: u32 = 100;

/// `pause`, or longer after a look that took so long. Not in a trial, which is short itself.
pub(super) fn rested(pause: Duration, took: Duration) -> Duration {
    match pause < NEAR {
        true => pause,
        false => pause.max(REST * took),
    }
}

/// What is to become of the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing new.
    Stay,
    /// It is taken away, for this reason.
    TakeAway(String),
    /// It is given back.
    GiveBack,
}

/// A container's window over time.
#[derive(Debug)]
pub(super) struct Adaptive {
    strikes: u32,
    /// When the first of them was seen.
    struck: Option<Instant>,
    /// None while the window is there.
    away: Option<Away>,
    /// When it was taken away or given back last.
    since: Option<Instant>,
    pause: Duration,
}

#[derive(Debug)]
struct Away {
    until: Instant,
    /// From when on the container may do something else.
    settled: Instant,
    /// Turns a second that the container takes without the window.
    turns: Option<f64>,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            strikes: 0,
            struck: None,
            away: None,
            since: None,
            pause: FIRST_PAUSE,
        }
    }
}

impl Adaptive {
    /// Judges by what was seen.
    pub(super) fn judge(&mut self, look: &Look, now: Instant) -> Verdict {
        match &mut self.away {
            None => {
                let proven = |since: Instant| now.saturating_duration_since(since) >= PROVEN;
                if self.since.is_some_and(proven) {
                    self.pause = FIRST_PAUSE;
                }
                let Some(harm) = &look.harm else {
                    self.strikes = 0;
                    return Verdict::Stay;
                };
                if self.strikes == 0 {
                    self.struck = Some(now);
                }
                self.strikes += 1;
                let lasts = self
                    .struck
                    .is_some_and(|at| now.saturating_duration_since(at) >= LASTING);
                let lately = self.since.is_some_and(|since| !proven(since));
                if self.strikes < STRIKES || !(lasts || lately) {
                    return Verdict::Stay;
                }
                let reason = format!("{harm}; tried again in {} s", self.pause.as_secs());
                self.away = Some(Away {
                    until: now + self.pause,
                    settled: now + self.pause / SETTLED,
                    turns: None,
                });
                self.pause = (2 * self.pause).min(LONGEST_PAUSE);
                self.turn(now);
                Verdict::TakeAway(reason)
            }
            Some(away) => {
                let other = match away.turns {
                    Some(turns) if now >= away.settled && look.cpus >= BUSY => {
                        look.turns >= CHANGED * turns || CHANGED * look.turns <= turns
                    }
                    _ => false,
                };
                if look.cpus >= BUSY {
                    away.turns.get_or_insert(look.turns);
                }
                // One that does nothing needs none, and is looked at too rarely for a trial.
                if !other && (now < away.until || look.turns == 0.0) {
                    return Verdict::Stay;
                }
                self.away = None;
                self.turn(now);
                Verdict::GiveBack
            }
        }
    }

    /// Whether the last look showed harm, and the next one may take the window away.
    pub(super) fn suspects(&self) -> bool {
        self.strikes > 0
    }

    fn turn(&mut self, now: Instant) {
        self.strikes = 0;
        self.since = Some(now);
    }

    /// How soon it should be looked at again; None: that does not matter.
    pub(super) fn wants(&self, now: Instant) -> Option<Duration> {
        let turned = self.since.map(|at| now.saturating_duration_since(at));
        match turned {
            Some(ago) if ago < TRIED && self.away.is_none() => Some(TRIAL),
            Some(ago) if ago < LATELY => Some(NEAR),
            _ if self.strikes > 0 => Some(NEAR),
            // One that did harm lately may begin again.
            Some(ago) if ago < PROVEN && self.away.is_none() => Some(FAR),
            _ => None,
        }
    }
}

/// How long until the next look at a pod.
#[derive(Debug, Default)]
pub(super) struct Pace {
    woken: Option<Instant>,
    idle: Option<Duration>,
}

impl Pace {
    /// Something has happened: sockets were made.
    pub(super) fn wake(&mut self, now: Instant) {
        self.woken = Some(now);
        self.idle = None;
    }

    /// Whether the pod has done anything lately.
    pub(super) fn is_awake(&self) -> bool {
        self.idle.is_none()
    }

    /// After a look at containers that were on so many CPUs.
    pub(super) fn next<'a>(
        &mut self,
        containers: impl Iterator<Item = &'a Adaptive>,
        cpus: f64,
        now: Instant,
    ) -> Duration {
        let lately = |woken: Instant| now.saturating_duration_since(woken) < LATELY;
        let soon = self.woken.is_some_and(lately).then_some(NEAR);
        let wanted = containers.filter_map(|c| c.wants(now));
        if let Some(pause) = wanted.chain(soon).min() {
            return pause;
        }
        if cpus >= BUSY {
            // What begins after a rest is looked at as what a call began.
            if self.idle.is_some() {
                self.wake(now);
                return NEAR;
            }
            return FAR;
        }
        let pause = self.idle.map_or(FAR, |idle| (2 * idle).min(RARE));
        self.idle = Some(pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(turns: f64, harm: bool) -> Look {
        Look {
            cpus: 0.5,
            turns,
            harm: harm.then(|| "harm".to_owned()),
            ..Look::default()
        }
    }

    fn taken_away(adaptive: &mut Adaptive, now: Instant) -> bool {
        adaptive.judge(&look(1.0, true), now - LASTING);
        let verdict = adaptive.judge(&look(1.0, true), now);
        matches!(verdict, Verdict::TakeAway(reason) if reason.contains("harm"))
    }

    #[test]
    fn one_look_is_not_enough_and_the_pauses_grow() {
        let mut adaptive = Adaptive::default();
        let start = Instant::now();
        assert_eq!(adaptive.judge(&look(1.0, true), start), Verdict::Stay);
        assert_eq!(adaptive.judge(&look(1.0, false), start), Verdict::Stay);
        let mut now = start;
        for pause in [10, 20, 40, 80, 160, 300, 300] {
            assert!(taken_away(&mut adaptive, now), "{pause}");
            let before = now + Duration::from_secs(pause - 1);
            assert_eq!(adaptive.judge(&look(1.0, false), before), Verdict::Stay);
            now += Duration::from_secs(pause);
            assert_eq!(adaptive.judge(&look(1.0, false), now), Verdict::GiveBack);
        }
        now += PROVEN;
        assert_eq!(adaptive.judge(&look(1.0, false), now), Verdict::Stay);
        assert!(taken_away(&mut adaptive, now));
        now += FIRST_PAUSE;
        assert_eq!(adaptive.judge(&look(1.0, false), now), Verdict::GiveBack);
    }

    #[test]
    fn what_starts_beside_it_is_no_neighbour_but_what_was_one_lately_is() {
        let mut adaptive = Adaptive::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        for ms in [0, 100, 200, 300, 400] {
            assert_eq!(adaptive.judge(&look(1.0, true), at(ms)), Verdict::Stay);
        }
        assert_eq!(adaptive.judge(&look(1.0, false), at(500)), Verdict::Stay);
        assert_eq!(adaptive.judge(&look(1.0, true), at(600)), Verdict::Stay);
        assert!(taken_away(&mut adaptive, at(1050)));
        let back = at(1050) + FIRST_PAUSE;
        let verdict = adaptive.judge(&look(1.0, false), back);
        assert_eq!(verdict, Verdict::GiveBack);
        assert_eq!(adaptive.judge(&look(1.0, true), back), Verdict::Stay);
        let soon = back + TRIAL;
        let verdict = adaptive.judge(&look(1.0, true), soon);
        assert!(matches!(verdict, Verdict::TakeAway(_)));
    }

    #[test]
    fn it_is_given_back_when_the_container_does_something_else() {
        for turns in [400.0, 25.0] {
            let mut adaptive = Adaptive::default();
            let start = Instant::now();
            assert!(taken_away(&mut adaptive, start));
            let at = |ms| start + Duration::from_millis(ms);
            assert_eq!(adaptive.judge(&look(100.0, false), at(100)), Verdict::Stay);
            assert_eq!(adaptive.judge(&look(turns, false), at(500)), Verdict::Stay);
            let idle = Look::default();
            assert_eq!(adaptive.judge(&idle, at(1500)), Verdict::Stay);
            assert_eq!(adaptive.judge(&look(150.0, false), at(1600)), Verdict::Stay);
            assert_eq!(
                adaptive.judge(&look(turns, false), at(1700)),
                Verdict::GiveBack
            );
        }
    }

    #[test]
    fn looks_take_a_hundredth_of_the_time_at_most() {
        let ms = Duration::from_millis;
        assert_eq!(rested(NEAR, ms(1)), NEAR);
        assert_eq!(rested(NEAR, ms(3)), ms(300));
        assert_eq!(rested(RARE, ms(3)), RARE);
        assert_eq!(rested(TRIAL, ms(3)), TRIAL);
    }

    #[test]
    fn one_that_does_nothing_is_looked_at_rarely() {
        let mut pace = Pace::default();
        let now = Instant::now();
        pace.wake(now);
        let none = || std::iter::empty::<&Adaptive>();
        assert_eq!(pace.next(none(), 0.0, now), NEAR);
        let later = now + Duration::from_secs(10);
        assert_eq!(pace.next(none(), 1.0, later), FAR);
        let pauses: Vec<u64> = (0..6)
            .map(|_| pace.next(none(), 0.0, later).as_millis() as u64)
            .collect();
        assert_eq!(pauses, [500, 1000, 1000, 1000, 1000, 1000]);
        assert_eq!(pace.next(none(), 1.0, later), NEAR);
        assert_eq!(pace.next(none(), 1.0, later + LATELY), FAR);
        pace.wake(later);
        assert_eq!(pace.next(none(), 0.0, later), NEAR);
        let mut adaptive = Adaptive::default();
        adaptive.judge(&look(1.0, true), later);
        let after = later + Duration::from_secs(10);
        assert_eq!(pace.next([&adaptive].into_iter(), 1.0, after), NEAR);
        // On trial, and some time later.
        let mut adaptive = Adaptive::default();
        assert!(taken_away(&mut adaptive, after));
        let back = after + FIRST_PAUSE;
        let verdict = adaptive.judge(&look(1.0, false), back);
        assert_eq!(verdict, Verdict::GiveBack);
        assert_eq!(pace.next([&adaptive].into_iter(), 1.0, back), TRIAL);
        let tried = back + TRIED;
        assert_eq!(pace.next([&adaptive].into_iter(), 1.0, tried), NEAR);
    }
}
