//! A route socket: carries out batches and answers questions about one network namespace.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Batch, Link, Route, read};
use crate::netlink::{Protocol, Request, Socket};
use crate::netns::Netns;
use crate::{Error, IfIndex, MacAddr, Result};

/// `NETNSA_NSID_NOT_ASSIGNED` of linux/net_namespace.h; in a request: the kernel chooses.
const NSID_NOT_ASSIGNED: i32 = -1;
/// Of linux/rtnetlink.h (4.13+): the route as it stands in the table, not what was made of it for this address.
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// A NETLINK_ROUTE socket that belongs to one network namespace for good.
///
/// Errors of its methods: [`Error::Netlink`] when the kernel refuses, [`Error::Syscall`] when it
/// does not answer, [`Error::Protocol`] when the answer makes no sense.
#[derive(Debug)]
pub struct RouteSocket {
    pub(super) socket: Socket,
}

impl AsFd for RouteSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl RouteSocket {
    /// Opens one in the calling thread's namespace.
    pub fn open() -> Result<Self> {
        Ok(Self {
            socket: Socket::open(Protocol::Route)?,
        })
    }

    /// Opens one in `netns`.
    pub fn open_in(netns: &Netns) -> Result<Self> {
        netns.run(Self::open)?
    }

    /// Sends the batch and reads every acknowledgement. The first failure is returned; the others
    /// are logged at debug level.
    pub fn execute(&mut self, batch: &Batch) -> Result<()> {
        let failures = self
            .socket
            .execute(batch.requests())?
            .into_iter()
            .filter_map(Result::err);
        let mut first = None;
        for failure in failures {
            if first.is_none() {
                first = Some(failure);
            } else {
                tracing::debug!("also failed: {failure}");
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// The link of that name, None when there is none.
    pub fn link_by_name(&mut self, name: &str) -> Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        self.link(format!("look up link {name:?}"), message)
    }

    /// The link of that index, None when there is none.
    pub fn link_by_index(&mut self, index: IfIndex) -> Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.header.index = index.0;
        self.link(format!("look up link {index}"), message)
    }

    fn link(&mut self, what: String, message: LinkMessage) -> Result<Option<Link>> {
        let request = Request::new(what, &RouteNetlinkMessage::GetLink(message));
        let found = self.socket.query(request, |kind, payload| {
            if kind == libc::RTM_NEWLINK {
                readable("a link", read::link(payload))
            } else {
                Ok(None)
            }
        });
        match found {
            Ok(links) => Ok(links.into_iter().next()),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every link.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.socket
            .dump(Request::new("list links", &message), |kind, payload| {
                if kind == libc::RTM_NEWLINK {
                    readable("a link", read::link(payload))
                } else {
                    Ok(None)
                }
            })
    }

    /// The ports of a bridge.
    pub fn ports(&mut self, bridge: IfIndex) -> Result<Vec<Link>> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::Controller(bridge.0)];
        let message = RouteNetlinkMessage::GetLink(message);
        let what = format!("list the ports of bridge {bridge}");
        self.socket
            .dump(Request::new(what, &message), |kind, payload| {
                if kind != libc::RTM_NEWLINK {
                    return Ok(None);
                }
                // The kernel leaves most of the others out, but need not.
                Ok(readable("a link", read::link(payload))?
                    .filter(|link| link.master == Some(bridge)))
            })
    }

    /// Addresses of a link with their prefixes.
    pub fn addresses(&mut self, link: IfIndex) -> Result<Vec<IpNet>> {
        let mut message = AddressMessage::default();
        message.header.index = link.0;
        let message = RouteNetlinkMessage::GetAddress(message);
        let what = format!("list addresses of link {link}");
        let found = self
            .socket
            .dump(Request::new(what, &message), |kind, payload| {
                if kind != libc::RTM_NEWADDR {
                    return Ok(None);
                }
                let (of, address) = required("an address", read::interface_address(payload))?;
                // Without strict checking the kernel lists every link's.
                Ok((of == link).then_some(address))
            });
        found.map_err(|error| error.of_link(link))
    }

