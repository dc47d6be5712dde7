//! Picks who polls a pod's host ends, where, and in which scheduling class; and makes that worker.
//!
//! Workers poll host ends (pod → host); what polls the pod ends are the pod's own sockets, and idle-class workers beside them. What a worker is on this kernel is found by
//! trying: see [`kind`]. docs/kernels.md tells what that comes to.

mod idle;
mod kind;
mod kthread;
mod socket;
mod sqpoll;

use std::collections::BTreeMap;
use std::time::Duration;

use kbp_kernel::process::Scheduling;
use kbp_kernel::{CpuId, CpuSet, NapiId};

use crate::Error;
use crate::claim::{self, Claim, Site};
use crate::config::Config;
use crate::policy::{Profile, WorkerPolicy};
use crate::state::WorkerState;
use idle::IdleStay;
pub(crate) use kind::Target;
use kind::{Kind, Poller, Seat};
pub(crate) use socket::learn;

/// How long a worker polls on after the last packet was seen.
pub const LEASE: Duration = Duration::from_millis(200);

/// A worker that has been made; it sleeps until its lease is started.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Ends before its thread does.
    _idle: Option<IdleStay>,
    kind: Kind,
    poller: Box<dyn Poller>,
    pub(crate) state: WorkerState,
    /// What is not as one would think of a worker of this policy.
    pub(crate) caveat: Option<String>,
    /// Keeps the CPU while the worker lives.
    _claim: Option<Claim>,
}

impl Worker {
    /// Polls this NAPI too, from now on; twice is fine.
    pub(crate) fn add(&mut self, target: &Target<'_>) -> kbp_kernel::Result<()> {
        self.poller.add(target)
    }

    /// Polls this NAPI no more; fine when it did not.
    pub(crate) fn remove(&mut self, napi: NapiId) -> kbp_kernel::Result<()> {
        self.poller.remove(napi)
    }

    /// Starts the lease anew, and wakes it when it is parked.
    pub(crate) fn wake(&mut self) -> kbp_kernel::Result<()> {
        self.poller.wake()
    }

    /// Whether it polls the pods' ends, too, beside the pods' own sockets.
    ///
    /// One that gives way to everybody does no harm there, and between requests that are far apart it halves the round trip once more
    /// (docs/workers.md). On a CPU of the pool it would draw the packets over to that CPU.
    pub(crate) fn polls_pod_ends(&self) -> bool {
        self.state.idle_class && self.caveat.is_none() && self.kind == Kind::Sqpoll
    }

    /// Whether packets may take another way than through the NAPIs while it sleeps. Not with sockets: they know their NAPIs by packets.
    pub(crate) fn can_do_without_packets(&self) -> bool {
        self.kind != Kind::Socket
    }

    /// Whether it is parked now.
    pub(crate) fn is_parked(&self) -> bool {
        self.poller.is_asleep()
    }

    /// How often it has gone over its instances, where that is counted.
    pub(crate) fn rounds(&self) -> Option<u64> {
        self.poller.rounds()
    }

    /// How long it takes to go over its instances once, timed now, where that can be done within `limit`.
    pub(crate) fn round_time(&self, limit: Duration) -> Option<Duration> {
        self.poller.round_time(limit)
    }

    /// CPU time that it has used: it polls without a pause while it is awake.
    pub(crate) fn busy(&self) -> Duration {
        self.poller.busy()
    }
}

/// What a pod's worker policy comes to on this node: decided here, made by [`make`].
#[derive(Debug)]
pub(crate) enum Plan {
    /// No worker, because none was wanted.
    None {
        /// Why.
        reason: String,
    },
    /// One on this CPU.
    On {
        /// `Dedicated`, `Shared` or `Idle`.
        policy: WorkerPolicy,
        /// The CPU.
        cpu: CpuId,
        /// Its claim, where it is one of the pool.
        claim: Option<Claim>,
        /// Why there.
        reason: String,
    },
    /// No worker, although one was wanted. No other kind stands in for it: sockets alone are better than one that was
    /// not asked for.
    Failed {
        /// Why.
        reason: String,
    },
}

impl Plan {
    pub(crate) fn none(reason: impl Into<String>) -> Self {
        Self::None {
            reason: reason.into(),
        }
    }

    pub(crate) fn failed(reason: impl Into<String>) -> Self {
        Self::Failed {
            reason: reason.into(),
        }
    }
}

/// Why no worker is wanted, where none is. Asked before anything that this kernel may lack: what nobody wants is not
/// missing. `sockets` is [`Sockets`] of the pod.
pub(crate) fn unwanted(asked: WorkerPolicy, pool: &CpuSet, sockets: &Sockets) -> Option<String> {
    match asked {
        WorkerPolicy::None => Some("none asked for".to_owned()),
        // Not idle. Beside polling sockets an idle-class worker gains only where requests are far apart (1 ms: p50 30
        // instead of 59 µs), and has its CPU busy all the time for it. docs/workers.md has the table.
        WorkerPolicy::Auto if pool.is_empty() => Some(format!(
            "auto: the node has no CPU pool; {}",
            match sockets {
                Sockets::Poll => "the pod's sockets poll".to_owned(),
                Sockets::Sleep(why) => format!("its sockets do not poll either ({why})"),
            }
        )),
        _ => None,
    }
}

