//! A kernel thread that busy-polls NAPI instances: an io_uring with SQPOLL, pinned to a CPU, with static NAPI tracking (6.13+).
//!
//! The thread sleeps `lease` after its last wake-up, whatever the NAPIs do. That is the safety net: a dead owner means a sleeping thread.

use std::time::Duration;

use crate::process::Scheduling;
use crate::{CpuId, Micros, NapiId, Result};

/// How a polling ring is set up.
#[derive(Debug, Clone)]
pub struct RingOptions {
    /// CPU of the thread.
    pub cpu: CpuId,
    /// Scheduling class of the thread: `Idle`, or `Other(0)`.
    pub scheduling: Scheduling,
    /// The thread sleeps this long after the last [`PollRing::wake`]; whole milliseconds, at least 1.
    pub lease: Duration,
    /// How long one busy-poll round stays on a NAPI.
    pub busy_poll: Micros,
    /// SO_PREFER_BUSY_POLL semantics: the NAPI belongs to the poller alone. See kernel-facts for when that hurts.
    pub prefer: bool,
}

/// The ring and its kernel thread; both end when it is dropped.
#[derive(Debug)]
pub struct PollRing {}

impl PollRing {
    /// Creates the ring, asleep, with no NAPI. `Unsupported` when io_uring, SQPOLL or static NAPI tracking is missing or forbidden.
    pub fn new(_options: &RingOptions) -> Result<Self> { todo!() }
    /// Adds a NAPI instance; adding it twice is fine.
    pub fn add(&mut self, _napi: NapiId) -> Result<()> { todo!() }
    /// Removes a NAPI instance; removing one that is not there is fine.
    pub fn remove(&mut self, _napi: NapiId) -> Result<()> { todo!() }
    /// Starts the lease anew and wakes the thread if it sleeps.
    pub fn wake(&self) -> Result<()> { todo!() }
    /// Whether the thread sleeps now (IORING_SQ_NEED_WAKEUP).
    pub fn is_asleep(&self) -> bool { todo!() }
    /// Thread id of the kernel thread (`iou-sqp-*`), from the SqThread line of the ring's fdinfo.
    pub fn thread_id(&self) -> Result<u32> { todo!() }
}
