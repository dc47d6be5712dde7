//! CPU topology: which CPUs exist, are online, isolated, siblings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::sys::read_text;
use crate::{CpuId, CpuSet, Error, Result, process};

/// What the machine says about its CPUs, read once from a sysfs root (`/sys`, or a tree made by a test).
#[derive(Debug, Clone)]
pub struct Topology {
    /// CPUs that are online.
    pub online: CpuSet,
    /// CPUs that the scheduler's balancing leaves alone (`isolcpus=`, `/sys/devices/system/cpu/isolated`).
    pub isolated: CpuSet,
    /// CPUs without a periodic tick (`nohz_full=`).
    pub nohz_full: CpuSet,
    places: BTreeMap<CpuId, Place>,
}

/// Where an online CPU sits.
#[derive(Debug, Clone)]
struct Place {
    siblings: CpuSet,
    node: u32,
}

impl Topology {
    /// Reads the machine's topology below `/sys`.
    pub fn read() -> Result<Self> {
        Self::read_from(Path::new("/sys"))
    }

    /// Reads a topology below another root.
    pub fn read_from(sys: &Path) -> Result<Self> {
        let system = sys.join("devices/system");
        let cpus = system.join("cpu");
        let online = read_set(cpus.join("online"))?.ok_or_else(|| Error::NotFound {
            what: format!("list of online CPUs {}", cpus.join("online").display()),
        })?;
        let nodes = read_nodes(&system.join("node"))?;
        let mut places = BTreeMap::new();
        for cpu in online.iter() {
            let siblings = read_set(cpus.join(format!("cpu{cpu}/topology/thread_siblings_list")))?;
            // A CPU that the kernel tells nothing of is alone.
            let siblings = siblings.unwrap_or_else(|| [cpu].into_iter().collect());
            let node = nodes
                .iter()
                .find(|(_, cpus)| cpus.contains(cpu))
                .map_or(0, |(id, _)| *id);
            places.insert(cpu, Place { siblings, node });
        }
        Ok(Self {
            isolated: read_set(cpus.join("isolated"))?.unwrap_or_default(),
            nohz_full: read_set(cpus.join("nohz_full"))?.unwrap_or_default(),
            online,
            places,
        })
    }

    /// SMT siblings of `cpu`, itself included; `Invalid` when it is not online.
    pub fn siblings(&self, cpu: CpuId) -> Result<CpuSet> {
        Ok(self.place(cpu)?.siblings.clone())
    }

    /// NUMA node of `cpu`; 0 where there is none. `Invalid` when the CPU is not online.
    pub fn numa_node(&self, cpu: CpuId) -> Result<u32> {
        Ok(self.place(cpu)?.node)
    }

    fn place(&self, cpu: CpuId) -> Result<&Place> {
        self.places.get(&cpu).ok_or_else(|| Error::Invalid {
            name: "CPU",
            value: cpu.to_string(),
            expected: format!("one that is online: {}", self.online),
        })
    }
}

