//! Comparing what the kernel has with what ADD left there.

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use kbp_kernel::ethtool;
use kbp_kernel::link::{Link, LinkKind, Route};
use kbp_kernel::{MacAddr, Result};
use kbp_poller::config::{Config, DEFAULT_STATE_DIR};
use kbp_poller::state;

use crate::attachment::Attachment;
use crate::bridge;
use crate::cni::ipam::{LeasedIp, RouteConfig};
use crate::cni::options::{BridgeOptions, Mode, Options, Profile};
use crate::routed::plan::is_main;
use crate::wire::{Side, Which, features};

/// What a result says about an attachment.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// MAC and MTU of the host end, where the result names them.
    pub(crate) host: (Option<MacAddr>, Option<u32>),
    /// MAC and MTU of the pod end, where the result names them.
    pub(crate) pod: (Option<MacAddr>, Option<u32>),
    /// Addresses of the pod end.
    pub(crate) ips: Vec<LeasedIp>,
    /// Routes in the pod.
    pub(crate) routes: Vec<RouteConfig>,
}

/// Every difference, in words; empty when there is none.
pub(crate) fn differences(
    host: &mut Side,
    pod: &mut Side,
    attachment: &Attachment,
    options: &Options,
    expected: &Expected,
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let host_end = host.route.link_by_name(&attachment.host_end())?;
    let pod_end = pod.route.link_by_name(&attachment.ifname)?;
    for (end, name, (mac, mtu)) in [
        (&host_end, attachment.host_end(), expected.host),
        (&pod_end, attachment.ifname.clone(), expected.pod),
    ] {
        match end {
            Some(link) => link_differences(link, mac, mtu, &mut found),
            None => found.push(format!("{name} does not exist")),
        }
    }
    let (Some(host_end), Some(pod_end)) = (host_end, pod_end) else {
        return Ok(found);
    };
    if !attachment.owns(&host_end) {
        let alias = host_end.alias.as_deref().unwrap_or_default();
        found.push(format!(
            "{} has the alias {alias:?} instead of {:?}",
            host_end.name,
            attachment.alias()
        ));
    }
    let is_pair = pod_end.peer_index == Some(host_end.index)
        && pod_end.peer_nsid == pod.route.nsid_of(&host.netns)?;
    if !is_pair {
        found.push(format!(
            "{} is not the other end of {}",
            host_end.name, pod_end.name
        ));
    }
    // Another one is fine: the plugin bandwidth, for one, puts its own there.
    if host_end.qdisc.as_deref() == Some("noqueue") {
        found.push(format!("{} has no qdisc", host_end.name));
    }
    feature_differences(
        (&*host, &host_end),
        (&*pod, &pod_end),
        options.profile,
        &mut found,
    )?;
    pod_differences(pod, &pod_end, expected, &mut found)?;
    match &options.mode {
        Mode::Bridge(bridge) => bridge_differences(host, &host_end, bridge, expected, &mut found)?,
        Mode::Routed | Mode::Tune => {
            let gateways: Vec<_> = expected.ips.iter().filter_map(|ip| ip.gateway).collect();
            neighbour_differences(pod, &pod_end, &host_end, &gateways, &mut found)?;
            host_differences(host, &host_end, &pod_end, expected, &mut found)?;
        }
    }
    Ok(found)
}

/// Compares what matters of GRO and TSO of the host end and the pod end with what the profile wants. The rest is as whoever polls
/// the host end, if anybody does, has set it.
pub(crate) fn feature_differences(
    host: (&Side, &Link),
    pod: (&Side, &Link),
    profile: Profile,
    found: &mut Vec<String>,
) -> Result<()> {
    for (which, (side, end)) in [(Which::Host, host), (Which::Pod, pod)] {
        let is = ethtool::features(&side.netns, &end.name)?;
        let wanted = features(which, profile, is);
        for (name, is, wanted) in [("GRO", is.gro, wanted.gro), ("TSO", is.tso, wanted.tso)] {
            // TSO of the host end leads past a NAPI that nobody polls.
            if is && name == "TSO" && which == Which::Host && takes_short_way(end) {
                continue;
            }
            if is != wanted {
                found.push(format!(
                    "{} has {name} {} instead of {}",
                    end.name,
                    on_off(is),
                    on_off(wanted)
                ));
            }
        }
    }
    Ok(())
}

fn takes_short_way(host_end: &Link) -> bool {
    let config = Config::load();
    let state_dir = config
        .as_ref()
        .map_or(Path::new(DEFAULT_STATE_DIR), |c| &c.state_dir);
    state::takes_short_way(state_dir, host_end.index)
}

