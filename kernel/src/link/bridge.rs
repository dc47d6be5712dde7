//! Requests that concern bridges and their ports.

use std::fmt;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    AfSpecBridge, BridgeVlanInfo, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::batch::{Batch, link_message};
use super::{RouteSocket, read};
use crate::netlink::Request;
use crate::{IfIndex, MacAddr, Mtu, Result};

/// Number of a VLAN (IEEE 802.1Q), 1 to 4094.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VlanId(pub u16);

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The VLAN that the kernel makes every new port an untagged member of, unless the bridge says otherwise
/// (`vlan_default_pvid`).
pub const DEFAULT_VLAN: VlanId = VlanId(1);

/// `RTEXT_FILTER_BRVLAN` of linux/rtnetlink.h: list the VLANs of ports.
const RTEXT_FILTER_BRVLAN: u32 = 1 << 1;

/// What a bridge's port is in one VLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortVlan {
    /// The VLAN.
    pub vlan: VlanId,
    /// Whether what comes untagged belongs to it.
    pub pvid: bool,
    /// Whether its frames leave untagged.
    pub untagged: bool,
}

/// A bridge to be created, without spanning tree.
#[derive(Debug, Clone)]
pub struct Bridge<'a> {
    /// Name, at most 15 bytes.
    pub name: &'a str,
    /// MAC; always given, or it would change with the ports, and udev would change it.
    pub mac: MacAddr,
    /// MTU, which the kernel lowers and raises with the ports' (br_mtu_auto_adjust in net/bridge/br_if.c).
    pub mtu: Mtu,
    /// Whether the ports' VLANs are kept apart. A kernel without CONFIG_BRIDGE_VLAN_FILTERING refuses it (EOPNOTSUPP).
    pub vlan_filtering: bool,
}

impl Batch {
    /// Creates a bridge that is up; fails when the name is taken.
    pub fn create_bridge(&mut self, bridge: &Bridge<'_>) -> &mut Self {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::IfName(bridge.name.to_owned()),
            LinkAttribute::Address(bridge.mac.0.to_vec()),
            LinkAttribute::Mtu(bridge.mtu.0),
            match bridge.vlan_filtering {
                true => filtering(true),
                // A kernel that cannot refuses to be told so.
                false => LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
            },
        ];
        self.change(
            format!("create bridge {} with MTU {}", bridge.name, bridge.mtu),
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewLink(message),
        )
    }

    /// Has a bridge keep its ports' VLANs apart, or not; refused (EOPNOTSUPP) as in [`Bridge::vlan_filtering`].
    pub fn set_vlan_filtering(&mut self, bridge: IfIndex, on: bool) -> &mut Self {
        let message = link_message(bridge, vec![filtering(on)]);
        let state = if on { "on" } else { "off" };
        let what = format!("switch VLAN filtering of bridge {bridge} {state}");
        self.change(what, 0, RouteNetlinkMessage::NewLink(message))
    }

    /// Makes `port` a port of `bridge`.
    pub fn set_master(&mut self, port: IfIndex, bridge: IfIndex) -> &mut Self {
        let message = link_message(port, vec![LinkAttribute::Controller(bridge.0)]);
        let what = format!("make link {port} a port of bridge {bridge}");
        self.change(what, 0, RouteNetlinkMessage::SetLink(message))
    }

    /// Lets a bridge's port send a frame back out of itself, or not.
    pub fn set_hairpin(&mut self, port: IfIndex, on: bool) -> &mut Self {
        let message = link_message(
            port,
            vec![LinkAttribute::LinkInfo(vec![
                LinkInfo::PortKind(InfoPortKind::Bridge),
                LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(
                    on,
                )])),
            ])],
        );
        let state = if on { "on" } else { "off" };
        let what = format!("switch hairpin mode of bridge port {port} {state}");
        // Only RTM_NEWLINK looks at the port's part of IFLA_LINKINFO.
        self.change(what, 0, RouteNetlinkMessage::NewLink(message))
    }

    /// Makes a bridge's port an untagged member of a VLAN, and that the VLAN of what comes untagged.
    pub fn set_port_vlan(&mut self, port: IfIndex, vlan: VlanId) -> &mut Self {
        let flags = BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged;
        let message = RouteNetlinkMessage::SetLink(vlan_message(port, flags, vlan));
        self.change(
            format!("make bridge port {port} an untagged member of VLAN {vlan}"),
            0,
            message,
        )
    }

    /// Takes a bridge's port out of a VLAN.
    pub fn delete_port_vlan(&mut self, port: IfIndex, vlan: VlanId) -> &mut Self {
        let message = vlan_message(port, BridgeVlanInfoFlags::empty(), vlan);
        let message = RouteNetlinkMessage::DelLink(message);
        self.change(
            format!("take bridge port {port} out of VLAN {vlan}"),
            0,
            message,
        )
    }
}

impl RouteSocket {
    /// The VLANs that a bridge's port is in; none of a port of a bridge that does not filter.
    pub fn port_vlans(&mut self, port: IfIndex) -> Result<Vec<PortVlan>> {
        let mut message = LinkMessage::default();
        message.header.interface_family = AddressFamily::Bridge;
        message.attributes = vec![LinkAttribute::Other(DefaultNla::new(
            libc::IFLA_EXT_MASK,
            RTEXT_FILTER_BRVLAN.to_ne_bytes().to_vec(),
        ))];
        let message = RouteNetlinkMessage::GetLink(message);
        let what = format!("list the VLANs of bridge port {port}");
        let found = self
            .socket
            .dump(Request::new(what, &message), |kind, payload| {
                let found = (kind == libc::RTM_NEWLINK).then(|| read::port_vlans(payload));
                Ok(found
                    .flatten()
                    .filter(|(of, _)| *of == port)
                    .map(|(_, vlans)| vlans))
            })?;
        Ok(found.into_iter().flatten().collect())
    }
}

fn filtering(on: bool) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::VlanFiltering(on)])),
    ])
}

/// A request of the bridge family; `flags` are `BRIDGE_VLAN_INFO_*` of linux/if_bridge.h.
fn vlan_message(port: IfIndex, flags: BridgeVlanInfoFlags, vlan: VlanId) -> LinkMessage {
    let info = BridgeVlanInfo { flags, vid: vlan.0 };
    let mut message = link_message(
        port,
        vec![LinkAttribute::AfSpecBridge(vec![AfSpecBridge::VlanInfo(
            info,
        )])],
    );
    message.header.interface_family = AddressFamily::Bridge;
    message
}
