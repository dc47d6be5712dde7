//! How large a packet may be that leaves the node.

use std::net::IpAddr;

use kbp_kernel::link::{Route, RouteSocket};
use kbp_kernel::{Mtu, Result};

use crate::wire::DEVICE_MTU;

/// What a node without a default route is taken to have: Ethernet's.
const DEFAULT_MTU: Mtu = Mtu(1500);

/// MTU towards the world for each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UplinkMtu {
    /// For IPv4.
    pub(crate) v4: Mtu,
    /// For IPv6.
    pub(crate) v6: Mtu,
}

impl UplinkMtu {
    /// The MTU of the links that the node's default routes use; a family without one takes the other's.
    pub(crate) fn find(host: &mut RouteSocket) -> Result<Self> {
        let routes = host.routes()?;
        let v4 = default_mtu(host, &routes, false)?;
        let v6 = default_mtu(host, &routes, true)?;
        Ok(Self {
            v4: v4.or(v6).unwrap_or(DEFAULT_MTU),
            v6: v6.or(v4).unwrap_or(DEFAULT_MTU),
        })
    }
}

fn default_mtu(host: &mut RouteSocket, routes: &[Route], v6: bool) -> Result<Option<Mtu>> {
    let defaults = routes.iter().filter(|route| {
        route.destination.prefix_len() == 0
            && matches!(route.destination.addr(), IpAddr::V6(_)) == v6
    });
    let Some(route) = defaults.min_by_key(|route| route.priority.unwrap_or_default()) else {
        return Ok(None);
    };
    let device = host.link_by_index(route.device)?.map(|link| link.mtu);
    // The route itself may be narrower than its device.
    Ok(route
        .mtu
        .into_iter()
        .chain(device)
        .min()
        .map(|mtu| mtu.min(DEVICE_MTU)))
}
