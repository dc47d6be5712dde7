//! Probes of links and their NAPI instances.

use crate::Result;

/// A veth end in a throw-away namespace gets a NAPI instance once GRO is on.
pub fn veth_napi() -> Result<()> {
    todo!()
}

/// The netdev family answers `napi-get`.
pub fn netdev_family() -> Result<()> {
    todo!()
}

/// `napi-set threaded=busy-poll` works on a throw-away veth.
pub fn threaded_busy_poll() -> Result<()> {
    todo!()
}
