//! Attach and detach of a pod.

use kbp_kernel::CpuSet;
use kbp_kernel::netns::Netns;

use crate::Result;
use crate::config::Config;
use crate::policy::Policy;
use crate::state::{Degraded, PodState};
use crate::window::Window;

/// What to attach.
#[derive(Debug)]
pub struct AttachRequest {
    /// Sandbox or container id.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// The pod's network namespace.
    pub netns: Netns,
    /// The pod's policy.
    pub policy: Policy,
    /// The pod's cpuset.
    pub cpuset: Option<CpuSet>,
    /// Window of the sockets, decided before (it goes into the state).
    pub window: Window,
    /// What the caller already knows to be missing (socket parts).
    pub degraded: Vec<Degraded>,
    /// The node's settings: CPU pool, state directory, features that are switched off.
    pub config: Config,
}

/// An attached pod. Dropping it detaches: worker, claim and state file go, the veth's features stay (they vanish with it).
#[derive(Debug)]
pub struct Attachment {}

/// What became of an attach.
#[derive(Debug)]
pub enum Outcome {
    /// Attached, perhaps with degraded parts: see [`Attachment::state`].
    Attached(Attachment),
    /// The namespace has only a loopback (yet): try again before the first process starts.
    NoInterface,
    /// Host network: nothing is touched.
    HostNetwork,
}

/// Finds the pod's veths, makes them pollable, starts the worker, writes the state file. Undoes its own work on error.
/// Fails only for `required` policies and for a state directory that cannot be written; everything else degrades.
pub fn attach(_request: AttachRequest) -> Result<Outcome> {
    todo!()
}

impl Attachment {
    /// What is true now.
    pub fn state(&self) -> PodState {
        todo!()
    }
    /// Adds a degraded part that was found out later (a seccomp listener that could not be installed) and rewrites the state file.
    pub fn degrade(&self, _degraded: Degraded) {
        todo!()
    }
    /// Detaches; the same as dropping it, but tells errors.
    pub fn detach(self) -> Result<()> {
        todo!()
    }
}
