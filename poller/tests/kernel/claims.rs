//! CPUs of a pool between pods that want them, and after crashes.

use std::collections::BTreeMap;
use std::path::Path;

use kbp_kernel::cpu::Topology;
use kbp_kernel::{CpuId, CpuSet};
use kbp_poller::Error;
use kbp_poller::claim::{self, Site};
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::state::Part;

use crate::node::{Node, any_cpu};

#[test]
fn the_second_dedicated_pod_on_a_pool_of_one_is_told_who_has_it() {
    let (node, other) = (Node::new(), Node::new());
    let cpu = any_cpu();
    let pool = format!("cpus = \"{cpu}\"");
    let first = node.attached(node.request("first", WorkerPolicy::Dedicated, &pool));
    let request = |required| {
        let mut request = other.request("second", WorkerPolicy::Dedicated, &pool);
        request.config.state_dir = node.state_dir();
        request.policy.required = required;
        request
    };

    let degraded = other.attached(request(false));
    let state = degraded.state();
    assert_eq!(state.degraded.len(), 1, "{state:?}");
    assert_eq!(state.degraded[0].part, Part::Worker);
    let reason = &state.degraded[0].reason;
    for part in [
        "no free CPU for a dedicated worker".to_owned(),
        format!("pool {cpu} "),
        format!("CPU {cpu} is held by test/first"),
        other.config("").path.display().to_string(),
    ] {
        assert!(reason.contains(&part), "{reason}");
    }
    assert!(state.worker.is_none(), "nothing that was not asked for");
    drop(degraded);

    // Auto asks for nothing in particular: it does without.
    let mut auto = request(true);
    auto.policy.worker = WorkerPolicy::Auto;
    let state = other.attached(auto).state();
    assert!(
        state.worker.is_none() && state.degraded.is_empty(),
        "{state:?}"
    );
    assert!(
        state
            .worker_reason
            .contains(&format!("CPU {cpu} is held by test/first")),
        "{}",
        state.worker_reason
    );

    let error = other.attach(request(true)).expect_err("required");
    assert!(
        matches!(&error, Error::Required { part: Part::Worker, reason: r } if r == reason),
        "{error}"
    );
    drop(first);
    let state = other.attached(request(true)).state();
    assert_eq!(state.worker.expect("a worker").cpu, cpu.0);
}

#[test]
fn dedicated_without_a_pool_says_where_to_set_one() {
    let node = Node::new();
    let mut request = node.request("a", WorkerPolicy::Dedicated, "");
    request.policy.required = true;
    let file = request.config.path.display().to_string();
    let error = node.attach(request).expect_err("required").to_string();
    assert!(
        error.contains("no CPU pool for a dedicated worker") && error.contains(&file),
        "{error}"
    );
}

/// A machine with `online` CPUs whose siblings are 0+1, 2+3 and so on.
fn machine(online: &str) -> Topology {
    let sys = tempfile::tempdir().expect("tempdir");
    let cpus = sys.path().join("devices/system/cpu");
    let set: CpuSet = online.parse().expect("cpus");
    for cpu in set.iter() {
        let dir = cpus.join(format!("cpu{cpu}/topology"));
        std::fs::create_dir_all(&dir).expect("mkdir");
        let first = cpu.0 / 2 * 2;
        let siblings = format!("{first},{}\n", first + 1);
        std::fs::write(dir.join("thread_siblings_list"), siblings).expect("write");
    }
    std::fs::write(cpus.join("online"), online).expect("write");
    Topology::read_from(sys.path()).expect("topology")
}

struct Place {
    topology: Topology,
    pool: CpuSet,
    cpuset: Option<CpuSet>,
    reserved: BTreeMap<CpuId, String>,
    load: BTreeMap<CpuId, u64>,
    dir: tempfile::TempDir,
}

impl Place {
    fn new(online: &str, pool: &str, cpuset: Option<&str>) -> Self {
        Self {
            topology: machine(online),
            pool: pool.parse().expect("pool"),
            cpuset: cpuset.map(|c| c.parse().expect("cpuset")),
            reserved: BTreeMap::new(),
            load: BTreeMap::new(),
            dir: tempfile::tempdir().expect("tempdir"),
        }
    }

    fn site(&self) -> Site<'_> {
        Site {
            state_dir: self.dir.path(),
            pool: &self.pool,
            config: Path::new("/etc/kbp/config.toml"),
            topology: &self.topology,
            usable: &self.topology.online,
            cpuset: self.cpuset.as_ref(),
            pods: &[],
            reserved: &self.reserved,
            load: &self.load,
        }
    }
}

#[test]
fn a_dedicated_worker_keeps_off_the_pods_cpus_and_their_siblings() {
    for (pool, cpuset, expected) in [
        ("0-5", None, 0),
        ("0-5", Some("0"), 2),
        ("0-1", Some("0"), 1),
        ("0-5", Some("0-3"), 4),
        ("1,3", Some("0,2-3"), 1),
    ] {
        let place = Place::new("0-5", pool, cpuset);
        let claim = claim::dedicated(&place.site()).expect("claim");
        assert_eq!(claim.cpu(), CpuId(expected), "{pool} {cpuset:?}");
    }
}

#[test]
fn exclusive_and_shared_claims_exclude_each_other() {
    let place = Place::new("0-3", "2", None);
    let shared = claim::shared(&place.site()).expect("claim");
    let also = claim::shared(&place.site()).expect("claim");
    assert!(matches!(
        claim::dedicated(&place.site()),
        Err(Error::NoFreeCpu { .. })
    ));
    drop(shared);
    assert!(claim::dedicated(&place.site()).is_err());
    drop(also);
    let alone = claim::dedicated(&place.site()).expect("claim");
    assert!(claim::shared(&place.site()).is_err());
    assert!(claim::dedicated(&place.site()).is_err());
    drop(alone);
    assert_eq!(
        std::fs::read_dir(place.dir.path().join("cpu"))
            .expect("list")
            .count(),
        0
    );
}