/// Whether the pod's own sockets busy-poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sockets {
    /// They do.
    Poll,
    /// They do not; why.
    Sleep(String),
}

/// Decides where the worker goes that `asked`, which wants one, and the node allow.
pub(crate) fn plan(asked: WorkerPolicy, site: &Site<'_>) -> Plan {
    match asked {
        WorkerPolicy::None => Plan::none("none asked for"),
        WorkerPolicy::Idle => match idle_cpus(site).first() {
            Some(cpu) => Plan::On {
                policy: asked,
                cpu: *cpu,
                claim: None,
                reason: format!("asked for; idle cycles of CPU {cpu}"),
            },
            None => Plan::failed("this process may use no CPU that is online"),
        },
        WorkerPolicy::Auto => match claim::shared(site) {
            // Auto asks for nothing in particular, so that other pods hold every CPU is no lack.
            Err(Error::NoFreeCpu { holders, .. }) => {
                Plan::none(format!("auto: no free CPU in the pool: {holders}"))
            }
            claim => on_pool(
                WorkerPolicy::Shared,
                "auto: the node has a CPU pool",
                site,
                claim,
            ),
        },
        WorkerPolicy::Dedicated => on_pool(asked, "asked for", site, claim::dedicated(site)),
        WorkerPolicy::Shared => on_pool(asked, "asked for", site, claim::shared(site)),
    }
}

fn on_pool(policy: WorkerPolicy, why: &str, site: &Site<'_>, claim: crate::Result<Claim>) -> Plan {
    match claim {
        Ok(claim) => Plan::On {
            policy,
            cpu: claim.cpu(),
            reason: format!("{why}; CPU {} of the pool {}", claim.cpu(), site.pool),
            claim: Some(claim),
        },
        Err(error) => Plan::failed(error.to_string()),
    }
}

/// Where an idle-class worker goes, best first. What it gives is that its CPU does not halt, so that whoever is woken there runs at
/// once; to give way to everybody it costs its CPU's caches only. So:
///
/// 1. not on CPUs that another kbp pod has for itself, while there are others;
/// 2. on the pod's own cpuset, where its threads are woken;
/// 3. where the fewest workers are, so that they spread.
fn idle_cpus(site: &Site<'_>) -> Vec<CpuId> {
    let online = &site.topology.online;
    let taken = crate::state::taken_by(site.pods, online);
    let mut workers: BTreeMap<CpuId, usize> = BTreeMap::new();
    for worker in site.pods.iter().filter_map(|p| p.worker.as_ref()) {
        *workers.entry(CpuId(worker.cpu)).or_default() += 1;
    }
    let own =
        |cpu| is_real_part(site.cpuset, online) && site.cpuset.is_some_and(|c| c.contains(cpu));
    let mut cpus: Vec<CpuId> = site.usable.iter().collect();
    cpus.sort_by_key(|cpu| {
        (
            taken.contains(*cpu),
            !own(*cpu),
            workers.get(cpu).copied().unwrap_or(0),
            *cpu,
        )
    });
    cpus
}

fn is_real_part(cpuset: Option<&CpuSet>, online: &CpuSet) -> bool {
    cpuset.is_some_and(|c| !c.is_empty() && !online.is_subset(c))
}

