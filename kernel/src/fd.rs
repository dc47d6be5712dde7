//! File descriptors that come from or go to another process: inherited over exec, or passed over a unix socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, getsockopt, recvmsg, sendmsg,
    sockopt,
};

use crate::sys::{check, errno};
use crate::{Error, Result};

/// Most descriptors that the kernel passes in one message (`SCM_MAX_FD`, include/net/scm.h).
pub const MAX_FDS: usize = 253;

/// What arrived in one message, or up to the end of the stream.
#[derive(Debug, Default)]
pub struct Message {
    /// The bytes.
    pub data: Vec<u8>,
    /// The descriptors, close-on-exec, in the order they were sent.
    pub fds: Vec<OwnedFd>,
}

/// Who is at the other end of a unix socket, as it was at connect or listen time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id in the caller's pid namespace; 0 when it is not visible from here.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Takes over a descriptor that the parent process left open for this one, and marks it close-on-exec.
///
/// Call it at the start of `main`. What survived an exec has no close-on-exec flag, and everything that a Rust program
/// opens has one: a number that carries the flag is somebody else's and is refused, and so is a second take of the same one.
pub fn take_inherited(number: RawFd) -> Result<OwnedFd> {
    let invalid = |expected: &str| Error::Invalid {
        name: "inherited file descriptor",
        value: number.to_string(),
        expected: expected.to_owned(),
    };
    if number <= libc::STDERR_FILENO {
        return Err(invalid(
            "a number above 2: 0 to 2 belong to the standard streams",
        ));
    }
    // SAFETY: F_GETFD takes no pointer; on a closed number it fails with EBADF.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    let flags = check(flags, || {
        format!("look at inherited file descriptor {number}")
    })?;
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(invalid(
            "a descriptor that came over exec, not one opened by this process",
        ));
    }
    // SAFETY: F_SETFD takes no pointer.
    let answer = unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    check(answer, || {
        format!("mark inherited file descriptor {number} close-on-exec")
    })?;
    // SAFETY: it is open, came over exec (see above), and nobody in this process owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Leaves `fds` open in the process that `command` starts, as 3, 4 and so on: the counterpart of [`take_inherited`].
///
/// The numbers must not be among those that std itself uses to start the process: so call it in a process that has been
/// running for a while and whose own descriptors have taken the low numbers.
pub fn pass(command: &mut Command, fds: Vec<OwnedFd>) {
    let first = libc::STDERR_FILENO + 1;
    let behind = first + fds.len() as RawFd;
    let install = move || {
        // Out of the way first: a number to be filled may be one that is still to be copied.
        let mut moved = [-1; MAX_FDS];
        for (fd, slot) in fds.iter().zip(&mut moved) {
            // SAFETY: no pointers, and the descriptor is open: the closure owns it.
            *slot = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, behind) };
            if *slot == -1 {
                return Err(std::io::Error::last_os_error());
            }
        }
        for (from, to) in moved.iter().zip(first..behind) {
            // SAFETY: no pointers. The copy has no close-on-exec flag.
            if unsafe { libc::dup2(*from, to) } == -1 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it only calls fcntl and dup2, which are async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(install) };
}

/// Sends `data`, at least one byte, together with `fds` (at most [`MAX_FDS`]); returns how many bytes went out.
/// The descriptors travel with the first byte. A closed peer is EPIPE, without a signal.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize> {
    if data.is_empty() || fds.len() > MAX_FDS {
        return Err(Error::Invalid {
            name: "message with file descriptors",
            value: format!("{} bytes, {} descriptors", data.len(), fds.len()),
            expected: format!("at least one byte and at most {MAX_FDS} descriptors"),
        });
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(data)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(nix::errno::Errno::EINTR) => {}
            sent => {
                return sent.map_err(errno(|| {
                    format!(
                        "send {} bytes and {} file descriptors",
                        data.len(),
                        raw.len()
                    )
                }));
            }
        }
    }
}

/// Receives one message (or piece of a stream) of at most `max_data` bytes and `max_fds` descriptors; no bytes: the peer
/// closed. More descriptors than that are an error, and none stays open.
pub fn receive(socket: BorrowedFd<'_>, max_data: usize, max_fds: usize) -> Result<Message> {
    let max_fds = max_fds.min(MAX_FDS);
    let mut data = vec![0u8; max_data];
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    let (bytes, fds, truncated) = loop {
        let mut pieces = [IoSliceMut::new(&mut data)];
        let message = match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut pieces,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(nix::errno::Errno::EINTR) => continue,
            message => message.map_err(errno(|| {
                "receive a message with file descriptors".to_owned()
            }))?,
        };
        let mut fds = Vec::new();
        let control = message
            .cmsgs()
            .map_err(errno(|| "read a control message".to_owned()))?;
        for entry in control {
            if let ControlMessageOwned::ScmRights(raw) = entry {
                // SAFETY: the kernel installed these for this call alone; each number comes up once.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        break (
            message.bytes,
            fds,
            message.flags.contains(MsgFlags::MSG_CTRUNC),
        );
    };
    if truncated || fds.len() > max_fds {
        return Err(Error::Protocol {
            what: "receive a message with file descriptors".to_owned(),
            detail: format!(
                "{} descriptors or more, at most {max_fds} expected",
                fds.len()
            ),
        });
    }
    data.truncate(bytes);
    Ok(Message { data, fds })
}

/// Who is at the other end of a unix socket (SO_PEERCRED).
pub fn peer(socket: impl AsFd) -> Result<Peer> {
    let credentials: UnixCredentials =
        getsockopt(&socket, sockopt::PeerCredentials).map_err(errno(|| {
            "ask who is at the other end of a unix socket".to_owned()
        }))?;
    Ok(Peer {
        pid: u32::try_from(credentials.pid()).unwrap_or(0),
        uid: credentials.uid(),
        gid: credentials.gid(),
    })
}

/// Sets the size of a terminal, given its master or slave end, in characters (TIOCSWINSZ).
pub fn set_window_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    check(answer, || {
        format!("set the size of a terminal to {columns}x{rows}")
    })?;
    Ok(())
}
