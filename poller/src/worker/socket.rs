//! A thread of this process that polls through sockets: for kernels before 6.13.

use std::net::IpAddr;

use kbp_kernel::link::RouteSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::poll_socket::{Ends, PollSockets, PollSocketsOptions, Primed, prime};
use kbp_kernel::{Error, IfIndex, NapiId, Result, probe};

use super::LEASE;
use super::kind::{Poller, Seat, Target};

/// Each that does not work costs the wait for a packet that does not come.
const MOST_ADDRESSES: usize = 4;

#[derive(Debug)]
pub(super) struct Sockets(PollSockets);

impl Sockets {
    pub(super) fn new(seat: Seat) -> Result<Self> {
        probe::socket_busy_poll()?;
        let sockets = PollSockets::new(&PollSocketsOptions {
            cpu: seat.cpu,
            scheduling: seat.scheduling,
            lease: LEASE,
        })?;
        Ok(Self(sockets))
    }
}

impl Poller for Sockets {
    fn add(&mut self, target: &Target<'_>) -> Result<()> {
        let Some((other, name)) = target.other else {
            return Err(Error::Unsupported {
                feature: "a busy-polling socket",
                reason: "it is primed by a packet from the other end of the link, which is not on this machine"
                    .to_owned(),
            });
        };
        let primed = primed(target.netns, target.link, other, name, Some(target.napi))?;
        self.0.add(primed);
        Ok(())
    }

    fn remove(&mut self, napi: NapiId) -> Result<()> {
        self.0.remove(napi);
        Ok(())
    }

    fn wake(&mut self) -> Result<()> {
        self.0.wake();
        Ok(())
    }

    fn is_asleep(&self) -> bool {
        self.0.is_asleep()
    }

    fn thread_id(&self) -> u32 {
        self.0.thread_id()
    }

    fn rounds(&self) -> Option<u64> {
        Some(self.0.rounds())
    }
}

/// The NAPI instance of `link`, learnt from a packet: for kernels that do not list instances (before 6.8).
pub(crate) fn learn(netns: &Netns, link: IfIndex, other: &Netns, name: &str) -> Result<NapiId> {
    Ok(primed(netns, link, other, name, None)?.napi())
}

fn primed(
    netns: &Netns,
    link: IfIndex,
    other: &Netns,
    name: &str,
    wanted: Option<NapiId>,
) -> Result<Primed> {
    let addresses = addresses(netns, link, other)?;
    let ends = Ends {
        polled: netns,
        other,
        other_name: name,
        addresses: &addresses,
    };
    prime(&ends, wanted)
}

/// Addresses of `netns` that a packet from `other` may get to: those of the link itself, then what `other` has as a gateway,
/// then the one that `netns` speaks to the world with.
fn addresses(netns: &Netns, link: IfIndex, other: &Netns) -> Result<Vec<IpAddr>> {
    let mut here = RouteSocket::open_in(netns)?;
    let mut found: Vec<IpAddr> = here.addresses(link)?.iter().map(|a| a.addr()).collect();
    let mut there = RouteSocket::open_in(other)?;
    for route in there.routes()? {
        if let Some(gateway) = route.gateway
            && here.is_local(gateway)?
        {
            found.push(gateway);
        }
    }
    for up in here.links()?.iter().filter(|l| l.up && !l.loopback) {
        if found.len() >= MOST_ADDRESSES {
            break;
        }
        found.extend(here.addresses(up.index)?.iter().map(|a| a.addr()));
    }
    // A link-local IPv6 address means nothing without its link.
    found.retain(|a| !matches!(a, IpAddr::V6(a) if a.is_unicast_link_local()));
    let mut seen = Vec::new();
    found.retain(|a| {
        !seen.contains(a) && {
            seen.push(*a);
            true
        }
    });
    found.truncate(MOST_ADDRESSES);
    Ok(found)
}
