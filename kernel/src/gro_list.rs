//! `rx-gro-list` of a link (NETIF_F_GRO_FRAGLIST), which has no ioctl of its own: by the ethtool generic netlink family (5.6+).
//!
//! Where it is on, GRO chains datagrams of one flow that a poll finds together. They go through the filters and the routing of the host as one, and
//! come apart before a socket takes them. It is also what makes a veth's sender hand its own datagrams to the NAPI of the other end
//! although the sender has TSO on (`veth_skb_is_eligible_for_gro` in drivers/net/veth.c): TCP then goes as on any veth, UDP can be polled.

use netlink_packet_core::DefaultNla;

use crate::netlink::attributes::{
    attributes, nested_attribute, text, text_attribute, u32_attribute,
};
use crate::netlink::{GENERIC_HEADER, GenericMessage, Request, Socket, open_family};
use crate::netns::Netns;
use crate::{Error, IfIndex, Result};

// linux/ethtool_netlink.h
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_FEATURES_SET: u8 = 12;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_HEADER_FLAGS: u16 = 3;
const ETHTOOL_FLAG_OMIT_REPLY: u32 = 1 << 1;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_WANTED: u16 = 3;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BITS_BIT: u16 = 1;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;
const ETHTOOL_A_BITSET_BIT_VALUE: u16 = 3;

const NAME: &str = "rx-gro-list";
const FEATURE: &str = "chaining datagrams in GRO (rx-gro-list)";

/// A socket of the `ethtool` family inside one network namespace.
#[derive(Debug)]
pub struct GroList {
    socket: Socket,
    family: u16,
}

impl GroList {
    /// Opens one in `netns`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel has no such family (before 5.6), [`Error::Syscall`] when the namespace cannot be entered.
    pub fn open_in(netns: &Netns) -> Result<Self> {
        let (socket, family) = netns.run(|| open_family("ethtool", FEATURE))??;
        Ok(Self { socket, family })
    }

    /// Whether it is on.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such link.
    pub fn is_on(&mut self, link: IfIndex) -> Result<bool> {
        let message = self.message(ETHTOOL_MSG_FEATURES_GET, vec![header(link, 0)]);
        let request = Request::new(format!("read {NAME} of link {link}"), &message);
        let found = self.socket.query(request, |_, payload| {
            let payload = payload.get(GENERIC_HEADER..).unwrap_or_default();
            Ok(Some(active(payload).any(|name| name == NAME)))
        });
        let found = found.map_err(|error| error.of_link(link))?;
        Ok(found.contains(&true))
    }

    /// Switches it, and reads it back. The NAPI instance stays.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such link, [`Error::Unsupported`] when the kernel does not know it or the device does not take it over.
    pub fn set(&mut self, link: IfIndex, on: bool) -> Result<()> {
        let mut bit = vec![text_attribute(ETHTOOL_A_BITSET_BIT_NAME, NAME)];
        if on {
            bit.push(DefaultNla::new(ETHTOOL_A_BITSET_BIT_VALUE, Vec::new()));
        }
        let bits = nested_attribute(
            ETHTOOL_A_BITSET_BITS,
            &[nested_attribute(ETHTOOL_A_BITSET_BITS_BIT, &bit)],
        );
        let message = self.message(
            ETHTOOL_MSG_FEATURES_SET,
            vec![
                header(link, ETHTOOL_FLAG_OMIT_REPLY),
                nested_attribute(ETHTOOL_A_FEATURES_WANTED, &[bits]),
            ],
        );
        let state = if on { "on" } else { "off" };
        let what = format!("switch {NAME} of link {link} {state}");
        self.socket
            .transact(&[Request::change(what, 0, &message)])
            .map_err(|error| match error.errno() {
                Some(libc::EINVAL | libc::EOPNOTSUPP) => Error::Unsupported {
                    feature: FEATURE,
                    reason: error.to_string(),
                },
                _ => error.of_link(link),
            })?;
        if self.is_on(link)? == on {
            return Ok(());
        }
        Err(Error::Unsupported {
            feature: FEATURE,
            reason: format!("link {link} does not take it over"),
        })
    }

    fn message(&self, command: u8, attributes: Vec<DefaultNla>) -> GenericMessage {
        GenericMessage {
            family: self.family,
            command,
            attributes,
        }
    }
}

fn header(link: IfIndex, flags: u32) -> DefaultNla {
    nested_attribute(
        ETHTOOL_A_FEATURES_HEADER,
        &[
            u32_attribute(ETHTOOL_A_HEADER_DEV_INDEX, link.0),
            u32_attribute(ETHTOOL_A_HEADER_FLAGS, flags),
        ],
    )
}

/// Names of the features that are on: a list of bits without a mask.
fn active(payload: &[u8]) -> impl Iterator<Item = String> + '_ {
    let of = |kind: u16| {
        move |(found, value)| {
            let found: u16 = found;
            (found & libc::NLA_TYPE_MASK as u16 == kind).then_some(value)
        }
    };
    attributes(payload)
        .filter_map(of(ETHTOOL_A_FEATURES_ACTIVE))
        .flat_map(attributes)
        .filter_map(of(ETHTOOL_A_BITSET_BITS))
        .flat_map(attributes)
        .filter_map(of(ETHTOOL_A_BITSET_BITS_BIT))
        .flat_map(attributes)
        .filter_map(of(ETHTOOL_A_BITSET_BIT_NAME))
        .map(text)
}
