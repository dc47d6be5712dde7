//! Between the messages and the library's own types.

use kbp_kernel::Micros;

use super::message as api;
use crate::policy::choose;
use crate::state::{self, Part, PodState, SocketCounters, WorkerState};
use crate::uplink::UplinkState;
use crate::window::Window;

/// The message that tells what is true of a pod.
pub fn pod(state: &PodState, bound: bool, packets: u64) -> api::Pod {
    api::Pod {
        id: state.id.clone(),
        namespace: state.namespace.clone(),
        worker_policy: state.worker_policy.to_string(),
        profile: state.profile.to_string(),
        interfaces: state
            .interfaces
            .iter()
            .map(|i| api::Interface {
                pod_interface: i.pod_interface.clone(),
                host_interface: i.host_interface.clone(),
                host_ifindex: i.host_ifindex,
                host_napi: i.host_napi,
                pod_napi: i.pod_napi,
            })
            .collect(),
        worker: state.worker.as_ref().map(worker),
        worker_reason: state.worker_reason.clone(),
        degraded: degraded(&state.degraded),
        bound,
        packets,
        owner_pid: state.owner_pid,
        rests: state.rests,
    }
}

/// The message that tells what is true of an uplink which has received `packets`.
pub fn uplink(state: &UplinkState, packets: u64) -> api::Uplink {
    api::Uplink {
        interface: state.interface.clone(),
        napis: state.napis.clone(),
        worker: state.worker.as_ref().map(worker),
        degraded: state.degraded.clone().unwrap_or_default(),
        packets,
    }
}

fn worker(state: &WorkerState) -> api::Worker {
    api::Worker {
        kind: state.kind.clone(),
        policy: state.policy.to_string(),
        tid: state.tid,
        cpu: state.cpu,
        idle_class: state.idle_class,
        lease_ms: state.lease_ms,
    }
}

/// The message for what holds for the sockets of a pod.
pub fn sockets(window: &Window, counters: SocketCounters) -> api::Sockets {
    api::Sockets {
        busy_poll_us: window.micros.map(|m| m.0),
        busy_poll_reason: window.reason.clone(),
        calls_handled: counters.calls_handled,
        sockets_set: counters.sockets_set,
        epolls_given: counters.epolls_given,
        epolls_crowded: counters.epolls_crowded,
        errors: counters.errors,
        short_way: String::new(),
    }
}

/// What such a message says.
pub fn read_sockets(message: &api::Sockets) -> (Window, SocketCounters) {
    let window = Window {
        micros: message.busy_poll_us.map(Micros),
        reason: message.busy_poll_reason.clone(),
    };
    let counters = SocketCounters {
        calls_handled: message.calls_handled,
        sockets_set: message.sockets_set,
        epolls_given: message.epolls_given,
        epolls_crowded: message.epolls_crowded,
        errors: message.errors,
    };
    (window, counters)
}

/// The message for parts that are missing.
pub fn degraded(parts: &[state::Degraded]) -> Vec<api::Degraded> {
    parts
        .iter()
        .map(|d| api::Degraded {
            part: d.part.to_string(),
            reason: d.reason.clone(),
        })
        .collect()
}

/// What such messages say; the name of the first part that is none.
pub fn read_degraded(messages: &[api::Degraded]) -> Result<Vec<state::Degraded>, String> {
    messages
        .iter()
        .map(|d| {
            let part = choose(&d.part, &Part::ALL)
                .map_err(|known| format!("{:?} is no part of kbp; known: {known}", d.part))?;
            Ok(state::Degraded {
                part,
                reason: d.reason.clone(),
            })
        })
        .collect()
}
