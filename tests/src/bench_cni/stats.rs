//! Durations and their quantiles.

use std::time::Duration;

use serde::Serialize;

/// Quantiles of some durations, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) p50_ms: f64,
    pub(crate) p90_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    pub(crate) samples: usize,
}

impl Summary {
    /// None of no durations. A quantile is the least duration that as many as it says do not exceed.
    pub(crate) fn of(durations: &[Duration]) -> Option<Self> {
        let mut sorted = durations.to_vec();
        sorted.sort();
        let at = |quantile: f64| {
            let rank = (quantile * sorted.len() as f64).ceil() as usize;
            let duration = sorted.get(rank.max(1) - 1)?;
            Some((duration.as_secs_f64() * 1e6).round() / 1e3)
        };
        Some(Self {
            p50_ms: at(0.5)?,
            p90_ms: at(0.9)?,
            p99_ms: at(0.99)?,
            max_ms: at(1.0)?,
            samples: sorted.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_durations_that_were_measured() {
        let durations: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        let summary = Summary::of(&durations).expect("durations");
        assert_eq!(
            (
                summary.p50_ms,
                summary.p90_ms,
                summary.p99_ms,
                summary.max_ms
            ),
            (50.0, 90.0, 99.0, 100.0)
        );
        let one = Summary::of(&durations[..1]).expect("a duration");
        assert_eq!((one.p50_ms, one.max_ms, one.samples), (100.0, 100.0, 1));
        assert_eq!(Summary::of(&[]), None);
    }
}
