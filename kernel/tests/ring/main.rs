//! What can poll a NAPI instance, on the running kernel: rings, sockets, the instance's own thread. Needs root.

mod napi_thread;
mod socket;
mod thread;
mod traffic;
mod unavailable;

#[path = "../support/forbid.rs"]
mod forbid;
#[path = "../link/pair.rs"]
#[allow(dead_code, reason = "the link tests use more of it")]
mod pair;

use std::time::{Duration, Instant};

use kbp_kernel::process::Scheduling;
use kbp_kernel::ring::RingOptions;
use kbp_kernel::{CpuId, cpu};

/// A CPU that exists on every machine the tests run on.
fn some_cpu() -> CpuId {
    cpu::usable()
        .expect("usable CPUs")
        .iter()
        .last()
        .expect("a CPU")
}

/// A ring in the ordinary class, so that it polls also while other tests keep the CPUs busy.
fn options(lease_ms: u64) -> RingOptions {
    RingOptions {
        cpu: some_cpu(),
        scheduling: Scheduling::Other(0),
        lease: Duration::from_millis(lease_ms),
        prefer: false,
    }
}

/// Longest wait for anything; generous, since other work may keep the CPUs.
const LIMIT: Duration = Duration::from_secs(60);

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
