//! One module a verb of the specification.

pub(crate) mod add;
pub(crate) mod check;
pub(crate) mod del;
pub(crate) mod gc;
pub(crate) mod status;

use std::path::Path;

use kbp_kernel::netns::Netns;

use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::wire::Side;

/// The pod's namespace, which must be there and not our own.
pub(crate) fn open_pod<'a>(call: &'a Call, host: &Side) -> Result<(Side, &'a Path)> {
    let path = call.netns.as_deref().unwrap_or(Path::new(""));
    let netns = Netns::open(path).map_err(|error| match error.errno() {
        Some(nix::libc::ENOENT | nix::libc::ESRCH) => CniError::new(
            Code::UNKNOWN_CONTAINER,
            format!(
                "CNI_NETNS {path:?}: the network namespace of container {} does not exist; its runtime has to make it before ADD and to keep it until DEL",
                call.container_id
            ),
        ),
        _ => CniError::new(Code::ENVIRONMENT, format!("CNI_NETNS {path:?}: {error}")),
    })?;
    if netns.is_same(&host.netns)? {
        return Err(CniError::new(
            Code::ENVIRONMENT,
            format!(
                "CNI_NETNS {path:?} is the namespace in which the plugin itself runs; a container on the host's network needs no attachment"
            ),
        ));
    }
    Ok((Side::pod(netns)?, path))
}
