//! Reading and making netlink attributes.
//!
//! A value that is shorter than its type is like one that is not there: what cannot do without it
//! says so, the rest goes on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{DefaultNla, Emitable, NLA_HEADER_SIZE, NlasIterator};

/// Type and value of every attribute in `bytes`, up to the first malformed one.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes)
        .map_while(Result::ok)
        .map(|attribute| {
            let (kind, length) = (attribute.kind(), attribute.value_length());
            let whole: &[u8] = attribute.into_inner();
            (
                kind,
                whole
                    .get(NLA_HEADER_SIZE..NLA_HEADER_SIZE + length)
                    .unwrap_or_default(),
            )
        })
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// A native u8 at `offset`.
pub(crate) fn u8_at(bytes: &[u8], offset: usize) -> Option<u8> {
    bytes.get(offset).copied()
}

/// A native u16 at `offset`.
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array(bytes, offset).map(u16::from_ne_bytes)
}

/// A native u32 at `offset`.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array(bytes, offset).map(u32::from_ne_bytes)
}

/// A native i32 at `offset`.
pub(crate) fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    array(bytes, offset).map(i32::from_ne_bytes)
}

/// A native u64 at `offset`.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array(bytes, offset).map(u64::from_ne_bytes)
}

/// A big-endian u32 (nf_tables).
pub(crate) fn u32_be(bytes: &[u8]) -> Option<u32> {
    array(bytes, 0).map(u32::from_be_bytes)
}

/// A text that may end with NUL.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A native u32.
pub(crate) fn u32_attribute(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

/// A native u64.
pub(crate) fn u64_attribute(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

/// A text that ends with NUL.
pub(crate) fn text_attribute(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, format!("{value}\0").into_bytes())
}

/// An attribute of attributes, with the flag that says so: newer families insist on it.
pub(crate) fn nested_attribute(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; inner.buffer_len()];
    inner.emit(&mut value);
    DefaultNla::new(kind | libc::NLA_F_NESTED as u16, value)
}

/// An address in network byte order; its length tells the family.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => array::<4>(bytes, 0).map(|octets| Ipv4Addr::from(octets).into()),
        16 => array::<16>(bytes, 0).map(|octets| Ipv6Addr::from(octets).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_a_malformed_attribute() {
        let mut bytes = Vec::new();
        for (length, kind, value) in [(5u16, 1u16, [7u8, 0, 0, 0]), (8, 2, [1, 2, 3, 4])] {
            bytes.extend(length.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
        }
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read, [(1, &[7][..]), (2, &[1, 2, 3, 4][..])]);
        // A length beyond the end, and one below the header's.
        for length in [40u16, 3] {
            bytes[8..10].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&bytes).count(), 1, "{length}");
        }
    }

    #[test]
    fn short_values_are_absent() {
        assert_eq!(u32_at(&[1, 2, 3], 0), None);
        assert_eq!(u32_at(&[0; 8], 5), None);
        assert_eq!(u32_at(&[0; 8], 50), None);
        assert_eq!(address(&[127, 0, 0, 1]), Some(IpAddr::from([127, 0, 0, 1])));
        assert_eq!(address(&[1; 5]), None);
        assert_eq!(text(b"lo\0rest"), "lo");
        assert_eq!(text(b"lo"), "lo");
    }
}
