//! A container's window while it runs: the one that is decided for it, and what keeps it from having that.
//!
//! There is one order. What fits its limits and its neighbours ([`decided`](Container::decided)) is none where a quota could be eaten.
//! While that window hurts, the whole container has none ([`super::adapt`]); and a process of which more threads would poll than it has
//! CPUs has none ([`Pollers`]), whatever the others have. A process that has none is not asked whether its window hurts. Everything
//! here is under the pod's lock, so that descriptors are looked through by one thread at a time.

use std::time::Instant;

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_poller::state::Degraded;
use kbp_poller::window::Window;

use super::adapt::{Adaptive, Verdict};
use crate::sockets::{Notifier, Pollers, Treatment, Watch};
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
        self.give(id, window, notifier);
    }

    /// Looks whether its window hurts, and takes it away or gives it back; None: it has none to look after.
    pub(super) fn look(&mut self, id: &str, notifier: &Notifier, now: Instant) -> Option<Looked> {
        let treatment = self.treatment?;
        self.decided.micros?;
        // First, so that a process that is in its own way is not taken for one that is in others'.
        let soon = self.adaptive.suspects();
        let changed = notifier.count_pollers(&mut self.pollers, treatment, soon);
        let processes = self.processes();
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
            Verdict::Stay => {
                return Some(Looked {
                    cpus,
                    slept,
                    changed,
                });
            }
            Verdict::GiveBack => self.decided.clone(),
            Verdict::TakeAway(reason) => Window {
                micros: None,
                reason: format!("auto: off for now, since {reason}"),
            },
        };
        self.give(id, window, Some(notifier));
        let changed = true;
        Some(Looked {
            cpus,
            slept,
            changed,
        })
    }

    /// Gives it a window: what it makes from now on, and what it has already.
    fn give(&mut self, id: &str, window: Window, notifier: Option<&Notifier>) {
        let from = self.window.micros;
        self.window = window;
        tracing::info!(
            "container {id}: busy-poll window now {}",
            described(&self.window)
        );
        let (Some(treatment), Some(notifier)) = (&mut self.treatment, notifier) else {
            return;
        };
        treatment.window = self.window.micros;
        notifier.admit(id, *treatment);
        let treatment = *treatment;
        if from == self.window.micros {
            return;
        }
        let mut processes = self.processes();
        processes.retain(|pid| !self.pollers.is_crowded(*pid));
        let retuned = notifier.retune(&processes, from, treatment);
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
    }

    /// What it has, for a person: its processes too.
    pub(super) fn shown(&self) -> Window {
        let crowded = self.pollers.reason();
        shown(&self.window, crowded, self.pollers.are_all_crowded())
    }

    /// Its processes; the first one, and those that have made something that polls, where it shares the shim's own cgroup.
    fn processes(&self) -> Vec<u32> {
        let Some((pid, handle)) = &self.process else {
            return Vec::new();
        };
        let own = Cgroup::of_process(std::process::id());
        let listed = Cgroup::of_process(*pid)
            .ok()
            .zip(own.ok())
            .and_then(|(cgroup, own)| cgroup.processes(&own, PROCESSES));
        // Asked after its cgroup was read: the number was its own until then.
        if !handle.signal(0).unwrap_or(false) {
            return Vec::new();
        }
        listed.unwrap_or_else(|| {
            let others = self.pollers.ids().filter(|other| other != pid);
            std::iter::once(*pid).chain(others).collect()
        })
    }
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
