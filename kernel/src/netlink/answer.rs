//! What the kernel sends back: acknowledgements with their extended text, ends of dumps, objects.

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP,
    NLMSG_OVERRUN, NetlinkBuffer,
};

use super::attributes::{attributes, i32_at, text, u32_at};

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG` of linux/netlink.h.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Why the kernel refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// Positive errno.
    pub(super) errno: i32,
    /// Text of the extended acknowledgement.
    pub(super) text: Option<String>,
}

/// One answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<'a> {
    /// The request, or the dump, is done; None: well.
    Done(Option<Failure>),
    /// An object.
    Message {
        /// `nlmsg_type`.
        kind: u16,
        /// What follows the netlink header.
        payload: &'a [u8],
    },
}

/// An answer and the request that it is for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Addressed<'a> {
    /// Sequence number of the request.
    pub(super) sequence: u32,
    /// The dump was interrupted by a change.
    pub(super) interrupted: bool,
    /// The answer.
    pub(super) body: Answer<'a>,
}

/// The answers in one received datagram; an error says what is wrong with the datagram.
pub(super) fn answers(datagram: &[u8]) -> impl Iterator<Item = Result<Addressed<'_>, String>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else {
                let length = rest.len();
                rest = &[];
                return Some(Err(format!(
                    "{length} bytes that are not a netlink message"
                )));
            };
            let length = (message.length() as usize).clamp(HEADER, rest.len());
            let (whole, after) = (&rest[..length], rest.get(length.next_multiple_of(4)..));
            rest = after.unwrap_or_default();
            if let Some(answer) = read(message.message_type(), message.flags(), &whole[HEADER..]) {
                return Some(answer.map(|body| Addressed {
                    sequence: message.sequence_number(),
                    interrupted: message.flags() & NLM_F_DUMP_INTR != 0,
                    body,
                }));
            }
        }
        None
    })
}

fn read(kind: u16, flags: u16, payload: &[u8]) -> Option<Result<Answer<'_>, String>> {
    Some(Ok(match kind {
        NLMSG_NOOP => return None,
        NLMSG_OVERRUN => return Some(Err("data was lost (NLMSG_OVERRUN)".to_owned())),
        NLMSG_ERROR => {
            // struct nlmsgerr: the errno, then the request's header, or with NLM_F_CAPPED unset the
            // whole request, then the attributes of the extended acknowledgement.
            let Some(errno) = i32_at(payload, 0) else {
                return Some(Err("an acknowledgement without an errno".to_owned()));
            };
            let echoed = match (flags & NLM_F_CAPPED != 0, u32_at(payload, 4)) {
                (false, Some(length)) => (length as usize).max(HEADER),
                _ => HEADER,
            };
            Answer::Done(failure(
                errno,
                flags,
                payload.get((4 + echoed).next_multiple_of(4)..),
            ))
        }
        // Old kernels end a dump without an errno.
        NLMSG_DONE => match i32_at(payload, 0) {
            Some(errno) => Answer::Done(failure(errno, flags, payload.get(4..))),
            None => Answer::Done(None),
        },
        kind => Answer::Message { kind, payload },
    }))
}

/// `errno` is negative, as the kernel sends it, or 0; a dump that ended well may also say how many
/// bytes it had.
fn failure(errno: i32, flags: u16, extended: Option<&[u8]>) -> Option<Failure> {
    let text = extended
        .filter(|_| flags & NLM_F_ACK_TLVS != 0)
        .and_then(|tlvs| attributes(tlvs).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG))
        .map(|(_, value)| text(value));
    if errno < 0 {
        return Some(Failure {
            errno: -errno,
            text,
        });
    }
    if let Some(text) = text {
        tracing::debug!("the kernel remarks: {text}");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER + payload.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((4 + value.len()) as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn error(errno: i32, echoed: &[u8], text: &str) -> Vec<u8> {
        let mut payload = errno.to_ne_bytes().to_vec();
        payload.extend(echoed);
        payload.extend(attribute(NLMSGERR_ATTR_MSG, format!("{text}\0").as_bytes()));
        payload
    }

    #[test]
    fn extended_text_is_found_behind_a_capped_and_a_whole_request() {
        let request = message(16, 0, 7, &[1, 2, 3, 4, 5, 6]);
        let capped = message(
            NLMSG_ERROR,
            NLM_F_CAPPED | NLM_F_ACK_TLVS,
            7,
            &error(-17, &request[..HEADER], "taken"),
        );
        let whole = message(
            NLMSG_ERROR,
            NLM_F_ACK_TLVS,
            8,
            &error(-22, &request, "wrong"),
        );
        let datagram = [capped, whole].concat();
        let read: Vec<_> = answers(&datagram).map(|a| a.expect("readable")).collect();
        let failed = |errno, text: &str| {
            Answer::Done(Some(Failure {
                errno,
                text: Some(text.to_owned()),
            }))
        };
        assert_eq!(read[0].body, failed(17, "taken"));
        assert_eq!(read[0].sequence, 7);
        assert_eq!(read[1].body, failed(22, "wrong"));
        assert_eq!(read.len(), 2);
    }

    #[test]
    fn the_end_of_a_dump_may_fail_and_may_be_interrupted() {
        let datagram = [
            message(24, NLM_F_DUMP_INTR, 3, &[9; 5]),
            message(NLMSG_DONE, 0, 3, &(-2i32).to_ne_bytes()),
            message(NLMSG_DONE, 0, 4, &64i32.to_ne_bytes()),
            message(NLMSG_DONE, 0, 5, &[]),
        ]
        .concat();
        let read: Vec<_> = answers(&datagram).map(|a| a.expect("readable")).collect();
        assert!(read[0].interrupted);
        assert_eq!(
            read[0].body,
            Answer::Message {
                kind: 24,
                payload: &[9; 5]
            }
        );
        assert_eq!(
            read[1].body,
            Answer::Done(Some(Failure {
                errno: 2,
                text: None
            }))
        );
        assert_eq!(read[2].body, Answer::Done(None));
        assert_eq!(read[3].body, Answer::Done(None));
    }

    #[test]
    fn a_broken_datagram_is_an_error_and_ends_it() {
        for broken in [vec![1; 9], message(16, 0, 1, &[0; 40])[..30].to_vec()] {
            let read: Vec<_> = answers(&broken).collect();
            assert_eq!(read.len(), 1, "{read:?}");
            assert!(read[0].is_err(), "{read:?}");
        }
        let overrun = message(NLMSG_OVERRUN, 0, 1, &[]);
        assert!(answers(&overrun).next().expect("one").is_err());
        let silent = message(NLMSG_NOOP, 0, 1, &[]);
        assert!(answers(&silent).next().is_none());
    }
}
