//! Busy polling of sockets and epoll instances.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::check;
use crate::{CpuId, Error, Micros, NapiId, Result};

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
    /// Packets a round; above 64 (NAPI_POLL_WEIGHT) needs CAP_NET_ADMIN. 0: the kernel's own 8.
    pub budget: u16,
    /// SO_PREFER_BUSY_POLL semantics.
    pub prefer: bool,
}

fn option(fd: BorrowedFd<'_>, name: i32) -> std::io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `length` live through the call, and `length` is the size of `value`.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if answer == -1 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// The kernel keeps windows in a signed 32-bit integer.
fn signed(window: Micros) -> Result<i32> {
    i32::try_from(window.0).map_err(|_| Error::Invalid {
        name: "busy-poll window",
        value: window.to_string(),
        expected: format!("microseconds up to {}", i32::MAX),
    })
}

/// What kind of socket `fd` is.
pub fn kind(fd: BorrowedFd<'_>) -> SocketKind {
    let Ok(domain) = option(fd, libc::SO_DOMAIN) else {
        return SocketKind::NotASocket;
    };
    match (domain, option(fd, libc::SO_TYPE)) {
        (libc::AF_INET | libc::AF_INET6, Ok(libc::SOCK_STREAM | libc::SOCK_DGRAM)) => {
            SocketKind::Inet
        }
        _ => SocketKind::Other,
    }
}

/// Whether closing the last descriptor of a socket may wait for its peer (SO_LINGER); None: it is no socket.
pub fn lingers(fd: BorrowedFd<'_>) -> Option<bool> {
    let mut linger = libc::linger {
        l_onoff: 0,
        l_linger: 0,
    };
    let mut length = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: `linger` and `length` live through the call, and `length` is the size of `linger`.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw mut linger).cast(),
            &raw mut length,
        )
    };
    (answer == 0).then_some(linger.l_onoff != 0 && linger.l_linger != 0)
}

/// SO_BUSY_POLL of a socket; 0: off.
pub fn busy_poll(fd: BorrowedFd<'_>) -> Result<Micros> {
    let value = option(fd, libc::SO_BUSY_POLL).map_err(|source| Error::Syscall {
        what: "read SO_BUSY_POLL".to_owned(),
        source,
    })?;
    Ok(Micros(u32::try_from(value).unwrap_or(0)))
}

/// Sets SO_BUSY_POLL. Before 6.4 or so a larger value than the socket has needs CAP_NET_ADMIN (EPERM).
pub fn set_busy_poll(fd: BorrowedFd<'_>, window: Micros) -> Result<()> {
    let value = signed(window)?;
    // SAFETY: `value` lives through the call and its size is given.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BUSY_POLL,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    check(answer, || format!("set SO_BUSY_POLL to {window} µs"))?;
    Ok(())
}

/// Whether packets wait for the socket's own polling (SO_PREFER_BUSY_POLL).
pub fn prefers_busy_poll(fd: BorrowedFd<'_>) -> Result<bool> {
    let value = option(fd, libc::SO_PREFER_BUSY_POLL).map_err(|source| Error::Syscall {
        what: "read SO_PREFER_BUSY_POLL".to_owned(),
        source,
    })?;
    Ok(value != 0)
}

/// Sets SO_PREFER_BUSY_POLL (5.11+). To set it takes CAP_NET_ADMIN (EPERM).
pub fn set_prefer_busy_poll(fd: BorrowedFd<'_>, prefer: bool) -> Result<()> {
    let value = libc::c_int::from(prefer);
    // SAFETY: `value` lives through the call and its size is given.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PREFER_BUSY_POLL,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    check(answer, || format!("set SO_PREFER_BUSY_POLL to {value}"))?;
    Ok(())
}

/// NAPI through which the socket's last packet came (SO_INCOMING_NAPI_ID); None before the first.
pub fn incoming_napi(fd: BorrowedFd<'_>) -> Result<Option<NapiId>> {
    let value = option(fd, libc::SO_INCOMING_NAPI_ID).map_err(|source| Error::Syscall {
        what: "read SO_INCOMING_NAPI_ID".to_owned(),
        source,
    })?;
    Ok(u32::try_from(value).ok().filter(|id| *id != 0).map(NapiId))
}

/// CPU on which the socket's last packet was handled (SO_INCOMING_CPU); None before the first.
pub fn incoming_cpu(fd: BorrowedFd<'_>) -> Result<Option<CpuId>> {
    let value = option(fd, libc::SO_INCOMING_CPU).map_err(|source| Error::Syscall {
        what: "read SO_INCOMING_CPU".to_owned(),
        source,
    })?;
    Ok(u32::try_from(value).ok().map(CpuId))
}

/// A new epoll instance, close-on-exec.
pub fn epoll_create() -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let answer = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    let fd = check(answer, || "create an epoll instance".to_owned())?;
    // SAFETY: the kernel just made it for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// ENOTTY is what an epoll instance without these ioctls says (before 6.9), and also any file that is no epoll instance;
/// EOPNOTSUPP is said by kernels built without busy polling.
fn epoll_error(fd: BorrowedFd<'_>, what: String, source: std::io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::ENOTTY | libc::EOPNOTSUPP) if is_epoll(fd) => Error::Unsupported {
            feature: "epoll busy polling (EPIOCSPARAMS)",
            reason: format!("{what}: {source}; Linux 6.9 or newer has it"),
        },
        _ => Error::Syscall { what, source },
    }
}

/// EPIOCGPARAMS; `Unsupported` before 6.9.
pub fn epoll_params(fd: BorrowedFd<'_>) -> Result<EpollParams> {
    read_epoll_params(fd).map_err(|source| {
        epoll_error(
            fd,
            "read the busy-poll settings of an epoll instance".to_owned(),
            source,
        )
    })
}

/// Whether `fd` is an epoll instance with a window, as far as this kernel tells; allocates nothing.
pub fn is_polling_epoll(fd: BorrowedFd<'_>) -> bool {
    read_epoll_params(fd).is_ok_and(|params| params.busy_poll > Micros(0))
}

fn read_epoll_params(fd: BorrowedFd<'_>) -> std::io::Result<EpollParams> {
    let mut params = libc::epoll_params {
        busy_poll_usecs: 0,
        busy_poll_budget: 0,
        prefer_busy_poll: 0,
        __pad: 0,
    };
    // SAFETY: the ioctl writes a struct epoll_params, which `params` is.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), libc::EPIOCGPARAMS, &raw mut params) };
    if answer == -1 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(EpollParams {
        busy_poll: Micros(params.busy_poll_usecs),
        budget: params.busy_poll_budget,
        prefer: params.prefer_busy_poll != 0,
    })
}

/// EPIOCSPARAMS; `Unsupported` before 6.9.
pub fn set_epoll_params(fd: BorrowedFd<'_>, params: EpollParams) -> Result<()> {
    signed(params.busy_poll)?;
    let raw = libc::epoll_params {
        busy_poll_usecs: params.busy_poll.0,
        busy_poll_budget: params.budget,
        prefer_busy_poll: params.prefer.into(),
        __pad: 0,
    };
    // SAFETY: the ioctl reads a struct epoll_params, which `raw` is.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), libc::EPIOCSPARAMS, &raw const raw) };
    if answer == -1 {
        let source = std::io::Error::last_os_error();
        return Err(epoll_error(
            fd,
            format!("set {params:?} on an epoll instance"),
            source,
        ));
    }
    Ok(())
}

/// Whether `/proc/self/fd`-style target of `fd` is an epoll instance.
pub fn is_epoll(fd: BorrowedFd<'_>) -> bool {
    std::fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventpoll]")
}
