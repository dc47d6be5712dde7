//! Other processes: pidfds, their file descriptors and memory, signals; scheduling of threads; reaping of children.

mod aside;
mod capabilities;
mod descriptors;
mod entry;
mod limits;
mod parent;
mod reap;
mod scheduling;

pub use aside::{Aside, aside};
pub use capabilities::{Capability, drop_for_good, give_up, take_up_in_this_thread};
pub use descriptors::{Descriptor, descriptor};
#[doc(hidden)]
pub use entry::run_short_lived;
pub use limits::OpenFiles;
pub use parent::end_with_parent;
pub use reap::{Exit, ExitInfo, become_subreaper, consume, peek_ended, wait_any_peek};
pub use scheduling::{
    Scheduling, Switches, Turns, affinity, affinity_count, cpu_time, cpu_time_of_all, current_cpu,
    last_cpu, scheduling, set_affinity, set_affinity_of, set_scheduling, switches, turns,
};

use std::io::{IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::sys::{check, errno, read_text};
use crate::{Error, Result};

/// A handle on a process that cannot come to mean another one.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

/// A process id as the kernel's signed type; 0 and what does not fit mean "a group" or "everybody" there, never a process.
fn raw_pid(pid: u32) -> Result<libc::pid_t> {
    libc::pid_t::try_from(pid)
        .ok()
        .filter(|pid| *pid > 0)
        .ok_or_else(|| Error::Invalid {
            name: "process id",
            value: pid.to_string(),
            expected: "a number from 1 to 2147483647".to_owned(),
        })
}

/// A thread id as the kernel's signed type; 0 is the caller.
fn raw_tid(tid: u32) -> Result<libc::pid_t> {
    if tid == 0 { Ok(0) } else { raw_pid(tid) }
}

fn pidfd_open(pid: libc::pid_t, flags: u32) -> std::io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    if fd == -1 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for this call (close-on-exec, always); descriptors fit an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

impl PidFd {
    /// Opens a process by id (pidfd_open).
    pub fn open(pid: u32) -> Result<Self> {
        let fd = pidfd_open(raw_pid(pid)?, 0).map_err(|source| Error::Syscall {
            what: format!("open process {pid}"),
            source,
        })?;
        Ok(Self { fd })
    }

    /// Opens the process that thread `tid` belongs to: PIDFD_THREAD where the kernel has it (6.9+), else by the Tgid of /proc/TID/status.
    ///
    /// Between learning `tid` and this call the thread may have died and its number may be another's: check afterwards
    /// that what named it still holds ([`crate::notify::Listener::is_valid`]).
    pub fn open_by_thread(tid: u32) -> Result<Self> {
        let what = || format!("open the process of thread {tid}");
        match pidfd_open(raw_pid(tid)?, libc::PIDFD_THREAD) {
            Ok(fd) => Ok(Self { fd }),
            // The flag is unknown before 6.9.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::open_leader_of(tid),
            Err(source) => Err(Error::Syscall {
                what: what(),
                source,
            }),
        }
    }

    fn open_leader_of(tid: u32) -> Result<Self> {
        Self::open(process_of(tid)?)
    }

    /// A copy of that process' file descriptor (pidfd_getfd), close-on-exec here.
    pub fn get_fd(&self, number: i32) -> Result<OwnedFd> {
        // SAFETY: no pointers; the pidfd is open.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.fd.as_raw_fd(), number, 0u32) };
        let fd = check(fd, || {
            format!("copy file descriptor {number} of another process")
        })?;
        // SAFETY: the kernel just made it for this call; descriptors fit an int.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// As [`Self::get_fd`], None when there is no such descriptor, or it cannot be had; allocates nothing.
    pub fn open_fd(&self, number: i32) -> Option<OwnedFd> {
        // SAFETY: no pointers; the pidfd is open.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.fd.as_raw_fd(), number, 0u32) };
        // SAFETY: when it is one, the kernel just made it for this call; descriptors fit an int.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Sends a signal, by number; 0 only checks. False when the process is gone.
    pub fn signal(&self, signal: i32) -> Result<bool> {
        // SAFETY: the pidfd is open, and a null siginfo means the same as kill(2).
        let answer = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0u32,
            )
        };
        gone_is_false(check(answer, || {
            format!("send signal {signal} to a process")
        }))
    }

    /// Waits up to `timeout` for the process (or thread, see [`Self::open_by_thread`]) to end; whether it has.
    /// It need not be a child, and a child is not reaped by this.
    pub fn wait_end(&self, timeout: Duration) -> Result<bool> {
        let until = std::time::Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            // Rounded up, so that the last round does not spin.
            let left = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
            let mut poll = libc::pollfd {
                fd: self.fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd that lives through the call.
            let answer = unsafe { libc::poll(&raw mut poll, 1, left) };
            match check(answer, || "wait for a process to end".to_owned()) {
                Ok(0) if left == 0 => return Ok(false),
                Ok(0) => {}
                Ok(_) => return Ok(true),
                Err(error) if error.errno() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn gone_is_false<T>(answer: Result<T>) -> Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) if error.errno() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Id of the process that thread `tid` belongs to. Allocates nothing unless it fails: a trapped call may wait for it.
pub fn process_of(tid: u32) -> Result<u32> {
    let what = || format!("read the Tgid of /proc/{tid}/status");
    let failed = |source| Error::Syscall {
        what: what(),
        source,
    };
    let mut path = [0; 32];
    let room = path.len();
    let mut rest = &mut path[..];
    write!(rest, "/proc/{tid}/status").map_err(failed)?;
    let length = room - rest.len();
    let path = std::str::from_utf8(&path[..length]).unwrap_or_default();
    // It is the fourth line; what precedes it is shorter than this, a thread's name being 15 bytes at most.
    let mut status = [0; 256];
    let length = std::fs::File::open(path)
        .and_then(|mut file| file.read(&mut status))
        .map_err(failed)?;
    status[..length]
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Tgid:"))
        .and_then(|value| std::str::from_utf8(value).ok()?.trim().parse().ok())
        .ok_or_else(|| Error::Protocol {
            what: what(),
            detail: "no such line".to_owned(),
        })
}

/// Sends a signal, by number, to process `pid`; 0 only checks. False when there is no such process.
/// Never a group or everybody: `pid` 0 is refused.
pub fn kill(pid: u32, signal: i32) -> Result<bool> {
    let raw = raw_pid(pid)?;
    // SAFETY: no pointers.
    let answer = unsafe { libc::kill(raw, signal) };
    gone_is_false(check(answer, || {
        format!("send signal {signal} to process {pid}")
    }))
}

/// Fields of a stat file below /proc from the third (the state) on; the second, the command, may hold blanks and brackets.
fn stat_fields(path: &Path) -> Result<Vec<String>> {
    let text = read_text(path)?;
    let (_, rest) = text.rsplit_once(')').ok_or_else(|| Error::Protocol {
        what: format!("read {}", path.display()),
        detail: "no command in brackets".to_owned(),
    })?;
    Ok(rest.split_whitespace().map(str::to_owned).collect())
}

/// Whether process `pid` has ended and waits for its parent. False also when there is no such process.
pub fn is_zombie(pid: u32) -> Result<bool> {
    match stat_fields(Path::new(&format!("/proc/{pid}/stat"))) {
        Ok(fields) => Ok(fields
            .first()
            .is_some_and(|state| state == "Z" || state == "X")),
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads `buffer.len()` bytes at `address` of the process that thread `tid` belongs to.
pub fn read_memory(tid: u32, address: u64, buffer: &mut [u8]) -> Result<()> {
    let what = || format!("read memory of thread {tid}");
    let length = buffer.len();
    let base = usize::try_from(address).map_err(|_| Error::Protocol {
        what: what(),
        detail: format!("address {address:#x}"),
    })?;
    let read = process_vm_readv(
        Pid::from_raw(raw_pid(tid)?),
        &mut [IoSliceMut::new(buffer)],
        &[RemoteIoVec { base, len: length }],
    )
    .map_err(errno(what))?;
    if read == length {
        Ok(())
    } else {
        Err(Error::Protocol {
            what: what(),
            detail: format!("{read} of {length} bytes"),
        })
    }
}

/// Gives the caller's process group a core scheduling cookie of its own (PR_SCHED_CORE), inherited by children: what has
/// another cookie does not run on a sibling hyperthread at the same time. ENODEV without simultaneous multithreading,
/// EINVAL from a kernel without core scheduling.
pub fn create_core_cookie() -> Result<()> {
    // include/linux/pid.h: PIDTYPE_PGID.
    const PROCESS_GROUP: libc::c_ulong = 2;
    // SAFETY: with PR_SCHED_CORE_CREATE the last argument must be 0, and nothing is a pointer.
    let answer = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_CREATE,
            0,
            PROCESS_GROUP,
            0,
        )
    };
    check(answer, || "create a core scheduling cookie".to_owned())?;
    Ok(())
}

/// Whether transparent huge pages are switched off for the calling process (PR_GET_THP_DISABLE).
pub fn thp_disabled() -> Result<bool> {
    let answer = prctl(libc::PR_GET_THP_DISABLE, 0);
    let answer = check(answer, || {
        "ask whether transparent huge pages are off".to_owned()
    })?;
    Ok(answer & 1 == 1)
}

/// Switches transparent huge pages off or on for the calling process (PR_SET_THP_DISABLE); inherited by children and over exec.
pub fn set_thp_disabled(disabled: bool) -> Result<()> {
    let answer = prctl(libc::PR_SET_THP_DISABLE, disabled.into());
    check(answer, || {
        format!(
            "switch transparent huge pages {}",
            if disabled { "off" } else { "on" }
        )
    })?;
    Ok(())
}

/// Gives memory that the allocator holds and nobody uses back to the kernel. Takes about a millisecond for each few megabytes of heap.
pub fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// prctl(2) with one plain value. The kernel reads every argument at full width and wants the unused ones zero.
fn prctl(option: i32, value: libc::c_ulong) -> i32 {
    const UNUSED: libc::c_ulong = 0;
    // SAFETY: the options used in this module take numbers, no pointers.
    unsafe { libc::prctl(option, value, UNUSED, UNUSED, UNUSED) }
}
