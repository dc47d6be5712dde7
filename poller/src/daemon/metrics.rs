//! What the daemon tells Prometheus.
//!
//! All of it is read when it is asked for: nothing is counted twice, and an idle daemon does no work for it. The rounds of a
//! worker are counted where they are this process' own, since the kernel counts none; of a ring one round is timed instead.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::service::Counts;
use crate::engine::Snapshot;
use crate::state::{PodState, SocketCounters, WorkerState};
use crate::uplink::Uplink;

type Labels = Vec<(&'static str, String)>;
type Seconds = Counter<f64, AtomicU64>;

/// A count of what a shim did to the sockets of its pod: name, meaning, and where it is told.
type OfSockets = (&'static str, &'static str, fn(&SocketCounters) -> u64);

const SOCKETS: [OfSockets; 5] = [
    (
        "pod_trapped_calls",
        "System calls of a pod that its shim answered",
        |s| s.calls_handled,
    ),
    (
        "pod_trapped_call_errors",
        "Answered calls that ran on without what they should have been given",
        |s| s.errors,
    ),
    (
        "pod_sockets_set",
        "Sockets of a pod that were given a busy-poll window",
        |s| s.sockets_set,
    ),
    (
        "pod_epolls_given",
        "Epoll instances of a pod that were given a busy-poll window",
        |s| s.epolls_given,
    ),
    (
        "pod_epolls_crowded",
        "Epoll instances of a pod that were left to sleep, since more processes than CPUs would poll",
        |s| s.epolls_crowded,
    ),
];

/// What there is to tell.
pub(super) struct Source<'a> {
    pub(super) snapshot: &'a Snapshot,
    /// Packets that busy polling took, in each pod's namespace and in the host's.
    pub(super) busy_polled: (Vec<(PodState, u64)>, Option<u64>),
    /// How long workers take to go over their NAPIs once.
    pub(super) round_times: &'a [(WorkerState, Duration)],
    pub(super) uplinks: &'a [Uplink],
    pub(super) counts: Counts,
    /// Attachments, waiting ones included.
    pub(super) held: usize,
}

impl Source<'_> {
    /// The whole text.
    pub(super) fn text(&self) -> String {
        let mut registry = Registry::with_prefix("kbp");
        of_pods(&mut registry, self.snapshot);
        of_busy_polling(&mut registry, &self.busy_polled);
        of_accounts(&mut registry, self.snapshot);
        of_workers(&mut registry, self.snapshot, self.round_times);
        of_uplinks(&mut registry, self.uplinks);
        of_daemon(&mut registry, self.snapshot, self.counts, self.held);
        let mut text = String::new();
        if encode(&mut text, &registry).is_err() {
            // Writing to a string does not fail; should it, half a page is worse than none.
            text.clear();
        }
        text
    }
}

