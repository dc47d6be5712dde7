//! A kernel thread that busy-polls NAPI instances: an io_uring with SQPOLL, pinned to a CPU, with static NAPI tracking (6.13+).
//!
//! The thread sleeps `lease` after its last wake-up, whatever the NAPIs do. That is the safety net: a dead owner means a sleeping thread.
//!
//! What the kernel does (io_uring/sqpoll.c, io_uring/napi.c), each point held by a test:
//! - The thread belongs to the process that made the ring, not to the thread: it outlives that thread and ends with the
//!   process or the ring, and is in the cgroups of that process ([`PollRing::beside`]). It inherits the class of its maker, so the class is set on it afterwards, while it sleeps.
//! - A NAPI instance is polled in whatever network namespace its device is: ids are unique on the machine.
//! - The lease runs from when the thread woke or last took an entry off the submission queue. IORING_ENTER_SQ_WAKEUP does
//!   nothing to a thread that is awake, so [`PollRing::wake`] queues an empty operation, whose completion is suppressed.
//! - It is kept in jiffies: at 250 Hz a lease is rounded up to the next 4 ms.
//! - A round over the NAPIs never waits at one of them; the busy-poll time of the registration only has to be non-zero.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::types::{Napi, NapiTracking};
use io_uring::{IoUring, opcode, squeue};

use crate::process::{Aside, Scheduling, aside, set_scheduling};
use crate::sys::read_text;
use crate::{CpuId, Error, NapiId, Result, cpu};

/// How a polling ring is set up.
#[derive(Debug, Clone)]
pub struct RingOptions {
    /// CPU of the thread; online, and in the cpuset of the calling process.
    pub cpu: CpuId,
    /// Scheduling class of the thread: `Idle`, or `Other(0)`.
    pub scheduling: Scheduling,
    /// The thread sleeps this long after the last [`PollRing::wake`]; whole milliseconds, at least 1.
    pub lease: Duration,
    /// SO_PREFER_BUSY_POLL semantics: the NAPI belongs to the poller alone. See kernel-facts for when that hurts.
    pub prefer: bool,
}

/// The ring and its kernel thread; both end when it is dropped (the thread a moment later).
pub struct PollRing {
    // Reading the sleep flag and queueing want the submission queue for themselves.
    ring: Mutex<IoUring>,
    thread_id: u32,
    /// Ends after the ring.
    aside: Option<Aside>,
}

impl PollRing {
    /// Creates the ring, asleep, with no NAPI. `Unsupported` when io_uring, SQPOLL or static NAPI tracking is missing or forbidden.
    ///
    /// Any thread may call it and end afterwards; the calling thread's own scheduling class stays as it is.
    pub fn new(options: &RingOptions) -> Result<Self> {
        let lease = lease_millis(options.lease)?;
        let mut builder = IoUring::builder();
        // One entry is what a wake-up needs; two completions are the least for it, and none is ever posted.
        builder
            .dontfork()
            .setup_sqpoll(lease)
            .setup_sqpoll_cpu(options.cpu.0);
        let mut ring = builder
            .build(1)
            .map_err(|source| setup_error(options.cpu, source))?;
        let mut napi = Napi::new()
            .set_busy_poll_timeout(1)
            .set_prefer_busy_poll(options.prefer)
            .set_tracking(NapiTracking::Static);
        ring.submitter()
            .register_napi(&mut napi)
            .map_err(register_error)?;
        let thread_id = started_thread(&mut ring)?;
        set_scheduling(thread_id, options.scheduling)?;
        Ok(Self {
            ring: Mutex::new(ring),
            thread_id,
            aside: None,
        })
    }

    /// As [`PollRing::new`], with the thread in a process beside this one: with cgroup v2, which moves processes only, that
    /// one can be given a cgroup of its own. It takes a few pages of memory, and ends with the ring or with this process.
    pub fn beside(options: &RingOptions) -> Result<Self> {
        let (ring, process) = aside(|| Self::new(options))?;
        let mut ring = ring?;
        ring.aside = Some(process);
        Ok(ring)
    }

