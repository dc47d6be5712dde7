//! A non-blocking socket on which the kernel announces changes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

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

    /// Lets only announcements through that hold one of `values` in the four bytes at `offset`,
    /// counted from the netlink header; the kernel drops the others, so they wake nobody. Each
    /// announcement is a message of its own (`rtnl_notify`).
    pub(crate) fn filter(&self, offset: u32, values: impl Iterator<Item = u32>) -> Result<()> {
        let instruction = |code: u32, k| libc::sock_filter {
            code: code as u16,
            jt: 0,
            jf: 0,
            k,
        };
        let answer = |length| instruction(libc::BPF_RET | libc::BPF_K, length);
        let mut program = vec![instruction(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            offset,
        )];
        for value in values {
            // A load takes the bytes for big-endian.
            let compare = instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value.to_be());
            program.extend([libc::sock_filter { jf: 1, ..compare }, answer(u32::MAX)]);
        }
        program.push(answer(0));
        let failed = |source| Error::Syscall {
            what: format!("filter: {}", self.what),
            source,
        };
        let length = program
            .len()
            .try_into()
            .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let program = libc::sock_fprog {
            len: length,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the kernel reads one sock_fprog and the `len` instructions it points to, all of
        // which live until the call returns.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(failed(io::Error::last_os_error()))
        }
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