fn named(state: &PodState, more: &[(&'static str, String)]) -> Labels {
    let mut labels = vec![
        ("namespace", state.namespace.clone()),
        ("pod", state.id.clone()),
    ];
    labels.extend_from_slice(more);
    labels
}

fn of_pods(registry: &mut Registry, snapshot: &Snapshot) {
    let packets = Family::<Labels, Counter>::default();
    let placed = Family::<Labels, Gauge>::default();
    let interfaces = Family::<Labels, Gauge>::default();
    let degraded = Family::<Labels, Gauge>::default();
    let sockets = SOCKETS.map(|_| Family::<Labels, Counter>::default());
    for pod in &snapshot.pods {
        let state = &pod.state;
        let named = |more: &[(&'static str, String)]| named(state, more);
        packets.get_or_create(&named(&[])).inc_by(pod.packets);
        for (family, (_, _, of)) in sockets.iter().zip(SOCKETS) {
            family.get_or_create(&named(&[])).inc_by(of(&state.sockets));
        }
        let count = i64::try_from(state.interfaces.len()).unwrap_or(i64::MAX);
        interfaces.get_or_create(&named(&[])).set(count);
        if let Some(worker) = &state.worker {
            let place = [
                ("policy", worker.policy.to_string()),
                ("cpu", worker.cpu.to_string()),
            ];
            placed.get_or_create(&named(&place)).set(1);
        }
        for missing in &state.degraded {
            let part = [("part", missing.part.to_string())];
            degraded.get_or_create(&named(&part)).inc();
        }
    }
    registry.register(
        "pod_packets",
        "Packets over the host ends of a pod since its attach, both ways",
        packets,
    );
    registry.register("pod_interfaces", "Polled interfaces of a pod", interfaces);
    registry.register(
        "pod_worker",
        "1 for each pod with a worker, by where that is",
        placed,
    );
    for (family, (name, help, _)) in sockets.into_iter().zip(SOCKETS) {
        registry.register(name, help, family);
    }
    registry.register(
        "pod_degraded_parts",
        "Parts of kbp that are not active for a pod",
        degraded,
    );
}

fn of_busy_polling(registry: &mut Registry, polled: &(Vec<(PodState, u64)>, Option<u64>)) {
    let (pods, host) = polled;
    let by_pods = Family::<Labels, Counter>::default();
    for (state, packets) in pods {
        by_pods.get_or_create(&named(state, &[])).inc_by(*packets);
    }
    registry.register(
        "pod_socket_polled_packets",
        "Packets that busy polling took in a pod's namespace since that exists: its sockets and epoll instances",
        by_pods,
    );
    if let Some(packets) = host {
        let counter = Counter::<u64>::default();
        counter.inc_by(*packets);
        registry.register(
            "node_polled_packets",
            "Packets that busy polling took in the node's own namespace since it was booted: workers of every process but kthreads, and sockets",
            counter,
        );
    }
}

fn of_uplinks(registry: &mut Registry, uplinks: &[Uplink]) {
    let packets = Family::<Labels, Counter>::default();
    let napis = Family::<Labels, Gauge>::default();
    let placed = Family::<Labels, Gauge>::default();
    for uplink in uplinks {
        let state = uplink.state();
        let interface = ("interface", state.interface.clone());
        let named =
            |more: &[(&'static str, String)]| [std::slice::from_ref(&interface), more].concat();
        packets.get_or_create(&named(&[])).inc_by(uplink.packets());
        let count = i64::try_from(state.napis.len()).unwrap_or(i64::MAX);
        napis.get_or_create(&named(&[])).set(count);
        if let Some(worker) = &state.worker {
            let place = [
                ("policy", worker.policy.to_string()),
                ("cpu", worker.cpu.to_string()),
            ];
            placed.get_or_create(&named(&place)).set(1);
        }
    }
    registry.register(
        "uplink_received_packets",
        "Packets that an uplink has received since it exists",
        packets,
    );
    registry.register(
        "uplink_polled_napis",
        "NAPI instances of an uplink that are polled; 0: it is not polled",
        napis,
    );
    registry.register(
        "uplink_worker",
        "1 for each uplink with a worker, by where that is",
        placed,
    );
}

/// What the worker of each pod does for it.
fn of_accounts(registry: &mut Registry, snapshot: &Snapshot) {
    let busy = Family::<Labels, Seconds>::default();
    let idle = Family::<Labels, Seconds>::default();
    let rounds = Family::<Labels, Counter>::default();
    let polled = snapshot.pods.iter().filter(|p| p.state.worker.is_some());
    for pod in polled {
        let (labels, account) = (named(&pod.state, &[]), pod.account);
        busy.get_or_create(&labels)
            .inc_by(account.busy.as_secs_f64());
        idle.get_or_create(&labels)
            .inc_by(account.idle.as_secs_f64());
        if let Some(counted) = account.rounds {
            rounds.get_or_create(&labels).inc_by(counted);
        }
    }
    registry.register_with_unit(
        "pod_worker_busy",
        "Part of a pod in the time that its worker's thread has run, by packets: the parts of a worker's pods add up to it. Nothing is added while it polls uplinks, too",
        Unit::Seconds,
        busy,
    );
    registry.register_with_unit(
        "pod_worker_idle",
        "Time that the thread of a pod's worker has not run since it has polled the pod: parked, or waiting for its CPU",
        Unit::Seconds,
        idle,
    );
    registry.register(
        "pod_worker_rounds",
        "Rounds of a pod's worker since it has polled the pod, each of them one over this pod too; of kind socket, since the kernel counts no rounds of the others",
        rounds,
    );
}

fn labels_of(worker: &WorkerState) -> Labels {
    vec![
        ("kind", worker.kind.clone()),
        ("policy", worker.policy.to_string()),
        ("cpu", worker.cpu.to_string()),
        ("tid", worker.tid.to_string()),
    ]
}

fn of_workers(
    registry: &mut Registry,
    snapshot: &Snapshot,
    round_times: &[(WorkerState, Duration)],
) {
    let busy = Family::<Labels, Seconds>::default();
    let parked_time = Family::<Labels, Seconds>::default();
    let parked = Family::<Labels, Gauge>::default();
    let pods = Family::<Labels, Gauge>::default();
    let uplinks = Family::<Labels, Gauge>::default();
    let renewals = Family::<Labels, Counter>::default();
    let rounds = Family::<Labels, Counter>::default();
    let rate = Family::<Labels, Gauge>::default();
    for worker in &snapshot.workers {
        let labels = labels_of(&worker.state);
        let idle = worker.age.saturating_sub(worker.busy);
        busy.get_or_create(&labels)
            .inc_by(worker.busy.as_secs_f64());
        parked_time
            .get_or_create(&labels)
            .inc_by(idle.as_secs_f64());
        parked.get_or_create(&labels).set(i64::from(worker.parked));
        pods.get_or_create(&labels)
            .set(i64::try_from(worker.pods).unwrap_or(i64::MAX));
        uplinks
            .get_or_create(&labels)
            .set(i64::try_from(worker.uplinks).unwrap_or(i64::MAX));
        renewals.get_or_create(&labels).inc_by(worker.renewals);
        if let Some(counted) = worker.rounds {
            rounds.get_or_create(&labels).inc_by(counted);
        }
        rate.get_or_create(&labels)
            .set(i64::try_from(worker.rate).unwrap_or(i64::MAX));
    }
    registry.register_with_unit(
        "worker_busy",
        "Time that a worker's thread has run, polling",
        Unit::Seconds,
        busy,
    );
    registry.register_with_unit(
        "worker_idle",
        "Time that a worker's thread has not run: parked, or waiting for its CPU",
        Unit::Seconds,
        parked_time,
    );
    registry.register("worker_parked", "1 while a worker is parked", parked);
    registry.register("worker_pods", "Pods that a worker polls", pods);
    registry.register("worker_uplinks", "Uplinks that a worker polls", uplinks);
    registry.register(
        "worker_rounds",
        "How often a worker of kind socket has gone over its pods; the kernel counts no rounds of the others",
        rounds,
    );
    let round = Family::<Labels, Gauge<f64, AtomicU64>>::default();
    for (worker, time) in round_times {
        round
            .get_or_create(&labels_of(worker))
            .set(time.as_secs_f64());
    }
    registry.register_with_unit(
        "worker_round",
        "How long a worker of kind sqpoll that is awake takes to go over its NAPIs once, timed over 8 rounds when it was asked for",
        Unit::Seconds,
        round,
    );
    registry.register("worker_lease_renewals", "Leases started", renewals);
    registry.register(
        "worker_packets_per_second",
        "Packets a second of a worker's pods, at the last look",
        rate,
    );
}

fn of_daemon(registry: &mut Registry, snapshot: &Snapshot, counts: Counts, held: usize) {
    let gauge = |value: usize| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        gauge
    };
    let counter = |value: u64| {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        counter
    };
    registry.register(
        "poller_attachments",
        "Attachments, waiting ones included",
        gauge(held),
    );
    registry.register("poller_attaches", "Attaches", counter(counts.attached));
    registry.register("poller_detaches", "Detaches", counter(counts.detached));
    registry.register(
        "poller_refusals",
        "Requests that were refused",
        counter(counts.refused),
    );
    registry.register(
        "poller_moves",
        "Pods that were moved from a hot core",
        counter(snapshot.moves),
    );
    if let Some(micros) = snapshot.cpu_latency {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(f64::from(micros.0) / 1e6);
        registry.register_with_unit(
            "poller_cpu_latency",
            "Longest exit latency of the CPUs' sleep states, as held",
            Unit::Seconds,
            gauge,
        );
    }
}
