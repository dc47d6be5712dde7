//! Tells from the turns of a container's threads whether its window hurts.
//!
//! Two programs on one CPU wait out each other's windows: their threads sleep, wake up, and then wait about a window for the CPU. And a
//! program that polls keeps the CPU from others that want it for moments: it is forced off it each time. A program that computes on the
//! same CPU shows as neither: it runs for milliseconds, so whoever polls beside it is forced off at some ticks only, and the window is
//! worth having there.
//!
//! Reading /proc wakes nobody. It costs some ten microseconds a thread that has run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_kernel::process::{self, Switches, Turns};
use kbp_poller::window::SHORT;

/// Threads of a container that are looked at.
const THREADS: usize = 512;
/// Share of the time that a thread has to run to be looked at.
pub(crate) const BUSY: f64 = 0.01;
/// Sleeps a second from which a thread's waits tell of something.
pub(crate) const SLEEPS: f64 = 200.0;
/// Forced switches a second that no program that computes brings about: even where each tick of the kernel is one (HZ=250).
const FORCED: f64 = 500.0;
/// Share of the time that only threads that wait for each other spend waiting. Wake-ups of halted CPUs count as waiting too.
const WAITED: f64 = 0.3;
/// Waiting for each second of running from which a window costs more than it may save: a pair that only sometimes shares a CPU waits
/// less.
const COST: f64 = 0.25;
/// Share of the time for which a thread wants a CPU from which it is moved to where there is more room.
const STAYS: f64 = 0.5;
/// Longest wait of a wake-up in windows that is still one for a window.
const WINDOWS: u32 = 4;

/// What the threads of a container have done since the look before.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Look {
    /// CPUs that they were on, on average.
    pub cpus: f64,
    /// Turns a second of all of them.
    pub turns: f64,
    /// Of which ended since there was nothing to do.
    pub slept: f64,
    /// Why the window hurts, for a person.
    pub harm: Option<String>,
    /// What those of them have done that have run or slept worth mentioning, by process and thread.
    pub steps: BTreeMap<(u32, u32), Step>,
}

impl Look {
    /// The processes of which several threads have run or slept worth mentioning.
    pub fn several(&self) -> BTreeSet<u32> {
        let pids: Vec<u32> = self.steps.keys().map(|(pid, _)| *pid).collect();
        let pairs = pids.windows(2).filter(|pair| pair[0] == pair[1]);
        pairs.map(|pair| pair[0]).collect()
    }
}

/// What a container's threads had done at the last look.
#[derive(Debug)]
pub struct Watch {
    threads: BTreeMap<(u32, u32), (Turns, Switches)>,
    at: Instant,
}

impl Watch {
    /// Looks for the first time.
    pub fn new(processes: &[u32]) -> Self {
        let mut watch = Self {
            threads: BTreeMap::new(),
            at: Instant::now(),
        };
        watch.look(processes, None, |_| true);
        watch
    }

    /// Looks again, at threads whose sockets have this window.
    ///
    /// `polls`: whether a process has it, too. One that has none waits for no other reason than on any node.
    pub fn look(
        &mut self,
        processes: &[u32],
        window: Option<Micros>,
        polls: impl Fn(u32) -> bool,
    ) -> Look {
        let seconds = self.at.elapsed().as_secs_f64();
        self.at = Instant::now();
        let mut threads = BTreeMap::new();
        let (mut steps, mut notable) = (Vec::new(), BTreeMap::new());
        for (pid, tid) in threads_of(processes) {
            let Ok(turns) = process::turns(pid, tid) else {
                continue;
            };
            let before = self.threads.get(&(pid, tid));
            // Those that have not run have not switched.
            let switches = match before {
                Some((old, switches)) if old.ran == turns.ran => Ok(*switches),
                _ => process::switches(pid, tid),
            };
            let Ok(switches) = switches else {
                continue;
            };
            threads.insert((pid, tid), (turns, switches));
            if let Some((old_turns, old_switches)) = before {
                let step = Step::between((old_turns, old_switches), (&turns, &switches), seconds);
                let judged = step.ran >= BUSY && window.is_some() && polls(pid);
                if step.ran >= BUSY || step.slept >= SLEEPS / 4.0 {
                    notable.insert((pid, tid), step);
                }
                // A thread that cannot be asked is gone.
                let cpus = judged.then(|| process::affinity_count(tid).ok()).flatten();
                steps.push((step, cpus));
            }
        }
        self.threads = threads;
        Look {
            cpus: steps.iter().map(|(s, _)| s.ran).sum(),
            turns: steps.iter().map(|(s, _)| s.turns).sum(),
            slept: steps.iter().map(|(s, _)| s.slept).sum(),
            harm: window.and_then(|window| harm(&steps, window)),
            steps: notable,
        }
    }
}