#[test]
fn an_offline_cpu_is_named() {
    let place = Place::new("0-2", "3", None);
    let error = claim::dedicated(&place.site())
        .expect_err("offline")
        .to_string();
    assert!(error.contains("CPU 3 is offline"), "{error}");
}

#[test]
fn a_cpu_outside_the_cpuset_of_the_process_is_named() {
    let place = Place::new("0-3", "3", None);
    let usable = "0-1".parse().expect("CPUs");
    let site = Site {
        usable: &usable,
        ..place.site()
    };
    let error = claim::dedicated(&site)
        .expect_err("not to be used")
        .to_string();
    let named = "CPU 3 is outside the cpuset of this process (0-1)";
    assert!(error.contains(named), "{error}");
}

#[test]
fn leftover_claim_files_are_swept_and_held_ones_are_not() {
    let place = Place::new("0-3", "1", None);
    let held = claim::dedicated(&place.site()).expect("claim");
    let cpus = place.dir.path().join("cpu");
    std::fs::write(cpus.join("2"), "").expect("write");
    claim::sweep(place.dir.path()).expect("sweep");
    assert!(cpus.join("1").exists() && !cpus.join("2").exists());
    drop(held);
    assert!(!cpus.join("1").exists());
}

/// Many claimants of one CPU: never two at a time, although each removes the file that the others wait for.
#[test]
fn no_two_hold_a_cpu_at_the_same_time() {
    use std::sync::atomic::{AtomicU32, Ordering};
    let place = Place::new("0-3", "1", None);
    let (holders, rounds) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while rounds.load(Ordering::SeqCst) < 2000 {
                    let Ok(claim) = claim::dedicated(&place.site()) else {
                        continue;
                    };
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                    rounds.fetch_add(1, Ordering::SeqCst);
                    // The others get a chance to be wrong.
                    std::thread::yield_now();
                    holders.fetch_sub(1, Ordering::SeqCst);
                    drop(claim);
                }
            });
        }
    });
}

/// A machine of two nodes, CPUs 0-3 and 4-7, siblings 0+1, 2+3 and so on.
fn two_nodes() -> Place {
    let sys = tempfile::tempdir().expect("tempdir");
    let system = sys.path().join("devices/system");
    for cpu in 0..8 {
        let dir = system.join(format!("cpu/cpu{cpu}/topology"));
        std::fs::create_dir_all(&dir).expect("mkdir");
        let first = cpu / 2 * 2;
        let siblings = format!("{first},{}\n", first + 1);
        std::fs::write(dir.join("thread_siblings_list"), siblings).expect("write");
    }
    std::fs::write(system.join("cpu/online"), "0-7\n").expect("write");
    for (node, cpus) in [("node0", "0-3\n"), ("node1", "4-7\n")] {
        let dir = system.join("node").join(node);
        std::fs::create_dir_all(&dir).expect("mkdir");
        std::fs::write(dir.join("cpulist"), cpus).expect("write");
    }
    let mut place = Place::new("0-7", "0-7", None);
    place.topology = Topology::read_from(sys.path()).expect("topology");
    place
}

#[test]
fn workers_stay_on_the_pods_numa_node_and_off_its_siblings() {
    let mut place = two_nodes();
    for (pool, cpuset, dedicated, shared) in [
        // The far node is worse than a sibling for none, and the near one has free cores.
        ("0-7", "0-1", 2, 2),
        ("0-7", "4", 6, 6),
        // Only siblings are left near: a dedicated worker rather goes far than disturb the pod's core.
        ("1,4", "0", 4, 1),
        // Only far ones.
        ("4-7", "0-3", 4, 4),
    ] {
        place.pool = pool.parse().expect("pool");
        place.cpuset = Some(cpuset.parse().expect("cpuset"));
        let claim = claim::dedicated(&place.site()).expect("claim");
        assert_eq!(claim.cpu(), CpuId(dedicated), "dedicated {pool} {cpuset}");
        drop(claim);
        let claim = claim::shared(&place.site()).expect("claim");
        assert_eq!(claim.cpu(), CpuId(shared), "shared {pool} {cpuset}");
    }
}

#[test]
fn shared_workers_go_where_the_least_load_is() {
    let mut place = Place::new("0-7", "0,2,4", None);
    place.load = [(CpuId(0), 50_000), (CpuId(2), 20_000), (CpuId(4), 90_000)].into();
    let claim = claim::shared(&place.site()).expect("claim");
    assert_eq!(claim.cpu(), CpuId(2));
    // A few packets are no load.
    place.load = [(CpuId(0), 900), (CpuId(2), 20), (CpuId(4), 0)].into();
    let claim = claim::shared(&place.site()).expect("claim");
    assert_eq!(claim.cpu(), CpuId(0));
}

#[test]
fn cpus_that_others_were_given_are_never_used_and_named() {
    let mut place = Place::new("0-3", "0-1", None);
    place.reserved = [(CpuId(0), "given to container db".to_owned())].into();
    let claim = claim::shared(&place.site()).expect("claim");
    assert_eq!(claim.cpu(), CpuId(1));
    place.reserved.insert(CpuId(1), "given to web".to_owned());
    let error = claim::dedicated(&place.site())
        .expect_err("none")
        .to_string();
    assert!(
        error.contains("CPU 0 is given to container db") && error.contains("CPU 1 is given to web"),
        "{error}"
    );
}
