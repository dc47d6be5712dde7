//! A container's window while it runs: the one that is decided for it, and what keeps it from having that.
//!
//! There is one order. What fits its limits and its neighbours ([`decided`](Container::decided)) is none where a quota could be eaten.
//! On CPUs of its own it may be wider ([`super::widen`]).
//! While that window hurts, the whole container has none ([`super::adapt`]); and a process of which more threads would poll than it has
//! CPUs has none ([`Pollers`]), whatever the others have. A process that has none is not asked whether its window hurts. Everything
//! here is under the pod's lock, so that descriptors are looked through by one thread at a time.

use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_poller::state::Degraded;
use kbp_poller::window::{LONG, Window};

use super::adapt::{Adaptive, Verdict};
use super::others::Others;
use super::widen::{Widening, Width};
use crate::sockets::{Look, Notifier, Pollers, Treatment, Watch};
use crate::spec::CpuLimits;
use crate::task::cgroup::Cgroup;

/// Processes of a container that are looked at; a server with more has them for connections, of which most are short.
const PROCESSES: usize = 1024;

/// A container of a pod.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) sandbox: bool,
    pub(super) limits: CpuLimits,
    /// What fits its limits and its neighbours.
    pub(super) decided: Window,
    /// What it has: that, or none while it hurts.
    pub(super) window: Window,
    pub(super) adaptive: Adaptive,
    pub(super) others: Others,
    pub(super) widening: Widening,
    pub(super) pollers: Pollers,
    /// Its first process; None before there is one.
    pub(super) process: Option<(u32, PidFd)>,
    /// None: it has no listener.
    pub(super) treatment: Option<Treatment>,
    pub(super) host_network: bool,
    pub(super) degraded: Vec<Degraded>,
}

/// What a look has found.
pub(super) struct Looked {
    /// CPUs that its threads were on, on average.
    pub(super) cpus: f64,
    /// How often they slept, a second.
    pub(super) slept: f64,
    /// Whether it has come to or from having its window, or one of its processes has.
    pub(super) changed: bool,
}

impl Container {
    /// Another window fits it now.
    pub(super) fn decide(&mut self, id: &str, window: Window, notifier: Option<&Notifier>) {
        if window == self.decided {
            return;
        }
        self.decided = window.clone();
        // What was learned about the old one says nothing of this one.
        self.adaptive = Adaptive::default();
        self.widening = Widening::default();
        self.give(id, window, notifier);
    }

    /// Looks whether its window hurts or should be wider, and gives it another one or none; None: it has none to look after.
    /// `widest`: what windows on CPUs of its own may be widened to, if they may.
    pub(super) fn look(
        &mut self,
        id: &str,
        notifier: &Notifier,
        widest: Option<Micros>,
        now: Instant,
    ) -> Option<Looked> {
        let treatment = self.treatment?;
        self.decided.micros?;
        // First, so that a process that is in its own way is not taken for one that is in others'.
        let soon = self.adaptive.suspects();
        let changed = notifier.count_pollers(&mut self.pollers, treatment, soon);
        let Listed { processes, own, .. } = self.processes();
        let Some(watch) = &mut self.adaptive.watch else {
            self.adaptive.watch = Some(Watch::new(&processes));
            return Some(Looked {
                cpus: 0.0,
                slept: 0.0,
                changed,
            });
        };
        let polls = |pid| !self.pollers.is_crowded(pid);
        let look = watch.look(&processes, self.window.micros, polls);
        let (cpus, slept) = (look.cpus, look.slept);
        let window = match self.adaptive.judge(&look, now) {
            Verdict::Stay => match self.widen(&look, own, widest, now) {
                Some(window) => window,
                None => {
                    return Some(Looked {
                        cpus,
                        slept,
                        changed,
                    });
                }
            },
            Verdict::GiveBack => self.decided.clone(),
            Verdict::TakeAway(reason) => {
                self.widening = Widening::default();
                Window {
                    micros: None,
                    reason: format!("auto: off for now, since {reason}"),
                }
            }
        };
        let whole = self.give(id, window, Some(notifier));
        // What has kept the wide one would have it for ever.
        if !whole && self.widening.gives_up(now) {
            self.give(id, self.decided.clone(), Some(notifier));
        }
        let changed = true;
        Some(Looked {
            cpus,
            slept,
            changed,
        })
    }