fn threads_of(processes: &[u32]) -> impl Iterator<Item = (u32, u32)> {
    let tasks = |pid: &u32| {
        let pid = *pid;
        let entries = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten();
        entries
            .flatten()
            .filter_map(move |entry| Some((pid, entry.file_name().to_str()?.parse().ok()?)))
    };
    processes.iter().flat_map(tasks).take(THREADS)
}

/// What one thread has done, a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Step {
    /// Seconds on a CPU.
    pub ran: f64,
    /// Seconds of waiting for one.
    pub waited: f64,
    /// Turns on CPUs.
    pub turns: f64,
    /// Sleeps.
    pub slept: f64,
    /// Switches to other threads that it did not ask for.
    pub forced: f64,
}

impl Step {
    fn between(from: (&Turns, &Switches), to: (&Turns, &Switches), seconds: f64) -> Self {
        let seconds = seconds.max(1e-3);
        let span = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() / seconds;
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / seconds;
        Self {
            ran: span(from.0.ran, to.0.ran),
            waited: span(from.0.waited, to.0.waited),
            turns: rate(from.0.count, to.0.count),
            slept: rate(from.1.voluntary, to.1.voluntary),
            forced: rate(from.1.forced, to.1.forced),
        }
    }

    /// Whether it waits for windows of others: those on CPUs of their own only where it does little else. `others`: time that others
    /// may have been on its CPUs.
    fn waits_for_windows(&self, window: Micros, others: f64) -> bool {
        let window_seconds = f64::from(window.0) * 1e-6;
        let wait = self.waited / self.turns.max(1.0);
        let fits = wait >= window_seconds / 2.0 && wait <= window_seconds * f64::from(WINDOWS);
        let waited = self.waited.min(others);
        let costs = waited >= COST * self.ran;
        self.slept >= SLEEPS && fits && costs && (window <= SHORT || waited >= WAITED)
    }
}

