//! Copies of a program's descriptors, which go without anybody waiting for it.
//!
//! Closing a file may wait for whoever keeps it (`flush`, as of NFS and FUSE), and closing the last descriptor of a connection for its
//! peer (`SO_LINGER`). A program brings about the one by calling `bind` on a file, and the other by closing its own descriptor meanwhile.
//! Neither may keep the other calls of its pod waiting, nor the end of the pod. So what may wait is closed by a thread of its own, and
//! nothing is copied any more while too many such threads do not come to an end.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use kbp_kernel::process::{self, Descriptor, PidFd};
use kbp_kernel::{Error, sockopt};

/// Threads that may be closing something at the same time.
const MOST: usize = 16;
const STACK_SIZE: usize = 64 * 1024;

/// Threads that are closing something, of the whole process: descriptors and threads are the process' too.
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// A copy of another process' descriptor.
#[derive(Debug)]
pub(super) struct Copy {
    /// None only while it is dropped.
    fd: Option<OwnedFd>,
}

impl Copy {
    /// Copies descriptor `number` of a process.
    pub(super) fn of(process: &PidFd, number: i32) -> Result<Self, Error> {
        if CLOSING.load(Ordering::Relaxed) >= MOST {
            return Err(Error::Unsupported {
                feature: "looking at descriptors of the container",
                reason: format!("closing copies of {MOST} of its files has not come to an end"),
            });
        }
        let fd = Some(process.get_fd(number)?);
        Ok(Self { fd })
    }

    /// Whether it is an epoll instance. What the program had under that number when its link was read may have been something else.
    pub(super) fn is_epoll(&self) -> bool {
        process::descriptor(std::process::id(), self.as_fd().as_raw_fd()) == Some(Descriptor::Epoll)
    }
}

impl AsFd for Copy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let fd = self.fd.as_ref();
        fd.expect("a copy has its descriptor until it is dropped")
            .as_fd()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else {
            return;
        };
        let at_once = match sockopt::lingers(fd.as_fd()) {
            Some(lingers) => !lingers,
            None => {
                process::descriptor(std::process::id(), fd.as_raw_fd()) == Some(Descriptor::Epoll)
            }
        };
        if at_once {
            return;
        }
        close_aside(fd);
    }
}

fn close_aside(fd: OwnedFd) {
    CLOSING.fetch_add(1, Ordering::Relaxed);
    let number = fd.as_raw_fd();
    // Kept open for ever where there can be no thread: better a descriptor too many than calls that hang.
    let fd = ManuallyDrop::new(fd);
    let work = move || {
        drop(ManuallyDrop::into_inner(fd));
        CLOSING.fetch_sub(1, Ordering::Relaxed);
    };
    let started = std::thread::Builder::new()
        .name("kbp-close".to_owned())
        .stack_size(STACK_SIZE)
        .spawn(work);
    if let Err(error) = started {
        tracing::warn!("descriptor {number} stays open for want of a thread to close it: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use nix::libc;
    use nix::sys::socket::{setsockopt, sockopt as options};

    use super::*;

    fn own() -> PidFd {
        PidFd::open(std::process::id()).expect("a pidfd")
    }

    /// A connection whose last close waits: it has more to say than its peer reads.
    fn lingering() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let mut socket =
            TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let peer = listener.accept().expect("accept").0;
        socket.set_nonblocking(true).expect("non-blocking");
        while socket.write(&[0; 65536]).is_ok() {}
        socket.set_nonblocking(false).expect("blocking");
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 60,
        };
        setsockopt(&socket, options::Linger, &linger).expect("SO_LINGER");
        (socket, peer)
    }

    #[test]
    fn nobody_waits_for_the_peer_of_a_connection_whose_last_descriptor_is_a_copy() {
        let (socket, peer) = lingering();
        let copy = Copy::of(&own(), socket.as_raw_fd()).expect("a copy");
        // Not the last one yet.
        drop(socket);
        let start = Instant::now();
        drop(copy);
        assert!(start.elapsed() < Duration::from_secs(20), "as on a close");
        // Reset: whoever closes is done then.
        drop(peer);
        let until = Instant::now() + Duration::from_secs(20);
        while CLOSING.load(Ordering::Relaxed) > 0 {
            assert!(Instant::now() < until, "it is never closed");
            std::thread::yield_now();
        }
    }

    #[test]
    fn sockets_and_epoll_instances_are_closed_with_their_copies() {
        let epoll = sockopt::epoll_create().expect("epoll instance");
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        for (fd, is_epoll) in [(epoll.as_raw_fd(), true), (listener.as_raw_fd(), false)] {
            let copy = Copy::of(&own(), fd).expect("a copy");
            assert_eq!(copy.is_epoll(), is_epoll);
        }
        let address = listener.local_addr().expect("address");
        let copy = Copy::of(&own(), listener.as_raw_fd()).expect("a copy");
        drop(listener);
        assert!(TcpListener::bind(address).is_err(), "the copy has it");
        drop(copy);
        TcpListener::bind(address).expect("nobody has it");
    }
}
