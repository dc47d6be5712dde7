//! The short way of packets for which nobody polls.
//!
//! A veth hands what it sends to the NAPI of its other end only while it has no TSO (veth_skb_is_eligible_for_gro, drivers/net/veth.c). So
//! TSO at the host end leads packets for the pod past the ring and the NAPI of the pod end, over the backlog, as on any veth: one pass of
//! the softirq fewer. Nothing is torn down and no packet is lost; without TSO they come to the NAPI again, and sockets learn its id anew
//! from the next packet. Only whoever sees the pod's programs can tell when that is worth it, and only where no worker polls the pod.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::policy::Profile;

/// Whether packets for a pod take the short way; shared between all that tune it.
#[derive(Debug, Clone, Default)]
pub(crate) struct ShortWay {
    /// Whether they may.
    able: bool,
    on: Arc<AtomicBool>,
}

impl ShortWay {
    /// Not taken yet. `waited_for`: a worker polls, or packets wait for the pod's sockets.
    pub(crate) fn new(profile: Profile, waited_for: bool, switched_off: bool) -> Self {
        Self {
            // With the other profile TCP goes that way in any case.
            able: profile == Profile::Latency && !waited_for && !switched_off,
            on: Arc::default(),
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Has it taken or not from now on; None: it cannot be. True when that is another way than before.
    pub(crate) fn set(&self, on: bool) -> Option<bool> {
        self.able.then(|| self.on.swap(on, Ordering::AcqRel) != on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_taken_only_where_nobody_waits_for_packets() {
        let way = ShortWay::new(Profile::Latency, false, false);
        let other = way.clone();
        assert_eq!((way.set(true), way.set(true)), (Some(true), Some(false)));
        assert!(other.is_on());
        assert_eq!(other.set(false), Some(true));
        for (profile, waited_for, off) in [
            (Profile::Throughput, false, false),
            (Profile::Latency, true, false),
            (Profile::Latency, false, true),
        ] {
            let way = ShortWay::new(profile, waited_for, off);
            assert_eq!((way.set(true), way.is_on()), (None, false));
        }
    }
}
