//! The supervisor's side of seccomp user notification (seccomp_unotify(2)).

use std::io::Error as IoError;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sys::check;
use crate::{Error, Result};

/// Room for a struct seccomp_notif without the heap, in 64-bit words; today's kernels fill 10.
const USUAL_WORDS: usize = 32;

/// SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (include/uapi/linux/seccomp.h).
const SYNC_WAKE_UP: u64 = 1;

/// A trapped system call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub struct Notification {
    /// Cookie of this call.
    pub id: u64,
    /// Thread id of the caller in the supervisor's pid namespace; 0 when it is not visible from here.
    pub tid: u32,
    /// System call number of the caller's architecture; see [`crate::syscalls::identify`].
    pub syscall: i32,
    /// `AUDIT_ARCH_*` of the caller.
    pub arch: u32,
    /// Arguments as passed; pointers are the caller's.
    pub args: [u64; 6],
}

/// What became of waiting for a notification.
#[derive(Debug)]
pub enum Received {
    /// A call waits for an answer.
    Call(Notification),
    /// The caller died before it was read, or there was nothing to read: wait again.
    Gone,
    /// Nobody uses the filter any more.
    Closed,
}

/// The listener of one filter. Closing it gives every call that still waits ENOSYS: answer them first.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    /// Room for a struct seccomp_notif of this kernel, in 64-bit words.
    words: usize,
    sync_wake_up: bool,
}

/// The kernel's sizes of its own structs (SECCOMP_GET_NOTIF_SIZES, 5.0+).
pub(crate) fn sizes() -> Result<libc::seccomp_notif_sizes> {
    let mut sizes = libc::seccomp_notif_sizes {
        seccomp_notif: 0,
        seccomp_notif_resp: 0,
        seccomp_data: 0,
    };
    // SAFETY: the kernel writes a struct seccomp_notif_sizes, which `sizes` is.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_NOTIF_SIZES,
            0u32,
            &raw mut sizes,
        )
    };
    check(answer, || {
        "ask for the sizes of seccomp notifications".to_owned()
    })?;
    Ok(sizes)
}

impl Listener {
    /// Takes over the fd that runc sent and asks for synchronous wake-ups where the kernel has them (6.6+); without them a call costs one scheduler trip more.
    pub fn new(fd: OwnedFd) -> Self {
        let ours = size_of::<libc::seccomp_notif>();
        // Where asking is forbidden, the size of this build is the best guess: the kernel has never changed it.
        let kernels = sizes().map_or(ours, |sizes| usize::from(sizes.seccomp_notif));
        // SAFETY: this request takes its flags by value.
        let answer = unsafe {
            libc::ioctl(
                fd.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS,
                SYNC_WAKE_UP,
            )
        };
        Self {
            fd,
            words: ours.max(kernels).div_ceil(size_of::<u64>()),
            sync_wake_up: answer == 0,
        }
    }

    /// Whether the caller and the supervisor hand the CPU to each other directly (6.6+).
    pub fn wakes_synchronously(&self) -> bool {
        self.sync_wake_up
    }

    /// Reads the next notification without blocking: call when poll(2) says readable or hung up.
    pub fn receive(&self) -> Result<Received> {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // Reading would block when the caller died meanwhile, so ask first.
        // SAFETY: one pollfd that lives through the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        match check(ready, || "poll a seccomp listener".to_owned()) {
            Err(error) if error.errno() == Some(libc::EINTR) => return Ok(Received::Gone),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        if poll.revents & libc::POLLIN == 0 {
            let over = poll.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0;
            return Ok(if over {
                Received::Closed
            } else {
                Received::Gone
            });
        }
        // Zeroed, or the kernel refuses it (EINVAL). A call waits while this runs, so the heap is for kernels to come.
        let mut usual = [0u64; USUAL_WORDS];
        let mut large = Vec::new();
        let buffer = match usual.get_mut(..self.words) {
            Some(buffer) => buffer,
            None => {
                large.resize(self.words, 0u64);
                &mut large[..]
            }
        };
        // SAFETY: the buffer has room for the kernel's struct seccomp_notif and is aligned for it.
        let answer = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_RECV,
                buffer.as_mut_ptr(),
            )
        };
        match check(answer, || "receive a seccomp notification".to_owned()) {
            Ok(_) => {}
            Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EINTR)) => {
                return Ok(Received::Gone);
            }
            Err(error) => return Err(error),
        }
        // SAFETY: the kernel filled it, it is no shorter than ours and aligned; every field is a plain integer.
        let raw = unsafe { buffer.as_ptr().cast::<libc::seccomp_notif>().read() };
        Ok(Received::Call(Notification {
            id: raw.id,
            tid: raw.pid,
            syscall: raw.data.nr,
            arch: raw.data.arch,
            args: raw.data.args,
        }))
    }

    /// Whether the call still waits (SECCOMP_IOCTL_NOTIF_ID_VALID); check after opening anything of the caller by its pid.
    pub fn is_valid(&self, id: u64) -> bool {
        // SAFETY: the ioctl reads one u64, which lives through the call.
        let answer = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
                &raw const id,
            )
        };
        answer == 0
    }

    /// Lets the call run as if it had not been trapped. Ok also when the caller is gone.
    pub fn continue_call(&self, id: u64) -> Result<()> {
        self.send(id, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32, || {
            "let a trapped call continue".to_owned()
        })
    }

    /// Lets the call fail with `errno` (positive) without running it. Ok also when the caller is gone.
    pub fn answer_with_error(&self, id: u64, errno: i32) -> Result<()> {
        self.send(id, -errno.abs(), 0, || {
            format!("answer a trapped call with errno {errno}")
        })
    }

    fn send(&self, id: u64, error: i32, flags: u32, what: impl FnOnce() -> String) -> Result<()> {
        let response = libc::seccomp_notif_resp {
            id,
            val: 0,
            error,
            flags,
        };
        // SAFETY: the ioctl reads a struct seccomp_notif_resp, whose size is part of the request's number.
        let answer = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                &raw const response,
            )
        };
        gone_is_fine(check(answer, what))
    }

    /// Puts a copy of `fd` into the caller as the result of its call, atomically (ADDFD with SEND, 5.14+).
    /// Ok also when the caller is gone. On error the call still waits for an answer.
    pub fn answer_with_fd(&self, id: u64, fd: BorrowedFd<'_>, close_on_exec: bool) -> Result<()> {
        let request = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: fd.as_raw_fd() as u32,
            newfd: 0,
            newfd_flags: if close_on_exec {
                libc::O_CLOEXEC as u32
            } else {
                0
            },
        };
        loop {
            // SAFETY: the ioctl reads a struct seccomp_notif_addfd, whose size is part of the request's number.
            let answer = unsafe {
                libc::ioctl(
                    self.fd.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_ADDFD,
                    &raw const request,
                )
            };
            match check(answer, || {
                "answer a trapped call with a file descriptor".to_owned()
            }) {
                // The caller was not reached yet, and nothing was done.
                Err(error) if error.errno() == Some(libc::EINTR) => {}
                done => return gone_is_fine(done),
            }
        }
    }
}

