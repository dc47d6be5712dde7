//! Finds a pod's interface and its host end, from both sides.

use kbp_kernel::IfIndex;
use kbp_kernel::netns::Netns;

use crate::Result;

/// A pod's veth with both ends known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name in the pod.
    pub pod_name: String,
    /// Index in the pod.
    pub pod_index: IfIndex,
    /// Name on the host.
    pub host_name: String,
    /// Index on the host.
    pub host_index: IfIndex,
}

/// What a namespace holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Interfaces that can be polled, and remarks on those that cannot (`eth1 is a netkit: it has no NAPI`).
    Endpoints {
        /// The veths.
        veths: Vec<Endpoint>,
        /// Why others are left alone.
        not_pollable: Vec<String>,
    },
    /// Only a loopback (yet).
    Empty,
    /// It is the host's own namespace: nothing is ever touched there.
    HostNetwork,
}

/// Looks at the pod's namespace, as seen from `host`.
pub fn find(_host: &Netns, _pod: &Netns) -> Result<Found> {
    todo!()
}
