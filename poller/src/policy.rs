//! What a pod asked for: annotations, else the runtime's options, else the config file, else the default.

use std::collections::BTreeMap;

use kbp_kernel::Micros;

use crate::Result;

/// Prefix of every annotation of kbp.
pub const PREFIX: &str = "kbp.io/";

/// `kbp.io/worker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerPolicy {
    /// kbp decides.
    Auto,
    /// A core of its own.
    Dedicated,
    /// A core of the pool, many pods.
    Shared,
    /// SCHED_IDLE: only cycles nobody else wants.
    Idle,
    /// No worker.
    None,
}

/// `kbp.io/busy-poll`: the window of the pod's sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BusyPoll {
    /// kbp decides: [`crate::window`].
    Auto,
    /// That long.
    Window(Micros),
    /// Not at all; written `off`.
    Off,
}

/// `kbp.io/profile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// GRO on, TSO off: every packet passes the NAPI.
    Latency,
    /// TSO on: TCP is not polled.
    Throughput,
}

/// One source of settings; None where it is silent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layer {
    /// `worker`.
    pub worker: Option<WorkerPolicy>,
    /// `busy-poll`.
    pub busy_poll: Option<BusyPoll>,
    /// `profile`.
    pub profile: Option<Profile>,
    /// `required`.
    pub required: Option<bool>,
}

/// What holds for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// See [`WorkerPolicy`]; default `auto`.
    pub worker: WorkerPolicy,
    /// See [`BusyPoll`]; default `auto`.
    pub busy_poll: BusyPoll,
    /// See [`Profile`]; default `latency`.
    pub profile: Profile,
    /// Fail the pod rather than run it degraded; default false.
    pub required: bool,
}

impl Layer {
    /// Reads the `kbp.io/` annotations; others are ignored, an unknown `kbp.io/` key is refused by name.
    pub fn from_annotations(_annotations: &BTreeMap<String, String>) -> Result<Self> { todo!() }
    /// Reads the TOML of CRI's `config_body` (the keys without prefix, in a table `[kbp]`; other tables are not ours).
    pub fn from_runtime_options(_toml: &str) -> Result<Self> { todo!() }
}

impl Policy {
    /// The first layer that speaks wins; the default where none does.
    pub fn resolve(_layers: &[Layer]) -> Self { todo!() }
}
