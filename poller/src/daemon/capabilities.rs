//! What the daemon may do, of all that root may.

use caps::{CapSet, Capability, CapsHashSet};

use super::{DaemonError, Result};

/// The capabilities that stay.
///
/// * `CAP_NET_ADMIN`: offloads, qdiscs and NAPI settings of links.
/// * `CAP_SYS_ADMIN`: entering the network namespaces of pods.
/// * `CAP_SYS_PTRACE`: opening `/proc/PID/ns/net` and `/proc/PID/fd/N` of processes with more capabilities than are left here.
/// * `CAP_SYS_NICE`: class and CPU of kernel threads.
pub const NEEDED: [&str; 4] = [
    "CAP_NET_ADMIN",
    "CAP_SYS_ADMIN",
    "CAP_SYS_PTRACE",
    "CAP_SYS_NICE",
];

/// Drops all the others for good, for this thread and those that it starts.
pub(super) fn drop_others() -> Result<()> {
    let failed = |e: caps::errors::CapsError| {
        DaemonError::io("drop capabilities", std::io::Error::other(e.to_string()))
    };
    let needed: CapsHashSet = NEEDED
        .iter()
        .map(|name| name.parse::<Capability>().map_err(failed))
        .collect::<Result<_>>()?;
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let missing: Vec<String> = needed
        .difference(&permitted)
        .map(ToString::to_string)
        .collect();
    if !missing.is_empty() {
        // It may do without one on this kernel; what fails for it says so then.
        tracing::warn!("the capabilities {} are not there", missing.join(", "));
    }
    // The bounding set takes CAP_SETPCAP, so it goes first; without that capability nothing can be added anyway.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported().difference(&needed) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(failed)?;
        }
    }
    let kept: CapsHashSet = needed.intersection(&permitted).copied().collect();
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)
}
