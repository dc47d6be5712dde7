//! The counters behind the state files: packets of the host ends, packets that were busy-polled, and what the worker's thread costs.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kbp_kernel::IfIndex;
use kbp_kernel::link::RouteSocket;
use kbp_kernel::napi::NetdevSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_kernel::process::cpu_time;
use kbp_poller::state::{PodState, WorkerState};
use serde::Serialize;

/// What a pod has done since its veth exists. None: this node does not tell, or not this user.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counters {
    /// Packets pod → host, as the host ends received them.
    pub(crate) from_pod: Option<u64>,
    /// Packets host → pod, as the host ends sent them.
    pub(crate) to_pod: Option<u64>,
    /// Packets that the pod's sockets and epoll instances took by busy polling.
    pub(crate) polled_by_sockets: Option<u64>,
    /// CPU time of the worker's thread, in nanoseconds.
    pub(crate) worker_cpu_ns: Option<u64>,
}

/// Reads counters, and remembers which network namespace is whose between two readings.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    by_nsid: BTreeMap<i32, Netns>,
}

impl Sampler {
    /// The counters of `pods`, in their order.
    pub(crate) fn read(&mut self, pods: &[PodState]) -> Vec<Counters> {
        // Without netlink there is still the rest.
        let mut socket = RouteSocket::open().ok();
        pods.iter()
            .map(|pod| self.counters(pod, socket.as_mut()))
            .collect()
    }

    fn counters(&mut self, pod: &PodState, socket: Option<&mut RouteSocket>) -> Counters {
        let mut counters = Counters::default();
        if let Some(worker) = &pod.worker {
            counters.worker_cpu_ns = thread_of(worker, pod)
                .and_then(|tid| cpu_time(tid, tid).ok())
                .and_then(|time| u64::try_from(time.as_nanos()).ok());
        }
        let Some(socket) = socket else {
            return counters;
        };
        let mut namespaces = BTreeSet::new();
        for interface in &pod.interfaces {
            let index = IfIndex(interface.host_ifindex);
            let Ok(Some(link)) = socket.link_by_index(index) else {
                continue;
            };
            // An index is given again; the name tells whether it is still this one.
            if link.name != interface.host_interface {
                continue;
            }
            *counters.from_pod.get_or_insert(0) += link.rx_packets;
            *counters.to_pod.get_or_insert(0) += link.tx_packets;
            namespaces.extend(link.peer_nsid);
        }
        for nsid in namespaces {
            if let Some(packets) = self.polled(nsid, socket) {
                *counters.polled_by_sockets.get_or_insert(0) += packets;
            }
        }
        counters
    }

    fn polled(&mut self, nsid: i32, socket: &mut RouteSocket) -> Option<u64> {
        // An id may have been given to another namespace since.
        if let Some(known) = self.by_nsid.get(&nsid)
            && socket.nsid_of(known).ok().flatten() != Some(nsid)
        {
            self.by_nsid.remove(&nsid);
        }
        let netns = match self.by_nsid.entry(nsid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(find(nsid, socket)?),
        };
        busy_poll_rx_packets(netns).ok()
    }
}

/// The worker's thread; a NAPI's own one has to be asked for, since the kernel makes a new one now and then.
fn thread_of(worker: &WorkerState, pod: &PodState) -> Option<u32> {
    if worker.tid != 0 {
        return Some(worker.tid);
    }
    let mut socket = NetdevSocket::open().ok()?;
    let mut pids = pod.interfaces.iter().filter_map(|i| {
        let napis = socket.napis(IfIndex(i.host_ifindex)).ok()?;
        napis.into_iter().find_map(|n| n.pid)
    });
    pids.next()
}

/// The network namespace with that id: one of a process, since a pod that does something has one.
fn find(nsid: i32, socket: &mut RouteSocket) -> Option<Netns> {
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(link) = std::fs::read_link(entry.path().join("ns/net")) else {
            continue;
        };
        if !seen.insert(link) {
            continue;
        }
        if let Ok(netns) = Netns::of_process(pid)
            && socket.nsid_of(&netns).ok().flatten() == Some(nsid)
        {
            return Some(netns);
        }
    }
    None
}

/// What a pod does now, from two readings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Rates {
    /// Packets a second, pod → host.
    pub(crate) from_pod: Option<f64>,
    /// Packets a second, host → pod.
    pub(crate) to_pod: Option<f64>,
    /// Packets a second that the pod's sockets polled.
    pub(crate) polled_by_sockets: Option<f64>,
    /// Share of a CPU that the worker's thread took, 0 to 1; the rest it was parked, or had to give way.
    pub(crate) worker_cpu: Option<f64>,
}

impl Rates {
    /// Share of the time that the worker was parked, or had to give way. None: there is no worker, or no two readings.
    pub(crate) fn parked(&self) -> Option<f64> {
        self.worker_cpu.map(|busy| 1.0 - busy)
    }

    /// The rates from `before` to `now`, `elapsed` apart. A counter that went backwards is that of something new.
    pub(crate) fn of(before: &Counters, now: &Counters, elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        let rate = |before: Option<u64>, now: Option<u64>| {
            Some(now?.checked_sub(before?)? as f64 / seconds)
        };
        Self {
            from_pod: rate(before.from_pod, now.from_pod),
            to_pod: rate(before.to_pod, now.to_pod),
            polled_by_sockets: rate(before.polled_by_sockets, now.polled_by_sockets),
            worker_cpu: rate(before.worker_cpu_ns, now.worker_cpu_ns)
                .map(|ns| (ns / 1e9).clamp(0.0, 1.0)),
        }
    }
}

/// The previous reading, by pod.
#[derive(Debug, Default)]
pub(crate) struct Previous {
    at: Option<Instant>,
    counters: BTreeMap<String, Counters>,
}

impl Previous {
    /// Rates since the last call with the same pods, and remembers these.
    pub(crate) fn rates(&mut self, pods: &[PodState], now: &[Counters]) -> Vec<Rates> {
        let at = Instant::now();
        let elapsed = self.at.map(|before| at - before);
        let rates = pods
            .iter()
            .zip(now)
            .map(|(pod, now)| {
                let before = self.counters.get(&key(pod));
                match (before, elapsed) {
                    (Some(before), Some(elapsed)) => Rates::of(before, now, elapsed),
                    _ => Rates::default(),
                }
            })
            .collect();
        self.at = Some(at);
        self.counters = pods.iter().map(key).zip(now.iter().copied()).collect();
        rates
    }
}

/// Ids are unique in a containerd namespace only, and another owner is another life.
fn key(pod: &PodState) -> String {
    format!("{}/{}/{}", pod.namespace, pod.id, pod.owner_start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_by_time_and_unknown_stays_unknown() {
        let counters = |packets, cpu| Counters {
            from_pod: Some(packets),
            to_pod: None,
            polled_by_sockets: Some(packets / 2),
            worker_cpu_ns: Some(cpu),
        };
        let rates = Rates::of(
            &counters(100, 0),
            &counters(300, 500_000_000),
            Duration::from_secs(2),
        );
        assert_eq!(rates.from_pod, Some(100.0));
        assert_eq!(rates.to_pod, None);
        assert_eq!(rates.polled_by_sockets, Some(50.0));
        assert_eq!(rates.worker_cpu, Some(0.25));
        let back = Rates::of(&counters(300, 5), &counters(100, 9), Duration::from_secs(1));
        assert_eq!(back.from_pod, None);
    }
}
