//! A non-blocking socket on which the kernel announces changes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::SocketAddr;

use super::answer::{Answer, answers};
use super::{Protocol, RECEIVE_BUFFER, retry_interrupted};
use crate::{Error, Result};

/// Membership in one multicast group of the calling thread's network namespace.
#[derive(Debug)]
pub(crate) struct Subscription {
    socket: netlink_sys::Socket,
    what: &'static str,
    buffer: Vec<u8>,
}

impl Subscription {
    /// Joins `group`; `what` is for errors, e.g. `watch links`.
    pub(crate) fn open(protocol: Protocol, group: u32, what: &'static str) -> Result<Self> {
        let failed = |source| Error::Syscall {
            what: what.to_owned(),
            source,
        };
        let mut socket = netlink_sys::Socket::new(protocol.number()).map_err(failed)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed)?;
        socket.add_membership(group).map_err(failed)?;
        socket.set_non_blocking(true).map_err(failed)?;
        Ok(Self {
            socket,
            what,
            buffer: Vec::with_capacity(RECEIVE_BUFFER),
        })
    }

    /// Hands every announcement that is there now to `read`; whether some were lost before these.
    pub(crate) fn read(&mut self, mut read: impl FnMut(u16, &[u8])) -> Result<bool> {
        let mut lost = false;
        loop {
            self.buffer.clear();
            match retry_interrupted(|| self.socket.recv_from(&mut self.buffer, 0)) {
                Ok((_, sender)) if sender.port_number() != 0 => {}
                Ok(_) => {
                    for answer in answers(&self.buffer) {
                        match answer.map(|a| a.body) {
                            Ok(Answer::Message { kind, payload }) => read(kind, payload),
                            Ok(Answer::Done(_)) => {}
                            // One that was cut off: what it said is lost.
                            Err(_) => lost = true,
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(lost),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => lost = true,
                Err(source) => {
                    return Err(Error::Syscall {
                        what: self.what.to_owned(),
                        source,
                    });
                }
            }
        }
    }
}

impl AsFd for Subscription {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
