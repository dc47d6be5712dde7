//! Masquerading through nf_tables, spoken over netlink: one `inet` table for all pods of the node.
//!
//! ```text
//! table inet kbp {
//!     set pods4  { type ipv4_addr; elements = { 10.88.0.2 comment "net/3f2a…/eth0" } }
//!     set pods6  { type ipv6_addr; }
//!     set local4 { type ipv4_addr; flags interval; elements = { 10.88.0.0/16 } }
//!     set local6 { type ipv6_addr; flags interval; }
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr @pods4 ip daddr != @local4 ip daddr != 224.0.0.0/4 masquerade
//!         ip6 saddr @pods6 ip6 daddr != @local6 ip6 daddr != ff00::/8 masquerade
//!     }
//! }
//! ```

use std::net::IpAddr;

use ipnet::IpNet;

use crate::Result;
use crate::netns::Netns;

/// An address whose traffic to the world is masqueraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masqueraded {
    /// The pod's address.
    pub address: IpAddr,
    /// Whom it was added for, as given to [`MasqueradeTable::add`]; empty when somebody else added it without a comment.
    pub owner: String,
}

/// The table of one name in one network namespace. Nothing is created before [`MasqueradeTable::add`].
#[derive(Debug)]
pub struct MasqueradeTable {}

impl MasqueradeTable {
    /// Opens a netlink socket in `netns` for the table `inet <name>` (`kbp`; tests use their own). `Unsupported` when the kernel has no nf_tables.
    pub fn open(_netns: &Netns, _name: &str) -> Result<Self> {
        todo!()
    }

    /// Masquerades `addresses`, except towards `local` ranges (the node's own pod ranges). Creates table, sets, chain and rules when they
    /// are missing, all in one transaction, so two callers at once, or one beside a [`MasqueradeTable::delete_if_unused`], cannot end up with half of it.
    /// Adding again is fine; an address that is there changes its owner. `owner` is 1 to 127 bytes without NUL.
    pub fn add(&mut self, _owner: &str, _addresses: &[IpAddr], _local: &[IpNet]) -> Result<()> {
        todo!()
    }

    /// Removes addresses; fine when they, or the table, are not there.
    pub fn remove(&mut self, _addresses: &[IpAddr]) -> Result<()> {
        todo!()
    }

    /// Every masqueraded address with its owner; empty when there is no table.
    pub fn list(&mut self) -> Result<Vec<Masqueraded>> {
        todo!()
    }

    /// Every range towards which nothing is masqueraded.
    pub fn local(&mut self) -> Result<Vec<IpNet>> {
        todo!()
    }

    /// Whether chain and rules are in force.
    pub fn is_active(&mut self) -> Result<bool> {
        todo!()
    }

    /// Deletes the table when no address is left, atomically; whether it did.
    pub fn delete_if_unused(&mut self) -> Result<bool> {
        todo!()
    }

    /// Deletes the table with everything in it; fine when it is not there.
    pub fn delete(&mut self) -> Result<()> {
        todo!()
    }
}
