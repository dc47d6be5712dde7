//! Moves pods away from a hot core.
//!
//! The rule, once a second: when the shared worker with the most packets a second has more than `hot` of them, the pod is moved
//! to the core with the least load whose move leaves the busier of the two cores with the least to do, provided that this
//! is at least a fifth less than before. One pod a second, so that a burst does not stir everything up; a core with one pod is
//! left alone, since a move would only carry the heat along.

use std::collections::BTreeMap;
use std::time::Instant;

use kbp_kernel::CpuId;

use super::workers::WorkerKey;
use super::{Kept, Pod, PodKey};

/// A pod on a shared worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    pod: PodKey,
    cpu: CpuId,
    /// Packets a second.
    rate: u64,
}

/// Which pod goes where.
fn choose(pods: &[Load], cores: &[CpuId], hot: u64) -> Option<(PodKey, CpuId)> {
    let mut loads: BTreeMap<CpuId, u64> = cores.iter().map(|c| (*c, 0)).collect();
    for pod in pods {
        *loads.entry(pod.cpu).or_default() += pod.rate;
    }
    let (&hottest, &most) = loads.iter().max_by_key(|(_, load)| **load)?;
    let (&coolest, &least) = loads.iter().min_by_key(|(_, load)| **load)?;
    let candidates: Vec<&Load> = pods.iter().filter(|p| p.cpu == hottest).collect();
    if most <= hot || hottest == coolest || candidates.len() < 2 {
        return None;
    }
    let peak = |pod: &Load| (most - pod.rate).max(least + pod.rate);
    let best = candidates.into_iter().min_by_key(|pod| peak(pod))?;
    (peak(best) <= most / 5 * 4).then_some((best.pod, coolest))
}

impl Kept {
    /// Moves at most one pod; how many it were.
    pub(super) fn rebalance(&mut self) -> u64 {
        let load_of = |(key, pod): (&PodKey, &Pod)| {
            Some(Load {
                pod: *key,
                cpu: pod.worker?.shared_cpu()?,
                rate: pod.rate,
            })
        };
        let pods: Vec<Load> = self.pods.iter().filter_map(load_of).collect();
        let Some(config) = pods
            .first()
            .and_then(|p| self.pods.get(&p.pod))
            .map(|p| &p.placing.config)
        else {
            return 0;
        };
        let cores: Vec<CpuId> = config.cpus.iter().collect();
        let Some((key, to)) = choose(&pods, &cores, config.hot) else {
            return 0;
        };
        let loads = self.loads();
        self.book_all(Instant::now());
        let Some(pod) = self.pods.get_mut(&key) else {
            return 0;
        };
        match self.workers.move_to(pod, to, &loads) {
            Ok(()) => 1,
            Err(reason) => {
                tracing::debug!("a pod stays on its hot core: {reason}");
                0
            }
        }
    }

    /// Packets a second on each CPU with a shared worker.
    pub(crate) fn loads(&self) -> BTreeMap<CpuId, u64> {
        let mut loads = BTreeMap::new();
        for pod in self.pods.values() {
            if let Some(cpu) = pod.worker.and_then(WorkerKey::shared_cpu) {
                *loads.entry(cpu).or_default() += pod.rate;
            }
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pods by their core and rate, numbered from 0.
    fn chosen(pods: &[(u32, u64)], cores: &[u32]) -> Option<(u64, u32)> {
        let pods: Vec<Load> = (0..)
            .zip(pods)
            .map(|(pod, (cpu, rate))| Load {
                pod: PodKey(pod),
                cpu: CpuId(*cpu),
                rate: *rate,
            })
            .collect();
        let cores: Vec<CpuId> = cores.iter().map(|c| CpuId(*c)).collect();
        choose(&pods, &cores, 100).map(|(pod, cpu)| (pod.0, cpu.0))
    }

    #[test]
    fn a_hot_core_gives_the_pod_away_that_evens_out_best() {
        for (pods, cores, expected) in [
            // Two equal ones on one core, the other core empty and without a worker as yet.
            (vec![(0, 100), (0, 100)], vec![0, 1], Some((0, 1))),
            // The one in the middle leaves 90 and 80; the others leave 150 or 120 on one core.
            (vec![(0, 20), (0, 80), (0, 70)], vec![0, 1], Some((1, 1))),
            // To the coolest of three.
            (
                vec![(0, 90), (0, 60), (1, 40), (2, 30)],
                vec![0, 1, 2],
                Some((1, 2)),
            ),
        ] {
            assert_eq!(chosen(&pods, &cores), expected, "{pods:?}");
        }
    }

    #[test]
    fn nothing_is_moved_that_would_gain_nothing() {
        for (pods, cores) in [
            // Not hot.
            (vec![(0, 50), (0, 50)], vec![0, 1]),
            // Alone: the heat would move along.
            (vec![(0, 900)], vec![0, 1]),
            // One pod makes the heat: wherever it goes is as hot.
            (vec![(0, 900), (0, 1)], vec![0, 1]),
            // Everywhere the same.
            (vec![(0, 90), (0, 90), (1, 90), (1, 90)], vec![0, 1]),
            // One core.
            (vec![(0, 900), (0, 900)], vec![0]),
            (vec![], vec![]),
        ] {
            assert_eq!(chosen(&pods, &cores), None, "{pods:?}");
        }
    }

    #[test]
    fn moving_comes_to_rest() {
        let mut pods = [(0, 200), (0, 150), (0, 140), (0, 10), (1, 5)];
        let mut moves = 0;
        while let Some((pod, cpu)) = chosen(&pods, &[0, 1]) {
            pods[usize::try_from(pod).expect("small")].0 = cpu;
            moves += 1;
            assert!(moves < 10, "{pods:?}");
        }
        assert!(moves > 0);
    }
}