/// Judges the steps of threads that have a window, by the CPUs that each may use; None: it has none.
fn harm(steps: &[(Step, Option<usize>)], window: Micros) -> Option<String> {
    let all: f64 = steps.iter().map(|(s, _)| s.ran).sum();
    let turns: f64 = steps.iter().map(|(s, _)| s.turns).sum();
    // The kernel moves a thread that always wants a CPU to another one in time, and leaves one that sleeps.
    let stays = |s: &Step, cpus: usize| cpus == 1 || s.ran + s.waited < STAYS;
    for (step, cpus) in steps {
        let Some(cpus) = cpus.filter(|cpus| step.ran >= BUSY && stays(step, *cpus)) else {
            continue;
        };
        // A thread of a container that has its CPUs nearly for itself waits for its siblings, as Go's do: they gain by the window together.
        let others = (cpus as f64 - all).max(0.0);
        if step.waits_for_windows(window, others) {
            return Some(format!(
                "a thread waits {:.0} % of its time for a CPU on which others poll",
                100.0 * step.waited
            ));
        }
        // Where the container's own threads may be who it had to make room for, nobody else is harmed. Each of their turns is one time
        // at most: memcached has a thread that wakes up every millisecond.
        let own = all - step.ran;
        let forced = step.forced - (turns - step.turns);
        if forced >= FORCED && own < step.waited / 2.0 {
            return Some(format!("others want its CPU {forced:.0} times a second"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(steps: &[Step], window: Micros, cpus: usize) -> Option<String> {
        let steps: Vec<_> = steps.iter().map(|s| (*s, Some(cpus))).collect();
        harm(&steps, window)
    }

    #[test]
    fn one_that_has_no_window_is_not_told() {
        let pair = step(0.3, 0.5, 18_000.0, 0.0);
        assert_eq!(harm(&[(pair, None)], SHORT), None);
        assert!(harm(&[(pair, None), (pair, Some(1))], SHORT).is_some());
    }

    const LONG: Micros = kbp_poller::window::LONG;

    fn step(ran: f64, waited: f64, slept: f64, forced: f64) -> Step {
        Step {
            ran,
            waited,
            turns: slept + forced,
            slept,
            forced,
        }
    }

    #[test]
    fn programs_that_wait_for_each_others_windows_are_told() {
        // A pair without pauses on one CPU, and one with a request every millisecond: the figures that such pairs have.
        let pair = step(0.5, 0.5, 18_000.0, 0.0);
        let paced = step(0.03, 0.022, 1_000.0, 0.0);
        for (step, window) in [
            (pair, SHORT),
            (paced, SHORT),
            (step(0.5, 0.45, 4_000.0, 0.0), LONG),
        ] {
            assert!(
                judged(&[step], window, 1).is_some_and(|h| h.contains("waits")),
                "{step:?}"
            );
        }
    }

    #[test]
    fn on_several_cpus_only_those_that_stay_together_are_told() {
        let pair = step(0.5, 0.5, 18_000.0, 0.0);
        let preempted = step(0.5, 0.5, 0.0, 18_000.0);
        for step in [pair, preempted] {
            assert_eq!(judged(&[step], SHORT, 2), None, "it is moved apart");
        }
        let paced = step(0.03, 0.022, 1_000.0, 0.0);
        assert!(judged(&[paced], SHORT, 2).is_some());
    }

    #[test]
    fn one_that_others_keep_forcing_off_is_told_unless_they_are_its_own() {
        let poller = step(0.9, 0.08, 0.0, 4_000.0);
        assert!(judged(&[poller], LONG, 1).is_some_and(|h| h.contains("4000 times")));
        let sibling = step(0.07, 0.0, 4_000.0, 0.0);
        assert_eq!(judged(&[poller, sibling], LONG, 1), None);
        // memcached's worker and the thread that looks after its memory.
        let (worker, upkeep) = (
            step(0.95, 0.04, 0.0, 1_030.0),
            step(0.01, 0.01, 1_000.0, 0.0),
        );
        assert_eq!(judged(&[worker, upkeep], LONG, 1), None);
        let beside = step(0.95, 0.04, 0.0, 2_000.0);
        assert!(judged(&[beside, upkeep], LONG, 1).is_some_and(|h| h.contains("1000 times")));
    }

    #[test]
    fn threads_that_wait_for_their_siblings_only_are_left_alone() {
        // Go's, on one CPU that nobody else wants.
        let (polls, waits) = (
            step(0.72, 0.2, 3_000.0, 2_000.0),
            step(0.25, 0.75, 3_500.0, 100.0),
        );
        assert_eq!(judged(&[polls, waits], LONG, 1), None);
        // The same, where another pod has half of that CPU.
        let half = [
            step(0.4, 0.5, 3_000.0, 0.0),
            step(0.1, 0.75, 3_500.0, 100.0),
        ];
        assert!(judged(&half, LONG, 1).is_some_and(|h| h.contains("waits")));
    }

    #[test]
    fn who_gains_by_its_window_is_left_alone() {
        for (what, step) in [
            ("alone, without pauses", step(0.99, 0.0, 0.0, 20.0)),
            (
                "beside a program that computes",
                step(0.5, 0.5, 100.0, 250.0),
            ),
            (
                "a request every ms, woken on a halted CPU",
                step(0.1, 0.05, 1_000.0, 0.0),
            ),
            (
                "without pauses, on one CPU with the other now and then",
                step(0.97, 0.025, 1_000.0, 20.0),
            ),
            ("idle", step(0.0, 0.0, 1.0, 0.0)),
        ] {
            assert_eq!(judged(&[step], LONG, 1), None, "{what}");
        }
        for step in [
            step(0.5, 0.5, 100.0, 250.0),
            step(0.97, 0.025, 1_000.0, 20.0),
        ] {
            assert_eq!(judged(&[step], SHORT, 1), None, "{step:?}");
        }
    }

    #[test]
    fn processes_with_several_threads_that_do_something_are_told() {
        let threads = [(7, 7), (8, 8), (8, 9), (8, 10), (9, 11)];
        let steps = threads.map(|thread| (thread, Step::default()));
        let look = Look {
            steps: steps.into_iter().collect(),
            ..Look::default()
        };
        assert_eq!(look.several(), BTreeSet::from([8]));
        assert_eq!(Look::default().several(), BTreeSet::new());
    }

    #[test]
    fn a_process_that_runs_is_seen_running() {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let busy = std::thread::spawn(move || {
            while told.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
                std::hint::spin_loop();
            }
        });
        let own = [std::process::id()];
        let mut watch = Watch::new(&own);
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let look = watch.look(&own, Some(SHORT), |_| true);
            if look.cpus > 0.0 {
                break;
            }
            assert!(Instant::now() < until, "{look:?}");
            std::thread::yield_now();
        }
        drop(tell);
        busy.join().expect("thread");
        let look = Watch::new(&[]).look(&[], Some(SHORT), |_| true);
        assert_eq!((look.cpus, look.turns, look.harm), (0.0, 0.0, None));
    }
}
