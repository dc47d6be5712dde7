//! Probes of what a supervisor of other processes needs: seccomp notifications and their descriptors.

use std::io::{PipeReader, PipeWriter, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;

use crate::notify::{self, Listener, Received};
use crate::process::PidFd;
use crate::sys::{check, errno};
use crate::{Error, Result};

/// A seccomp filter with a listener can be installed, a trapped call arrives and can be answered, and the kernel's structs
/// have the sizes that this build expects. The filter sits on a thread that ends with the probe, never on its caller.
pub fn seccomp_notify() -> Result<()> {
    let sizes = notify::sizes().map_err(unavailable)?;
    let kernel = [
        sizes.seccomp_notif,
        sizes.seccomp_notif_resp,
        sizes.seccomp_data,
    ];
    let ours = [
        size_of::<libc::seccomp_notif>(),
        size_of::<libc::seccomp_notif_resp>(),
        size_of::<libc::seccomp_data>(),
    ];
    if kernel.map(usize::from) != ours {
        return Err(Error::Unsupported {
            feature: NOTIFY,
            reason: format!(
                "the kernel's structs have {kernel:?} bytes, this build knows {ours:?}"
            ),
        });
    }
    with_trapped_thread(|listener| {
        let silent = || Error::Unsupported {
            feature: NOTIFY,
            reason: format!("a trapped call did not arrive within {} s", BOUND.as_secs()),
        };
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(BOUND).unwrap_or(PollTimeout::MAX);
        poll(&mut waiting, timeout).map_err(errno(|| "poll a seccomp listener".to_owned()))?;
        match listener.receive()? {
            Received::Call(call) => listener.answer_with_error(call.id, ANSWER),
            Received::Gone | Received::Closed => Err(silent()),
        }
    })
    .and_then(|(answered, errno)| {
        answered?;
        if errno == Some(ANSWER) {
            return Ok(());
        }
        Err(Error::Unsupported {
            feature: NOTIFY,
            reason: format!("the trapped call was answered with errno {ANSWER} and got {errno:?}"),
        })
    })
}

/// Synchronous wake-up of seccomp notifications (6.6+).
pub fn seccomp_sync_wake_up() -> Result<()> {
    let (synchronous, _) = with_trapped_thread(Listener::wakes_synchronously)?;
    if synchronous {
        Ok(())
    } else {
        Err(Error::Unsupported {
            feature: "synchronous wake-up of seccomp notifications",
            reason: "the listener refuses the flag; Linux 6.6 or newer has it".to_owned(),
        })
    }
}

const NOTIFY: &str = "seccomp user notification";
const BOUND: Duration = Duration::from_secs(2);
/// An errno that no bind of a bad descriptor gives by itself.
const ANSWER: i32 = libc::EXFULL;

fn unavailable(error: Error) -> Error {
    let remedy = match error.errno() {
        Some(libc::EBUSY) => "this process already runs under a filter with a listener",
        Some(libc::EPERM | libc::EACCES) => "a seccomp filter or security module forbids it",
        Some(libc::ENOSYS | libc::EINVAL) => "the kernel is built without it",
        _ => return error,
    };
    Error::Unsupported {
        feature: NOTIFY,
        reason: format!("{error}; {remedy}"),
    }
}

/// Runs `work` with the listener of a thread that tries one trapped call; returns its result and the errno that the call
/// got. The listener is closed after `work`: a call that is still not answered then gets ENOSYS, so nothing hangs.
fn with_trapped_thread<T>(work: impl FnOnce(&Listener) -> T) -> Result<(T, Option<i32>)> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("seccomp-probe".to_owned())
        .spawn(move || {
            let installed = notify::trap_calling_thread(&[libc::SYS_bind]);
            let trapped = installed.is_ok();
            if sender.send(installed).is_err() || !trapped {
                return None;
            }
            // SAFETY: the kernel reads no address for a descriptor that is none.
            let answer = unsafe { libc::bind(-1, std::ptr::null(), 0) };
            (answer == -1)
                .then(std::io::Error::last_os_error)
                .and_then(|e| e.raw_os_error())
        });
    let thread = thread.map_err(|source| Error::Syscall {
        what: "start a thread to try a seccomp filter".to_owned(),
        source,
    })?;
    let installed = receiver.recv();
    let result = match installed {
        Ok(Ok(fd)) => {
            let listener = Listener::new(fd);
            Ok(work(&listener))
        }
        Ok(Err(error)) => Err(unavailable(error)),
        // The thread ended without a word: joining tells its panic.
        Err(mpsc::RecvError) => Err(Error::NotFound {
            what: "answer of the probe's thread".to_owned(),
        }),
    };
    let got = thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    Ok((result?, got))
}

/// A child's descriptor can be copied with pidfd_getfd: that is what Yama and other security modules may forbid, while a
/// process may always copy its own.
pub fn pidfd_getfd() -> Result<()> {
    let pipe_error = |source| Error::Syscall {
        what: "make a pipe".to_owned(),
        source,
    };
    let (reader, writer) = pipe().map_err(pipe_error)?;
    let child = Child::start(reader, writer)?;
    let copy = PidFd::open(child.pid as u32)
        .and_then(|process| process.get_fd(child.reader.as_raw_fd()))
        .map_err(|error| Error::Unsupported {
            feature: "copying descriptors of other processes (pidfd_getfd)",
            reason: format!(
                "{error}; it needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3"
            ),
        })?;
    let inode = |fd| fstat(fd).map(|s| (s.st_dev, s.st_ino));
    let what = || "compare a copied descriptor".to_owned();
    let same = inode(copy.as_fd()).map_err(errno(what))?
        == inode(child.reader.as_fd()).map_err(errno(what))?;
    if same {
        Ok(())
    } else {
        Err(Error::Protocol {
            what: what(),
            detail: "it is another file".to_owned(),
        })
    }
}

/// A copy of this process that waits until its maker closes a pipe.
struct Child {
    pid: libc::pid_t,
    reader: PipeReader,
    writer: Option<PipeWriter>,
}

impl Child {
    fn start(reader: PipeReader, writer: PipeWriter) -> Result<Self> {
        // No exit signal: neither SIGCHLD nor an ordinary wait for any child will notice it.
        // SAFETY: without CLONE_VM the child has memory of its own, and it only makes the system calls below.
        let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if pid == 0 {
            let mut byte = 0u8;
            // SAFETY: async-signal-safe calls on descriptors that the child has copies of, and one byte of its own.
            unsafe {
                libc::close(writer.as_raw_fd());
                libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(0);
            }
        }
        let pid = check(pid, || "fork a child to try pidfd_getfd on".to_owned())?;
        Ok(Self {
            pid: pid as libc::pid_t,
            reader,
            writer: Some(writer),
        })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.writer = None;
        // Not only by the pipe: a child of another thread may hold a copy of its end until it runs exec.
        // SAFETY: no pointers; the child is not reaped yet, so the number is still its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // SAFETY: a null status is allowed. __WALL finds a child without exit signal.
        while unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) } == -1
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
    }
}
