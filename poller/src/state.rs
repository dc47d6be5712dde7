//! `<state_dir>/pods/<id>@<namespace>.json`: what is true now. Written by the owner of the worker (rename, mode 0600), gone with the pod.

mod files;
mod owner;

use kbp_kernel::{CpuId, CpuSet};
use serde::{Deserialize, Serialize};

use crate::policy::{BusyPollMode, Profile, WorkerPolicy};

pub(crate) use files::{
    check_names, create_dir, pods_dir, read_all_beside, read_stale, remove_file, remove_own,
    remove_stale, replace, sweep_unfinished,
};
pub use files::{read_all, remove, stale, taken_cpus, takes_short_way, write};
pub(crate) use owner::lock;
pub use owner::start_time;

/// A part of kbp that can be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The pod's veth owns NAPI instances and packets pass them.
    PollableVeth,
    /// A kernel worker polls.
    Worker,
    /// bind/connect/listen set SO_BUSY_POLL.
    SocketBusyPoll,
    /// epoll instances busy-poll.
    EpollBusyPoll,
    /// CPUs are kept from deep sleep, as asked.
    CpuLatency,
    /// Packets wait for whoever polls, as asked by `prefer-busy-poll` or `busy-poll-mode`.
    PreferBusyPoll,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 6] = [
        Self::PollableVeth,
        Self::Worker,
        Self::SocketBusyPoll,
        Self::EpollBusyPoll,
        Self::CpuLatency,
        Self::PreferBusyPoll,
    ];
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::PollableVeth => "pollable-veth",
            Self::Worker => "worker",
            Self::SocketBusyPoll => "socket-busy-poll",
            Self::EpollBusyPoll => "epoll-busy-poll",
            Self::CpuLatency => "cpu-latency",
            Self::PreferBusyPoll => "prefer-busy-poll",
        })
    }
}

/// A part that is not active, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degraded {
    /// The part.
    pub part: Part,
    /// Why, with the remedy where there is one.
    pub reason: String,
}

/// One polled interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceState {
    /// Name in the pod.
    pub pod_interface: String,
    /// Name on the host.
    pub host_interface: String,
    /// Index on the host.
    pub host_ifindex: u32,
    /// NAPI of the host end (pod → host).
    pub host_napi: Option<u32>,
    /// NAPI of the pod end (host → pod).
    pub pod_napi: Option<u32>,
}

/// The worker of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerState {
    /// `kthread`, `threaded`, `sqpoll` or `socket`.
    pub kind: String,
    /// What the policy came to: `dedicated`, `shared` or `idle`.
    pub policy: WorkerPolicy,
    /// Thread id; 0 for a `kthread` or `threaded`, of which the kernel makes a new one each time it wakes.
    pub tid: u32,
    /// Its CPU.
    pub cpu: u32,
    /// Whether it runs only on idle cycles.
    pub idle_class: bool,
    /// Milliseconds it polls on after the last traffic.
    pub lease_ms: u32,
}

/// What was done to a pod's sockets so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketCounters {
    /// Trapped calls that were answered.
    pub calls_handled: u64,
    /// Sockets that were given a window.
    pub sockets_set: u64,
    /// Epoll instances that were given a window.
    pub epolls_given: u64,
    /// Epoll instances that were left to sleep, since more processes than CPUs would poll.
    #[serde(default)]
    pub epolls_crowded: u64,
    /// Calls that ran on without what they should have been given.
    pub errors: u64,
}

/// What is true of a pod now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodState {
    /// Sandbox id, or container id where there is no sandbox.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// Process that owns the worker.
    pub owner_pid: u32,
    /// When that process started, in clock ticks since boot: tells it from a later one with the same id.
    pub owner_start: u64,
    /// Worker policy as asked.
    pub worker_policy: WorkerPolicy,
    /// Profile as asked.
    pub profile: Profile,
    /// Polled interfaces.
    pub interfaces: Vec<InterfaceState>,
    /// The worker, where there is one.
    pub worker: Option<WorkerState>,
    /// Why there is a worker of this kind, or none.
    pub worker_reason: String,
    /// Busy-poll window of the sockets in µs; None: off.
    pub busy_poll_us: Option<u32>,
    /// Why that window.
    pub busy_poll_reason: String,
    /// `busy-poll-mode` as asked.
    #[serde(default)]
    pub busy_poll_mode: BusyPollMode,
    /// `prefer-busy-poll` as asked.
    #[serde(default)]
    pub prefer_busy_poll: bool,
    /// What was done to the sockets; counted up about once a second.
    #[serde(default)]
    pub sockets: SocketCounters,
    /// The pod's cpuset in the kernel's list format, where it has one.
    pub cpuset: Option<String>,
    /// Why packets for the pod pass by its NAPI, while they do.
    #[serde(default)]
    pub short_way: Option<String>,
    /// Whether what the pod sends passes by the host end's NAPI, since its worker has not been wanted for a while: kbp itself has TSO on in
    /// the pod then.
    #[serde(default)]
    pub rests: bool,
    /// What is not active.
    pub degraded: Vec<Degraded>,
}

impl PodState {
    /// Whether it is this pod's: ids are unique in a containerd namespace only.
    pub fn is(&self, namespace: &str, id: &str) -> bool {
        self.namespace == namespace && self.id == id
    }

    fn owner_lives(&self) -> bool {
        start_time(self.owner_pid) == Some(self.owner_start)
    }
}

/// A state file that describes nothing any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stale {
    /// Its name in the directory of the state files.
    pub file: String,
    /// Why it is stale.
    pub reason: String,
    /// Whether its owner is gone, so that it may be removed; else it cannot be read, or not as a state file of this version.
    pub owner_gone: bool,
}

/// CPUs that `pods` hold.
pub(crate) fn taken_by(pods: &[PodState], online: &CpuSet) -> CpuSet {
    let mut taken = Vec::new();
    for pod in pods {
        let cpuset = pod.cpuset.as_deref().and_then(|c| c.parse::<CpuSet>().ok());
        if let Some(cpuset) = cpuset.filter(|c| !online.is_subset(c)) {
            taken.extend(cpuset.iter());
        }
        if let Some(worker) = &pod.worker
            && worker.policy == WorkerPolicy::Dedicated
        {
            taken.push(CpuId(worker.cpu));
        }
    }
    taken.into_iter().collect()
}
