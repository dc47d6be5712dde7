//! What is left to do after a shim that was killed.

use std::path::Path;

use kbp_poller::config::{Config, DEFAULT_STATE_DIR};
use kbp_poller::{attach, state};

use crate::sockets;
use crate::spec;

/// Removes what a pod of this id may have left behind when its shim was killed: state file, notifier socket, node-wide setting, claim file, a
/// half-written `config.json`. Worker and listeners went with the process. Idempotent and never fails; what cannot be removed is
/// logged.
pub fn cleanup(namespace: &str, id: &str, bundle: &Path) {
    let config = Config::load();
    let state_dir = config
        .as_ref()
        .map_or(Path::new(DEFAULT_STATE_DIR), |c| &c.state_dir);
    cleanup_in(state_dir, namespace, id, bundle);
}

pub(super) fn cleanup_in(state_dir: &Path, namespace: &str, id: &str, bundle: &Path) {
    if let Err(error) = sockets::remove(state_dir, namespace, id) {
        tracing::warn!("{error}");
    }
    let sysctl = Path::new(sockets::node_wide::SYSCTL);
    if let Err(error) = sockets::node_wide::restore(state_dir, sysctl) {
        tracing::warn!("{error}");
    }
    // Before the state file goes, which says what else there is. The kernel has released the claims of a killed shim; their files are
    // still there.
    if let Err(error) = attach::clear_leftovers(state_dir) {
        tracing::warn!("{error}");
    }
    if let Err(error) = state::remove(state_dir, namespace, id) {
        tracing::warn!("{error}");
    }
    if let Err(error) = spec::bundle::remove_temporary(bundle) {
        tracing::warn!("{error}");
    }
}