/// ENOENT: the caller was gone when the answer came. ESRCH: a signal took it out of the call while it was to be given a
/// descriptor (seccomp_do_user_notification, kernel/seccomp.c); it comes back with a new notification.
fn gone_is_fine<T>(answer: Result<T>) -> Result<()> {
    match answer {
        Err(error) if !matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Err(error),
        _ => Ok(()),
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Descriptors that are waited for together (poll(2)). It is filled anew for each wait and keeps its memory, so that a wait
/// allocates nothing once it has grown.
///
/// Why not epoll: a synchronous wake-up ([`Listener::wakes_synchronously`]) hands the caller's CPU to a thread in poll, but to a thread
/// in epoll_wait it gets through only as a hint (ep_poll_callback, fs/eventpoll.c). Scanning some dozens of descriptors is far
/// cheaper than a trip over another CPU.
#[derive(Debug, Default)]
pub struct WaitSet {
    fds: Vec<libc::pollfd>,
}

impl WaitSet {
    /// Empties it.
    pub fn clear(&mut self) {
        self.fds.clear();
    }

    /// Adds a descriptor and returns its place. With `reads` it is waited for until there is something to read, else only for its end.
    /// One that is closed before the wait counts as ended.
    pub fn add(&mut self, fd: BorrowedFd<'_>, reads: bool) -> usize {
        self.fds.push(libc::pollfd {
            fd: fd.as_raw_fd(),
            events: if reads { libc::POLLIN } else { 0 },
            revents: 0,
        });
        self.fds.len() - 1
    }

    /// Waits until one of them has something to say, for at most `timeout` (rounded up to milliseconds; None: for ever); how many have.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<usize> {
        let timeout = timeout.map_or(-1, |t| {
            i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let count = self.fds.len() as libc::nfds_t;
        // SAFETY: the vector has `count` initialised pollfds and is not touched during the call.
        let ready = unsafe { libc::poll(self.fds.as_mut_ptr(), count, timeout) };
        check(ready, || format!("wait for {count} descriptors")).map(|ready| ready as usize)
    }

    /// Whether the descriptor at `place` has something to say after a wait: input, its end or an error.
    pub fn is_ready(&self, place: usize) -> bool {
        self.fds.get(place).is_some_and(|fd| fd.revents != 0)
    }
}

/// Puts a filter on the **calling thread** that sends `traps` (numbers of the build's own architecture) to the returned
/// listener and allows the rest. It stays until the thread ends and is inherited by what the thread starts: meant for
/// probes and tests, on a thread of their own. Sets no_new_privs only where the kernel insists.
pub fn trap_calling_thread(traps: &[i64]) -> Result<OwnedFd> {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let count = u8::try_from(traps.len()).map_err(|_| Error::Invalid {
        name: "trapped system calls",
        value: traps.len().to_string(),
        expected: "at most 255".to_owned(),
    })?;
    // The number is the first word of struct seccomp_data.
    let mut filter = vec![statement(
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        0,
        0,
        0,
    )];
    for (number, left) in traps.iter().zip((0..count).rev()) {
        // To the last instruction on a match: over the remaining comparisons and the allow.
        filter.push(statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            *number as u32,
            left + 1,
            0,
        ));
    }
    filter.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ALLOW,
        0,
        0,
    ));
    filter.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_USER_NOTIF,
        0,
        0,
    ));
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    let install = || {
        // SAFETY: `program` and the filter it points to live through the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const program,
            )
        };
        if fd == -1 {
            return Err(IoError::last_os_error());
        }
        // SAFETY: the kernel just made it for this call; descriptors fit an int.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    let installed = match install() {
        // Neither CAP_SYS_ADMIN nor no_new_privs.
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            // SAFETY: no pointers.
            let answer = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            check(answer, || "set no_new_privs".to_owned())?;
            install()
        }
        done => done,
    };
    installed.map_err(|source| Error::Syscall {
        what: "install a seccomp filter with a listener".to_owned(),
        source,
    })
}
