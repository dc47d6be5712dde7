//! Generic netlink: messages of a family, and the controller that knows the families' ids.

use netlink_packet_core::{DefaultNla, Emitable, NetlinkSerializable};

use super::attributes::{attributes, text_attribute, u16_at};
use super::{Protocol, Request, Socket};
use crate::{Error, Result};

/// Length of `struct genlmsghdr`.
pub(crate) const GENERIC_HEADER: usize = 4;

// The controller itself, linux/genetlink.h.
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// A message of a generic netlink family.
#[derive(Debug)]
pub(crate) struct GenericMessage {
    /// Id of the family.
    pub(crate) family: u16,
    /// Command of the family.
    pub(crate) command: u8,
    /// Attributes of the command.
    pub(crate) attributes: Vec<DefaultNla>,
}

impl NetlinkSerializable for GenericMessage {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        GENERIC_HEADER + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (header, attributes) = buffer.split_at_mut(GENERIC_HEADER);
        // Version 1, and two reserved bytes.
        header.copy_from_slice(&[self.command, 1, 0, 0]);
        self.attributes.as_slice().emit(attributes);
    }
}

/// Opens a generic netlink socket in the calling thread's namespace and looks the family up;
/// [`Error::Unsupported`], naming `feature`, when the kernel does not have it.
pub(crate) fn open_family(name: &str, feature: &'static str) -> Result<(Socket, u16)> {
    let mut socket = Socket::open(Protocol::Generic)?;
    let message = GenericMessage {
        family: GENL_ID_CTRL,
        command: CTRL_CMD_GETFAMILY,
        attributes: vec![text_attribute(CTRL_ATTR_FAMILY_NAME, name)],
    };
    let what = format!("look up the netlink family {name}");
    let found = socket.query(Request::new(what.clone(), &message), |_, payload| {
        let id = attributes(payload.get(GENERIC_HEADER..).unwrap_or_default())
            .find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID)
            .and_then(|(_, value)| u16_at(value, 0));
        Ok(id)
    });
    let ids = found.map_err(|error| match error.errno() {
        Some(libc::ENOENT) => Error::Unsupported {
            feature,
            reason: format!("this kernel has no netlink family {name}"),
        },
        _ => error,
    })?;
    let id = ids.first().copied().ok_or_else(|| Error::Protocol {
        what,
        detail: "the answer has no id".to_owned(),
    })?;
    Ok((socket, id))
}
