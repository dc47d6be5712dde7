//! The route family: veth pairs, addresses, routes, neighbours, qdiscs, counters, namespace ids, link events.

mod announce;
mod batch;
mod bridge;
mod events;
mod name;
mod read;
mod socket;

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

pub use announce::announce;
pub use batch::Batch;
pub use bridge::{Bridge, DEFAULT_VLAN, PortVlan, VlanId};
pub use events::{LinkEvent, LinkEvents};
pub use socket::RouteSocket;

use crate::netns::Netns;
use crate::{IfIndex, MacAddr, Mtu};

/// A veth pair to be born with each end in its final namespace, in one RTM_NEWLINK.
/// The host end is created in the namespace of the socket. Both ends have one queue pair. The host end is born up;
/// the pod end cannot be (the kernel answers ENOTCONN): it is set up from a socket in its own namespace.
#[derive(Debug, Clone)]
pub struct VethPair<'a> {
    /// Name of the host end, at most 15 bytes.
    pub host_name: &'a str,
    /// MAC of the host end; always given, or udev would change it.
    pub host_mac: MacAddr,
    /// Name of the pod end.
    pub pod_name: &'a str,
    /// MAC of the pod end.
    pub pod_mac: MacAddr,
    /// Namespace of the pod end.
    pub pod_netns: &'a Netns,
    /// MTU of both ends, 68 to 65535.
    pub mtu: Mtu,
    /// Transmit queue length in packets (`IFLA_TXQLEN`).
    pub tx_queue_len: u32,
}

/// Kind of a link as the kernel names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A virtual Ethernet pair: can be polled.
    Veth,
    /// No rtnl kind: loopback or a physical device.
    None,
    /// Anything else (`bridge`, `netkit`, `vlan`…).
    Other(String),
}

/// One interface as the kernel describes it.
#[derive(Debug, Clone)]
pub struct Link {
    /// Index in its namespace.
    pub index: IfIndex,
    /// Name.
    pub name: String,
    /// Alias (`IFLA_IFALIAS`), at most 255 bytes.
    pub alias: Option<String>,
    /// rtnl kind.
    pub kind: LinkKind,
    /// Whether IFF_UP is set.
    pub up: bool,
    /// Whether IFF_RUNNING is set: its operational state is up, or not known.
    pub running: bool,
    /// Whether this is the loopback.
    pub loopback: bool,
    /// MAC, where it is six bytes.
    pub mac: Option<MacAddr>,
    /// MTU.
    pub mtu: Mtu,
    /// Index of the peer (`IFLA_LINK`), in the namespace that `peer_nsid` names.
    pub peer_index: Option<IfIndex>,
    /// Id of the peer's namespace as seen from this one (`IFLA_LINK_NETNSID`); None: the same namespace.
    pub peer_nsid: Option<i32>,
    /// Index of the bridge it is a port of.
    pub master: Option<IfIndex>,
    /// Of a bridge: whether it keeps its ports' VLANs apart.
    pub vlan_filtering: bool,
    /// Of a bridge's port: whether it may send a frame back out of itself.
    pub hairpin: bool,
    /// Received packets (`IFLA_STATS64`).
    pub rx_packets: u64,
    /// Sent packets.
    pub tx_packets: u64,
    /// Number of receive queues.
    pub rx_queues: u32,
    /// Name of the qdisc in force (`noqueue`, `pfifo`…).
    pub qdisc: Option<String>,
}

/// A route to add or one that was read: unicast, protocol static when it is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination; a prefix length of 0 is the default route.
    pub destination: IpNet,
    /// Next hop; None: directly on the link. May be of the other family (`via inet6`).
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Interface.
    pub device: IfIndex,
    /// MTU metric of the route (`RTAX_MTU`); None: the device's.
    pub mtu: Option<Mtu>,
    /// RTNH_F_ONLINK: the gateway is on the link although no address says so.
    pub onlink: bool,
    /// `RTAX_ADVMSS`: TCP MSS to advertise, in bytes.
    pub advmss: Option<u32>,
    /// Metric; of routes to the same destination the lowest wins. None: the kernel's default (0 for IPv4, 1024 for IPv6).
    pub priority: Option<u32>,
    /// Routing table; None: main.
    pub table: Option<u32>,
    /// Scope (`RT_SCOPE_*`, IPv4 only); None: link without a gateway, else universe.
    pub scope: Option<u8>,
}

impl Route {
    /// A route to `destination` directly on `device`; the rest is set with struct update syntax.
    pub fn new(destination: IpNet, device: IfIndex) -> Self {
        Self {
            destination,
            gateway: None,
            source: None,
            device,
            mtu: None,
            onlink: false,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
        }
    }
}

impl fmt::Display for Route {
    /// As ip-route(8) writes it, with the index for the device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.destination.prefix_len() == 0 {
            let family = if self.destination.addr().is_ipv4() {
                ""
            } else {
                " (IPv6)"
            };
            write!(f, "default{family}")?;
        } else {
            write!(f, "{}", self.destination)?;
        }
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " on link {}", self.device)?;
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(table) = self.table {
            write!(f, " table {table}")?;
        }
        if self.onlink {
            write!(f, " onlink")
        } else {
            Ok(())
        }
    }
}
