//! From a lease to what the pod and the bridge shall have. Nothing here touches the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kbp_kernel::Mtu;
use serde_json::json;

use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam::{Lease, LeasedIp, RouteConfig};
use crate::routed::plan::{MIN_MTU_V6, is_main, is_v6, ranges, unique};
use crate::uplink::UplinkMtu;

/// What one attachment consists of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    /// The pod's addresses, each with its gateway, where there is one.
    pub(crate) ips: Vec<LeasedIp>,
    /// The bridge's addresses, with the prefix lengths of the pod's; none unless it is the gateway.
    pub(crate) gateways: Vec<IpNet>,
    /// The pod's routes beside those to the ranges of its addresses.
    pub(crate) routes: Vec<RouteConfig>,
    /// The node's own pod ranges, towards which nothing is masqueraded.
    pub(crate) ranges: Vec<IpNet>,
}

impl Plan {
    /// The pod's addresses without prefix lengths.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        self.ips.iter().map(|ip| ip.address.addr()).collect()
    }

    /// Whether any address is of that family.
    pub(crate) fn has(&self, v6: bool) -> bool {
        self.ips.iter().any(|ip| is_v6(ip.address) == v6)
    }
}

/// What the bridge is to the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Role {
    /// It has the gateways' addresses.
    pub(crate) gateway: bool,
    /// And is the pods' way to everywhere.
    pub(crate) default_gateway: bool,
}

/// Works out an attachment. `configured` are the ranges of the IPAM section, `mtu` is that of the ports.
pub(crate) fn plan(
    lease: &Lease,
    configured: &[IpNet],
    role: Role,
    mtu: Mtu,
    uplink: UplinkMtu,
) -> Result<Plan> {
    let ips = plan_ips(&lease.ips, role)?;
    if mtu < MIN_MTU_V6
        && let Some(v6) = ips.iter().find(|ip| is_v6(ip.address))
    {
        let address = v6.address.addr();
        let allowed = format!("at least {MIN_MTU_V6} with an IPv6 address ({address})");
        return Err(CniError::config("mtu", &json!(mtu.0), &allowed));
    }
    let ranges = ranges(ips.iter().map(|ip| ip.address), configured);
    let gateway = |dst: IpNet| {
        let mut family = ips.iter().filter(|ip| is_v6(ip.address) == is_v6(dst));
        family.find_map(|ip| ip.gateway)
    };
    // Only what the bridge forwards can be larger than the way out: elsewhere the other router is asked.
    let leaves = |dst: IpNet| {
        let out = if is_v6(dst) { uplink.v6 } else { uplink.v4 };
        let inside = ranges.iter().any(|range| range.contains(&dst));
        (role.gateway && !inside && out < mtu).then_some(out.0)
    };
    let mut routes: Vec<RouteConfig> = Vec::new();
    for route in &lease.routes {
        // Without a gateway of its family there is nowhere to send it.
        let Some(gw) = route.gw.or_else(|| gateway(route.dst)) else {
            continue;
        };
        let route = RouteConfig {
            gw: Some(gw),
            mtu: route.mtu.or_else(|| leaves(route.dst)),
            ..route.clone()
        };
        // The kernel makes the routes to the pod's own ranges.
        let own = ips.iter().any(|ip| ip.address.trunc() == route.dst);
        if !routes.contains(&route) && !own {
            routes.push(route);
        }
    }
    if role.default_gateway {
        for everything in [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())] {
            let mut named = routes.iter().filter(|route| route.dst == everything);
            if !named.any(is_main)
                && let Some(gw) = gateway(everything)
            {
                routes.push(RouteConfig {
                    mtu: leaves(everything),
                    ..RouteConfig::new(everything, Some(gw))
                });
            }
        }
    }
    let gateways = ips.iter().filter(|_| role.gateway).filter_map(|ip| {
        // The prefix length is that of an address that exists.
        IpNet::new(ip.gateway?, ip.address.prefix_len()).ok()
    });
    Ok(Plan {
        gateways: unique(gateways),
        routes,
        ranges,
        ips,
    })
}

