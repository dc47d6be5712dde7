//! What this kernel can do, found out by trying it on throw-away objects. Each probe leaves nothing behind.
//!
//! An `Err` says what was tried and why it did not work, with the remedy where one is known. It is meant to be shown.

mod link;
mod supervise;

pub use link::{
    masquerade, napi_settings, netdev_family, threaded, threaded_busy_poll, veth_features,
    veth_napi, veth_packet,
};
pub use supervise::{pidfd_getfd, seccomp_notify, seccomp_sync_wake_up};

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::process::Scheduling;
use crate::ring::{PollRing, RingOptions};
use crate::sockopt::{self, EpollParams};
use crate::sys::errno;
use crate::{Error, Micros, Result, cpu};

/// An SQPOLL ring with static NAPI tracking can be made, on a CPU that this process may use.
pub fn sqpoll_napi() -> Result<()> {
    let cpu = cpu::usable()?
        .iter()
        .next()
        .ok_or_else(|| Error::NotFound {
            what: "a CPU that this process may use".to_owned(),
        })?;
    // The thread never wakes, so it costs nothing, and the kernel takes it down when the ring goes.
    PollRing::new(&RingOptions {
        cpu,
        scheduling: Scheduling::Idle,
        lease: Duration::from_millis(1),
        prefer: false,
    })?;
    Ok(())
}

/// SO_BUSY_POLL can be set on a socket.
pub fn socket_busy_poll() -> Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(errno(|| "make a UDP socket".to_owned()))?;
    let window = Micros(50);
    let unsupported = |reason| Error::Unsupported {
        feature: "SO_BUSY_POLL",
        reason,
    };
    sockopt::set_busy_poll(socket.as_fd(), window).map_err(|error| match error.errno() {
        Some(libc::ENOPROTOOPT) => unsupported(format!(
            "{error}; the kernel is built without CONFIG_NET_RX_BUSY_POLL"
        )),
        Some(libc::EPERM) => unsupported(format!("{error}; it needs CAP_NET_ADMIN on this kernel")),
        _ => error,
    })?;
    let found = sockopt::busy_poll(socket.as_fd())?;
    if found == window {
        Ok(())
    } else {
        Err(unsupported(format!(
            "{window} µs were set, {found} are there"
        )))
    }
}

/// EPIOCSPARAMS can be set on an epoll instance.
pub fn epoll_busy_poll() -> Result<()> {
    let epoll = sockopt::epoll_create()?;
    let params = EpollParams {
        busy_poll: Micros(50),
        budget: 8,
        prefer: false,
    };
    sockopt::set_epoll_params(epoll.as_fd(), params)?;
    let found = sockopt::epoll_params(epoll.as_fd())?;
    if found == params {
        Ok(())
    } else {
        Err(Error::Unsupported {
            feature: "epoll busy polling (EPIOCSPARAMS)",
            reason: format!("{params:?} were set, {found:?} are there"),
        })
    }
}
