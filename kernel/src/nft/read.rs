//! From nf_tables' answers to elements, and the comments in their user data.

use std::net::IpAddr;

use crate::netlink::attributes::{address, attributes, text, u32_be};

/// Length of `struct nfgenmsg`.
const HEADER: usize = 4;

// linux/netfilter/nf_tables.h
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_SET_ELEM_USERDATA: u16 = 6;
const NFT_SET_ELEM_INTERVAL_END: u32 = 1;
const NFTA_GEN_ID: u16 = 1;

/// User data is a sequence of type, length (one byte each) and value; the kernel only keeps it.
/// This type is what nft(8) shows as `comment`: a text with its NUL.
const UDATA_COMMENT: u8 = 0;

/// One element of a set of addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// The address, or in an interval set a bound.
    pub(super) address: IpAddr,
    /// Whether this is the first address after an interval.
    pub(super) is_end: bool,
    /// Its comment, empty when it has none.
    pub(super) comment: String,
}

/// The elements in an answer to NFT_MSG_GETSETELEM.
pub(super) fn elements(payload: &[u8]) -> Vec<Element> {
    attributes(payload.get(HEADER..).unwrap_or_default())
        .filter(|(kind, _)| *kind == NFTA_SET_ELEM_LIST_ELEMENTS)
        .flat_map(|(_, list)| attributes(list))
        .filter(|(kind, _)| *kind == NFTA_LIST_ELEM)
        .filter_map(|(_, bytes)| element(bytes))
        .collect()
}

/// None for one without an address: the catch-all element of an interval set.
fn element(bytes: &[u8]) -> Option<Element> {
    let (mut key, mut is_end, mut comment) = (None, false, String::new());
    for (kind, value) in attributes(bytes) {
        match kind {
            NFTA_SET_ELEM_KEY => {
                let data = attributes(value).find(|(kind, _)| *kind == NFTA_DATA_VALUE);
                key = data.and_then(|(_, bytes)| address(bytes));
            }
            NFTA_SET_ELEM_FLAGS => {
                is_end = u32_be(value).is_some_and(|f| f & NFT_SET_ELEM_INTERVAL_END != 0);
            }
            NFTA_SET_ELEM_USERDATA => comment = comment_of_user_data(value),
            _ => {}
        }
    }
    Some(Element {
        address: key?,
        is_end,
        comment,
    })
}

/// The number in an answer to NFT_MSG_GETGEN.
pub(super) fn generation(payload: &[u8]) -> Option<u32> {
    let (_, value) = attributes(payload.get(HEADER..)?).find(|(kind, _)| *kind == NFTA_GEN_ID)?;
    u32_be(value)
}

/// A comment of at most 254 bytes as user data.
pub(super) fn comment_to_user_data(comment: &str) -> Vec<u8> {
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    let value = comment.bytes().take(usize::from(length) - 1);
    [UDATA_COMMENT, length]
        .into_iter()
        .chain(value)
        .chain([0])
        .collect()
}

fn comment_of_user_data(mut bytes: &[u8]) -> String {
    while let [kind, length, rest @ ..] = bytes {
        let Some((value, after)) = rest.split_at_checked(usize::from(*length)) else {
            break;
        };
        if *kind == UDATA_COMMENT {
            return text(value);
        }
        bytes = after;
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_survives_user_data() {
        let bytes = comment_to_user_data("net/abc/eth0");
        assert_eq!(bytes[..2], [0, 13]);
        assert_eq!(comment_of_user_data(&bytes), "net/abc/eth0");
        // Behind something else, and not at all.
        let behind = [&[9, 2, 7, 7][..], &bytes].concat();
        assert_eq!(comment_of_user_data(&behind), "net/abc/eth0");
        for broken in [&[][..], &[0], &[0, 5, b'a'], &[9, 1, 0]] {
            assert_eq!(comment_of_user_data(broken), "", "{broken:?}");
        }
    }
}
