//! Has packets wait for whoever polls: the settings of a pod end's NAPI behind `prefer-busy-poll` and `busy-poll-mode`.
//!
//! A veth has no interrupt, but it has what the kernel masks in place of one: after a poll whose completion is deferred
//! (napi_complete_done, net/core/dev.c) senders go on putting packets into the ring and schedule nothing (rx_notify_masked,
//! drivers/net/veth.c). Then the packets wait for the next poll of a socket or an epoll instance, or for the timer. Without these
//! settings nothing waits, whatever a socket prefers. They are lost with the NAPI, so they are set again at each look.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kbp_kernel::Error;
use kbp_kernel::napi::{Napi, NapiSettings, NetdevSocket};

use crate::attach::AttachRequest;
use crate::config::Feature;
use crate::policy::BusyPollMode;
use crate::state::{Degraded, Part};

/// Deferred completions in a row: one, so that a pod falls silent with one timer and not with many.
const DEFERRED: u32 = 1;
/// How long packets wait for a poll, in nanoseconds: about what a round trip takes whose ends both poll.
const FLUSH: u64 = 20_000;
/// How long packets wait for a program that had events and works on them, in nanoseconds. Other threads and processes of the pod
/// wait for their packets as long, since a pod has one NAPI.
const SUSPENDED: u64 = 200_000;

/// Nothing is deferred: the kernel's own settings of a veth.
const NONE: NapiSettings = NapiSettings {
    threaded: None,
    gro_flush_timeout: Some(0),
    defer_hard_irqs: Some(0),
    irq_suspend_timeout: Some(0),
};

/// What a pod's policy makes of its NAPIs; shared between all that tune it.
#[derive(Debug, Clone)]
pub(crate) struct Deferral {
    /// None: the policy asks for nothing.
    wanted: Option<NapiSettings>,
    /// Why it is not to be had, where the operator has said so.
    off: Option<String>,
    /// Whether the pod's sockets poll at all: packets would wait for nobody.
    sockets_poll: Arc<AtomicBool>,
}

impl Deferral {
    /// What the pod's policy asks for; nothing where its sockets are known not to poll.
    pub(crate) fn of(request: &AttachRequest) -> Self {
        let (policy, config) = (&request.policy, &request.config);
        let unable = |d: &Degraded| d.part == Part::SocketBusyPoll;
        let suspend = match policy.busy_poll_mode {
            BusyPollMode::Suspend => SUSPENDED,
            BusyPollMode::Spin => 0,
        };
        let wanted = NapiSettings {
            threaded: None,
            gro_flush_timeout: Some(FLUSH),
            defer_hard_irqs: Some(DEFERRED),
            irq_suspend_timeout: Some(suspend),
        };
        Self {
            wanted: Some(wanted)
                .filter(|_| policy.defers() && !request.degraded.iter().any(unable)),
            off: config.switched_off(Feature::NapiSettings),
            sockets_poll: Arc::new(AtomicBool::new(request.window.micros.is_some())),
        }
    }

    /// Tells whether the pod's sockets poll from now on; true when that changes what its NAPIs should be like.
    pub(crate) fn set_sockets_poll(&self, poll: bool) -> bool {
        self.sockets_poll.swap(poll, Ordering::AcqRel) != poll && self.wanted.is_some()
    }

    /// Whether there is something to take back.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.is_some() && self.off.is_none()
    }

    /// Why packets do not wait on a kernel that does not tell its NAPIs; None when they should not.
    pub(crate) fn without_ids(&self, error: &Error) -> Option<String> {
        self.wanted?;
        Some(self.off.clone().unwrap_or_else(|| error.to_string()))
    }

    /// Sees to it that the instances of a pod end are as they should be; why they are not.
    pub(crate) fn apply(&self, socket: &mut NetdevSocket, napis: &[Napi]) -> Result<(), String> {
        let wanted = match (self.wanted, &self.off) {
            (Some(_), Some(off)) => return Err(off.clone()),
            (wanted, _) => wanted.filter(|_| self.sockets_poll.load(Ordering::Acquire)),
        };
        for napi in napis {
            let change = match wanted {
                Some(wanted) if !is(napi, wanted) => wanted,
                // What a killed predecessor has left; what somebody else has set is theirs.
                None if is_ours(napi) => NONE,
                _ => continue,
            };
            match socket.set(napi.id, change) {
                // It went meanwhile: the event for that is under way.
                Ok(()) | Err(Error::NotFound { .. }) => {}
                Err(error @ Error::Unsupported { .. }) => {
                    return Err(format!("{error}; Linux 6.13 or newer has it"));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}

fn is(napi: &Napi, settings: NapiSettings) -> bool {
    napi.gro_flush_timeout == settings.gro_flush_timeout
        && napi.defer_hard_irqs == settings.defer_hard_irqs
        && napi.irq_suspend_timeout == settings.irq_suspend_timeout
}

/// Whether kbp has set these.
fn is_ours(napi: &Napi) -> bool {
    napi.gro_flush_timeout == Some(FLUSH)
        && napi.defer_hard_irqs == Some(DEFERRED)
        && matches!(napi.irq_suspend_timeout, Some(0 | SUSPENDED))
}
