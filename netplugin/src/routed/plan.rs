//! From a lease to what the kernel shall have. Nothing here touches the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kbp_kernel::Mtu;
use serde_json::json;

use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam::{Lease, LeasedIp, RouteConfig};
use crate::uplink::UplinkMtu;
use crate::wire::DEVICE_MTU;

/// Gateways when IPAM names none: nobody else has a use for them on a link of two.
const FALLBACK_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const FALLBACK_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
/// Smallest MTU of IPv6 (RFC 8200 section 5).
pub(crate) const MIN_MTU_V6: Mtu = Mtu(1280);

/// What one attachment consists of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    /// The pod's addresses with the prefix lengths of their ranges, each with its gateway.
    pub(crate) ips: Vec<PlannedIp>,
    /// Every next hop inside the pod: permanent neighbours there, all with the host end's MAC.
    pub(crate) next_hops: Vec<IpAddr>,
    /// The pod's routes in an order in which they can be added. Without a gateway: directly on the link.
    pub(crate) routes: Vec<RouteConfig>,
    /// The node's own pod ranges, towards which nothing is masqueraded.
    pub(crate) ranges: Vec<IpNet>,
}

/// An address of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedIp {
    /// The address with the prefix length of its range.
    pub(crate) address: IpNet,
    /// The address of the host end.
    pub(crate) gateway: IpAddr,
}

impl PlannedIp {
    /// The address alone, as the host routes to it.
    pub(crate) fn host_route(&self) -> IpNet {
        IpNet::from(self.address.addr())
    }
}

impl Plan {
    /// The addresses of the host end, each once.
    pub(crate) fn gateways(&self) -> Vec<IpAddr> {
        unique(self.ips.iter().map(|ip| ip.gateway))
    }

    /// The addresses as results spell them.
    pub(crate) fn leased(&self) -> Vec<LeasedIp> {
        let leased = |ip: &PlannedIp| LeasedIp {
            address: ip.address,
            gateway: Some(ip.gateway),
        };
        self.ips.iter().map(leased).collect()
    }

    /// The pod's addresses without prefix lengths.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        self.ips.iter().map(|ip| ip.address.addr()).collect()
    }

    /// Whether any address is IPv6.
    pub(crate) fn has_v6(&self) -> bool {
        self.ips.iter().any(|ip| is_v6(ip.address))
    }

    /// Whether any address is IPv4.
    pub(crate) fn has_v4(&self) -> bool {
        self.ips.iter().any(|ip| !is_v6(ip.address))
    }
}

/// Addresses with the gateways they get.
pub(crate) fn plan_ips(ips: &[LeasedIp]) -> Result<Vec<PlannedIp>> {
    ips.iter()
        .map(|ip| {
            let fallback = if is_v6(ip.address) {
                FALLBACK_V6
            } else {
                FALLBACK_V4
            };
            let planned = PlannedIp {
                address: ip.address,
                gateway: ip.gateway.unwrap_or(fallback),
            };
            let refuse = |why: &str| {
                let msg = format!(
                    "IPAM gave address {} with gateway {}: {why}",
                    planned.address, planned.gateway
                );
                Err(CniError::new(Code::IPAM, msg))
            };
            if planned.gateway.is_ipv6() != is_v6(planned.address) {
                return refuse("they are of different families");
            }
            if planned.gateway == planned.address.addr() {
                return refuse("the host end needs an address of its own");
            }
            Ok(planned)
        })
        .collect()
}

/// The node's own pod ranges: those of the addresses, and those that the config names.
pub(crate) fn ranges(addresses: impl Iterator<Item = IpNet>, configured: &[IpNet]) -> Vec<IpNet> {
    let own = addresses.map(|address| address.trunc());
    // A range of everything would be a default route, one of a single address holds no other pod.
    unique(own.chain(configured.iter().copied()))
        .into_iter()
        .filter(|range| range.prefix_len() > 0 && range.prefix_len() < range.max_prefix_len())
        .collect()
}

