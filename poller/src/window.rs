//! How long a pod's sockets busy-poll: `auto`'s rule (kernel-facts: a window must not fight its neighbours nor eat a quota).

use kbp_kernel::{CpuSet, Micros};

use crate::policy::BusyPoll;

/// What decides a window.
#[derive(Debug, Clone)]
pub struct CpuSituation {
    /// The pod's cpuset; None: every CPU.
    pub cpuset: Option<CpuSet>,
    /// CPUs that are online.
    pub online: CpuSet,
    /// CPUs that other kbp pods have in a cpuset of theirs.
    pub taken: CpuSet,
    /// CPU quota in CPUs (quota / period); None: no quota.
    pub quota: Option<f64>,
}

/// The decision and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// None: no busy polling.
    pub micros: Option<Micros>,
    /// For status and log.
    pub reason: String,
}

/// Decides the window.
pub fn decide(_asked: BusyPoll, _cpus: &CpuSituation) -> Window { todo!() }