    /// Adds a NAPI instance; adding it twice is fine. The kernel does not check that there is one with this id, now or later:
    /// one that has gone is passed over, until it is removed. `Invalid` for a number that can be no NAPI id.
    pub fn add(&mut self, napi: NapiId) -> Result<()> {
        let answer = self.lock().submitter().register_napi_add_id(napi.0);
        unless(libc::EEXIST, answer, napi, "poll")
    }

    /// Removes a NAPI instance; removing one that is not there is fine. `Invalid` for a number that can be no NAPI id.
    pub fn remove(&mut self, napi: NapiId) -> Result<()> {
        let answer = self.lock().submitter().register_napi_del_id(napi.0);
        unless(libc::ENOENT, answer, napi, "stop polling")
    }

    /// Starts the lease anew and wakes the thread if it sleeps. No system call when it is awake.
    pub fn wake(&self) -> Result<()> {
        let mut ring = self.lock();
        let nothing = opcode::Nop::new()
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS);
        // SAFETY: a no-operation refers to no memory.
        let pushed = unsafe { ring.submission().push(&nothing) };
        // Full means that the wake-up before this one is not taken yet: it will start the lease as well.
        drop(pushed);
        ring.submit().map_err(|source| Error::Syscall {
            what: format!("wake the polling thread {}", self.thread_id),
            source,
        })?;
        Ok(())
    }

    /// How long the thread takes to go over its instances once, from a few rounds timed now. None when it sleeps, or has not got round within
    /// `limit`, since others have its CPU. Waits without sleeping; the lease starts anew.
    ///
    /// It takes what is queued once a round: so from one empty operation's being taken to the next one's is a round.
    pub fn round_time(&self, limit: Duration) -> Option<Duration> {
        const ROUNDS: u32 = 8;
        let mut ring = self.lock();
        if ring.submission().need_wakeup() {
            return None;
        }
        let end = Instant::now() + limit;
        let mut began = None;
        // The first only tells where a round begins.
        for _ in 0..=ROUNDS {
            let nothing = opcode::Nop::new()
                .build()
                .flags(squeue::Flags::SKIP_SUCCESS);
            // SAFETY: a no-operation refers to no memory.
            unsafe { ring.submission().push(&nothing) }.ok()?;
            while !ring.submission().is_empty() {
                if Instant::now() >= end {
                    return None;
                }
                std::hint::spin_loop();
            }
            began.get_or_insert_with(Instant::now);
        }
        Some(began?.elapsed() / ROUNDS)
    }

    /// Whether the thread sleeps now (IORING_SQ_NEED_WAKEUP).
    pub fn is_asleep(&self) -> bool {
        self.lock().submission().need_wakeup()
    }

    /// Thread id of the kernel thread (`iou-sqp-*`), a thread of the calling process or of one beside it.
    pub fn thread_id(&self) -> u32 {
        self.thread_id
    }

    fn lock(&self) -> MutexGuard<'_, IoUring> {
        // Nothing in here can be left half done by a panic.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PollRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PollRing")
            .field("thread_id", &self.thread_id)
            .finish_non_exhaustive()
    }
}

/// What came of changing the list of instances; `fine` says that it was so already.
fn unless(fine: i32, answer: std::io::Result<()>, napi: NapiId, what: &str) -> Result<()> {
    match answer {
        Err(source) if source.raw_os_error() == Some(fine) => Ok(()),
        Err(source) if source.raw_os_error() == Some(libc::EINVAL) => Err(Error::Invalid {
            name: "NAPI id",
            value: napi.to_string(),
            expected: "an id as napi-get tells it, above the number of possible CPUs".to_owned(),
        }),
        answer => answer.map_err(|source| Error::Syscall {
            what: format!("{what} NAPI {napi}"),
            source,
        }),
    }
}

/// The kernel reads 0 as one second, so it is refused here.
fn lease_millis(lease: Duration) -> Result<u32> {
    u32::try_from(lease.as_millis())
        .ok()
        .filter(|millis| *millis > 0)
        .ok_or_else(|| Error::Invalid {
            name: "lease of a polling thread",
            value: format!("{lease:?}"),
            expected: "1 to 4294967295 ms".to_owned(),
        })
}

