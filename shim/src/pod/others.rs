//! How much others run on the CPUs of a container that has CPUs of its own.
//!
//! What these CPUs were busy with, less what the container has run. Its own interrupts count as others' work; [`super::widen`] allows
//! for them.

use std::time::{Duration, Instant};

use kbp_kernel::CpuSet;
use kbp_kernel::cpu_time::CpuTimes;

/// The kernel tells how long a CPU was idle in steps of 10 ms, and what comes and goes within a second is nobody's neighbour.
const SHORTEST: Duration = Duration::from_secs(1);

/// What was counted longer ago than this says nothing of who is there now.
const LONGEST: Duration = Duration::from_secs(10);

/// What was counted at one look.
#[derive(Debug, Clone)]
struct Point {
    at: Instant,
    idle: Duration,
    own: Duration,
}

/// The others of one container.
#[derive(Debug, Default)]
pub(super) struct Others {
    cpus: CpuSet,
    last: Option<Point>,
    /// CPUs that they were on, on average; what was before counts half.
    share: Option<f64>,
}

impl Others {
    /// CPUs that they are on, on average; None while that is not known. `own`: CPU time of the container so far.
    pub(super) fn look(&mut self, cpus: &CpuSet, own: Duration) -> Option<f64> {
        let early = |point: &Point| point.at.elapsed() < SHORTEST;
        if self.cpus == *cpus && self.last.as_ref().is_some_and(early) {
            return self.share;
        }
        let times = CpuTimes::read().ok()?.each;
        // What a hypervisor takes is nobody's here.
        let idle = cpus
            .iter()
            .filter_map(|cpu| times.get(&cpu))
            .map(|t| t.idle + t.stolen);
        let now = Point {
            at: Instant::now(),
            idle: idle.sum(),
            own,
        };
        let old = |point: &Point| now.at.saturating_duration_since(point.at) > LONGEST;
        self.share = match &self.last {
            Some(last) if self.cpus == *cpus && !old(last) => {
                let share = share(last, &now, cpus.len());
                Some(self.share.map_or(share, |before| (before + share) / 2.0))
            }
            _ => None,
        };
        self.cpus = cpus.clone();
        self.last = Some(now);
        self.share
    }
}

fn share(from: &Point, to: &Point, cpus: usize) -> f64 {
    let seconds = to.at.saturating_duration_since(from.at).as_secs_f64();
    let during = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() / seconds;
    let busy = cpus as f64 - during(from.idle, to.idle);
    (busy - during(from.own, to.own)).max(0.0)
}

#[cfg(test)]
mod tests {
    use kbp_kernel::cpu::Topology;

    use super::*;

    #[test]
    fn others_are_what_is_neither_idle_nor_own() {
        let start = Instant::now();
        let point = |ms: u64, idle: u64, own: u64| Point {
            at: start + Duration::from_millis(ms),
            idle: Duration::from_millis(idle),
            own: Duration::from_millis(own),
        };
        let from = point(0, 1000, 0);
        for (to, cpus, expected) in [
            (point(500, 1500, 0), 1, 0.0),
            (point(500, 1250, 200), 1, 0.1),
            (point(500, 1250, 200), 2, 1.1),
            // Steps of the kernel's counter.
            (point(500, 1010, 495), 1, 0.0),
        ] {
            let share = share(&from, &to, cpus);
            assert!((share - expected).abs() < 1e-6, "{to:?}: {share}");
        }
    }

    #[test]
    fn nothing_is_known_at_first_nor_of_other_cpus() {
        let online = Topology::read().expect("topology").online;
        let one: CpuSet = online.iter().take(1).collect();
        let mut others = Others::default();
        assert_eq!(others.look(&one, Duration::ZERO), None);
        assert_eq!(
            others.look(&online, Duration::ZERO),
            if one == online { None } else { others.share }
        );
        assert_eq!(others.share, None);
    }
}
