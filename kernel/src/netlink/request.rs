//! One request to the kernel, ready to be sent, with the words that its error will carry.

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkSerializable,
};

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSG_ALIGNTO`.
const ALIGNMENT: usize = 4;

/// A request and what it is, e.g. `create veth pair kbp1/eth0`.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    what: String,
    kind: u16,
    flags: u16,
    payload: Vec<u8>,
}

impl Request {
    /// A request without an acknowledgement of its own: a question, or the frame of a transaction.
    pub(crate) fn new(what: impl Into<String>, message: &impl NetlinkSerializable) -> Self {
        let mut payload = vec![0; message.buffer_len()];
        message.serialize(&mut payload);
        Self {
            what: what.into(),
            kind: message.message_type(),
            flags: NLM_F_REQUEST,
            payload,
        }
    }

    /// A request that changes something, so that the kernel acknowledges it; `flags` says how
    /// (`NLM_F_CREATE`…).
    pub(crate) fn change(
        what: impl Into<String>,
        flags: u16,
        message: &impl NetlinkSerializable,
    ) -> Self {
        Self::new(what, message).with_flags(flags | NLM_F_ACK)
    }

    /// Adds flags.
    pub(crate) fn with_flags(mut self, flags: u16) -> Self {
        self.flags |= flags;
        self
    }

    /// What is tried on what.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    /// Whether an acknowledgement or the end of a dump will come.
    pub(super) fn is_answered(&self) -> bool {
        // Two bits that mean something else on a change, where the acknowledgement is asked for too.
        self.flags & NLM_F_ACK != 0 || self.flags & NLM_F_DUMP == NLM_F_DUMP
    }

    /// Bytes that [`Request::write`] appends.
    pub(super) fn len(&self) -> usize {
        (HEADER + self.payload.len()).next_multiple_of(ALIGNMENT)
    }

    /// Appends the request with its header to `message`.
    pub(super) fn write(&self, sequence: u32, message: &mut Vec<u8>) {
        let mut header = NetlinkHeader::default();
        // A request is at most some kilobytes.
        header.length = (HEADER + self.payload.len()) as u32;
        header.message_type = self.kind;
        header.flags = self.flags;
        header.sequence_number = sequence;
        let start = message.len();
        message.resize(start + HEADER, 0);
        header.emit(&mut message[start..]);
        message.extend_from_slice(&self.payload);
        message.resize(start + self.len(), 0);
    }
}
