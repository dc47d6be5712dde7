//! Network namespaces: open, compare, enter and leave again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::Result;

/// What makes two handles the same namespace: device and inode of its nsfs file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of the nsfs.
    pub dev: u64,
    /// Inode, as in `readlink /proc/PID/ns/net`.
    pub ino: u64,
}

/// An open network namespace; it lives at least as long as this handle.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// Opens the namespace bound at `path` (`/run/netns/x`, `/proc/1/ns/net`); refuses what is not a network namespace (NS_GET_NSTYPE).
    pub fn open(_path: &Path) -> Result<Self> { todo!() }
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> { todo!() }
    /// The namespace of a process.
    pub fn of_process(_pid: u32) -> Result<Self> { todo!() }
    /// A new, unnamed namespace with its loopback down; gone with its last handle. For tests and probes.
    pub fn create() -> Result<Self> { todo!() }
    /// Identity, to compare namespaces.
    pub fn id(&self) -> Result<NetnsId> { todo!() }
    /// Whether both handles are the same namespace.
    pub fn is_same(&self, _other: &Self) -> Result<bool> { todo!() }
    /// A second handle on the same namespace.
    pub fn try_clone(&self) -> Result<Self> { todo!() }
    /// Runs `work` on the calling thread inside this namespace and returns to the thread's own one afterwards, also on a panic.
    /// A thread that cannot return would do everything else in the wrong namespace: then the process aborts.
    pub fn run<T>(&self, _work: impl FnOnce() -> T) -> Result<T> { todo!() }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
