//! Other processes: pidfds, their file descriptors, thread ids, scheduling.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::{CpuId, CpuSet, Result};

/// A handle on a process that cannot come to mean another one.
#[derive(Debug)]
pub struct PidFd { fd: OwnedFd }

impl PidFd {
    /// Opens a process by id (pidfd_open).
    pub fn open(_pid: u32) -> Result<Self> { todo!() }
    /// Opens the process that thread `tid` belongs to: PIDFD_THREAD where the kernel has it (6.9+), else by the Tgid of /proc/TID/status.
    pub fn open_by_thread(_tid: u32) -> Result<Self> { todo!() }
    /// A copy of that process' file descriptor (pidfd_getfd).
    pub fn get_fd(&self, _number: i32) -> Result<OwnedFd> { todo!() }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> { self.fd.as_fd() }
}

/// Scheduling class of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduling {
    /// SCHED_OTHER with a nice value.
    Other(i32),
    /// SCHED_IDLE: only cycles nobody else wants.
    Idle,
    /// SCHED_FIFO with a priority.
    Fifo(u32),
    /// Anything else, by the kernel's number.
    Unknown(u32),
}

/// Scheduling class of thread `tid` (0: the caller).
pub fn scheduling(_tid: u32) -> Result<Scheduling> { todo!() }
/// Sets the scheduling class of thread `tid` (0: the caller).
pub fn set_scheduling(_tid: u32, _class: Scheduling) -> Result<()> { todo!() }
/// CPUs that thread `tid` may run on (0: the caller).
pub fn affinity(_tid: u32) -> Result<CpuSet> { todo!() }
/// Sets the CPUs that thread `tid` may run on.
pub fn set_affinity(_tid: u32, _cpus: &CpuSet) -> Result<()> { todo!() }
/// CPU on which thread `tid` of process `pid` ran last (field 39 of /proc/PID/task/TID/stat).
pub fn last_cpu(_pid: u32, _tid: u32) -> Result<CpuId> { todo!() }
/// Makes the calling process the reaper of its orphaned descendants (PR_SET_CHILD_SUBREAPER).
pub fn become_subreaper() -> Result<()> { todo!() }
/// Whether transparent huge pages are switched off for the calling process (PR_SET_THP_DISABLE), and the switch; inherited by children and over exec.
pub fn set_thp_disabled(_disabled: bool) -> Result<()> { todo!() }