/// Addresses with their gateways: IPAM's, or the range's first address when the bridge is the gateway.
fn plan_ips(ips: &[LeasedIp], role: Role) -> Result<Vec<LeasedIp>> {
    ips.iter()
        .map(|ip| {
            let first = || role.gateway.then(|| first_address(ip.address));
            let planned = LeasedIp {
                address: ip.address,
                gateway: ip.gateway.or_else(first),
            };
            let Some(gateway) = planned.gateway else {
                return Ok(planned);
            };
            let refuse = |why: &str| {
                let address = planned.address;
                let msg = format!("IPAM gave address {address} with gateway {gateway}: {why}");
                Err(CniError::new(Code::IPAM, msg))
            };
            if gateway.is_ipv6() != is_v6(planned.address) {
                return refuse("they are of different families");
            }
            if role.gateway && gateway == planned.address.addr() {
                return refuse("the bridge needs an address of its own");
            }
            if role.gateway && !planned.address.contains(&gateway) {
                return refuse("the bridge's address has to be in the pods' range");
            }
            Ok(planned)
        })
        .collect()
}

/// The first address of a range that a host can have.
fn first_address(net: IpNet) -> IpAddr {
    match net.network() {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().saturating_add(1)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().saturating_add(1)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPLINK: UplinkMtu = UplinkMtu {
        v4: Mtu(1400),
        v6: Mtu(1300),
    };
    const GATEWAY: Role = Role {
        gateway: true,
        default_gateway: false,
    };
    const SWITCH: Role = Role {
        gateway: false,
        default_gateway: false,
    };

    fn lease(ips: &[(&str, Option<&str>)], routes: &[&str]) -> Lease {
        let ip = |(address, gateway): &(&str, Option<&str>)| LeasedIp {
            address: address.parse().expect("a range"),
            gateway: gateway.map(|text| text.parse().expect("an address")),
        };
        let route = |dst: &&str| RouteConfig::new(dst.parse().expect("a range"), None);
        Lease {
            ips: ips.iter().map(ip).collect(),
            routes: routes.iter().map(route).collect(),
            ..Lease::default()
        }
    }

    fn texts(items: &[impl ToString]) -> Vec<String> {
        items.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_gateway_has_the_first_address_and_narrow_ways_out() {
        let lease = lease(
            &[("10.88.0.5/16", None), ("fd00::5/64", Some("fd00::9"))],
            &["0.0.0.0/0", "10.88.0.0/16"],
        );
        let role = Role {
            default_gateway: true,
            ..GATEWAY
        };
        let plan = plan(&lease, &[], role, Mtu(9000), UPLINK).expect("valid");
        assert_eq!(texts(&plan.gateways), ["10.88.0.1/16", "fd00::9/64"]);
        let routes: Vec<_> = plan
            .routes
            .iter()
            .map(|route| (route.dst.to_string(), route.gw, route.mtu))
            .collect();
        let ip = |text: &str| text.parse().ok();
        assert_eq!(
            routes,
            [
                ("0.0.0.0/0".to_owned(), ip("10.88.0.1"), Some(1400)),
                ("::/0".to_owned(), ip("fd00::9"), Some(1300)),
            ]
        );
        assert_eq!(texts(&plan.ranges), ["10.88.0.0/16", "fd00::/64"]);
    }

    #[test]
    fn a_mere_switch_has_no_address_and_leaves_routes_to_others() {
        let lease = lease(
            &[("10.88.0.5/16", Some("10.88.0.1"))],
            &["0.0.0.0/0", "::/0"],
        );
        let plan = plan(&lease, &[], SWITCH, Mtu(9000), UPLINK).expect("valid");
        assert!(plan.gateways.is_empty());
        assert_eq!(plan.routes.len(), 1);
        assert_eq!(plan.routes[0].mtu, None);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let refused = |ips: &[(&str, Option<&str>)], role, mtu| {
            plan(&lease(ips, &[]), &[], role, Mtu(mtu), UPLINK).expect_err("refused")
        };
        let error = refused(&[("10.88.0.1/16", None)], GATEWAY, 1500);
        assert!(error.msg.contains("address of its own"), "{error}");
        let error = refused(&[("10.88.0.2/16", Some("fd00::1"))], SWITCH, 1500);
        assert!(error.msg.contains("families"), "{error}");
        let error = refused(&[("10.88.0.2/16", Some("10.9.0.1"))], GATEWAY, 1500);
        assert!(error.msg.contains("range"), "{error}");
        let error = refused(&[("fd00::2/64", None)], SWITCH, 1279);
        assert!(
            error.msg.contains("1279") && error.msg.contains("1280"),
            "{error}"
        );
    }
}
