//! Other processes: pidfds, their file descriptors, thread ids, scheduling, exits.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::sys::{check, errno, read_text};
use crate::{CpuId, CpuSet, Error, Result};

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
        let path = format!("/proc/{tid}/status");
        let status = read_text(&path)?;
        let leader = status
            .lines()
            .find_map(|line| line.strip_prefix("Tgid:"))
            .and_then(|value| value.trim().parse().ok())
            .ok_or_else(|| Error::Protocol {
                what: format!("read {path}"),
                detail: "no Tgid line".to_owned(),
            })?;
        Self::open(leader)
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

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal {
        /// Number of the signal, real-time ones too.
        signal: i32,
        /// Whether it left a core.
        core_dumped: bool,
    },
}

/// A child that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitInfo {
    /// Its process id, free again after [`consume`].
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

impl ExitInfo {
    /// The status as shells and containerd tell it: the exit code, or 128 and the signal.
    pub fn status(&self) -> u32 {
        match self.exit {
            Exit::Code(code) => (code & 0xff) as u32,
            Exit::Signal { signal, .. } => 128 + signal as u32,
        }
    }
}

/// waitid(2) through libc: nix refuses a child that a real-time signal killed.
fn waitid(kind: libc::idtype_t, id: libc::id_t, flags: i32) -> std::io::Result<Option<ExitInfo>> {
    // SAFETY: all bytes zero is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: `info` lives through the call.
        if unsafe { libc::waitid(kind, id, &raw mut info, flags) } == 0 {
            break;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    // SAFETY: waitid filled it for a child, or left the zeroes: then the pid is 0.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let exit = match info.si_code {
        libc::CLD_EXITED => Exit::Code(status),
        code => Exit::Signal {
            signal: status,
            core_dumped: code == libc::CLD_DUMPED,
        },
    };
    Ok(Some(ExitInfo {
        pid: pid as u32,
        exit,
    }))
}

fn peek(flags: i32) -> Result<Option<u32>> {
    match waitid(libc::P_ALL, 0, libc::WEXITED | libc::WNOWAIT | flags) {
        Ok(info) => Ok(info.map(|info| info.pid)),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        Err(source) => Err(Error::Syscall {
            what: "wait for a child to end".to_owned(),
            source,
        }),
    }
}

/// Blocks until a child has ended and tells which, leaving it to be reaped by whoever waits for it; None when there are no children.
///
/// The same child is told again until somebody reaps it. Reap it with [`consume`] when it is nobody else's.
pub fn wait_any_peek() -> Result<Option<u32>> {
    peek(0)
}

/// A child that has ended, as [`wait_any_peek`] tells it, without blocking; None when there is none now.
pub fn peek_ended() -> Result<Option<u32>> {
    peek(libc::WNOHANG)
}

/// Reaps the child `pid`, which has ended; does not wait for one that still runs ([`Error::NotFound`]).
pub fn consume(pid: u32) -> Result<ExitInfo> {
    let raw = raw_pid(pid)?;
    waitid(
        libc::P_PID,
        raw as libc::id_t,
        libc::WEXITED | libc::WNOHANG,
    )
    .map_err(|source| Error::Syscall {
        what: format!("reap child {pid}"),
        source,
    })?
    .ok_or_else(|| Error::NotFound {
        what: format!("exit of child {pid}: it still runs, and"),
    })
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

/// Scheduling class of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduling {
    /// SCHED_OTHER with a nice value, −20 to 19.
    Other(i32),
    /// SCHED_IDLE: only cycles nobody else wants.
    Idle,
    /// SCHED_FIFO with a priority, 1 to 99.
    Fifo(u32),
    /// Anything else, by the kernel's number.
    Unknown(u32),
}

/// Scheduling class of thread `tid` (0: the caller).
pub fn scheduling(tid: u32) -> Result<Scheduling> {
    let raw = raw_tid(tid)?;
    let what = || format!("read the scheduling class of thread {tid}");
    // SAFETY: no pointers.
    let policy = check(unsafe { libc::sched_getscheduler(raw) }, what)?;
    match policy & !libc::SCHED_RESET_ON_FORK {
        libc::SCHED_OTHER => {
            // The bare system call answers 20 − nice, never negative; the C function's −1 is ambiguous.
            // SAFETY: no pointers.
            let answer = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, raw) };
            Ok(Scheduling::Other(20 - check(answer, what)? as i32))
        }
        libc::SCHED_IDLE => Ok(Scheduling::Idle),
        libc::SCHED_FIFO => {
            let mut param = libc::sched_param { sched_priority: 0 };
            // SAFETY: `param` lives through the call.
            check(unsafe { libc::sched_getparam(raw, &raw mut param) }, what)?;
            Ok(Scheduling::Fifo(param.sched_priority as u32))
        }
        other => Ok(Scheduling::Unknown(other as u32)),
    }
}

