//! CPUs of the pool, claimed with flock()ed files in `<state_dir>/cpu/`.
//!
//! A dedicated worker holds the file of its CPU exclusively, shared ones together. The kernel drops the lock of a
//! process that dies, so a crash releases its claims; the file is removed by whoever holds it alone.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kbp_kernel::cpu::Topology;
use kbp_kernel::{CpuId, CpuSet};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::policy::WorkerPolicy;
use crate::state::{self, PodState};
use crate::{Error, Result};

/// Who releases a claim holds its file alone for a moment, and a child that was forked just then holds it until it has
/// become its own program: so a refusal counts only when it is still one a moment later.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(5);

/// A CPU of the pool that is held until this is dropped.
#[derive(Debug)]
pub struct Claim {
    cpu: CpuId,
    path: PathBuf,
    lock: Flock<File>,
}

impl Claim {
    /// The CPU.
    pub fn cpu(&self) -> CpuId {
        self.cpu
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Only who holds the lock alone may unlink: others would go on holding a file that nobody can find any more.
        if self.lock.relock(FlockArg::LockExclusiveNonblock).is_ok()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "could not remove a CPU claim");
        }
    }
}

/// Where a worker is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// Directory of state and claims.
    pub state_dir: &'a Path,
    /// CPUs that may be claimed.
    pub pool: &'a CpuSet,
    /// The file that sets the pool, for messages.
    pub config: &'a Path,
    /// The machine.
    pub topology: &'a Topology,
    /// CPUs that this process may use: its own cpuset limits where its workers can be.
    pub usable: &'a CpuSet,
    /// The pod's own cpuset.
    pub cpuset: Option<&'a CpuSet>,
    /// Every pod that is attached now.
    pub pods: &'a [PodState],
    /// CPUs of the pool that somebody else was given, and by whom.
    pub reserved: &'a BTreeMap<CpuId, String>,
    /// Packets a second that the workers of this process see on a CPU.
    pub load: &'a BTreeMap<CpuId, u64>,
}

/// Loads that differ by less than this many packets a second count as the same: then the number of workers decides, so that
/// pods which are silent as yet spread as well.
const LOAD_STEP: u64 = 10_000;

/// Claims a CPU of the pool for one worker alone. Best are CPUs outside the pod's cpuset, whose SMT siblings do
/// nothing for kbp or the pod, on the pod's NUMA node.
pub fn dedicated(site: &Site<'_>) -> Result<Claim> {
    claim(site, FlockArg::LockExclusiveNonblock, "dedicated", |cpu| {
        (
            site.in_cpuset(cpu),
            site.busy_siblings(cpu),
            site.is_far(cpu),
            cpu,
        )
    })
}

/// Claims a CPU of the pool together with other shared workers: the one with the least load; among equals one on the pod's
/// NUMA node, outside its cpuset, with the fewest pods, whose SMT siblings do nothing for kbp or the pod.
pub fn shared(site: &Site<'_>) -> Result<Claim> {
    claim(site, FlockArg::LockSharedNonblock, "shared", |cpu| {
        (
            site.load.get(&cpu).copied().unwrap_or(0) / LOAD_STEP,
            site.is_far(cpu),
            site.in_cpuset(cpu),
            site.workers_on(cpu),
            site.busy_siblings(cpu),
            cpu,
        )
    })
}

/// Claims this CPU of the pool together with other shared workers.
pub(crate) fn shared_on(site: &Site<'_>, cpu: CpuId) -> Result<Claim> {
    let pool: CpuSet = [cpu]
        .into_iter()
        .filter(|c| site.pool.contains(*c))
        .collect();
    let narrow = Site {
        pool: &pool,
        ..*site
    };
    shared(&narrow)
}

/// Removes claim files that nobody holds, as a killed process leaves them behind.
pub fn sweep(state_dir: &Path) -> Result<()> {
    let dir = claims_dir(state_dir);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(format!("read directory {}", dir.display()), e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(format!("read directory {}", dir.display()), e))?;
        let Some(cpu) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // Dropping an exclusive claim removes its file.
        drop(take(&dir, CpuId(cpu), FlockArg::LockExclusiveNonblock)?);
    }
    Ok(())
}

