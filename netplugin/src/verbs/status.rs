//! STATUS: could an ADD work? That pods can be polled is a condition only where the config says that they have to.

use kbp_kernel::link::{LinkKind, RouteSocket};
use kbp_kernel::probe;

use crate::cni::config::Config;
use crate::cni::delegate::Ipam;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::options::{Mode, Options};

/// Tries what every ADD needs: a config that can be read, netlink, the IPAM plugin. A plugin that knows STATUS is
/// asked, too.
pub(crate) fn status(call: &Call, config: &Config) -> Result<()> {
    let options = Options::read(&config.json, call)?;
    let unavailable = |error: CniError| CniError {
        code: Code::NOT_AVAILABLE,
        ..error
    };
    // A bridge that does not exist yet is made by the first ADD.
    let link = match &options.mode {
        Mode::Bridge(bridge) => bridge.name.as_str(),
        Mode::Routed | Mode::Tune => "lo",
    };
    let found = RouteSocket::open()
        .and_then(|mut socket| socket.link_by_name(link))
        .map_err(|error| unavailable(error.into()))?;
    if let (Mode::Bridge(_), Some(found)) = (&options.mode, found)
        && found.kind != LinkKind::Other("bridge".to_owned())
    {
        let msg = format!("bridge: {link:?} is another kind of link");
        return Err(CniError::new(Code::NOT_AVAILABLE, msg));
    }
    if let Some(poller) = options.poller.filter(|poller| poller.required) {
        poller.answers().map_err(|error| {
            let msg = format!("{error}; onUnavailable is \"fail\"");
            CniError::new(Code::NOT_AVAILABLE, msg)
        })?;
    }
    if options.required {
        probe::veth_features().map_err(|error| {
            let msg = format!("{error}; the network config has \"required\": true");
            CniError::new(Code::NOT_AVAILABLE, msg)
        })?;
    }
    if !config.wants_ipam() {
        return Ok(());
    }
    let ipam = Ipam::find(config, call).map_err(|error| match error.code {
        Code::CONFIG => error,
        _ => unavailable(error),
    })?;
    ipam.status()
}
