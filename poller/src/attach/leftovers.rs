//! What killed owners left.

use std::path::Path;

use kbp_kernel::link::RouteSocket;
use kbp_kernel::napi::Threaded;
use kbp_kernel::netns::Netns;
use kbp_kernel::{IfIndex, napi_thread};

use crate::state::{self, PodState};
use crate::{Result, claim, tune};

/// Removes what killed owners left in the state directory: their state files and claim files.
///
/// # Errors
/// When the directory cannot be read or changed.
pub fn clear_leftovers(state_dir: &Path) -> Result<()> {
    // The lock would make it.
    if !state_dir.is_dir() {
        return Ok(());
    }
    let _lock = state::lock(state_dir);
    for stale in state::stale(state_dir)?
        .into_iter()
        .filter(|s| s.owner_gone)
    {
        tracing::info!(
            file = stale.file,
            reason = stale.reason,
            "removing a state file"
        );
        if let Some(state) = state::read_stale(state_dir, &stale) {
            end_kthreads(&state);
            end_short_way(&state);
        }
        state::remove_stale(state_dir, &stale)?;
    }
    state::sweep_unfinished(state_dir)?;
    claim::sweep(state_dir)
}

/// Unlike other workers, a NAPI's own thread does not end with its owner.
fn end_kthreads(state: &PodState) {
    let mode = match state.worker.as_ref().map(|w| w.kind.as_str()) {
        Some("kthread") => Threaded::BusyPoll,
        Some("threaded") => Threaded::Enabled,
        _ => return,
    };
    for interface in &state.interfaces {
        let ended = Netns::current().and_then(|host| {
            let link = RouteSocket::open_in(&host)?.link_by_name(&interface.host_interface)?;
            // Its number may be another link's by now.
            match link.filter(|l| l.index == IfIndex(interface.host_ifindex)) {
                Some(link) => napi_thread::stop(&host, link.index, mode),
                None => Ok(0),
            }
        });
        if let Err(error) = ended {
            tracing::warn!(%error, "a NAPI may keep its thread");
        }
    }
}

/// The host end goes on passing by the NAPI after its owner.
fn end_short_way(state: &PodState) {
    if state.short_way.is_none() {
        return;
    }
    for interface in &state.interfaces {
        let ended = Netns::current().and_then(|host| {
            let link = RouteSocket::open_in(&host)?.link_by_name(&interface.host_interface)?;
            // Its number may be another link's by now.
            match link.filter(|l| l.index == IfIndex(interface.host_ifindex)) {
                Some(link) => tune::leave_short_way(&host, &link.name),
                None => Ok(()),
            }
        });
        if let Err(error) = ended {
            tracing::warn!(%error, "packets of a pod may still pass by its NAPI");
        }
    }
}
