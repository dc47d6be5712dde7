//! Finds other CPUs for the workers of one that goes offline: the kernel lets their threads run on any other then, and leaves them there
//! when it comes back.

use std::time::Instant;

use kbp_kernel::CpuSet;
use kbp_kernel::cpu::Topology;

use super::{Kept, Pod};

impl Kept {
    /// Looks whether CPUs have gone or come.
    pub(super) fn follow_cpus(&mut self) {
        match Topology::read() {
            Ok(topology) if self.online != topology.online => self.place_on(topology.online),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the CPUs that are online could not be read"),
        }
    }

    fn place_on(&mut self, online: CpuSet) {
        self.book_all(Instant::now());
        for pod in self.pods.values_mut() {
            match pod.worker {
                Some(key) if !online.contains(key.cpu()) => {
                    tracing::warn!("CPU {} has gone offline, and a worker with it", key.cpu());
                    self.workers.release(pod);
                    pod.displaced = true;
                }
                _ if pod.displaced => {}
                _ => continue,
            }
            self.workers.place(pod);
            pod.booked_packets = pod.packets();
            pod.displaced = pod.worker.is_none();
            // Its worker has its NAPIs from the next look.
            pod.refresh_soon();
        }
        self.online = online;
    }

    /// Whether it matters now which CPUs there are.
    pub(super) fn are_cpus_wanted(&self) -> bool {
        self.workers.are_awake() || self.pods.values().any(Pod::is_displaced)
    }
}
