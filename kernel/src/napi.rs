//! NAPI instances through the netdev generic netlink family (Documentation/netlink/specs/netdev.yaml).

use crate::netns::Netns;
use crate::{IfIndex, NapiId, Result};

/// How the kernel runs a NAPI instance (`napi-set threaded`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threaded {
    /// In softirq.
    Disabled,
    /// In a kernel thread that sleeps between packets.
    Enabled,
    /// In a kernel thread that busy-polls (6.19+; before that ERANGE or EINVAL).
    BusyPoll,
}

/// One NAPI instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Napi {
    /// Its id.
    pub id: NapiId,
    /// Its interface.
    pub ifindex: IfIndex,
    /// Thread that runs it, where there is one.
    pub pid: Option<u32>,
    /// How it runs; None where the kernel does not tell.
    pub threaded: Option<Threaded>,
    /// `gro-flush-timeout` in nanoseconds.
    pub gro_flush_timeout: Option<u64>,
    /// `defer-hard-irqs`.
    pub defer_hard_irqs: Option<u32>,
    /// `irq-suspend-timeout` in nanoseconds.
    pub irq_suspend_timeout: Option<u64>,
}

/// What `napi-set` can change; None leaves a value as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct NapiSettings {
    /// See [`Napi::threaded`].
    pub threaded: Option<Threaded>,
    /// See [`Napi::gro_flush_timeout`].
    pub gro_flush_timeout: Option<u64>,
    /// See [`Napi::defer_hard_irqs`].
    pub defer_hard_irqs: Option<u32>,
    /// See [`Napi::irq_suspend_timeout`].
    pub irq_suspend_timeout: Option<u64>,
}

/// A socket of the `netdev` family inside one network namespace.
#[derive(Debug)]
pub struct NetdevSocket {}

impl NetdevSocket {
    /// Opens one in the calling thread's namespace; `Unsupported` when the kernel has no netdev family.
    pub fn open() -> Result<Self> { todo!() }
    /// Opens one in `netns`.
    pub fn open_in(_netns: &Netns) -> Result<Self> { todo!() }
    /// The NAPI instances of a link. A veth end that is down or has GRO off has none.
    pub fn napis(&mut self, _link: IfIndex) -> Result<Vec<Napi>> { todo!() }
    /// Changes a NAPI instance.
    pub fn set(&mut self, _id: NapiId, _settings: NapiSettings) -> Result<()> { todo!() }
}
