//! Requests that change links, addresses, routes, neighbours and qdiscs.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeader, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Route, VethPair};
use crate::netlink::Request;
use crate::{IfIndex, MacAddr, Mtu};

/// Requests that are sent to the kernel in one message and answered one by one.
/// The kernel carries out every request of a batch, also those after a failed one; the caller undoes.
///
/// ```no_run
/// use kbp_kernel::IfIndex;
/// use kbp_kernel::link::{Batch, RouteSocket};
///
/// let mut batch = Batch::new();
/// batch
///     .set_up(IfIndex(2))
///     .add_address(IfIndex(2), "10.88.0.2/32".parse().expect("an address"), true);
/// RouteSocket::open()?.execute(&batch)?;
/// # Ok::<(), kbp_kernel::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Batch {
    requests: Vec<Request>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a veth pair; fails when either name is taken.
    pub fn create_veth(&mut self, pair: &VethPair<'_>) -> &mut Self {
        self.create_pair(pair, 1, None, LinkFlags::Up)
    }

    /// Creates a veth pair with that many queue pairs at each end, each with a NAPI instance of its own, and with
    /// the host end a port of `bridge`; fails when either name is taken. Both ends are down: a qdisc that is
    /// replaced on a link that is up costs an RCU grace period under the kernel's RTNL lock (dev_deactivate_many
    /// in net/sched/sch_generic.c).
    pub fn create_veth_with(
        &mut self,
        pair: &VethPair<'_>,
        queues: u32,
        bridge: Option<IfIndex>,
    ) -> &mut Self {
        self.create_pair(pair, queues, bridge, LinkFlags::empty())
    }

    fn create_pair(
        &mut self,
        pair: &VethPair<'_>,
        queues: u32,
        bridge: Option<IfIndex>,
        host_flags: LinkFlags,
    ) -> &mut Self {
        let end = |name: &str, mac: MacAddr| {
            let mut message = LinkMessage::default();
            message.attributes = vec![
                LinkAttribute::IfName(name.to_owned()),
                LinkAttribute::Address(mac.0.to_vec()),
                LinkAttribute::Mtu(pair.mtu.0),
                LinkAttribute::TxQueueLen(pair.tx_queue_len),
                // With one each there is one NAPI instance, and every socket of the pod is on it.
                LinkAttribute::NumTxQueues(queues),
                LinkAttribute::NumRxQueues(queues),
            ];
            message
        };
        let mut pod = end(pair.pod_name, pair.pod_mac);
        pod.attributes
            .push(LinkAttribute::NetNsFd(pair.pod_netns.as_fd().as_raw_fd()));
        let mut host = end(pair.host_name, pair.host_mac);
        host.header.flags = host_flags;
        host.header.change_mask = LinkFlags::Up;
        host.attributes
            .extend(bridge.map(|bridge| LinkAttribute::Controller(bridge.0)));
        host.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(pod))),
        ]));
        self.change(
            format!(
                "create veth pair {} with {} in the pod and MTU {}",
                pair.host_name, pair.pod_name, pair.mtu
            ),
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewLink(host),
        )
    }

    /// Sets IFF_UP.
    pub fn set_up(&mut self, link: IfIndex) -> &mut Self {
        self.set_flags(format!("set link {link} up"), link, LinkFlags::Up)
    }

    /// Clears IFF_UP.
    pub fn set_down(&mut self, link: IfIndex) -> &mut Self {
        self.set_flags(format!("set link {link} down"), link, LinkFlags::empty())
    }

    fn set_flags(&mut self, what: String, link: IfIndex, flags: LinkFlags) -> &mut Self {
        let mut message = link_message(link, vec![]);
        message.header.flags = flags;
        message.header.change_mask = LinkFlags::Up;
        self.change(what, 0, RouteNetlinkMessage::SetLink(message))
    }

    /// Deletes a link (of a veth, both ends).
    pub fn delete_link(&mut self, link: IfIndex) -> &mut Self {
        let message = RouteNetlinkMessage::DelLink(link_message(link, vec![]));
        self.change(format!("delete link {link}"), 0, message)
    }

    /// Sets the MTU.
    pub fn set_mtu(&mut self, link: IfIndex, mtu: Mtu) -> &mut Self {
        let message = link_message(link, vec![LinkAttribute::Mtu(mtu.0)]);
        let what = format!("set the MTU of link {link} to {mtu}");
        self.change(what, 0, RouteNetlinkMessage::SetLink(message))
    }

    /// Sets the alias, at most 255 bytes; an empty one removes it.
    pub fn set_alias(&mut self, link: IfIndex, alias: &str) -> &mut Self {
        let message = link_message(link, vec![alias_attribute(alias)]);
        let what = format!("set the alias of link {link} to {alias:?}");
        self.change(what, 0, RouteNetlinkMessage::SetLink(message))
    }

    /// Sets the alias, at most 255 bytes, of a link that the same batch creates: the kernel takes no alias with a
    /// new link, and in one batch nothing comes between, not even the death of this process.
    pub fn set_alias_of(&mut self, name: &str, alias: &str) -> &mut Self {
        let attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            alias_attribute(alias),
        ];
        let message = link_message(IfIndex(0), attributes);
        let what = format!("set the alias of link {name} to {alias:?}");
        self.change(what, 0, RouteNetlinkMessage::SetLink(message))
    }

    /// Adds an address without duplicate address detection (IFA_F_NODAD on v6).
    /// `no_prefix_route`: IFA_F_NOPREFIXROUTE, no route to the address' own prefix.
    pub fn add_address(
        &mut self,
        link: IfIndex,
        address: IpNet,
        no_prefix_route: bool,
    ) -> &mut Self {
        let mut flags = AddressFlags::Nodad;
        flags.set(AddressFlags::Noprefixroute, no_prefix_route);
        let mut message = AddressMessage::default();
        message.header = AddressHeader {
            family: family(address.addr()),
            prefix_len: address.prefix_len(),
            flags: AddressHeaderFlags::Nodad,
            scope: if address.addr().is_loopback() {
                AddressScope::Host
            } else {
                AddressScope::Universe
            },
            index: link.0,
        };
        message.attributes = vec![
            AddressAttribute::Local(address.addr()),
            AddressAttribute::Address(address.addr()),
            AddressAttribute::Flags(flags),
        ];
        self.change(
            format!("add address {address} to link {link}"),
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewAddress(message),
        )
    }

    /// Deletes an address.
    pub fn delete_address(&mut self, link: IfIndex, address: IpNet) -> &mut Self {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = link.0;
        message.attributes = vec![
            AddressAttribute::Local(address.addr()),
            AddressAttribute::Address(address.addr()),
        ];
        self.change(
            format!("delete address {address} from link {link}"),
            0,
            RouteNetlinkMessage::DelAddress(message),
        )
    }

    /// Adds a route (NLM_F_CREATE|NLM_F_EXCL).
    pub fn add_route(&mut self, route: &Route) -> &mut Self {
        self.change(
            format!("add route {route}"),
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewRoute(route_message(route)),
        )
    }

    /// Adds or replaces a route.
    pub fn replace_route(&mut self, route: &Route) -> &mut Self {
        self.change(
            format!("replace route {route}"),
            NLM_F_CREATE | NLM_F_REPLACE,
            RouteNetlinkMessage::NewRoute(route_message(route)),
        )
    }

    /// Deletes a route.
    pub fn delete_route(&mut self, route: &Route) -> &mut Self {
        let message = RouteNetlinkMessage::DelRoute(route_message(route));
        self.change(format!("delete route {route}"), 0, message)
    }

    /// Adds a permanent neighbour (NUD_PERMANENT), replacing an old entry.
    pub fn add_neighbour(&mut self, link: IfIndex, address: IpAddr, mac: MacAddr) -> &mut Self {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = link.0;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(match address {
                IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
                IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
            }),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        self.change(
            format!("add permanent neighbour {address} at {mac} to link {link}"),
            NLM_F_CREATE | NLM_F_REPLACE,
            RouteNetlinkMessage::NewNeighbour(message),
        )
    }

    /// Replaces the root qdisc by a `pfifo` of `limit` packets.
    pub fn set_pfifo(&mut self, link: IfIndex, limit: u32) -> &mut Self {
        let mut message = TcMessage::default();
        // An ifindex is a positive i32 in the kernel.
        message.header.index = link.0 as i32;
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![
            TcAttribute::Kind("pfifo".to_owned()),
            // struct tc_fifo_qopt: the limit and nothing else.
            TcAttribute::Other(DefaultNla::new(
                libc::TCA_OPTIONS,
                limit.to_ne_bytes().to_vec(),
            )),
        ];
        self.change(
            format!("set qdisc pfifo of {limit} packets on link {link}"),
            NLM_F_CREATE | NLM_F_REPLACE,
            RouteNetlinkMessage::NewQueueDiscipline(message),
        )
    }

    /// Deletes the root qdisc: the link gets its kind's default one back (a veth none).
    pub fn delete_qdisc(&mut self, link: IfIndex) -> &mut Self {
        let mut message = TcMessage::default();
        // An ifindex is a positive i32 in the kernel.
        message.header.index = link.0 as i32;
        message.header.parent = TcHandle::ROOT;
        let message = RouteNetlinkMessage::DelQueueDiscipline(message);
        self.change(format!("delete the root qdisc of link {link}"), 0, message)
    }

    /// Number of requests.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is no request.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// The requests in order.
    pub(super) fn requests(&self) -> &[Request] {
        &self.requests
    }

    pub(super) fn change(
        &mut self,
        what: String,
        flags: u16,
        message: RouteNetlinkMessage,
    ) -> &mut Self {
        self.requests.push(Request::change(what, flags, &message));
        self
    }
}

