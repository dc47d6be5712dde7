//! Requests that concern bridges and their ports.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridgePort, InfoKind, InfoPortData, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};

use super::batch::{Batch, link_message};
use crate::{IfIndex, MacAddr, Mtu};

/// A bridge to be created, without spanning tree.
#[derive(Debug, Clone)]
pub struct Bridge<'a> {
    /// Name, at most 15 bytes.
    pub name: &'a str,
    /// MAC; always given, or it would change with the ports, and udev would change it.
    pub mac: MacAddr,
    /// MTU, which the kernel lowers and raises with the ports' (br_mtu_auto_adjust in net/bridge/br_if.c).
    pub mtu: Mtu,
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
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.change(
            format!("create bridge {} with MTU {}", bridge.name, bridge.mtu),
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewLink(message),
        )
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
}