/// Sets the scheduling class of thread `tid` (0: the caller). A class above the present one needs CAP_SYS_NICE.
pub fn set_scheduling(tid: u32, class: Scheduling) -> Result<()> {
    let raw = raw_tid(tid)?;
    let what = || format!("set thread {tid} to {class:?}");
    let (policy, priority) = match class {
        Scheduling::Other(_) => (libc::SCHED_OTHER, 0),
        Scheduling::Idle => (libc::SCHED_IDLE, 0),
        Scheduling::Fifo(priority) => (libc::SCHED_FIFO, priority as i32),
        Scheduling::Unknown(number) => {
            return Err(Error::Invalid {
                name: "scheduling class",
                value: number.to_string(),
                expected: "SCHED_OTHER, SCHED_IDLE or SCHED_FIFO".to_owned(),
            });
        }
    };
    let param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: `param` lives through the call.
    check(
        unsafe { libc::sched_setscheduler(raw, policy, &raw const param) },
        what,
    )?;
    if let Scheduling::Other(nice) = class {
        // SAFETY: no pointers.
        check(
            unsafe { libc::setpriority(libc::PRIO_PROCESS, raw as libc::id_t, nice) },
            what,
        )?;
    }
    Ok(())
}

/// Words of the kernel's bit set of CPUs; 8192 CPUs are the most that it can be built for.
const MASK_WORDS: usize = 8192 / usize::BITS as usize;

/// CPUs that thread `tid` may run on (0: the caller).
pub fn affinity(tid: u32) -> Result<CpuSet> {
    let mut mask = [0usize; MASK_WORDS];
    // The bare system call, since the C type ends at 1024 CPUs.
    // SAFETY: `mask` lives through the call and its size is given.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            raw_tid(tid)?,
            size_of_val(&mask),
            mask.as_mut_ptr(),
        )
    };
    check(answer, || format!("read the CPUs of thread {tid}"))?;
    Ok(mask
        .iter()
        .zip((0u32..).step_by(usize::BITS as usize))
        .flat_map(|(word, first)| {
            (0..usize::BITS)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| CpuId(first + bit))
        })
        .collect())
}

/// Sets the CPUs that thread `tid` may run on (0: the caller).
pub fn set_affinity(tid: u32, cpus: &CpuSet) -> Result<()> {
    let mut mask = [0usize; MASK_WORDS];
    for cpu in cpus.iter() {
        let word = mask
            .get_mut((cpu.0 / usize::BITS) as usize)
            .ok_or_else(|| Error::Invalid {
                name: "CPU",
                value: cpu.to_string(),
                expected: "a number below 8192".to_owned(),
            })?;
        *word |= 1 << (cpu.0 % usize::BITS);
    }
    // SAFETY: `mask` lives through the call and its size is given.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            raw_tid(tid)?,
            size_of_val(&mask),
            mask.as_ptr(),
        )
    };
    check(answer, || format!("pin thread {tid} to the CPUs {cpus}"))?;
    Ok(())
}

/// CPU on which thread `tid` of process `pid` ran last (field 39 of /proc/PID/task/TID/stat).
pub fn last_cpu(pid: u32, tid: u32) -> Result<CpuId> {
    let path = format!("/proc/{pid}/task/{tid}/stat");
    let fields = stat_fields(Path::new(&path))?;
    fields
        .get(39 - 3)
        .and_then(|field| field.parse().ok())
        .map(CpuId)
        .ok_or_else(|| Error::Protocol {
            what: format!("read {path}"),
            detail: "no number in field 39".to_owned(),
        })
}

/// Time that thread `tid` of process `pid` has spent on a CPU (/proc/PID/task/TID/schedstat, to the nanosecond).
pub fn cpu_time(pid: u32, tid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/task/{tid}/schedstat");
    let text = read_text(&path)?;
    text.split_whitespace()
        .next()
        .and_then(|field| field.parse().ok())
        .map(Duration::from_nanos)
        .ok_or_else(|| Error::Protocol {
            what: format!("read {path}"),
            detail: format!("{text:?}"),
        })
}

/// Makes the calling process the reaper of its orphaned descendants (PR_SET_CHILD_SUBREAPER).
pub fn become_subreaper() -> Result<()> {
    // SAFETY: no pointers.
    check(
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) },
        || "become the reaper of orphaned descendants".to_owned(),
    )?;
    Ok(())
}

/// Whether transparent huge pages are switched off for the calling process (PR_GET_THP_DISABLE).
pub fn thp_disabled() -> Result<bool> {
    // SAFETY: no pointers.
    let answer = check(
        unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) },
        || "ask whether transparent huge pages are off".to_owned(),
    )?;
    Ok(answer & 1 == 1)
}

/// Switches transparent huge pages off or on for the calling process (PR_SET_THP_DISABLE); inherited by children and over exec.
pub fn set_thp_disabled(disabled: bool) -> Result<()> {
    let value = libc::c_ulong::from(disabled);
    // SAFETY: no pointers; the unused arguments must be zero and as wide as the kernel reads them.
    let answer = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, value, 0u64, 0u64, 0u64) };
    check(answer, || {
        format!(
            "switch transparent huge pages {}",
            if disabled { "off" } else { "on" }
        )
    })?;
    Ok(())
}
