//! Link events of one network namespace.

use std::os::fd::{AsFd, BorrowedFd};

use super::read::LinkHeader;
use crate::netlink::{Protocol, Subscription};
use crate::netns::Netns;
use crate::{IfIndex, Result};

/// Offset of `ifi_index` in a message: behind the netlink header and four bytes of ifinfomsg.
const IFI_INDEX: u32 = 20;

/// Something happened to a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LinkEvent {
    /// It appeared or changed: up or down, name, MTU, features, master…
    Changed(IfIndex),
    /// It is gone from this namespace.
    Removed(IfIndex),
    /// The kernel dropped events (ENOBUFS): read everything anew.
    Lost,
}

/// A socket that receives the link events (RTNLGRP_LINK) of one namespace; non-blocking, its fd
/// can be polled. Subscribe first, then read the state: so nothing is missed in between.
#[derive(Debug)]
pub struct LinkEvents {
    subscription: Subscription,
}

impl LinkEvents {
    /// Subscribes in `netns`.
    ///
    /// # Errors
    /// [`crate::Error::Syscall`] when the namespace cannot be entered or no socket be opened.
    pub fn subscribe(netns: &Netns) -> Result<Self> {
        let subscription = netns
            .run(|| Subscription::open(Protocol::Route, libc::RTNLGRP_LINK, "watch links"))??;
        Ok(Self { subscription })
    }

    /// From now on only events about `links`: what happens to the other links of a busy node does
    /// not even wake the reader. Replaces what was set before; events that are already there stay.
    ///
    /// # Errors
    /// [`crate::Error::Syscall`] when the kernel refuses, e.g. more than about 2000 links.
    pub fn watch_only(&mut self, links: &[IfIndex]) -> Result<()> {
        self.subscription
            .filter(IFI_INDEX, links.iter().map(|link| link.0))
    }

    /// Every event that is there now, in order; empty when there is none. Where some were
    /// dropped, [`LinkEvent::Lost`] comes last.
    ///
    /// # Errors
    /// [`crate::Error::Syscall`] when the socket fails.
    pub fn read(&mut self) -> Result<Vec<LinkEvent>> {
        let mut events = Vec::new();
        let lost = self.subscription.read(|kind, payload| {
            let Some(header) = LinkHeader::read(payload) else {
                return;
            };
            // A bridge announces a port that leaves it as RTM_DELLINK of AF_BRIDGE: the link stays.
            let is_link = i32::from(header.family) == libc::AF_UNSPEC;
            match kind {
                libc::RTM_DELLINK if is_link => events.push(LinkEvent::Removed(header.index)),
                libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                    events.push(LinkEvent::Changed(header.index));
                }
                _ => {}
            }
        })?;
        if lost {
            events.push(LinkEvent::Lost);
        }
        Ok(events)
    }
}

impl AsFd for LinkEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.subscription.as_fd()
    }
}