impl Site<'_> {
    /// Workers of the pool on `cpu`; idle-class ones do not count, they give way.
    fn workers_on(&self, cpu: CpuId) -> usize {
        self.pool_workers().filter(|(c, _)| *c == cpu).count()
    }

    fn pool_workers(&self) -> impl Iterator<Item = (CpuId, &PodState)> {
        self.pods.iter().filter_map(|pod| {
            let worker = pod.worker.as_ref()?;
            let on_pool = matches!(
                worker.policy,
                WorkerPolicy::Dedicated | WorkerPolicy::Shared
            );
            on_pool.then_some((CpuId(worker.cpu), pod))
        })
    }

    fn in_cpuset(&self, cpu: CpuId) -> bool {
        self.cpuset.is_some_and(|c| c.contains(cpu))
    }

    fn busy_siblings(&self, cpu: CpuId) -> usize {
        // A machine that does not tell its siblings has none to avoid.
        let siblings = self.topology.siblings(cpu).unwrap_or_default();
        siblings
            .iter()
            .filter(|s| *s != cpu && (self.in_cpuset(*s) || self.workers_on(*s) > 0))
            .count()
    }

    /// Whether `cpu` is on another NUMA node than all of the pod's CPUs.
    fn is_far(&self, cpu: CpuId) -> bool {
        let node = |c| self.topology.numa_node(c).ok();
        match self.cpuset {
            Some(cpuset) if !cpuset.is_empty() => !cpuset.iter().any(|c| node(c) == node(cpu)),
            _ => false,
        }
    }
}

fn claim<K: Ord>(
    site: &Site<'_>,
    how: FlockArg,
    kind: &'static str,
    rank: impl Fn(CpuId) -> K,
) -> Result<Claim> {
    if site.pool.is_empty() {
        return Err(Error::NoPool {
            kind,
            config: site.config.display().to_string(),
        });
    }
    let dir = claims_dir(site.state_dir);
    state::create_dir(&dir)?;
    let mut candidates: Vec<CpuId> = site
        .pool
        .iter()
        .filter(|c| site.usable.contains(*c) && !site.reserved.contains_key(c))
        .collect();
    candidates.sort_by_key(|c| rank(*c));
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(PAUSE);
        }
        for cpu in &candidates {
            if let Some(claim) = take(&dir, *cpu, how)? {
                return Ok(claim);
            }
        }
    }
    Err(Error::NoFreeCpu {
        kind,
        pool: site.pool.to_string(),
        config: site.config.display().to_string(),
        holders: holders(site),
    })
}

/// Why each CPU of the pool is not to be had.
fn holders(site: &Site<'_>) -> String {
    let mut names: BTreeMap<CpuId, Vec<String>> = BTreeMap::new();
    for (cpu, pod) in site.pool_workers() {
        let holders = names.entry(cpu).or_default();
        holders.push(format!("{}/{}", pod.namespace, pod.id));
    }
    let each = site.pool.iter().map(|cpu| {
        if !site.topology.online.contains(cpu) {
            return format!("CPU {cpu} is offline");
        }
        if !site.usable.contains(cpu) {
            return format!(
                "CPU {cpu} is outside the cpuset of this process ({})",
                site.usable
            );
        }
        if let Some(by) = site.reserved.get(&cpu) {
            return format!("CPU {cpu} is {by}");
        }
        match names.get(&cpu) {
            Some(pods) => format!("CPU {cpu} is held by {}", pods.join(", ")),
            // The lock is there before the state file.
            None => format!("CPU {cpu} is held by a pod that is just being attached"),
        }
    });
    each.collect::<Vec<_>>().join("; ")
}

fn claims_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("cpu")
}

/// Tries to lock the file of one CPU; None when somebody else holds it.
fn take(dir: &Path, cpu: CpuId, how: FlockArg) -> Result<Option<Claim>> {
    let path = dir.join(cpu.to_string());
    let failed = |what: &str, e: io::Error| Error::io(format!("{what} {}", path.display()), e);
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| failed("open CPU claim", e))?;
        let opened = file.metadata().map_err(|e| failed("read CPU claim", e))?;
        let lock = match Flock::lock(file, how) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(failed("lock CPU claim", errno.into())),
        };
        // Its last holder may have removed the file between the opening and the locking: then this lock is on a file
        // that nobody else can see, and the next one would be given the same CPU.
        match fs::metadata(&path) {
            Ok(now) if (now.dev(), now.ino()) == (opened.dev(), opened.ino()) => {
                return Ok(Some(Claim { cpu, path, lock }));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("read CPU claim", e)),
        }
    }
}
