//! Mode `bridge`: every pod is a port of one bridge, by a veth pair that can be busy-polled.
//!
//! ```text
//!   pod                                   host
//!   eth0  10.88.0.5/16                    kbp1f0…  a port of
//!     0.0.0.0/0 via 10.88.0.1 mtu 1500    kbp0     10.88.0.1/16 with isGateway
//! ```
//!
//! Pods resolve each other's addresses by ARP and neighbour discovery, and are told of every address that
//! changed its owner. All ports and the bridge have one MTU.
//! The gateway of pods in a VLAN of their own is not the bridge but [`vlan`]'s link.

pub(crate) mod plan;
pub(crate) mod vlan;
pub(crate) mod wire;
