//! What differs between IPv4 and IPv6 in the table.

use std::net::IpAddr;

/// Sets, header offsets and constants of one address family.
#[derive(Debug)]
pub(super) struct Family {
    /// Set of the masqueraded addresses.
    pub(super) pods: &'static str,
    /// Set of the ranges that are not masqueraded towards.
    pub(super) local: &'static str,
    /// `NFPROTO_*` of linux/netfilter.h.
    pub(super) protocol: u8,
    /// Length of an address in bytes.
    pub(super) length: u32,
    /// nft(8)'s own number of the type, by which it shows elements (`ipv4_addr`, `ipv6_addr`).
    pub(super) key_type: u32,
    /// Offset of the source address in the network header.
    pub(super) source: u32,
    /// Offset of the destination address in the network header.
    pub(super) destination: u32,
    /// First bytes of a multicast address, and the mask under which they are compared; as many
    /// bytes as nft(8) shows as a prefix.
    pub(super) multicast: (&'static [u8], &'static [u8]),
}

const IPV4: Family = Family {
    pods: "pods4",
    local: "local4",
    protocol: libc::NFPROTO_IPV4 as u8,
    length: 4,
    key_type: 7,
    source: 12,
    destination: 16,
    multicast: (&[224, 0, 0, 0], &[240, 0, 0, 0]),
};

const IPV6: Family = Family {
    pods: "pods6",
    local: "local6",
    protocol: libc::NFPROTO_IPV6 as u8,
    length: 16,
    key_type: 8,
    source: 8,
    destination: 24,
    multicast: (&[0xff], &[0xff]),
};

impl Family {
    /// Both.
    pub(super) const ALL: [&'static Self; 2] = [&IPV4, &IPV6];

    /// The family of an address.
    pub(super) fn of(address: IpAddr) -> &'static Self {
        if address.is_ipv4() { &IPV4 } else { &IPV6 }
    }
}
