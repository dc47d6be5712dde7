//! A polling ring: one kernel thread for any number of NAPIs of any namespace.

use std::time::Duration;

use kbp_kernel::process::Scheduling;
use kbp_kernel::ring::{PollRing, RingOptions};
use kbp_kernel::{NapiId, Result};

use super::kind::{Poller, Seat, Target};
use super::{LEASE, idle};

#[derive(Debug)]
pub(super) struct Ring(PollRing);

impl Ring {
    pub(super) fn new(seat: Seat) -> Result<Self> {
        let options = RingOptions {
            cpu: seat.cpu,
            scheduling: seat.scheduling,
            lease: LEASE,
            // The NAPI stays free between two rounds, so that a packet which comes while the worker is not running is
            // handled by softirq at once instead of waiting for it.
            prefer: false,
        };
        if seat.scheduling == Scheduling::Idle && idle::wants_own_process() {
            match PollRing::beside(&options) {
                Ok(ring) => return Ok(Self(ring)),
                Err(error) => {
                    tracing::warn!("an idle worker will not be in a cgroup of its own: {error}")
                }
            }
        }
        Ok(Self(PollRing::new(&options)?))
    }
}

impl Poller for Ring {
    fn add(&mut self, target: &Target<'_>) -> Result<()> {
        self.0.add(target.napi)
    }

    fn remove(&mut self, napi: NapiId) -> Result<()> {
        self.0.remove(napi)
    }

    fn wake(&mut self) -> Result<()> {
        self.0.wake()
    }

    fn is_asleep(&self) -> bool {
        self.0.is_asleep()
    }

    fn thread_id(&self) -> u32 {
        self.0.thread_id()
    }

    fn round_time(&self, limit: Duration) -> Option<Duration> {
        self.0.round_time(limit)
    }
}
