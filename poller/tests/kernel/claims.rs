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