/// Makes the worker of a [`Plan::On`], of the first kind that works; it is parked. On error why none does.
pub(crate) fn make(
    policy: WorkerPolicy,
    profile: Profile,
    cpu: CpuId,
    claim: Option<Claim>,
    config: &Config,
) -> Result<Worker, String> {
    let scheduling = match policy {
        WorkerPolicy::Idle => Scheduling::Idle,
        _ => Scheduling::Other(0),
    };
    let (kind, poller) = kind::first_that_works(policy, profile, Seat { cpu, scheduling }, config)?;
    let (stay, caveat) = match scheduling {
        Scheduling::Idle => match idle::enter(poller.thread_id()) {
            Ok(stay) => (stay, None),
            Err(why) => (
                None,
                Some(format!(
                    "warning: it is idle towards its own cgroup only and can take half of the CPU from a container: {why}"
                )),
            ),
        },
        _ => (None, None),
    };
    Ok(Worker {
        _idle: stay,
        kind,
        caveat,
        state: WorkerState {
            kind: kind.to_string(),
            policy,
            tid: poller.thread_id(),
            cpu: cpu.0,
            idle_class: scheduling == Scheduling::Idle,
            lease_ms: u32::try_from(LEASE.as_millis()).unwrap_or(u32::MAX),
        },
        poller,
        _claim: claim,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kbp_kernel::cpu::Topology;

    use super::*;
    use crate::state::{PodState, SocketCounters};

    fn set(text: &str) -> CpuSet {
        text.parse().expect("cpus")
    }

    fn machine(online: &str) -> Topology {
        let sys = tempfile::tempdir().expect("tempdir");
        let cpus = sys.path().join("devices/system/cpu");
        std::fs::create_dir_all(&cpus).expect("mkdir");
        std::fs::write(cpus.join("online"), online).expect("write");
        Topology::read_from(sys.path()).expect("topology")
    }

    fn pod(cpuset: Option<&str>, worker: Option<(WorkerPolicy, u32)>) -> PodState {
        PodState {
            id: "other".to_owned(),
            namespace: "test".to_owned(),
            owner_pid: 1,
            owner_start: 1,
            worker_policy: WorkerPolicy::Auto,
            profile: Profile::Latency,
            interfaces: Vec::new(),
            worker: worker.map(|(policy, cpu)| WorkerState {
                kind: "sqpoll".to_owned(),
                policy,
                tid: 1,
                cpu,
                idle_class: policy == WorkerPolicy::Idle,
                lease_ms: 200,
            }),
            worker_reason: String::new(),
            busy_poll_us: None,
            busy_poll_reason: String::new(),
            busy_poll_mode: Default::default(),
            prefer_busy_poll: false,
            sockets: SocketCounters::default(),
            cpuset: cpuset.map(str::to_owned),
            short_way: None,
            rests: false,
            degraded: Vec::new(),
        }
    }

    #[test]
    fn idle_workers_keep_off_others_cpus_then_to_the_pods_own_then_spread() {
        use WorkerPolicy::{Dedicated, Idle};
        let on = |cpu| pod(None, Some((Idle, cpu)));
        for (cpuset, usable, pods, expected) in [
            (None, "0-3", vec![], [0, 1, 2, 3]),
            (None, "0-3", vec![on(0)], [1, 2, 3, 0]),
            (None, "0-3", vec![on(0), on(1), on(1)], [2, 3, 0, 1]),
            (Some("2-3"), "0-3", vec![], [2, 3, 0, 1]),
            // A cpuset of every CPU is none of its own.
            (Some("0-3"), "0-3", vec![], [0, 1, 2, 3]),
            (Some("2-3"), "0-3", vec![on(2)], [3, 2, 0, 1]),
            (Some("2-3"), "0-3", vec![pod(Some("2"), None)], [3, 0, 1, 2]),
            (None, "0-3", vec![pod(Some("0"), None)], [1, 2, 3, 0]),
            (
                None,
                "0-3",
                vec![pod(None, Some((Dedicated, 0))), on(1), on(2), on(3)],
                [1, 2, 3, 0],
            ),
        ] {
            let (topology, usable) = (machine("0-3"), set(usable));
            let cpuset = cpuset.map(set);
            let site = Site {
                state_dir: Path::new("/nonexistent"),
                pool: &CpuSet::default(),
                config: Path::new("/nonexistent"),
                topology: &topology,
                usable: &usable,
                cpuset: cpuset.as_ref(),
                pods: &pods,
                reserved: &BTreeMap::new(),
                load: &BTreeMap::new(),
            };
            let cpus = idle_cpus(&site);
            assert_eq!(cpus, expected.map(CpuId), "{cpuset:?} {pods:?}");
        }
    }

    #[test]
    fn auto_wants_a_worker_only_where_there_is_a_pool() {
        let asleep = Sockets::Sleep("a quota of 0.5 CPUs".to_owned());
        for (asked, pool, sockets, expected) in [
            (
                WorkerPolicy::None,
                "2",
                &Sockets::Poll,
                Some("none asked for"),
            ),
            (WorkerPolicy::Auto, "2", &Sockets::Poll, None),
            (WorkerPolicy::Auto, "", &Sockets::Poll, Some("sockets poll")),
            (
                WorkerPolicy::Auto,
                "",
                &asleep,
                Some("not poll either (a quota of 0.5 CPUs)"),
            ),
            (WorkerPolicy::Idle, "", &Sockets::Poll, None),
            (WorkerPolicy::Dedicated, "", &asleep, None),
        ] {
            let pool = if pool.is_empty() {
                CpuSet::default()
            } else {
                set(pool)
            };
            let reason = unwanted(asked, &pool, sockets);
            assert!(
                match (&reason, expected) {
                    (Some(reason), Some(expected)) => reason.contains(expected),
                    (None, None) => true,
                    _ => false,
                },
                "{asked} {pool}: {reason:?}"
            );
        }
    }

    #[test]
    fn no_worker_is_made_outside_of_what_the_process_may_use() {
        let topology = machine("0-3");
        let site = Site {
            state_dir: Path::new("/nonexistent"),
            pool: &CpuSet::default(),
            config: Path::new("/nonexistent"),
            topology: &topology,
            usable: &CpuSet::default(),
            cpuset: None,
            pods: &[],
            reserved: &BTreeMap::new(),
            load: &BTreeMap::new(),
        };
        match plan(WorkerPolicy::Idle, &site) {
            Plan::Failed { reason } => {
                assert_eq!(reason, "this process may use no CPU that is online");
            }
            other => panic!("{other:?}"),
        }
    }
}
