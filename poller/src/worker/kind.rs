//! The kinds of workers, behind one interface, and which is tried first.

use std::fmt;
use std::time::Duration;

use kbp_kernel::netns::Netns;
use kbp_kernel::process::Scheduling;
use kbp_kernel::{CpuId, IfIndex, NapiId, Result};

use super::kthread::{self, Mode};
use super::{socket, sqpoll};
use crate::config::{Config, Feature};
use crate::policy::{Profile, WorkerPolicy};

/// What polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The NAPI's own kernel thread, which polls without a pause.
    Kthread,
    /// The same, asleep until a packet wakes it.
    Threaded,
    /// The kernel thread of an io_uring.
    Sqpoll,
    /// A thread of this process, through sockets.
    Socket,
}

impl Kind {
    /// What is tried for a policy, in this order; the first that works is it.
    ///
    /// A kthread has one NAPI, never lets go of it and stops only when it is told, so it is for CPUs of a pod's own.
    /// Between the others the ring is first: it polls without a system call a round, and parks by itself if its owner hangs.
    ///
    /// For throughput a thread that is woken finds more packets at a time than one that looks for each, and leaves its CPU to the
    /// receiver in between (docs/workers.md has the figures). Not in the idle class: packets would wait for an idle CPU.
    pub(super) fn of_policy(policy: WorkerPolicy, profile: Profile) -> &'static [Self] {
        match (policy, profile) {
            (WorkerPolicy::Dedicated | WorkerPolicy::Shared, Profile::Throughput) => {
                &[Self::Threaded, Self::Sqpoll, Self::Socket]
            }
            (WorkerPolicy::Dedicated, Profile::Latency) => {
                &[Self::Kthread, Self::Sqpoll, Self::Socket]
            }
            _ => &[Self::Sqpoll, Self::Socket],
        }
    }

    /// What switches it off.
    pub(super) fn feature(self) -> Feature {
        match self {
            Self::Kthread => Feature::Kthread,
            Self::Threaded => Feature::Threaded,
            Self::Sqpoll => Feature::Sqpoll,
            Self::Socket => Feature::Socket,
        }
    }

    fn make(self, seat: Seat) -> Result<Box<dyn Poller>> {
        Ok(match self {
            Self::Kthread => Box::new(kthread::Kthreads::new(seat, Mode::Polls)?),
            Self::Threaded => Box::new(kthread::Kthreads::new(seat, Mode::Sleeps)?),
            Self::Sqpoll => Box::new(sqpoll::Ring::new(seat)?),
            Self::Socket => Box::new(socket::Sockets::new(seat)?),
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In the config they have the same names.
        self.feature().fmt(f)
    }
}

/// Where a worker runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat {
    pub(super) cpu: CpuId,
    pub(super) scheduling: Scheduling,
}

/// A NAPI instance and the namespaces at both ends of its link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    /// The instance.
    pub(crate) napi: NapiId,
    /// Namespace of its link.
    pub(crate) netns: &'a Netns,
    /// The link.
    pub(crate) link: IfIndex,
    /// Namespace and name of the other end, where it is on this machine.
    pub(crate) other: Option<(&'a Netns, &'a str)>,
}

/// Something that polls NAPI instances for one lease after each [`Poller::wake`], and sleeps otherwise. All of them leave the instances
/// to softirq when they sleep and when they are dropped.
pub(super) trait Poller: fmt::Debug + Send {
    /// Polls this one too, from now on; twice is fine.
    fn add(&mut self, target: &Target<'_>) -> Result<()>;
    /// Polls it no more; fine when it did not.
    fn remove(&mut self, napi: NapiId) -> Result<()>;
    /// Starts the lease anew.
    fn wake(&mut self) -> Result<()>;
    /// Whether it sleeps now.
    fn is_asleep(&self) -> bool;
    /// Its thread, of this process or one beside it; else the last that the kernel made, 0 before the first.
    fn thread_id(&self) -> u32;
    /// How often it has gone over its instances; None where the kernel does that, and does not count.
    fn rounds(&self) -> Option<u64> {
        None
    }
    /// How long it takes to go over its instances once, timed now; None when it sleeps, does not get its CPU within `limit`, or goes over none
    /// but one of its own.
    fn round_time(&self, _limit: Duration) -> Option<Duration> {
        None
    }
    /// CPU time that it has used.
    fn busy(&self) -> Duration {
        let tid = self.thread_id();
        kbp_kernel::process::cpu_time(tid, tid).unwrap_or_default()
    }
}

/// The first kind that works, with what is wrong with those before it.
pub(super) fn first_that_works(
    policy: WorkerPolicy,
    profile: Profile,
    seat: Seat,
    config: &Config,
) -> std::result::Result<(Kind, Box<dyn Poller>), String> {
    let mut reasons = Vec::new();
    for kind in Kind::of_policy(policy, profile) {
        let made = match config.switched_off(kind.feature()) {
            Some(off) => Err(off),
            None => kind.make(seat).map_err(|e| e.to_string()),
        };
        match made {
            Ok(poller) => return Ok((*kind, poller)),
            Err(reason) => reasons.push(format!("{kind}: {reason}")),
        }
    }
    Err(reasons.join("; "))
}
