//! A container's window while it runs: the one that is decided for it, and what keeps it from having that.
//!
//! There is one order. The container's window follows its [`Course`]; and a process of which more threads would poll than it has CPUs
//! has none ([`Pollers`]), whatever the others have. A process that has none is not asked whether its window hurts. Everything here is
//! under the pod's lock, so that descriptors are looked through by one thread at a time.

use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_poller::state::Degraded;
use kbp_poller::window::Window;

use super::adapt::{BUSY, WHOLE};
use super::course::{Course, Neighbours};
use super::others::Others;
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
    pub(super) course: Course,
    /// None before the first look at this window.
    pub(super) watch: Option<Watch>,
    pub(super) rest: Rest,
    pub(super) others: Others,
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
    /// Another window fits it now; whether that is news. `afresh`: its own limits have changed.
    pub(super) fn decide(
        &mut self,
        id: &str,
        window: Window,
        afresh: bool,
        notifier: Option<&Notifier>,
    ) -> bool {
        let from = self.course.window().micros;
        let news = self.course.decide(window, afresh);
        if news {
            self.watch = None;
            self.give(id, from, notifier);
        }
        news
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
        self.course.decided().micros?;
        let Listed {
            processes,
            own,
            cgroup,
        } = self.processes();
        let settled = !self.course.tries() && self.course.adaptive().wants(now).is_none();
        if self.rest.goes_on(own, now) && settled && self.watch.is_some() {
            return Some(Looked {
                cpus: 0.0,
                slept: 0.0,
                changed: false,
            });
        }
        self.rest.looked = Some(now);
        // First, so that a process that is in its own way is not taken for one that is in others'.
        let soon = self.course.adaptive().suspects();
        let mut changed = notifier.count_pollers(&mut self.pollers, treatment, soon);
        let Some(watch) = &mut self.watch else {
            self.watch = Some(Watch::new(&processes));
            return Some(Looked {
                cpus: 0.0,
                slept: 0.0,
                changed,
            });
        };
        let from = self.course.window().micros;
        let polls = |pid| !self.pollers.is_crowded(pid);
        let look = watch.look(&processes, from, polls);
        for pid in look.several() {
            // Asked when it is open: what the number means then is in the container.
            let its = || cgroup.as_ref().is_some_and(|cgroup| cgroup.contains(pid));
            if let Some(process) = PidFd::open(pid).ok().filter(|_| its()) {
                self.pollers.watch(pid, process);
            }
        }
        let neighbours = self.neighbours(own);
        if self.course.step(&look, neighbours, widest, now) {
            let wide = self.course.window().micros;
            if !self.give(id, from, Some(notifier)) && self.course.falls_short(now) {
                self.give(id, wide, Some(notifier));
            }
            changed = true;
        }
        Some(Looked {
            cpus: look.cpus,
            slept: look.slept,
            changed,
        })
    }

    /// Who else runs on its CPUs, where that matters and is known.
    fn neighbours(&mut self, own: Option<Duration>) -> Option<Neighbours> {
        if !self.course.may_widen() {
            return None;
        }
        let cpus = self.limits.cpuset()?;
        let share = self.others.look(&cpus, own?)?;
        let cpus = cpus.len();
        Some(Neighbours { share, cpus })
    }

    /// Gives it its window: what it makes from now on, and what it has already, with the window `from`; false when there was no time
    /// for all of that.
    fn give(&mut self, id: &str, from: Option<Micros>, notifier: Option<&Notifier>) -> bool {
        let window = self.course.window();
        tracing::info!("container {id}: busy-poll window now {}", described(window));
        let (Some(treatment), Some(notifier)) = (&mut self.treatment, notifier) else {
            return true;
        };
        treatment.window = window.micros;
        notifier.admit(id, *treatment);
        let treatment = *treatment;
        if from == treatment.window {
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
        let all = self.pollers.are_all_crowded();
        shown(self.course.window(), crowded, all)
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

/// Whether a container does nothing, by one figure: looking at each thread of every idle pod once a second would add up.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// What it had run, and when that was asked.
    ran: Option<(Duration, Instant)>,
    /// The last whole look.
    looked: Option<Instant>,
}

impl Rest {
    /// Whether it has done next to nothing since this was asked last, and was looked at not long ago. `own`: what it has run.
    fn goes_on(&mut self, own: Option<Duration>, now: Instant) -> bool {
        let Some(own) = own else {
            return false;
        };
        let passed = |since: Instant| now.saturating_duration_since(since);
        let Some((ran, at)) = self.ran.replace((own, now)) else {
            return false;
        };
        let idle = own.saturating_sub(ran) < passed(at).mul_f64(BUSY);
        idle && self.looked.is_some_and(|at| passed(at) < WHOLE)
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
    fn one_that_runs_next_to_nothing_rests_until_the_next_whole_look() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let ran = |ms| Some(Duration::from_millis(ms));
        let mut rest = Rest::default();
        assert!(!rest.goes_on(ran(5), at(0)), "nothing to compare with");
        assert!(!rest.goes_on(ran(5), at(500)), "never looked at");
        rest.looked = Some(at(500));
        assert!(rest.goes_on(ran(9), at(1000)));
        assert!(!rest.goes_on(ran(14), at(1500)), "a hundredth of a CPU");
        assert!(rest.goes_on(ran(14), at(16_499)));
        assert!(!rest.goes_on(ran(14), at(16_501)), "long ago");
        assert!(!rest.goes_on(None, at(16_502)), "nobody counts for it");
    }

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