/// Works out an attachment. `configured` are the ranges of the IPAM section, `mtu` is that of the config.
pub(crate) fn plan(
    lease: &Lease,
    configured: &[IpNet],
    is_default_gateway: bool,
    mtu: Option<Mtu>,
    uplink: UplinkMtu,
) -> Result<Plan> {
    let ips = plan_ips(&lease.ips)?;
    if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU_V6)
        && let Some(v6) = ips.iter().find(|ip| is_v6(ip.address))
    {
        let allowed = format!(
            "at least {MIN_MTU_V6} with an IPv6 address ({})",
            v6.address.addr()
        );
        return Err(CniError::config("mtu", &json!(mtu.0), &allowed));
    }
    let ranges = ranges(ips.iter().map(|ip| ip.address), configured);
    let gateway = |dst: IpNet| {
        let family = || ips.iter().filter(move |ip| is_v6(ip.address) == is_v6(dst));
        let near = family().find(|ip| dst.contains(&ip.address.addr()));
        near.or_else(|| family().next()).map(|ip| ip.gateway)
    };
    let leaves = |dst: IpNet| {
        let mtu = mtu.unwrap_or(if is_v6(dst) { uplink.v6 } else { uplink.v4 });
        let inside = ranges.iter().any(|range| range.contains(&dst));
        (!inside && mtu < DEVICE_MTU).then_some(mtu.0)
    };

    let mut routes: Vec<RouteConfig> = Vec::new();
    for address in unique(ips.iter().map(|ip| ip.gateway)) {
        // Without this the pod could not answer the host end.
        if !ranges.iter().any(|range| range.contains(&address)) && !is_link_local_v6(address) {
            routes.push(RouteConfig::new(IpNet::from(address), None));
        }
    }
    for range in &ranges {
        let named = lease
            .routes
            .iter()
            .any(|route| route.dst == *range && is_main(route));
        if !named && let Some(gw) = gateway(*range) {
            routes.push(RouteConfig::new(*range, Some(gw)));
        }
    }
    for route in &lease.routes {
        // Of a family in which the pod has no address: it could send nothing there.
        let Some(gw) = route.gw.or_else(|| gateway(route.dst)) else {
            continue;
        };
        let mtu = route.mtu.or_else(|| leaves(route.dst));
        let route = RouteConfig {
            gw: Some(gw),
            mtu,
            ..route.clone()
        };
        if !routes.contains(&route) {
            routes.push(route);
        }
    }
    if is_default_gateway {
        for everything in [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())] {
            let named = routes
                .iter()
                .any(|route| route.dst == everything && is_main(route));
            if !named && let Some(gw) = gateway(everything) {
                routes.push(RouteConfig {
                    mtu: leaves(everything),
                    ..RouteConfig::new(everything, Some(gw))
                });
            }
        }
    }
    let next_hops = unique(
        ips.iter()
            .map(|ip| ip.gateway)
            .chain(routes.iter().filter_map(|route| route.gw)),
    );
    Ok(Plan {
        ips,
        next_hops,
        routes,
        ranges,
    })
}

