//! Network namespaces: open, compare, enter and leave again.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::{io, mem, thread};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{Error, Result};

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
    /// Opens the namespace bound at `path` (`/run/netns/x`, `/proc/1/ns/net`).
    ///
    /// # Errors
    /// [`Error::Syscall`] when the file cannot be opened, [`Error::Invalid`] when it is
    /// something else than a network namespace.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("open network namespace {}", path.display());
        // O_NONBLOCK: the path comes from outside, and opening a fifo would wait for its writer.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| Error::Syscall {
                what: what(),
                source,
            })?;
        let refuse = |found: String| Error::Invalid {
            name: "network namespace",
            value: path.display().to_string(),
            expected: format!("a file like /run/netns/NAME or /proc/PID/ns/net; this is {found}"),
        };
        // nsfs first: NS_GET_NSTYPE's number may mean anything to a device file.
        if !is_on_nsfs(&file).map_err(|source| Error::Syscall {
            what: what(),
            source,
        })? {
            return Err(refuse("not a namespace".to_owned()));
        }
        match namespace_type(&file).map_err(|source| Error::Syscall {
            what: what(),
            source,
        })? {
            libc::CLONE_NEWNET => Ok(Self { fd: file.into() }),
            other => Err(refuse(format!("a namespace of another type ({other:#x})"))),
        }
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`Error::Syscall`] when /proc cannot be read.
    pub fn current() -> Result<Self> {
        // Not /proc/self: that is the main thread, and the namespace belongs to the thread.
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace of a process.
    ///
    /// # Errors
    /// [`Error::Syscall`] when there is no such process or it may not be looked into.
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// A new, unnamed namespace with its loopback down; gone with its last handle.
    /// For tests and probes.
    ///
    /// # Errors
    /// [`Error::Syscall`] when the caller may not create one (CAP_SYS_ADMIN).
    pub fn create() -> Result<Self> {
        // On a thread of its own, which then ends: the caller's never leaves its namespace.
        let made = thread::Builder::new()
            .name("new-netns".to_owned())
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Syscall {
                    what: "create a network namespace".to_owned(),
                    source: errno.into(),
                })?;
                Self::current()
            });
        let thread = made.map_err(|source| Error::Syscall {
            what: "start a thread for a new network namespace".to_owned(),
            source,
        })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Identity, to compare namespaces.
    ///
    /// # Errors
    /// [`Error::Syscall`] when the kernel does not tell.
    pub fn id(&self) -> Result<NetnsId> {
        let metadata = self.try_clone().and_then(|copy| {
            File::from(copy.fd)
                .metadata()
                .map_err(|source| Error::Syscall {
                    what: "identify a network namespace".to_owned(),
                    source,
                })
        })?;
        Ok(NetnsId {
            dev: metadata.dev(),
            ino: metadata.ino(),
        })
    }

    /// Whether both handles are the same namespace.
    ///
    /// # Errors
    /// As [`Netns::id`].
    pub fn is_same(&self, other: &Self) -> Result<bool> {
        Ok(self.id()? == other.id()?)
    }

    /// A second handle on the same namespace.
    ///
    /// # Errors
    /// [`Error::Syscall`] when the process has no file descriptor left.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().map_err(|source| Error::Syscall {
            what: "duplicate the handle of a network namespace".to_owned(),
            source,
        })?;
        Ok(Self { fd })
    }

    /// Runs `work` on the calling thread inside this namespace and returns to the thread's
    /// own one afterwards, also on a panic. Threads that `work` starts stay inside.
    ///
    /// A thread that cannot return would do everything else in the wrong namespace: then
    /// the process aborts.
    ///
    /// # Errors
    /// [`Error::Syscall`] when the namespace cannot be entered (CAP_SYS_ADMIN); `work` has
    /// not run then.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let home = Self::current()?;
        self.enter().map_err(|errno| Error::Syscall {
            what: "enter a network namespace".to_owned(),
            source: errno.into(),
        })?;
        let _return = Return { home };
        Ok(work())
    }

    fn enter(&self) -> nix::Result<()> {
        setns(&self.fd, CloneFlags::CLONE_NEWNET)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Brings the thread back home when it goes out of scope.
struct Return {
    home: Netns,
}

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(errno) = self.home.enter() {
            tracing::error!("cannot return to the thread's own network namespace: {errno}");
            std::process::abort();
        }
    }
}

fn is_on_nsfs(file: &File) -> io::Result<bool> {
    // SAFETY: statfs is plain old data, for which all zeroes is a valid value.
    let mut stat: libc::statfs = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is valid for writing one struct statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type == libc::NSFS_MAGIC)
}

/// The `CLONE_NEW*` flag of an open namespace (ioctl_ns(2)).
fn namespace_type(file: &File) -> io::Result<i32> {
    // SAFETY: NS_GET_NSTYPE takes no argument and touches no memory of ours.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) } {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(kind),
    }
}
