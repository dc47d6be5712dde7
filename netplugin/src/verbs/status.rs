//! STATUS: could an ADD work?

use kbp_kernel::link::RouteSocket;

use crate::cni::config::Config;
use crate::cni::delegate::Ipam;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::options::Options;

/// Tries what every ADD needs: a config that can be read, netlink, the IPAM plugin. A plugin that knows STATUS is
/// asked, too.
pub(crate) fn status(call: &Call, config: &Config) -> Result<()> {
    Options::read(&config.json, call)?;
    let unavailable = |error: CniError| CniError {
        code: Code::NOT_AVAILABLE,
        ..error
    };
    RouteSocket::open()
        .and_then(|mut socket| socket.link_by_name("lo"))
        .map_err(|error| unavailable(error.into()))?;
    if !config.wants_ipam() {
        return Ok(());
    }
    let ipam = Ipam::find(config, call).map_err(|error| match error.code {
        Code::CONFIG => error,
        _ => unavailable(error),
    })?;
    ipam.status()
}