/// The host end as a bridge's port, and the bridge as the gateway.
fn bridge_differences(
    host: &mut Side,
    end: &Link,
    wanted: &BridgeOptions,
    expected: &Expected,
    found: &mut Vec<String>,
) -> Result<()> {
    let Some(bridge) = host.route.link_by_name(&wanted.name)? else {
        found.push(format!("{} does not exist", wanted.name));
        return Ok(());
    };
    if !bridge.up {
        found.push(format!("{} is down", bridge.name));
    }
    if end.master != Some(bridge.index) {
        found.push(format!("{} is not a port of {}", end.name, bridge.name));
    } else if end.hairpin != wanted.hairpin {
        found.push(format!(
            "{} has hairpin mode {} instead of {}",
            end.name,
            on_off(end.hairpin),
            on_off(wanted.hairpin)
        ));
    }
    if let Some(wanted) = wanted.vlan {
        let vlans = host.route.port_vlans(end.index)?;
        let only = matches!(&vlans[..], [is] if is.vlan == wanted && is.pvid && is.untagged);
        if !bridge.vlan_filtering || !only {
            found.push(format!("{} is not in VLAN {wanted} alone", end.name));
        }
    }
    if bridge.mtu != end.mtu {
        found.push(format!(
            "{} has MTU {}, its port {} has {}",
            bridge.name, bridge.mtu, end.name, end.mtu
        ));
    }
    if wanted.is_gateway {
        let (index, name) = match wanted.vlan {
            None => (Some(bridge.index), bridge.name),
            Some(vlan) => {
                let name = bridge::vlan::gateway_name(&bridge.name, vlan);
                (host.route.index_of(&name)?, name)
            }
        };
        let addresses = match index {
            Some(index) => host.route.addresses(index)?,
            None => Vec::new(),
        };
        for gateway in expected.ips.iter().filter_map(|ip| ip.gateway) {
            if !addresses.iter().any(|address| address.addr() == gateway) {
                found.push(format!("{name} lacks the address {gateway}"));
            }
        }
    }
    Ok(())
}

fn link_differences(link: &Link, mac: Option<MacAddr>, mtu: Option<u32>, found: &mut Vec<String>) {
    let name = &link.name;
    if link.kind != LinkKind::Veth {
        found.push(format!("{name} is not a veth"));
    }
    if !link.up {
        found.push(format!("{name} is down"));
    }
    if let Some(mac) = mac.filter(|mac| link.mac != Some(*mac)) {
        let is = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
        found.push(format!("{name} has the MAC {is} instead of {mac}"));
    }
    if let Some(mtu) = mtu.filter(|mtu| link.mtu.0 != *mtu) {
        found.push(format!("{name} has MTU {} instead of {mtu}", link.mtu));
    }
}

fn pod_differences(
    pod: &mut Side,
    end: &Link,
    expected: &Expected,
    found: &mut Vec<String>,
) -> Result<()> {
    let addresses = pod.route.addresses(end.index)?;
    for ip in &expected.ips {
        if !addresses.contains(&ip.address) {
            found.push(format!("{} lacks the address {}", end.name, ip.address));
        }
    }
    let routes = pod.route.routes()?;
    for wanted in expected.routes.iter().filter(|route| is_main(route)) {
        if !routes.iter().any(|route| is_same_route(route, wanted)) {
            let gw = wanted.gw.map(|gw| format!(" via {gw}")).unwrap_or_default();
            let mtu = wanted
                .mtu
                .map(|mtu| format!(" mtu {mtu}"))
                .unwrap_or_default();
            found.push(format!(
                "the route to {}{gw}{mtu} is missing in the pod",
                wanted.dst
            ));
        }
    }
    Ok(())
}

fn host_differences(
    host: &mut Side,
    end: &Link,
    pod_end: &Link,
    expected: &Expected,
    found: &mut Vec<String>,
) -> Result<()> {
    let addresses = host.route.addresses(end.index)?;
    let routes = host.route.routes()?;
    for ip in &expected.ips {
        if let Some(gateway) = ip.gateway
            && !addresses.contains(&IpNet::from(gateway))
        {
            found.push(format!("{} lacks the address {gateway}", end.name));
        }
        let host_route = IpNet::from(ip.address.addr());
        if !routes
            .iter()
            .any(|route| route.destination == host_route && route.device == end.index)
        {
            found.push(format!(
                "the host's route to {host_route} over {} is missing",
                end.name
            ));
        }
    }
    let pod_addresses: Vec<_> = expected.ips.iter().map(|ip| ip.address.addr()).collect();
    neighbour_differences(host, end, pod_end, &pod_addresses, found)
}

fn neighbour_differences(
    side: &mut Side,
    end: &Link,
    peer: &Link,
    wanted: &[IpAddr],
    found: &mut Vec<String>,
) -> Result<()> {
    let neighbours = side.route.permanent_neighbours(end.index)?;
    for address in wanted {
        if !neighbours
            .iter()
            .any(|(ip, mac)| ip == address && Some(*mac) == peer.mac)
        {
            found.push(format!(
                "{} lacks the permanent neighbour {address} with the MAC of {}",
                end.name, peer.name
            ));
        }
    }
    Ok(())
}

/// What the result does not say of a route is not compared: a later plugin may have set it.
fn is_same_route(route: &Route, wanted: &RouteConfig) -> bool {
    route.destination == wanted.dst
        && (wanted.gw.is_none() || route.gateway == wanted.gw)
        && (wanted.mtu.is_none() || route.mtu.map(|mtu| mtu.0) == wanted.mtu)
        && (wanted.priority.is_none() || route.priority == wanted.priority)
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