/// A CPU list from a file; None where there is no such file, since not every kernel has every list.
fn read_set(path: PathBuf) -> Result<Option<CpuSet>> {
    match read_text(&path) {
        // `nohz_full` says this when the kernel could have such CPUs but was not told any.
        Ok(text) if text.trim() == "(null)" => Ok(Some(CpuSet::default())),
        Ok(text) => text
            .parse::<CpuSet>()
            .map(Some)
            .map_err(|error| Error::Protocol {
                what: format!("read {}", path.display()),
                detail: error.to_string(),
            }),
        Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// NUMA nodes and their CPUs; none on a kernel without NUMA.
fn read_nodes(root: &Path) -> Result<Vec<(u32, CpuSet)>> {
    let file_error = |source| Error::File {
        path: root.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(file_error(source)),
    };
    let mut nodes = Vec::new();
    for entry in entries {
        let entry = entry.map_err(file_error)?;
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("node")?.parse().ok());
        if let Some(id) = number {
            nodes.push((
                id,
                read_set(entry.path().join("cpulist"))?.unwrap_or_default(),
            ));
        }
    }
    Ok(nodes)
}

/// CPUs that the calling thread may run on now: its cpuset and its affinity.
pub fn allowed() -> Result<CpuSet> {
    process::affinity(0)
}

/// CPUs to which the calling process could pin a thread: its cpuset, whatever its present affinity.
pub fn usable() -> Result<CpuSet> {
    let online = Topology::read()?.online;
    let allowed = allowed()?;
    if allowed == online {
        return Ok(allowed);
    }
    // The kernel tells the cpuset nowhere in one line, but cuts every affinity down to it: try on a thread of our own.
    let tried = std::thread::Builder::new()
        .name("cpus".to_owned())
        .spawn(move || {
            process::set_affinity(0, &online)?;
            process::affinity(0)
        });
    let thread = tried.map_err(|source| Error::Syscall {
        what: "start a thread to learn the usable CPUs".to_owned(),
        source,
    })?;
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs tree with these files, gone with the guard.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("temporary directory");
        for (path, text) in files {
            let path = root.path().join("devices/system").join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("directory");
            std::fs::write(path, text).expect("file");
        }
        root
    }

    fn set(text: &str) -> CpuSet {
        text.parse().expect("a CPU list")
    }

    #[test]
    fn two_nodes_with_siblings_isolation_and_an_offline_cpu() {
        let root = tree(&[
            ("cpu/online", "0-2,4-7\n"),
            ("cpu/isolated", "6-7\n"),
            ("cpu/nohz_full", "7\n"),
            ("cpu/cpu0/topology/thread_siblings_list", "0,4\n"),
            ("cpu/cpu1/topology/thread_siblings_list", "1,5\n"),
            ("cpu/cpu2/topology/thread_siblings_list", "2,6\n"),
            ("cpu/cpu4/topology/thread_siblings_list", "0,4\n"),
            ("cpu/cpu5/topology/thread_siblings_list", "1,5\n"),
            ("cpu/cpu6/topology/thread_siblings_list", "2,6\n"),
            ("cpu/cpu7/topology/thread_siblings_list", "7\n"),
            ("node/node0/cpulist", "0-1,4-5\n"),
            ("node/node1/cpulist", "2-3,6-7\n"),
            ("node/has_cpu", "0-1\n"),
        ]);
        let topology = Topology::read_from(root.path()).expect("topology");
        assert_eq!(topology.online, set("0-2,4-7"));
        assert_eq!(topology.isolated, set("6-7"));
        assert_eq!(topology.nohz_full, set("7"));
        assert_eq!(topology.siblings(CpuId(4)).expect("siblings"), set("0,4"));
        assert_eq!(topology.siblings(CpuId(7)).expect("siblings"), set("7"));
        assert_eq!(topology.numa_node(CpuId(5)).expect("node"), 0);
        assert_eq!(topology.numa_node(CpuId(6)).expect("node"), 1);
        let error = topology
            .siblings(CpuId(3))
            .expect_err("offline")
            .to_string();
        assert!(
            error.contains("\"3\"") && error.contains("0-2,4-7"),
            "{error}"
        );
        assert!(topology.numa_node(CpuId(99)).is_err());
    }

    #[test]
    fn a_kernel_that_tells_little_has_lone_cpus_on_node_0() {
        let root = tree(&[
            ("cpu/online", "0-1\n"),
            ("cpu/isolated", "\n"),
            ("cpu/nohz_full", "  (null)\n"),
        ]);
        let topology = Topology::read_from(root.path()).expect("topology");
        assert!(topology.isolated.is_empty() && topology.nohz_full.is_empty());
        assert_eq!(topology.siblings(CpuId(1)).expect("siblings"), set("1"));
        assert_eq!(topology.numa_node(CpuId(1)).expect("node"), 0);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let root = tree(&[]);
        let error = Topology::read_from(root.path())
            .expect_err("no tree")
            .to_string();
        assert!(error.contains("devices/system/cpu/online"), "{error}");
        let root = tree(&[("cpu/online", "0-1\n"), ("cpu/isolated", "some\n")]);
        let error = Topology::read_from(root.path())
            .expect_err("malformed")
            .to_string();
        assert!(
            error.contains("cpu/isolated") && error.contains("some"),
            "{error}"
        );
    }

    #[test]
    fn this_machine_is_consistent() {
        let topology = Topology::read().expect("topology");
        let allowed = allowed().expect("allowed");
        let usable = usable().expect("usable");
        assert!(allowed.is_subset(&usable) && usable.is_subset(&topology.online));
        for cpu in topology.online.iter() {
            assert!(topology.siblings(cpu).expect("siblings").contains(cpu));
            topology.numa_node(cpu).expect("node");
        }
    }

    #[test]
    fn usable_cpus_are_more_than_the_present_affinity() {
        std::thread::spawn(|| {
            let before = usable().expect("usable");
            let one = before.iter().next().expect("a CPU");
            process::set_affinity(0, &[one].into_iter().collect()).expect("pin");
            assert_eq!(allowed().expect("allowed").len(), 1);
            assert_eq!(usable().expect("usable"), before);
            assert_eq!(
                allowed().expect("allowed").len(),
                1,
                "asking changes nothing"
            );
        })
        .join()
        .expect("thread");
    }
}
