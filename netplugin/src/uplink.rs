//! How large a packet may be that leaves the node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kbp_kernel::link::{Route, RouteSocket};
use kbp_kernel::{Mtu, Result};

use crate::wire::DEVICE_MTU;

/// What a node without a default route is taken to have: Ethernet's.
const DEFAULT_MTU: Mtu = Mtu(1500);

/// Addresses for documentation (RFC 5737, RFC 3849): nobody's, so a node reaches them by its default route if at all.
const ANYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1)),
];

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
        let [v4, v6] = ANYWHERE;
        let v4 = default_mtu(host, v4)?;
        let v6 = default_mtu(host, v6)?;
        Ok(Self {
            v4: v4.or(v6).unwrap_or(DEFAULT_MTU),
            v6: v6.or(v4).unwrap_or(DEFAULT_MTU),
        })
    }
}

fn default_mtu(host: &mut RouteSocket, anywhere: IpAddr) -> Result<Option<Mtu>> {
    let Some(route) = default_route(host, anywhere)? else {
        return Ok(None);
    };
    let device = host.mtu_of(route.device)?;
    // The route itself may be narrower than its device.
    Ok(route
        .mtu
        .into_iter()
        .chain(device)
        .min()
        .map(|mtu| mtu.min(DEVICE_MTU)))
}

/// The default route of the family of `anywhere`. One lookup finds it; only where the node has a route of its own to
/// that address are all of them read, of which every pod has one.
fn default_route(host: &mut RouteSocket, anywhere: IpAddr) -> Result<Option<Route>> {
    match host.route_to(anywhere) {
        Ok(Some(route)) if route.destination.prefix_len() == 0 => return Ok(Some(route)),
        Ok(None) => return Ok(None),
        Ok(Some(_)) | Err(_) => {}
    }
    let routes = host.routes()?.into_iter();
    let defaults = routes.filter(|route| {
        route.destination.prefix_len() == 0
            && route.destination.addr().is_ipv6() == anywhere.is_ipv6()
    });
    Ok(defaults.min_by_key(|route| route.priority.unwrap_or_default()))
}
