//! From the kernel's answers to links, addresses, routes and neighbours.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Link, LinkKind, PortVlan, Route, VlanId};
use crate::netlink::attributes::{
    address, attributes, i32_at, text, u8_at, u16_at, u32_at, u64_at,
};
use crate::{IfIndex, MacAddr, Mtu};

// linux/rtnetlink.h
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const RTNH_F_ONLINK: u32 = 4;
/// `NETNSA_NSID` of linux/net_namespace.h.
const NETNSA_NSID: u16 = 1;
// linux/if_link.h
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BRPORT_MODE: u16 = 4;
// linux/if_bridge.h
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
const BRIDGE_VLAN_INFO_PVID: u16 = 1 << 1;
const BRIDGE_VLAN_INFO_UNTAGGED: u16 = 1 << 2;
// Lengths of the structures before the attributes.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
const RTMSG: usize = 12;
const NDMSG: usize = 12;
const RTGENMSG: usize = 4;
const RTNEXTHOP: usize = 8;

/// Family, index and flags of a `struct ifinfomsg`.
pub(super) struct LinkHeader {
    pub(super) family: u8,
    pub(super) index: IfIndex,
    pub(super) flags: u32,
}

impl LinkHeader {
    pub(super) fn read(payload: &[u8]) -> Option<Self> {
        Some(Self {
            family: u8_at(payload, 0)?,
            index: IfIndex(u32_at(payload, 4)?),
            flags: u32_at(payload, 8)?,
        })
    }
}

/// `rtm_type` of a `struct rtmsg`.
pub(super) fn route_type(payload: &[u8]) -> Option<u8> {
    u8_at(payload, 7)
}

