//! A container's cgroup: its statistics in the messages that containerd expects, and what happens when memory runs out.

mod files;
mod oom;
mod v1;
mod v2;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::protobuf::well_known_types::any::Any;

pub use oom::OomWatch;

use super::error::{Error, Result};
use super::events::pack;

/// Where cgroups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";

/// The cgroup of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cgroup {
    /// Version 1 (also as part of the hybrid layout): a directory for every controller that has one.
    V1(HashMap<String, PathBuf>),
    /// Version 2: one directory.
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroup that process `pid` is in now.
    pub fn of_process(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/cgroup");
        let table = fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
        let mount = Path::new(MOUNT);
        Self::parse(&table, mount, mount.join("cgroup.controllers").exists()).ok_or_else(|| {
            Error::Malformed {
                path: path.into(),
                detail: "no cgroup with a directory".to_owned(),
            }
        })
    }

    /// From the text of /proc/PID/cgroup (cgroups(7)): `number:controller,…:path`, version 2 with number 0.
    fn parse(table: &str, mount: &Path, unified: bool) -> Option<Self> {
        let lines = table.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            Some((
                fields.next()?,
                fields.next()?,
                fields.next()?.trim_start_matches('/'),
            ))
        });
        if unified {
            let (.., path) = lines.into_iter().find(|(number, ..)| *number == "0")?;
            return Some(Self::V2(mount.join(path)));
        }
        let mut directories = HashMap::new();
        for (_, controllers, path) in lines {
            for controller in controllers
                .split(',')
                .filter(|name| !name.is_empty() && !name.contains('='))
            {
                directories.insert(controller.to_owned(), mount.join(controller).join(path));
            }
        }
        (!directories.is_empty()).then_some(Self::V1(directories))
    }

    /// Its processes and those of cgroups below it, at most `limit`; None where it is not a container's alone: the root, or one
    /// that `other` is in as well.
    pub fn processes(&self, other: &Self, limit: usize) -> Option<Vec<u32>> {
        let own = self.directory()?;
        let shared = other.directory().is_none_or(|other| other.starts_with(own));
        let is_root = !own.parent()?.join("cgroup.procs").exists();
        if shared || is_root {
            return None;
        }
        let mut processes = Vec::new();
        let mut directories = vec![own.to_owned()];
        while let Some(directory) = directories.pop() {
            // One that goes meanwhile has no processes any more.
            let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            processes.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
            if processes.len() >= limit {
                break;
            }
            let below = fs::read_dir(&directory).into_iter().flatten().flatten();
            directories.extend(
                below
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path()),
            );
        }
        processes.truncate(limit);
        Some(processes)
    }

    /// Whether process `pid` is in it, or in one below it.
    pub fn contains(&self, pid: u32) -> bool {
        let of = Self::of_process(pid).ok();
        let directories = of.as_ref().and_then(Self::directory).zip(self.directory());
        directories.is_some_and(|(of, own)| of.starts_with(own))
    }

    /// CPU time of all that has ever run in it; None where the kernel does not count that.
    pub fn cpu_time(&self) -> Option<Duration> {
        match self {
            Self::V1(directories) => {
                let file = directories.get("cpuacct")?.join("cpuacct.usage");
                let nanoseconds = fs::read_to_string(file).ok()?.trim().parse().ok()?;
                Some(Duration::from_nanos(nanoseconds))
            }
            Self::V2(directory) => {
                let stat = fs::read_to_string(directory.join("cpu.stat")).ok()?;
                let mut lines = stat.lines();
                let value = lines.find_map(|line| line.strip_prefix("usage_usec "))?;
                Some(Duration::from_micros(value.trim().parse().ok()?))
            }
        }
    }

    /// Where its processes are listed.
    fn directory(&self) -> Option<&Path> {
        match self {
            Self::V1(directories) => ["cpu", "pids", "memory", "freezer"]
                .iter()
                .find_map(|name| directories.get(*name))
                .map(PathBuf::as_path),
            Self::V2(directory) => Some(directory),
        }
    }

    /// Statistics: `io.containerd.cgroups.v1.Metrics` or `…v2.Metrics`.
    pub fn stats(&self) -> Result<Any> {
        let packed = match self {
            Self::V1(directories) => {
                let metrics = v1::metrics(directories)
                    .map_err(Error::io("read the statistics of a cgroup"))?;
                pack("io.containerd.cgroups.v1.Metrics", &metrics)
            }
            Self::V2(directory) => {
                let what = || format!("read the statistics of cgroup {}", directory.display());
                if !directory.exists() {
                    return Err(Error::NotFound("cgroup does not exist".to_owned()));
                }
                let metrics = v2::metrics(directory).map_err(Error::io(what()))?;
                pack("io.containerd.cgroups.v2.Metrics", &metrics)
            }
        };
        packed.map_err(|error| {
            Error::io("encode the statistics of a cgroup")(io::Error::other(error))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_has_a_directory_for_every_controller() {
        let table = "9:name=systemd:/a\n4:memory:/default/t1\n2:cpu,cpuacct:/default/t1\n0::/\n";
        let Some(Cgroup::V1(directories)) = Cgroup::parse(table, Path::new("/c"), false) else {
            panic!("not v1")
        };
        assert_eq!(directories.len(), 3);
        assert_eq!(directories["memory"], Path::new("/c/memory/default/t1"));
        assert_eq!(directories["cpuacct"], Path::new("/c/cpuacct/default/t1"));
    }

    #[test]
    fn version_2_has_one() {
        let table = "0::/system.slice/x.scope\n";
        let found = Cgroup::parse(table, Path::new("/c"), true);
        assert_eq!(found, Some(Cgroup::V2("/c/system.slice/x.scope".into())));
        assert_eq!(Cgroup::parse("", Path::new("/c"), true), None);
        assert_eq!(Cgroup::parse(table, Path::new("/c"), false), None);
    }

    #[test]
    fn cpu_time_is_read_in_either_version() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().to_owned();
        let v1 = Cgroup::V1(HashMap::from([("cpuacct".to_owned(), path.clone())]));
        let v2 = Cgroup::V2(path.clone());
        assert_eq!((v1.cpu_time(), v2.cpu_time()), (None, None));
        fs::write(path.join("cpuacct.usage"), "1500000\n").expect("write");
        fs::write(path.join("cpu.stat"), "usage_usec 2500\nuser_usec 1\n").expect("write");
        assert_eq!(v1.cpu_time(), Some(Duration::from_micros(1500)));
        assert_eq!(v2.cpu_time(), Some(Duration::from_micros(2500)));
    }

    #[test]
    fn processes_are_those_of_the_tree_unless_it_is_the_other_s_too() {
        let dir = tempfile::tempdir().expect("tempdir");
        let below = dir.path().join("a/below");
        fs::create_dir_all(&below).expect("mkdir");
        fs::write(dir.path().join("a/cgroup.procs"), "1\n2\n").expect("write");
        fs::write(below.join("cgroup.procs"), "3\n").expect("write");
        fs::write(dir.path().join("cgroup.procs"), "9\n").expect("write");
        let cgroup = |name: &str| Cgroup::V2(dir.path().join(name));
        let (a, other) = (cgroup("a"), cgroup("other"));
        assert_eq!(a.processes(&other, 10), Some(vec![1, 2, 3]));
        assert_eq!(a.processes(&other, 1), Some(vec![1]));
        assert_eq!(a.processes(&cgroup("a/below"), 10), None);
        assert_eq!(Cgroup::V2(dir.path().into()).processes(&other, 10), None);
        assert_eq!(other.processes(&a, 10), Some(Vec::new()));
    }

    #[test]
    fn the_test_s_own_cgroup_is_found_and_has_processes() {
        let cgroup = Cgroup::of_process(std::process::id()).expect("a cgroup");
        let any = cgroup.stats().expect("statistics");
        assert!(
            any.type_url.starts_with("io.containerd.cgroups.v"),
            "{}",
            any.type_url
        );
    }
}
