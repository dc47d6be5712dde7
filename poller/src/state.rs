//! `<state_dir>/pods/<id>.json`: what is true now. Written by the owner of the worker (rename, mode 0600), gone with the pod.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::policy::{Profile, WorkerPolicy};
use crate::Result;

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
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PollableVeth => "pollable-veth",
            Self::Worker => "worker",
            Self::SocketBusyPoll => "socket-busy-poll",
            Self::EpollBusyPoll => "epoll-busy-poll",
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
    /// `sqpoll`.
    pub kind: String,
    /// Thread id of the kernel thread.
    pub tid: u32,
    /// Its CPU.
    pub cpu: u32,
    /// Whether it runs only on idle cycles.
    pub idle_class: bool,
    /// Milliseconds it polls on after the last traffic.
    pub lease_ms: u32,
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
    /// The pod's cpuset in the kernel's list format, where it has one.
    pub cpuset: Option<String>,
    /// What is not active.
    pub degraded: Vec<Degraded>,
}

/// Every pod's state below `state_dir`, by id. A file whose owner is gone is left out (and reported by [`stale`]).
pub fn read_all(_state_dir: &Path) -> Result<Vec<PodState>> { todo!() }
/// Ids of state files whose owner is gone.
pub fn stale(_state_dir: &Path) -> Result<Vec<String>> { todo!() }
/// Writes or replaces one pod's file.
pub fn write(_state_dir: &Path, _state: &PodState) -> Result<()> { todo!() }
/// Removes one pod's file; fine when it is not there.
pub fn remove(_state_dir: &Path, _id: &str) -> Result<()> { todo!() }
