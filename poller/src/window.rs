//! How long a pod's sockets busy-poll: `auto`'s rule.
//!
//! A spinner in its window is not preempted by the wake-up of its peer, and every spun microsecond counts against the
//! pod's CPU quota. So the window is long only where nobody else wants the CPU, and there is none where the quota could
//! be eaten.

use kbp_kernel::{CpuSet, Micros};

use crate::policy::BusyPoll;

/// Window of a pod that has CPUs of its own: spans the gap to the next request of a busy peer, and there is no
/// neighbour to wait for the CPU.
pub const LONG: Micros = Micros(100);

/// Window on shared CPUs: long enough for the answer of a peer that spins as well (12 µs). Two threads that answer each
/// other on *one* CPU wait for each other's window: 60–81 µs at 20–30 µs of window, where sleeping takes 15. That is
/// the price of not knowing where the scheduler puts them, and why the window is not longer.
pub const SHORT: Micros = Micros(20);

/// What decides a window.
#[derive(Debug, Clone)]
pub struct CpuSituation {
    /// The pod's cpuset; None: every CPU.
    pub cpuset: Option<CpuSet>,
    /// CPUs that are online.
    pub online: CpuSet,
    /// CPUs that other kbp pods have in a cpuset of theirs: [`crate::state::taken_cpus`].
    pub taken: CpuSet,
    /// CPU quota in CPUs (quota / period); None: no quota.
    pub quota: Option<f64>,
}

impl CpuSituation {
    /// CPUs that the pod may run on. A cpuset that names no online CPU counts as none given.
    fn usable(&self) -> CpuSet {
        let usable: CpuSet = match &self.cpuset {
            Some(cpus) => cpus.iter().filter(|c| self.online.contains(*c)).collect(),
            None => CpuSet::default(),
        };
        if usable.is_empty() {
            self.online.clone()
        } else {
            usable
        }
    }

    /// The quota, where spinning could eat it: each CPU of the pod can burn one CPU second a second, so a quota of
    /// at least as many CPUs as the pod may run on cannot be exhausted by any amount of spinning, and every smaller one
    /// can. How many threads of the pod will spin is not known before they do; being throttled costs tens of
    /// milliseconds where busy polling gains tens of microseconds, so the doubt goes against the window.
    fn tight_quota(&self) -> Option<f64> {
        self.quota
            .filter(|quota| *quota < self.usable().len() as f64)
    }
}

/// The decision and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// None: no busy polling.
    pub micros: Option<Micros>,
    /// For status and log.
    pub reason: String,
}

impl Window {
    fn of(micros: Micros, reason: String) -> Self {
        Self {
            micros: Some(micros),
            reason,
        }
    }

    fn off(reason: String) -> Self {
        Self {
            micros: None,
            reason,
        }
    }
}

/// Decides the window. What was asked for is always done; the reason warns when it may hurt.
pub fn decide(asked: BusyPoll, cpus: &CpuSituation) -> Window {
    let tight = cpus.tight_quota();
    let count = cpus.usable().len();
    match asked {
        BusyPoll::Off => Window::off("switched off by kbp.io/busy-poll".to_owned()),
        BusyPoll::Window(micros) => Window::of(
            micros,
            match tight {
                None => "asked for by kbp.io/busy-poll".to_owned(),
                Some(quota) => format!(
                    "asked for by kbp.io/busy-poll; warning: spinning on {count} CPUs can exhaust the quota of {quota} CPUs and have the pod throttled for tens of milliseconds"
                ),
            },
        ),
        BusyPoll::Auto => auto(cpus, tight, count),
    }
}

fn auto(cpus: &CpuSituation, tight: Option<f64>, count: usize) -> Window {
    if let Some(quota) = tight {
        return Window::off(format!(
            "auto: a quota of {quota} CPUs on {count} CPUs could be eaten by spinning and the pod throttled; give it a cpuset no larger than its quota, or set kbp.io/busy-poll"
        ));
    }
    let Some(cpuset) = cpus.cpuset.as_ref().filter(|c| !c.is_empty()) else {
        return Window::of(SHORT, "auto: the pod runs on shared CPUs".to_owned());
    };
    if cpus.online.is_subset(cpuset) {
        return Window::of(
            SHORT,
            format!("auto: the pod's cpuset {cpuset} is every online CPU, so it shares them"),
        );
    }
    let contended: CpuSet = cpuset.iter().filter(|c| cpus.taken.contains(*c)).collect();
    if contended.is_empty() {
        Window::of(
            LONG,
            format!("auto: the pod has a cpuset of its own ({cpuset})"),
        )
    } else {
        Window::of(
            SHORT,
            format!(
                "auto: the pod shares CPUs {contended} of its cpuset {cpuset} with another kbp pod"
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn situation(cpuset: Option<&str>, taken: &str, quota: Option<f64>) -> CpuSituation {
        CpuSituation {
            cpuset: cpuset.map(|c| c.parse().expect("cpuset")),
            online: "0-7".parse().expect("online"),
            taken: taken.parse().expect("taken"),
            quota,
        }
    }

    #[test]
    fn auto_follows_cpuset_neighbours_and_quota() {
        for (cpuset, taken, quota, expected, why) in [
            (None, "", None, Some(SHORT), "shared CPUs"),
            (Some(""), "", None, Some(SHORT), "shared CPUs"),
            (Some("0-7"), "", None, Some(SHORT), "every online CPU"),
            (Some("0-15"), "", None, Some(SHORT), "every online CPU"),
            (Some("2-3"), "", None, Some(LONG), "of its own (2-3)"),
            (Some("2-3"), "0-1,4", None, Some(LONG), "of its own"),
            (Some("2-3"), "3-4", None, Some(SHORT), "shares CPUs 3 of"),
            (None, "", Some(0.5), None, "quota of 0.5 CPUs on 8 CPUs"),
            (None, "", Some(7.9), None, "quota of 7.9"),
            (None, "", Some(8.0), Some(SHORT), "shared CPUs"),
            (Some("2-3"), "", Some(1.0), None, "on 2 CPUs"),
            (Some("2-3"), "", Some(2.0), Some(LONG), "of its own"),
            (Some("2"), "", Some(1.0), Some(LONG), "of its own"),
        ] {
            let window = decide(BusyPoll::Auto, &situation(cpuset, taken, quota));
            assert_eq!(
                window.micros, expected,
                "{cpuset:?} {taken} {quota:?}: {}",
                window.reason
            );
            assert!(
                window.reason.contains(why),
                "{cpuset:?} {taken} {quota:?}: {}",
                window.reason
            );
        }
    }

    #[test]
    fn an_explicit_window_is_honoured_and_a_tight_quota_named() {
        let asked = BusyPoll::Window(Micros(500));
        let free = decide(asked, &situation(None, "", None));
        assert_eq!(free.micros, Some(Micros(500)));
        assert!(!free.reason.contains("warning"), "{}", free.reason);

        let tight = decide(asked, &situation(None, "", Some(1.5)));
        assert_eq!(tight.micros, Some(Micros(500)));
        assert!(
            tight.reason.contains("warning") && tight.reason.contains("1.5"),
            "{}",
            tight.reason
        );
    }

    #[test]
    fn off_is_off_whatever_the_cpus() {
        assert_eq!(
            decide(BusyPoll::Off, &situation(Some("2"), "", None)).micros,
            None
        );
    }
}
