//! What the file descriptors of a process are, told without a copy of them.

use std::io::Write as _;

/// What a file descriptor is, as far as busy polling cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// A socket of any kind.
    Socket,
    /// An epoll instance.
    Epoll,
    /// Anything else.
    Other,
}

/// What descriptor `number` of process `pid` is, by its link in /proc; None when there is no such descriptor or process. It may be
/// another one by the time of the answer, unless it is the caller's own. Allocates nothing: a trapped call may wait for it.
pub fn descriptor(pid: u32, number: i32) -> Option<Descriptor> {
    // Two numbers of ten digits at most, and a zero byte at the end.
    let mut path = [0u8; 40];
    write!(&mut path[..39], "/proc/{pid}/fd/{number}").ok()?;
    let mut link = [0u8; 32];
    // SAFETY: the path ends with a zero byte, and the kernel writes no more than the length of `link`.
    let length =
        unsafe { libc::readlink(path.as_ptr().cast(), link.as_mut_ptr().cast(), link.len()) };
    let link = link.get(..usize::try_from(length).ok()?)?;
    Some(match link {
        b"anon_inode:[eventpoll]" => Descriptor::Epoll,
        _ if link.starts_with(b"socket:[") => Descriptor::Socket,
        _ => Descriptor::Other,
    })
}