/// Whether a range is of IPv6.
pub(crate) fn is_v6(net: IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

fn is_link_local_v6(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Whether a route is in the main table (RT_TABLE_MAIN).
pub(crate) fn is_main(route: &RouteConfig) -> bool {
    route.table.is_none_or(|table| table == 254)
}

/// Each once, in order.
pub(crate) fn unique<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut list, item| {
        if !list.contains(&item) {
            list.push(item);
        }
        list
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPLINK: UplinkMtu = UplinkMtu {
        v4: Mtu(1400),
        v6: Mtu(1300),
    };

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn lease(ips: &[(&str, Option<&str>)], routes: &[RouteConfig]) -> Lease {
        Lease {
            ips: ips
                .iter()
                .map(|(a, g)| LeasedIp {
                    address: net(a),
                    gateway: g.map(ip),
                })
                .collect(),
            routes: routes.to_vec(),
            ..Lease::default()
        }
    }

    fn route(dst: &str, gw: Option<&str>, mtu: Option<u32>) -> RouteConfig {
        RouteConfig {
            mtu,
            ..RouteConfig::new(net(dst), gw.map(ip))
        }
    }

    #[test]
    fn routes_off_the_node_have_the_uplinks_mtu_and_the_others_none() {
        let lease = lease(
            &[
                ("10.88.0.5/16", Some("10.88.0.1")),
                ("fd00::5/64", Some("fd00::1")),
            ],
            &[
                route("0.0.0.0/0", None, None),
                route("::/0", None, None),
                route("10.88.7.0/24", None, None),
            ],
        );
        let configured = [net("10.99.0.0/16"), net("10.88.0.0/16")];
        let plan = plan(&lease, &configured, true, None, UPLINK).expect("plan");
        assert_eq!(
            plan.routes,
            [
                route("10.88.0.0/16", Some("10.88.0.1"), None),
                route("fd00::/64", Some("fd00::1"), None),
                route("10.99.0.0/16", Some("10.88.0.1"), None),
                route("0.0.0.0/0", Some("10.88.0.1"), Some(1400)),
                route("::/0", Some("fd00::1"), Some(1300)),
                route("10.88.7.0/24", Some("10.88.0.1"), None),
            ],
        );
        assert_eq!(plan.next_hops, [ip("10.88.0.1"), ip("fd00::1")]);
        assert_eq!(plan.gateways(), plan.next_hops);
        assert_eq!(
            plan.ranges,
            [net("10.88.0.0/16"), net("fd00::/64"), net("10.99.0.0/16")]
        );
        assert_eq!(plan.ips[0].host_route(), net("10.88.0.5/32"));
        assert!(plan.has_v4() && plan.has_v6());
    }

    #[test]
    fn the_configs_mtu_goes_before_the_uplinks_and_a_routes_own_before_both() {
        let routes = [
            route("0.0.0.0/0", None, None),
            route("10.1.0.0/16", None, Some(900)),
        ];
        let lease = lease(&[("10.88.0.5/16", Some("10.88.0.1"))], &routes);
        let plan = plan(&lease, &[], false, Some(Mtu(1000)), UPLINK).expect("plan");
        let mtus: Vec<_> = plan.routes.iter().map(|route| route.mtu).collect();
        assert_eq!(mtus, [None, Some(1000), Some(900)]);
    }

    #[test]
    fn without_a_gateway_a_link_local_one_is_taken() {
        let lease = lease(&[("10.88.0.5/32", None), ("fd00::5/128", None)], &[]);
        let plan = plan(&lease, &[], true, None, UPLINK).expect("plan");
        assert_eq!(
            plan.routes,
            [
                route("169.254.1.1/32", None, None),
                route("0.0.0.0/0", Some("169.254.1.1"), Some(1400)),
                route("::/0", Some("fe80::1"), Some(1300)),
            ],
        );
        assert!(plan.ranges.is_empty());
    }

    #[test]
    fn a_default_route_is_added_only_when_asked_for_and_only_once() {
        let one = lease(
            &[("10.88.0.5/16", Some("10.88.0.1"))],
            &[route("0.0.0.0/0", Some("10.88.0.9"), None)],
        );
        for is_default_gateway in [false, true] {
            let plan = plan(&one, &[], is_default_gateway, None, UPLINK).expect("plan");
            assert_eq!(plan.routes.len(), 2, "{:?}", plan.routes);
            assert_eq!(plan.next_hops, [ip("10.88.0.1"), ip("10.88.0.9")]);
        }
        let none = lease(&[("10.88.0.5/16", Some("10.88.0.1"))], &[]);
        assert_eq!(
            plan(&none, &[], false, None, UPLINK)
                .expect("plan")
                .routes
                .len(),
            1
        );
        assert_eq!(
            plan(&none, &[], true, None, UPLINK)
                .expect("plan")
                .routes
                .len(),
            2
        );
    }

    #[test]
    fn a_range_that_ipam_routes_itself_is_not_routed_twice() {
        let own = route("10.88.0.0/16", Some("10.88.0.1"), None);
        let lease = lease(
            &[("10.88.0.5/16", Some("10.88.0.1"))],
            &[own.clone(), own.clone()],
        );
        assert_eq!(
            plan(&lease, &[], false, None, UPLINK).expect("plan").routes,
            [own]
        );
    }

    #[test]
    fn a_route_of_a_family_without_address_is_left_out() {
        let lease = lease(
            &[("10.88.0.5/16", Some("10.88.0.1"))],
            &[route("::/0", None, None)],
        );
        let plan = plan(&lease, &[net("fd00::/64")], true, None, UPLINK).expect("plan");
        assert!(
            plan.routes.iter().all(|route| !is_v6(route.dst)),
            "{:?}",
            plan.routes
        );
    }

    #[test]
    fn a_small_mtu_or_a_wrong_gateway_is_refused() {
        let v6 = lease(&[("fd00::5/64", None)], &[]);
        let error = plan(&v6, &[], false, Some(Mtu(1279)), UPLINK).expect_err("too small");
        assert_eq!(error.code, Code::CONFIG);
        assert!(
            error.msg.contains("1279") && error.msg.contains("1280"),
            "{error}"
        );
        plan(&v6, &[], false, Some(Mtu(1280)), UPLINK).expect("large enough");
        for gateway in ["fd00::1", "10.88.0.5"] {
            let wrong = lease(&[("10.88.0.5/16", Some(gateway))], &[]);
            let error = plan(&wrong, &[], false, None, UPLINK).expect_err(gateway);
            assert_eq!(error.code, Code::IPAM);
            assert!(error.msg.contains(gateway), "{error}");
        }
    }
}