    /// Unicast routes of the main table, both families; a multipath route appears once for each
    /// next hop.
    pub fn routes(&mut self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            let message = RouteNetlinkMessage::GetRoute(message);
            let found = self
                .socket
                .dump(Request::new("list routes", &message), |kind, payload| {
                    if kind != libc::RTM_NEWROUTE {
                        return Ok(None);
                    }
                    required("a route", read::routes(payload)).map(Some)
                });
            match found {
                Ok(found) => routes.extend(found.into_iter().flatten().filter(|route| {
                    // A kernel without IPv6 answers the second question like the first.
                    let is_v6 = route.destination.addr().is_ipv6();
                    route.table.is_none() && is_v6 == (family == AddressFamily::Inet6)
                })),
                // The main table is made with its first route.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }

    /// Whether this namespace takes packets to `address` for its own. An IPv6 address is on its link
    /// before that: the kernel makes its local route later, in a work item (addrconf_dad_work in
    /// net/ipv6/addrconf.c), also when there is no duplicate address detection.
    pub fn is_local(&mut self, address: IpAddr) -> Result<bool> {
        let types = self.route_lookup(address, 0, |payload| {
            readable("a route", read::route_type(payload))
        });
        match types {
            Ok(types) => Ok(types.contains(&libc::RTN_LOCAL)),
            // The answers of no route and of routes that refuse.
            Err(error)
                if matches!(
                    error.errno(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The unicast route of this namespace by which packets to `address` go, as it stands in its table; with several
    /// next hops the first. None: there is none.
    ///
    /// # Errors
    /// Also when a route refuses such packets (`unreachable`, `prohibit`, `blackhole`).
    pub fn route_to(&mut self, address: IpAddr) -> Result<Option<Route>> {
        let found = self.route_lookup(address, RTM_F_FIB_MATCH, |payload| {
            required("a route", read::routes(payload)).map(Some)
        });
        match found {
            Ok(found) => Ok(found.into_iter().flatten().next()),
            Err(error) if error.errno() == Some(libc::ENETUNREACH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Looks one route up: it takes the same time with ten routes and with ten thousand.
    fn route_lookup<T>(
        &mut self,
        address: IpAddr,
        flags: u32,
        read: impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>> {
        let mut message = RouteMessage::default();
        (
            message.header.address_family,
            message.header.destination_prefix_length,
        ) = match address {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.header.flags = RouteFlags::from_bits_retain(flags);
        message.attributes = vec![RouteAttribute::Destination(address.into())];
        let message = RouteNetlinkMessage::GetRoute(message);
        let request = Request::new(format!("look up the route to {address}"), &message);
        self.socket.query(request, |kind, payload| {
            if kind == libc::RTM_NEWROUTE {
                read(payload)
            } else {
                Ok(None)
            }
        })
    }

    /// Permanent neighbours of a link.
    pub fn permanent_neighbours(&mut self, link: IfIndex) -> Result<Vec<(IpAddr, MacAddr)>> {
        let mut message = NeighbourMessage::default();
        message.attributes = vec![NeighbourAttribute::IfIndex(link.0)];
        let message = RouteNetlinkMessage::GetNeighbour(message);
        let what = format!("list neighbours of link {link}");
        self.socket
            .dump(Request::new(what, &message), |kind, payload| {
                let found = read::neighbour(payload).filter(|_| kind == libc::RTM_NEWNEIGH);
                Ok(found
                    .filter(|(of, state, ..)| *of == link && state & libc::NUD_PERMANENT != 0)
                    .map(|(_, _, address, mac)| (address, mac)))
            })
    }

    /// The id that this socket's namespace has given to `netns` (RTM_GETNSID), None when it has
    /// given none.
    pub fn nsid_of(&mut self, netns: &Netns) -> Result<Option<i32>> {
        let message = RouteNetlinkMessage::GetNsId(nsid_message(netns, None));
        let request = Request::new("look up the id of a network namespace", &message);
        let found = self.socket.query(request, |kind, payload| {
            if kind == libc::RTM_NEWNSID {
                readable("the id of a namespace", read::nsid(payload))
            } else {
                Ok(None)
            }
        })?;
        Ok(found.into_iter().next().flatten())
    }

    /// As [`RouteSocket::nsid_of`]; gives `netns` an id when it has none. The kernel does the same
    /// as soon as it describes a link whose peer is in `netns`.
    pub fn ensure_nsid(&mut self, netns: &Netns) -> Result<i32> {
        if let Some(id) = self.nsid_of(netns)? {
            return Ok(id);
        }
        let what = "give an id to a network namespace";
        let message = RouteNetlinkMessage::NewNsId(nsid_message(netns, Some(NSID_NOT_ASSIGNED)));
        match self.socket.transact(&[Request::change(what, 0, &message)]) {
            // Somebody else was faster.
            Err(error) if error.errno() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
        self.nsid_of(netns)?.ok_or_else(|| Error::Protocol {
            what: what.to_owned(),
            detail: "there is none afterwards".to_owned(),
        })
    }
}

fn nsid_message(netns: &Netns, id: Option<i32>) -> NsidMessage {
    let mut message = NsidMessage::default();
    // A file descriptor is never negative.
    message.attributes = vec![NsidAttribute::Fd(netns.as_fd().as_raw_fd() as u32)];
    message.attributes.extend(id.map(NsidAttribute::Id));
    message
}

pub(super) fn required<T>(what: &str, read: Option<T>) -> Result<T> {
    read.ok_or_else(|| Error::Protocol {
        what: format!("read {what}"),
        detail: "an attribute is missing or too short".to_owned(),
    })
}

pub(super) fn readable<T>(what: &str, read: Option<T>) -> Result<Option<T>> {
    required(what, read).map(Some)
}
