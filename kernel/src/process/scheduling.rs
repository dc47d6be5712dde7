//! Where, in which class and for how long threads run.

use std::os::unix::thread::JoinHandleExt as _;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use super::{raw_tid, stat_fields};
use crate::sys::{check, errno, read_text};
use crate::{CpuId, CpuSet, Error, Result};

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
    let answer = unsafe { libc::sched_setscheduler(raw, policy, &raw const param) };
    check(answer, what)?;
    if let Scheduling::Other(nice) = class {
        // SAFETY: no pointers.
        let answer = unsafe { libc::setpriority(libc::PRIO_PROCESS, raw as libc::id_t, nice) };
        check(answer, what)?;
    }
    Ok(())
}

/// Words of the kernel's bit set of CPUs; 8192 CPUs are the most that it can be built for.
const MASK_WORDS: usize = 8192 / usize::BITS as usize;

/// CPUs that thread `tid` may run on (0: the caller).
pub fn affinity(tid: u32) -> Result<CpuSet> {
    Ok(affinity_mask(tid)?
        .iter()
        .zip((0u32..).step_by(usize::BITS as usize))
        .filter(|(word, _)| **word != 0)
        .flat_map(|(word, first)| {
            (0..usize::BITS)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| CpuId(first + bit))
        })
        .collect())
}

/// How many CPUs thread `tid` may run on (0: the caller). Allocates nothing unless it fails.
pub fn affinity_count(tid: u32) -> Result<usize> {
    let words = affinity_mask(tid)?;
    Ok(words.iter().map(|word| word.count_ones() as usize).sum())
}

fn affinity_mask(tid: u32) -> Result<[usize; MASK_WORDS]> {
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
    Ok(mask)
}

/// Sets the CPUs that thread `tid` may run on (0: the caller).
pub fn set_affinity(tid: u32, cpus: &CpuSet) -> Result<()> {
    let mask = mask_of(cpus)?;
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

/// Sets the CPUs that a thread of this process may run on whose id nobody knows, since it has perhaps not run yet. One that
/// has not is moved at once when it waits for another CPU.
///
/// # Errors
/// [`Error::Syscall`] also when it has ended (ESRCH).
pub fn set_affinity_of<T>(thread: &JoinHandle<T>, cpus: &CpuSet) -> Result<()> {
    let mask = mask_of(cpus)?;
    // SAFETY: the handle is there, so that the thread was neither joined nor detached and its pthread_t is valid; `mask` lives
    // through the call, and its size is given, which the C library hands to the kernel whatever the C type's is.
    let errno = unsafe {
        libc::pthread_setaffinity_np(
            thread.as_pthread_t(),
            size_of_val(&mask),
            mask.as_ptr().cast(),
        )
    };
    if errno != 0 {
        return Err(Error::Syscall {
            what: format!("pin a thread to the CPUs {cpus}"),
            source: std::io::Error::from_raw_os_error(errno),
        });
    }
    Ok(())
}

fn mask_of(cpus: &CpuSet) -> Result<[usize; MASK_WORDS]> {
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
    Ok(mask)
}

/// CPU on which the caller runs now.
pub fn current_cpu() -> Result<CpuId> {
    // SAFETY: no arguments.
    let cpu = check(unsafe { libc::sched_getcpu() }, || {
        "ask for the CPU that the caller runs on".to_owned()
    })?;
    Ok(CpuId(cpu.unsigned_abs()))
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

/// Time that all threads of process `pid` have spent on a CPU, those that have ended too (CLOCK_PROCESS_CPUTIME_ID of another process).
pub fn cpu_time_of_all(pid: u32) -> Result<Duration> {
    let what = || format!("read the CPU time of process {pid}");
    let raw = nix::unistd::Pid::from_raw(raw_tid(pid)?);
    let clock = nix::time::clock_getcpuclockid(raw).map_err(errno(what))?;
    let time = nix::time::clock_gettime(clock).map_err(errno(what))?;
    Ok(time.into())
}

/// Time that thread `tid` of process `pid` has spent on a CPU (/proc/PID/task/TID/schedstat, to the nanosecond).
pub fn cpu_time(pid: u32, tid: u32) -> Result<Duration> {
    Ok(turns(pid, tid)?.ran)
}

/// A thread's turns on CPUs since it began (/proc/PID/task/TID/schedstat).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turns {
    /// Time on a CPU.
    pub ran: Duration,
    /// Time in which it could have run and waited for a CPU.
    pub waited: Duration,
    /// How often it got one.
    pub count: u64,
}

/// The turns of thread `tid` of process `pid`.
pub fn turns(pid: u32, tid: u32) -> Result<Turns> {
    let path = format!("/proc/{pid}/task/{tid}/schedstat");
    let text = read_text(&path)?;
    let mut fields = text.split_whitespace().map(str::parse);
    let (Some(Ok(ran)), Some(Ok(waited)), Some(Ok(count))) =
        (fields.next(), fields.next(), fields.next())
    else {
        return Err(Error::Protocol {
            what: format!("read {path}"),
            detail: format!("{text:?}"),
        });
    };
    Ok(Turns {
        ran: Duration::from_nanos(ran),
        waited: Duration::from_nanos(waited),
        count,
    })
}

/// How often a thread has left its CPU since it began (/proc/PID/task/TID/status).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Switches {
    /// Because it had nothing to do.
    pub voluntary: u64,
    /// Because another thread was to run.
    pub forced: u64,
}

/// The switches of thread `tid` of process `pid`.
pub fn switches(pid: u32, tid: u32) -> Result<Switches> {
    let path = format!("/proc/{pid}/task/{tid}/status");
    let text = read_text(&path)?;
    let field = |name: &str| -> Result<u64> {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            .ok_or_else(|| Error::Protocol {
                what: format!("read {path}"),
                detail: format!("no number behind {name}"),
            })
    };
    Ok(Switches {
        voluntary: field("voluntary_ctxt_switches:")?,
        forced: field("nonvoluntary_ctxt_switches:")?,
    })
}