pub(super) fn link_message(link: IfIndex, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = link.0;
    message.attributes = attributes;
    message
}

/// Without the NUL that LinkAttribute::IfAlias adds: the kernel removes an alias only when the value is empty.
fn alias_attribute(alias: &str) -> LinkAttribute {
    LinkAttribute::Other(DefaultNla::new(
        libc::IFLA_IFALIAS,
        alias.as_bytes().to_vec(),
    ))
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(route.destination.addr()),
        destination_prefix_length: route.destination.prefix_len(),
        // The attribute below says it; this field holds only a byte.
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: RouteProtocol::Static,
        scope: match (route.scope, route.gateway) {
            (Some(scope), _) => scope.into(),
            (None, None) if route.destination.addr().is_ipv4() => RouteScope::Link,
            _ => RouteScope::Universe,
        },
        kind: RouteType::Unicast,
        flags: if route.onlink {
            RouteFlags::Onlink
        } else {
            RouteFlags::empty()
        },
        ..RouteHeader::default()
    };
    let table = route.table.unwrap_or(u32::from(RouteHeader::RT_TABLE_MAIN));
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(table));
    attributes.push(RouteAttribute::Oif(route.device.0));
    if route.destination.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(route_address(
            route.destination.network(),
        )));
    }
    match route.gateway {
        Some(gateway) if gateway.is_ipv4() == route.destination.addr().is_ipv4() => {
            attributes.push(RouteAttribute::Gateway(route_address(gateway)));
        }
        Some(gateway) => attributes.push(RouteAttribute::Via(RouteVia::from(gateway))),
        None => {}
    }
    attributes.extend(
        route
            .source
            .map(|s| RouteAttribute::PrefSource(route_address(s))),
    );
    attributes.extend(route.priority.map(RouteAttribute::Priority));
    let metrics: Vec<_> = [
        route.mtu.map(|mtu| RouteMetric::Mtu(mtu.0)),
        route.advmss.map(RouteMetric::Advmss),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
