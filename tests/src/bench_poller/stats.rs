//! Figures of one measurement.

use serde::Serialize;

/// Latencies of one measurement, in µs.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
    pub(crate) samples: u64,
    /// (quantile, µs), ascending.
    pub(crate) curve: Vec<(f64, f64)>,
}