/// A link; None when what every link has is missing.
pub(super) fn link(payload: &[u8]) -> Option<Link> {
    let header = LinkHeader::read(payload)?;
    let flag = |flag: i32| header.flags & flag as u32 != 0;
    let mut link = Link {
        index: header.index,
        name: String::new(),
        alias: None,
        kind: LinkKind::None,
        up: flag(libc::IFF_UP),
        running: flag(libc::IFF_RUNNING),
        loopback: flag(libc::IFF_LOOPBACK),
        mac: None,
        mtu: Mtu(0),
        peer_index: None,
        peer_nsid: None,
        master: None,
        vlan_filtering: false,
        hairpin: false,
        rx_packets: 0,
        tx_packets: 0,
        rx_queues: 1,
        qdisc: None,
    };
    for (kind, value) in attributes(payload.get(IFINFOMSG..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_IFALIAS => link.alias = Some(text(value)),
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok().map(MacAddr),
            libc::IFLA_MTU => link.mtu = Mtu(u32_at(value, 0)?),
            // 0: the peer is being removed.
            libc::IFLA_LINK => link.peer_index = u32_at(value, 0).filter(|i| *i != 0).map(IfIndex),
            libc::IFLA_LINK_NETNSID => link.peer_nsid = i32_at(value, 0),
            libc::IFLA_MASTER => link.master = u32_at(value, 0).map(IfIndex),
            libc::IFLA_NUM_RX_QUEUES => link.rx_queues = u32_at(value, 0)?,
            libc::IFLA_QDISC => link.qdisc = Some(text(value)),
            // struct rtnl_link_stats64 begins with the two packet counters.
            libc::IFLA_STATS64 => {
                link.rx_packets = u64_at(value, 0)?;
                link.tx_packets = u64_at(value, 8)?;
            }
            libc::IFLA_LINKINFO => read_info(&mut link, value),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

/// Kind of a link, and what bridges and their ports say about themselves.
fn read_info(link: &mut Link, info: &[u8]) {
    let find = |wanted: u16| attributes(info).find_map(|(k, v)| (k == wanted).then_some(v));
    link.kind = match find(libc::IFLA_INFO_KIND).map(text) {
        None => LinkKind::None,
        Some(kind) if kind == "veth" => LinkKind::Veth,
        Some(kind) => LinkKind::Other(kind),
    };
    let flag = |of: u16, wanted: u16| {
        let found = attributes(find(of)?).find(|(kind, _)| *kind == wanted)?;
        u8_at(found.1, 0).map(|value| value != 0)
    };
    if link.kind == LinkKind::Other("bridge".to_owned()) {
        let filtering = flag(libc::IFLA_INFO_DATA, IFLA_BR_VLAN_FILTERING);
        link.vlan_filtering = filtering.unwrap_or_default();
    }
    if find(libc::IFLA_INFO_SLAVE_KIND).map(text).as_deref() == Some("bridge") {
        let hairpin = flag(libc::IFLA_INFO_SLAVE_DATA, IFLA_BRPORT_MODE);
        link.hairpin = hairpin.unwrap_or_default();
    }
}

/// Address of `struct ifaddrmsg` with its prefix, and its link.
pub(super) fn interface_address(payload: &[u8]) -> Option<(IfIndex, IpNet)> {
    let prefix = u8_at(payload, 1)?;
    let link = IfIndex(u32_at(payload, 4)?);
    let (mut local, mut peer) = (None, None);
    for (kind, value) in attributes(payload.get(IFADDRMSG..)?) {
        match kind {
            libc::IFA_LOCAL => local = address(value),
            libc::IFA_ADDRESS => peer = address(value),
            _ => {}
        }
    }
    // On a point-to-point address IFA_ADDRESS is the other end; IPv6 often has only that one.
    Some((link, IpNet::new(local.or(peer)?, prefix).ok()?))
}

/// The unicast routes of a `struct rtmsg`: one for each next hop.
pub(super) fn routes(payload: &[u8]) -> Option<Vec<Route>> {
    let family = u8_at(payload, 0)?;
    if u8_at(payload, 7)? != libc::RTN_UNICAST {
        return Some(vec![]);
    }
    let unspecified: IpAddr = match i32::from(family) {
        libc::AF_INET => [0; 4].into(),
        libc::AF_INET6 => [0; 16].into(),
        _ => return Some(vec![]),
    };
    let scope = u8_at(payload, 6)?;
    let mut destination = unspecified;
    let mut hop = Hop {
        flags: u32_at(payload, 8)?,
        ..Hop::default()
    };
    let mut hops = vec![];
    let (mut source, mut priority, mut mtu, mut advmss) = (None, None, None, None);
    let mut table = u32::from(u8_at(payload, 4)?);
    for (kind, value) in attributes(payload.get(RTMSG..)?) {
        match kind {
            libc::RTA_DST => destination = address(value)?,
            libc::RTA_PREFSRC => source = address(value),
            libc::RTA_PRIORITY => priority = u32_at(value, 0),
            libc::RTA_TABLE => table = u32_at(value, 0)?,
            libc::RTA_MULTIPATH => hops = next_hops(value)?,
            libc::RTA_METRICS => {
                for (metric, value) in attributes(value) {
                    match metric {
                        RTAX_MTU => mtu = u32_at(value, 0).map(Mtu),
                        RTAX_ADVMSS => advmss = u32_at(value, 0),
                        _ => {}
                    }
                }
            }
            _ => hop.read(kind, value),
        }
    }
    if hops.is_empty() {
        hops.push(hop);
    }
    let destination = IpNet::new(destination, u8_at(payload, 1)?).ok()?;
    let route = |hop: Hop| {
        Some(Route {
            destination,
            gateway: hop.gateway,
            source,
            device: hop.device?,
            mtu,
            onlink: hop.flags & RTNH_F_ONLINK != 0,
            advmss,
            priority,
            table: (table != u32::from(libc::RT_TABLE_MAIN)).then_some(table),
            scope: (family == libc::AF_INET as u8).then_some(scope),
        })
    };
    // A hop without a device leads nowhere that kbp could use (`ip route add … nhid` of a group).
    Some(hops.into_iter().filter_map(route).collect())
}

#[derive(Default)]
struct Hop {
    device: Option<IfIndex>,
    gateway: Option<IpAddr>,
    flags: u32,
}

impl Hop {
    fn read(&mut self, kind: u16, value: &[u8]) {
        match kind {
            libc::RTA_OIF => self.device = u32_at(value, 0).map(IfIndex),
            libc::RTA_GATEWAY => self.gateway = address(value),
            // struct rtvia: a family of two bytes, then an address.
            libc::RTA_VIA => self.gateway = value.get(2..).and_then(address),
            _ => {}
        }
    }
}

/// Each `struct rtnexthop` has a length, flags, an index and attributes of its own.
fn next_hops(mut bytes: &[u8]) -> Option<Vec<Hop>> {
    let mut hops = vec![];
    while !bytes.is_empty() {
        let length = usize::from(u16_at(bytes, 0)?);
        let mut hop = Hop {
            device: u32_at(bytes, 4).filter(|i| *i != 0).map(IfIndex),
            flags: u32::from(u8_at(bytes, 2)?),
            gateway: None,
        };
        for (kind, value) in attributes(bytes.get(RTNEXTHOP..length)?) {
            hop.read(kind, value);
        }
        hops.push(hop);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(hops)
}

/// Index and VLANs of a bridge's port, as the bridge family describes it (`struct bridge_vlan_info` of
/// linux/if_bridge.h).
pub(super) fn port_vlans(payload: &[u8]) -> Option<(IfIndex, Vec<PortVlan>)> {
    let header = LinkHeader::read(payload)?;
    let spec = attributes(payload.get(IFINFOMSG..)?)
        .find(|(kind, _)| *kind == libc::IFLA_AF_SPEC)
        .map_or(&[][..], |(_, value)| value);
    let vlans = attributes(spec).filter(|(kind, _)| *kind == IFLA_BRIDGE_VLAN_INFO);
    let vlans = vlans.filter_map(|(_, value)| {
        let flags = u16_at(value, 0)?;
        Some(PortVlan {
            vlan: VlanId(u16_at(value, 2)?),
            pvid: flags & BRIDGE_VLAN_INFO_PVID != 0,
            untagged: flags & BRIDGE_VLAN_INFO_UNTAGGED != 0,
        })
    });
    Some((header.index, vlans.collect()))
}

/// Link, state, address and MAC of a `struct ndmsg`; None for one without a MAC.
pub(super) fn neighbour(payload: &[u8]) -> Option<(IfIndex, u16, IpAddr, MacAddr)> {
    let link = IfIndex(u32_at(payload, 4)?);
    let state = u16_at(payload, 8)?;
    let (mut destination, mut mac) = (None, None);
    for (kind, value) in attributes(payload.get(NDMSG..)?) {
        match kind {
            libc::NDA_DST => destination = address(value),
            libc::NDA_LLADDR => mac = value.try_into().ok().map(MacAddr),
            _ => {}
        }
    }
    Some((link, state, destination?, mac?))
}

/// The id in an answer to RTM_GETNSID; the inner None: none was given.
pub(super) fn nsid(payload: &[u8]) -> Option<Option<i32>> {
    let (_, value) = attributes(payload.get(RTGENMSG..)?).find(|(kind, _)| *kind == NETNSA_NSID)?;
    i32_at(value, 0).map(|id| Some(id).filter(|id| *id >= 0))
}
