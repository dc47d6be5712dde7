//! The route family: veth pairs, addresses, routes, neighbours, qdiscs, counters, namespace ids, link events.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use ipnet::IpNet;

use crate::netns::Netns;
use crate::{IfIndex, MacAddr, Mtu, Result};

/// A veth pair to be born with each end in its final namespace, in one RTM_NEWLINK.
/// The host end is created in the namespace of the socket. Both ends have one queue pair. The host end is born up;
/// the pod end cannot be (the kernel answers ENOTCONN): see [`PodSetup::up`].
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

/// Requests that are sent to the kernel in one message and answered one by one.
/// The kernel carries out every request of a batch, also those after a failed one; the caller undoes.
#[derive(Debug, Default)]
pub struct Batch {}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self { Self::default() }
    /// Creates a veth pair.
    pub fn create_veth(&mut self, _pair: &VethPair<'_>) -> &mut Self { todo!() }
    /// Sets IFF_UP.
    pub fn set_up(&mut self, _link: IfIndex) -> &mut Self { todo!() }
    /// Clears IFF_UP.
    pub fn set_down(&mut self, _link: IfIndex) -> &mut Self { todo!() }
    /// Deletes a link (of a veth, both ends).
    pub fn delete_link(&mut self, _link: IfIndex) -> &mut Self { todo!() }
    /// Sets the MTU.
    pub fn set_mtu(&mut self, _link: IfIndex, _mtu: Mtu) -> &mut Self { todo!() }
    /// Sets the alias; an empty one removes it.
    pub fn set_alias(&mut self, _link: IfIndex, _alias: &str) -> &mut Self { todo!() }
    /// Adds an address without duplicate address detection (IFA_F_NODAD on v6). `no_prefix_route`: IFA_F_NOPREFIXROUTE.
    pub fn add_address(&mut self, _link: IfIndex, _address: IpNet, _no_prefix_route: bool) -> &mut Self { todo!() }
    /// Adds a route (NLM_F_CREATE|NLM_F_EXCL).
    pub fn add_route(&mut self, _route: &Route) -> &mut Self { todo!() }
    /// Adds or replaces a route.
    pub fn replace_route(&mut self, _route: &Route) -> &mut Self { todo!() }
    /// Deletes a route.
    pub fn delete_route(&mut self, _route: &Route) -> &mut Self { todo!() }
    /// Adds a permanent neighbour (NUD_PERMANENT), replacing an old entry.
    pub fn add_neighbour(&mut self, _link: IfIndex, _address: IpAddr, _mac: MacAddr) -> &mut Self { todo!() }
    /// Replaces the root qdisc by a `pfifo` of `limit` packets.
    pub fn set_pfifo(&mut self, _link: IfIndex, _limit: u32) -> &mut Self { todo!() }
    /// Number of requests.
    pub fn len(&self) -> usize { todo!() }
    /// Whether there is no request.
    pub fn is_empty(&self) -> bool { todo!() }
}

/// A NETLINK_ROUTE socket that belongs to one network namespace for good.
#[derive(Debug)]
pub struct RouteSocket {}

impl RouteSocket {
    /// Opens one in the calling thread's namespace.
    pub fn open() -> Result<Self> { todo!() }
    /// Opens one in `netns`.
    pub fn open_in(_netns: &Netns) -> Result<Self> { todo!() }
    /// Sends the batch and reads every acknowledgement. The first failure is returned; the others are logged at debug level.
    pub fn execute(&mut self, _batch: &Batch) -> Result<()> { todo!() }
    /// The link of that name, None when there is none.
    pub fn link_by_name(&mut self, _name: &str) -> Result<Option<Link>> { todo!() }
    /// The link of that index, None when there is none.
    pub fn link_by_index(&mut self, _index: IfIndex) -> Result<Option<Link>> { todo!() }
    /// Every link.
    pub fn links(&mut self) -> Result<Vec<Link>> { todo!() }
    /// Addresses of a link with their prefixes.
    pub fn addresses(&mut self, _link: IfIndex) -> Result<Vec<IpNet>> { todo!() }
    /// Routes of the main table, both families.
    pub fn routes(&mut self) -> Result<Vec<Route>> { todo!() }
    /// Permanent neighbours of a link.
    pub fn permanent_neighbours(&mut self, _link: IfIndex) -> Result<Vec<(IpAddr, MacAddr)>> { todo!() }
    /// The id that this socket's namespace has given to `netns` (RTM_GETNSID), None when it has given none.
    pub fn nsid_of(&mut self, _netns: &Netns) -> Result<Option<i32>> { todo!() }
}

/// Something happened to a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// It appeared or changed.
    Changed(IfIndex),
    /// It is gone.
    Removed(IfIndex),
    /// The kernel dropped events (ENOBUFS): read everything anew.
    Lost,
}

/// A socket that receives the link events (RTNLGRP_LINK) of one namespace; non-blocking, its fd can be polled.
#[derive(Debug)]
pub struct LinkEvents {}

impl LinkEvents {
    /// Subscribes in `netns`.
    pub fn subscribe(_netns: &Netns) -> Result<Self> { todo!() }
    /// Every event that is there now; empty when there is none.
    pub fn read(&mut self) -> Result<Vec<LinkEvent>> { todo!() }
}

impl AsFd for LinkEvents {
    fn as_fd(&self) -> BorrowedFd<'_> { todo!() }
}
