//! Telling a link's neighbours who has an address now: gratuitous ARP (RFC 5227 section 3) and unsolicited
//! neighbour advertisement (RFC 4861 section 7.2.6). Who still has an earlier owner's MAC takes the new one.

use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::netns::Netns;
use crate::sys::{check, errno};
use crate::{IfIndex, MacAddr, Result};

const BROADCAST: MacAddr = MacAddr([0xff; 6]);
/// Where Ethernet carries ff02::1 (RFC 2464 section 7).
const ALL_NODES_MAC: MacAddr = MacAddr([0x33, 0x33, 0, 0, 0, 1]);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Sends one announcement for each address out of `link`, which is up and has the MAC `mac`. That somebody takes
/// notice is not awaited.
///
/// # Errors
/// When the kernel does not take a frame.
pub fn announce(netns: &Netns, link: IfIndex, mac: MacAddr, addresses: &[IpAddr]) -> Result<()> {
    if addresses.is_empty() {
        return Ok(());
    }
    let open = || {
        socket(
            AddressFamily::Packet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
    };
    let socket = netns
        .run(open)?
        .map_err(errno(|| format!("open a packet socket for link {link}")))?;
    for address in addresses {
        match address {
            IpAddr::V4(v4) => {
                let packet = arp(mac, *v4);
                send(&socket, link, libc::ETH_P_ARP, BROADCAST, &packet, *address)?;
            }
            IpAddr::V6(v6) => {
                let packet = advertisement(mac, *v6);
                send(
                    &socket,
                    link,
                    libc::ETH_P_IPV6,
                    ALL_NODES_MAC,
                    &packet,
                    *address,
                )?;
            }
        }
    }
    Ok(())
}

/// An ARP request for the sender's own address.
fn arp(mac: MacAddr, address: Ipv4Addr) -> Vec<u8> {
    // Ethernet, IPv4, their lengths, request.
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(mac.0);
    packet.extend(address.octets());
    packet.extend([0; 6]);
    packet.extend(address.octets());
    packet
}

/// An IPv6 packet with a neighbour advertisement that overrides what others remember.
fn advertisement(mac: MacAddr, address: Ipv6Addr) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    const OVERRIDE: u8 = 0x20;
    // Type 136, code 0, no checksum yet, flags.
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    // Target link-layer address: option 2, one unit of eight bytes.
    message.extend([2, 1]);
    message.extend(mac.0);
    // 32 bytes: it fits.
    let length = message.len() as u16;

    let mut pseudo_header = Vec::with_capacity(40);
    pseudo_header.extend(address.octets());
    pseudo_header.extend(ALL_NODES.octets());
    pseudo_header.extend(u32::from(length).to_be_bytes());
    pseudo_header.extend([0, 0, 0, ICMPV6]);
    let checksum = checksum(pseudo_header.iter().chain(&message));
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    // Version 6; a hop limit of 255 proves that no router passed it on.
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([ICMPV6, 255]);
    packet.extend(address.octets());
    packet.extend(ALL_NODES.octets());
    packet.extend(message);
    packet
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum<'a>(bytes: impl Iterator<Item = &'a u8>) -> u16 {
    let mut sum = 0_u32;
    for (n, byte) in bytes.enumerate() {
        sum += u32::from(*byte) << if n % 2 == 0 { 8 } else { 0 };
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded to 16 bits above.
    !(sum as u16)
}

fn send(
    socket: &OwnedFd,
    link: IfIndex,
    protocol: i32,
    to: MacAddr,
    packet: &[u8],
    address: IpAddr,
) -> Result<()> {
    // SAFETY: sockaddr_ll is plain old data, for which all zeroes is a valid value.
    let mut name: libc::sockaddr_ll = unsafe { mem::zeroed() };
    name.sll_family = libc::AF_PACKET as u16;
    // An EtherType has 16 bits, an ifindex is a positive i32 in the kernel.
    name.sll_protocol = (protocol as u16).to_be();
    name.sll_ifindex = link.0 as i32;
    name.sll_halen = 6;
    name.sll_addr[..6].copy_from_slice(&to.0);
    // SAFETY: packet and name are readable for the lengths given; the kernel keeps neither.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            libc::MSG_DONTWAIT,
            (&raw const name).cast(),
            mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    check(sent as i64, || format!("announce {address} on link {link}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_that_of_rfc_1071() {
        // The example of its section 3, whose sum is 0xddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(bytes.iter()), !0xddf2);
    }
}