    /// Another window where it has CPUs of its own; None: it keeps what it has.
    fn widen(
        &mut self,
        look: &Look,
        own: Option<Duration>,
        widest: Option<Micros>,
        now: Instant,
    ) -> Option<Window> {
        if self.window.micros.is_none() || self.decided.micros != Some(LONG) {
            return None;
        }
        let (cpus, own) = (self.limits.cpuset()?, own?);
        let others = self.others.look(&cpus, own)?;
        let width = self.widening.judge(look, others, cpus.len(), widest, now)?;
        let decided = &self.decided;
        Some(match width {
            Width::Plain => decided.clone(),
            Width::Wide(why) => Window {
                micros: widest,
                reason: format!("{}, and {why}", decided.reason),
            },
        })
    }

    /// Gives it a window: what it makes from now on, and what it has already; false when there was no time for all of that.
    fn give(&mut self, id: &str, window: Window, notifier: Option<&Notifier>) -> bool {
        let from = self.window.micros;
        self.window = window;
        tracing::info!(
            "container {id}: busy-poll window now {}",
            described(&self.window)
        );
        let (Some(treatment), Some(notifier)) = (&mut self.treatment, notifier) else {
            return true;
        };
        treatment.window = self.window.micros;
        notifier.admit(id, *treatment);
        let treatment = *treatment;
        if from == self.window.micros {
            return true;
        }
        let Listed {
            mut processes,
            cgroup,
            ..
        } = self.processes();
        processes.retain(|pid| !self.pollers.is_crowded(*pid));
        // Asked when it is open: what the number means then is in the container.
        let its = |pid| cgroup.as_ref().is_none_or(|cgroup| cgroup.contains(pid));
        let open = |pid| PidFd::open(pid).ok().filter(|_| its(pid));
        let retuned = notifier.retune(&processes, open, from, treatment);
        tracing::info!(
            "container {id}: {} sockets and {} epoll instances that were there have it too{}",
            retuned.sockets,
            retuned.epolls,
            if retuned.cut_short {
                "; there were more than there was time for"
            } else {
                ""
            }
        );
        !retuned.cut_short
    }

    /// What it has, for a person: its processes too.
    pub(super) fn shown(&self) -> Window {
        let crowded = self.pollers.reason();
        shown(&self.window, crowded, self.pollers.are_all_crowded())
    }

    /// Its processes; the first one, and those that have made something that polls, where it shares the shim's own cgroup.
    fn processes(&self) -> Listed {
        let Some((pid, handle)) = &self.process else {
            return Listed::default();
        };
        let own = Cgroup::of_process(std::process::id());
        let cgroups = Cgroup::of_process(*pid).ok().zip(own.ok());
        let listed = cgroups.and_then(|(cgroup, own)| {
            Some(Listed {
                processes: cgroup.processes(&own, PROCESSES)?,
                own: cgroup.cpu_time(),
                cgroup: Some(cgroup),
            })
        });
        // Asked after its cgroup was read: the number was its own until then.
        if !handle.signal(0).unwrap_or(false) {
            return Listed::default();
        }
        listed.unwrap_or_else(|| {
            let others = self.pollers.ids().filter(|other| other != pid);
            Listed {
                processes: std::iter::once(*pid).chain(others).collect(),
                ..Listed::default()
            }
        })
    }
}

/// The processes of a container.
#[derive(Default)]
struct Listed {
    processes: Vec<u32>,
    /// CPU time of all that it ever had.
    own: Option<Duration>,
    /// None: it shares the shim's.
    cgroup: Option<Cgroup>,
}

/// A window and why.
pub(super) fn described(window: &Window) -> String {
    let micros = |micros: Micros| format!("{micros} µs");
    let micros = window.micros.map_or_else(|| "off".to_owned(), micros);
    format!("{micros} ({})", window.reason)
}

/// `crowded`: why some processes have none, or `all` of them.
fn shown(window: &Window, crowded: Option<String>, all: bool) -> Window {
    let (Some(_), Some(crowded)) = (window.micros, crowded) else {
        return window.clone();
    };
    match all {
        true => Window {
            micros: None,
            reason: format!("auto: off for now, since {crowded}"),
        },
        false => Window {
            micros: window.micros,
            reason: format!(
                "{}; off for now for some processes, since {crowded}",
                window.reason
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_without_a_window_are_told_where_the_container_has_one() {
        let window = |micros: Option<u32>, reason: &str| Window {
            micros: micros.map(Micros),
            reason: reason.to_owned(),
        };
        let many = || Some("many".to_owned());
        let has = window(Some(20), "auto: shared");
        let off = window(None, "auto: a quota");
        assert_eq!(shown(&has, None, false), has);
        assert_eq!(shown(&off, many(), true), off);
        assert_eq!(
            shown(&has, many(), true),
            window(None, "auto: off for now, since many")
        );
        let some = "auto: shared; off for now for some processes, since many";
        assert_eq!(shown(&has, many(), false), window(Some(20), some));
    }
}
