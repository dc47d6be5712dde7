//! What window a container has over time: by what fits it, and by what was seen of it.
//!
//! What fits its limits and its neighbours ([`decided`](Course::decided)) is none where a quota could be eaten. On CPUs of its own it may
//! be wider ([`super::widen`]). While it hurts there is none ([`super::adapt`]). Nothing here looks at anything: a look goes in, and a
//! window comes out.

use std::time::Instant;

use kbp_kernel::Micros;
use kbp_poller::window::{LONG, Window};

use super::adapt::{Adaptive, Verdict};
use super::widen::{Widening, Width};
use crate::sockets::Look;

/// A container's window over time.
#[derive(Debug)]
pub(super) struct Course {
    /// What fits its limits and its neighbours.
    decided: Window,
    /// What it has: that, a wider one, or none while it hurts.
    window: Window,
    adaptive: Adaptive,
    widening: Widening,
}

/// What others do on a container's CPUs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neighbours {
    /// CPUs that they are on, on average.
    pub(super) share: f64,
    /// How many CPUs the container has.
    pub(super) cpus: usize,
}

impl Course {
    /// Of a container that has this window now.
    pub(super) fn new(decided: Window) -> Self {
        Self {
            window: decided.clone(),
            decided,
            adaptive: Adaptive::default(),
            widening: Widening::default(),
        }
    }

    /// What it has.
    pub(super) fn window(&self) -> &Window {
        &self.window
    }

    /// What fits it.
    pub(super) fn decided(&self) -> &Window {
        &self.decided
    }

    /// What its window does to others.
    pub(super) fn adaptive(&self) -> &Adaptive {
        &self.adaptive
    }

    /// Whether a wide window is on trial.
    pub(super) fn tries(&self) -> bool {
        self.widening.is_unsettled()
    }

    /// Whether it matters who else runs on its CPUs.
    pub(super) fn may_widen(&self) -> bool {
        self.window.micros.is_some() && self.decided.micros == Some(LONG)
    }

    /// Another window fits it now; whether it gets another one, or another reason for it. `afresh`: its own limits have changed, so that
    /// what was learned says nothing any more. Else that stays while the window is the same: other pods that come and go must not bring
    /// back one that hurts.
    pub(super) fn decide(&mut self, window: Window, afresh: bool) -> bool {
        if window == self.decided {
            return false;
        }
        let same = !afresh && window.micros == self.decided.micros;
        let plain = self.window == self.decided;
        self.decided = window;
        if same && !plain {
            return false;
        }
        if !same {
            self.adaptive = Adaptive::default();
            self.widening = Widening::default();
        }
        self.window = self.decided.clone();
        true
    }

    /// By what was seen since the look before: whether it gets another window. `widest`: what it may be widened to.
    pub(super) fn step(
        &mut self,
        look: &Look,
        neighbours: Option<Neighbours>,
        widest: Option<Micros>,
        now: Instant,
    ) -> bool {
        self.window = match self.adaptive.judge(look, now) {
            Verdict::GiveBack => self.decided.clone(),
            Verdict::TakeAway(reason) => {
                self.widening = Widening::default();
                Window {
                    micros: None,
                    reason: format!("auto: off for now, since {reason}"),
                }
            }
            Verdict::Stay => {
                let width = match neighbours.filter(|_| self.may_widen()) {
                    Some(neighbours) => self.widening.judge(look, neighbours, widest, now),
                    None => self.widening.rests(look, now),
                };
                match width {
                    None => return false,
                    Some(Width::Plain) => self.decided.clone(),
                    Some(Width::Wide(why)) => Window {
                        micros: widest,
                        reason: format!("{}, and {why}", self.decided.reason),
                    },
                }
            }
        };
        true
    }

    /// Not all that the container has could be given its window: whether it is to get another one, since what has kept a wide one would
    /// have it for ever.
    pub(super) fn falls_short(&mut self, now: Instant) -> bool {
        let gives_up = self.widening.gives_up(now);
        if gives_up {
            self.window = self.decided.clone();
        }
        gives_up
    }
}

#[cfg(test)]
mod tests;
