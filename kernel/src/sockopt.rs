//! Busy polling of sockets and epoll instances.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::{Micros, NapiId, Result};

/// Address family and type, as far as busy polling cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketKind {
    /// AF_INET or AF_INET6, SOCK_STREAM or SOCK_DGRAM.
    Inet,
    /// Any other socket (unix, netlink, packet, raw…).
    Other,
    /// Not a socket.
    NotASocket,
}

/// What an epoll instance is told by EPIOCSPARAMS (`struct epoll_params`, 6.9+).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpollParams {
    /// How long epoll_wait busy-polls; 0: not at all.
    pub busy_poll: Micros,
    /// Packets a round; above 64 (NAPI_POLL_WEIGHT) needs CAP_NET_ADMIN.
    pub budget: u16,
    /// SO_PREFER_BUSY_POLL semantics.
    pub prefer: bool,
}

/// What kind of socket `fd` is.
pub fn kind(_fd: BorrowedFd<'_>) -> SocketKind { todo!() }
/// SO_BUSY_POLL of a socket; 0: off.
pub fn busy_poll(_fd: BorrowedFd<'_>) -> Result<Micros> { todo!() }
/// Sets SO_BUSY_POLL.
pub fn set_busy_poll(_fd: BorrowedFd<'_>, _window: Micros) -> Result<()> { todo!() }
/// NAPI through which the socket's last packet came (SO_INCOMING_NAPI_ID); None before the first.
pub fn incoming_napi(_fd: BorrowedFd<'_>) -> Result<Option<NapiId>> { todo!() }
/// A new epoll instance, close-on-exec.
pub fn epoll_create() -> Result<OwnedFd> { todo!() }
/// EPIOCGPARAMS.
pub fn epoll_params(_fd: BorrowedFd<'_>) -> Result<EpollParams> { todo!() }
/// EPIOCSPARAMS; `Unsupported` before 6.9.
pub fn set_epoll_params(_fd: BorrowedFd<'_>, _params: EpollParams) -> Result<()> { todo!() }
/// Whether `/proc/self/fd`-style target of `fd` is an epoll instance.
pub fn is_epoll(_fd: BorrowedFd<'_>) -> bool { todo!() }