const FEATURE: &str = "in-kernel polling (io_uring SQPOLL with static NAPI tracking)";

fn setup_error(cpu: CpuId, source: std::io::Error) -> Error {
    let reason = match source.raw_os_error() {
        Some(libc::ENOSYS) => {
            "this kernel has no io_uring, or a seccomp filter forbids it".to_owned()
        }
        Some(libc::EPERM | libc::EACCES) => {
            match read_text("/proc/sys/kernel/io_uring_disabled")
                .as_deref()
                .map(str::trim)
            {
                Ok("0") | Err(_) => {
                    "a seccomp filter or security module forbids io_uring".to_owned()
                }
                Ok(value) => format!(
                    "kernel.io_uring_disabled is {value}; set it to 0, or to 1 and run with CAP_SYS_ADMIN"
                ),
            }
        }
        Some(libc::EINVAL) => return unusable_cpu(cpu, source),
        _ => {
            return Error::Syscall {
                what: format!("create a polling ring on CPU {cpu}"),
                source,
            };
        }
    };
    Error::Unsupported {
        feature: FEATURE,
        reason: format!("{source}: {reason}"),
    }
}

/// EINVAL is how the kernel refuses a CPU that is offline or outside the cpuset, and also how an old kernel refuses SQPOLL.
fn unusable_cpu(cpu: CpuId, source: std::io::Error) -> Error {
    let usable = cpu::usable();
    match usable {
        Ok(usable) if !usable.contains(cpu) => Error::Invalid {
            name: "CPU of a polling thread",
            value: cpu.to_string(),
            expected: format!("an online CPU in the cpuset of this process: {usable}"),
        },
        _ => Error::Unsupported {
            feature: FEATURE,
            reason: format!("{source}: the kernel refuses an SQPOLL ring on CPU {cpu}"),
        },
    }
}

fn register_error(source: std::io::Error) -> Error {
    match source.raw_os_error() {
        // 6.9 to 6.12 know the request, but not static tracking; before that the request itself is unknown.
        Some(libc::EINVAL | libc::EOPNOTSUPP) => Error::Unsupported {
            feature: FEATURE,
            reason: format!(
                "{source}: the kernel refuses static NAPI tracking; Linux 6.13 or newer has it"
            ),
        },
        _ => Error::Syscall {
            what: "register NAPI tracking with a ring".to_owned(),
            source,
        },
    }
}

/// Thread id of a ring's polling thread, once it has run and gone to sleep. It starts in its maker's class and has nothing
/// to do, so that takes a few scheduler trips; the bound is for a machine that is drowned in work.
fn started_thread(ring: &mut IoUring) -> Result<u32> {
    const BOUND: Duration = Duration::from_secs(5);
    let until = Instant::now() + BOUND;
    loop {
        // Before it has run, fdinfo names its maker.
        if ring.submission().need_wakeup()
            && let Some(tid) = told_thread(ring)?
        {
            let name = read_text(format!("/proc/self/task/{tid}/comm"));
            return if name.is_ok_and(|name| name.starts_with("iou-sqp-")) {
                Ok(tid)
            } else {
                // The kernel tells the id as the first pid namespace has it.
                Err(Error::Unsupported {
                    feature: FEATURE,
                    reason: format!(
                        "the polling thread has id {tid}, which is not visible in this pid namespace; \
                         run in the host's (hostPID)"
                    ),
                })
            };
        }
        if Instant::now() >= until {
            return Err(Error::Protocol {
                what: "find the thread of a polling ring".to_owned(),
                detail: format!("it did not start within {} s", BOUND.as_secs()),
            });
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What the ring's fdinfo says its thread is; None while the ring is locked: then the line is left out, or says −1.
fn told_thread(ring: &IoUring) -> Result<Option<u32>> {
    let text = read_text(format!("/proc/thread-self/fdinfo/{}", ring.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("SqThread:"));
    Ok(line.and_then(|value| value.trim().parse().ok()))
}
