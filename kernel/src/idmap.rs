//! Mounts that show files with other owners (mount_setattr(2), since Linux 5.12; overlay takes such layers since 5.19).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::sys::check;
use crate::{Error, Result};

/// A range of user or group ids inside a container and what they are outside (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// A user namespace without processes: it stands for a mapping of ids.
#[derive(Debug)]
pub struct IdMapping {
    namespace: OwnedFd,
}

/// A process that does nothing but hold its new user namespace; ended when this is dropped.
struct Holder(libc::pid_t);

impl Holder {
    fn start() -> Result<Self> {
        // Without a signal at its end: it is nobody's child but ours, and no waitpid(-1) elsewhere sees it.
        // SAFETY: as fork(2), with a stack of its own copy; the child makes two system calls, allocates nothing and never returns.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: no pointers.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
                }
            }
        }
        check(pid, || "make a user namespace".to_owned()).map(|pid| Self(pid as libc::pid_t))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: a child of ours that has not been waited for, so the number is still its own.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WCLONE);
        }
    }
}

impl IdMapping {
    /// A mapping of these user and group ids. Needs CAP_SETUID and CAP_SETGID in force.
    pub fn new(users: &[IdRange], groups: &[IdRange]) -> Result<Self> {
        let holder = Holder::start()?;
        for (file, ranges) in [("uid_map", users), ("gid_map", groups)] {
            let lines: String = ranges
                .iter()
                .map(|r| format!("{} {} {}\n", r.inside, r.outside, r.count))
                .collect();
            let path = format!("/proc/{}/{file}", holder.0);
            std::fs::write(path, &lines).map_err(|source| Error::Syscall {
                what: format!("map ids {:?} ({file})", lines.trim_end()),
                source,
            })?;
        }
        let path = format!("/proc/{}/ns/user", holder.0);
        let file = std::fs::File::open(&path).map_err(|source| Error::Syscall {
            what: format!("open {path}"),
            source,
        })?;
        Ok(Self {
            namespace: file.into(),
        })
    }

    /// A copy of the mount at `path`, in no place yet, whose files show the mapped owners.
    pub fn mount(&self, path: &Path, read_only: bool) -> Result<Detached> {
        let what = || format!("show {} with mapped owners", path.display());
        let name = c_path(path)?;
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
        // SAFETY: the path lives through the call.
        let tree =
            unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, name.as_ptr(), flags) };
        let tree = check(tree, what)?;
        // SAFETY: the kernel just made it for this call; descriptors fit an int.
        let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP
                | if read_only {
                    libc::MOUNT_ATTR_RDONLY
                } else {
                    0
                },
            attr_clr: 0,
            propagation: 0,
            userns_fd: self.namespace.as_raw_fd() as u64,
        };
        // SAFETY: path and attributes live through the call, and the size is that of the attributes.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        check(answer, what)?;
        Ok(Detached(tree))
    }
}

/// A mount that is in no place: gone when this is dropped, unless it was put into one.
#[derive(Debug)]
pub struct Detached(OwnedFd);

impl Detached {
    /// Puts it at `target`, over what is there.
    pub fn attach(self, target: &Path) -> Result<()> {
        let name = c_path(target)?;
        // SAFETY: both paths live through the call.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                name.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        check(answer, || format!("mount at {}", target.display())).map(drop)
    }
}

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Invalid {
        name: "path",
        value: path.display().to_string(),
        expected: "one without a zero byte".to_owned(),
    })
}
