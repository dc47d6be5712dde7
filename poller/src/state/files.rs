//! The files of the states: `<state_dir>/pods/<id>@<namespace>.json`, written by rename, mode 0600.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kbp_kernel::{CpuSet, IfIndex};
use serde::Serialize;

use super::{PodState, Stale, lock, start_time, taken_by};
use crate::{Error, Result};

/// Bytes of the longest id and of the longest namespace: a file name carries both, and 255 bytes at most. containerd's have
/// up to 76.
const MAX_ID: usize = 110;

/// Every pod's state below `state_dir`, by id. A file whose owner is gone is left out (and reported by [`stale`]).
pub fn read_all(state_dir: &Path) -> Result<Vec<PodState>> {
    Ok(scan(state_dir, &|_| false)?.0)
}

/// [`read_all`], where `known` are the states of this process' own pods: their files are not read again, which for
/// hundreds of pods is most of the work.
pub(crate) fn read_all_beside(state_dir: &Path, known: Vec<PodState>) -> Result<Vec<PodState>> {
    let names: BTreeSet<String> = known
        .iter()
        .map(|pod| file_name(&pod.namespace, &pod.id))
        .collect();
    let mut pods = scan(state_dir, &|name| names.contains(name))?.0;
    pods.extend(known);
    Ok(pods)
}

/// Whether packets for the pod of this host end pass by its NAPI, as whoever keeps the pod says.
pub fn takes_short_way(state_dir: &Path, host_end: IfIndex) -> bool {
    let pods = read_all(state_dir).unwrap_or_default();
    pods.iter().any(|pod| {
        pod.short_way.is_some() && pod.interfaces.iter().any(|i| i.host_ifindex == host_end.0)
    })
}

/// State files whose owner is gone, or that cannot be read as what they should be.
pub fn stale(state_dir: &Path) -> Result<Vec<Stale>> {
    Ok(scan(state_dir, &|_| false)?.1)
}

/// CPUs that other pods than this one hold: in a cpuset that is a real part of `online`, or by a dedicated worker.
pub fn taken_cpus(state_dir: &Path, namespace: &str, id: &str, online: &CpuSet) -> Result<CpuSet> {
    let mut pods = read_all(state_dir)?;
    pods.retain(|pod| !pod.is(namespace, id));
    Ok(taken_by(&pods, online))
}
/// Writes or replaces one pod's file.
pub fn write(state_dir: &Path, state: &PodState) -> Result<()> {
    let path = file_of(state_dir, &state.namespace, &state.id)?;
    let pods = pods_dir(state_dir);
    create_dir(&pods)?;
    // A leading dot keeps the half-written file out of `scan`; the owner's pid keeps two owners apart.
    let temporary = pods.join(format!(
        ".{}@{}.{}.tmp",
        state.id,
        state.namespace,
        std::process::id()
    ));
    replace(&path, &temporary, state)
}

/// Writes a state to `temporary` and gives that the name `path`, so that nobody reads half of it.
pub(crate) fn replace(path: &Path, temporary: &Path, state: &impl Serialize) -> Result<()> {
    let written = write_file(temporary, state).and_then(|()| fs::rename(temporary, path));
    written.map_err(|source| {
        // Best effort: the write is what failed, and it is reported.
        let _ = fs::remove_file(temporary);
        Error::io(format!("write state file {}", path.display()), source)
    })
}

/// Removes the half-written files of processes that are gone: one that is killed in the middle of [`write()`] leaves its own.
pub(crate) fn sweep_unfinished(state_dir: &Path) -> Result<()> {
    let pods = pods_dir(state_dir);
    let entries = match fs::read_dir(&pods) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::io(format!("read {}", pods.display()), source)),
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix('.')?.strip_suffix(".tmp"))
            .and_then(|name| name.rsplit_once('.')?.1.parse::<u32>().ok());
        if owner.is_some_and(|pid| start_time(pid).is_none()) {
            // Others sweep as well, and it may be gone.
            remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Refuses names that cannot be those of files.
pub(crate) fn check_names(namespace: &str, id: &str) -> Result<()> {
    file_of(Path::new("/"), namespace, id).map(drop)
}

/// Removes one pod's file; fine when it is not there.
pub fn remove(state_dir: &Path, namespace: &str, id: &str) -> Result<()> {
    remove_file(&file_of(state_dir, namespace, id)?)
}

/// Removes one pod's file if this process owns it: whoever took the pod over has written its own in its place.
pub(crate) fn remove_own(state_dir: &Path, namespace: &str, id: &str) -> Result<()> {
    let path = file_of(state_dir, namespace, id)?;
    let _lock = lock(state_dir);
    let owner = fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<PodState>(&text).ok())
        .map(|state| state.owner_pid);
    match owner {
        Some(owner) if owner != std::process::id() => Ok(()),
        _ => remove_file(&path),
    }
}

/// What a stale file says, where it can be read.
pub(crate) fn read_stale(state_dir: &Path, stale: &Stale) -> Option<PodState> {
    let text = fs::read(pods_dir(state_dir).join(&stale.file)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Removes a stale file; fine when it is not there.
pub(crate) fn remove_stale(state_dir: &Path, stale: &Stale) -> Result<()> {
    remove_file(&pods_dir(state_dir).join(&stale.file))
}

/// Removes a state's file; fine when it is not there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(
            format!("remove state file {}", path.display()),
            e,
        )),
        _ => Ok(()),
    }
}

/// Makes `dir` with its parents, for root only. An existing one keeps its mode.
pub(crate) fn create_dir(dir: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| Error::io(format!("make directory {}", dir.display()), e))
}

/// Where the files of the pods are.
pub(crate) fn pods_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("pods")
}

/// The file of a pod. Names come from outside, and one with a slash would lead to another place.
fn file_of(state_dir: &Path, namespace: &str, id: &str) -> Result<PathBuf> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    for (key, name) in [("id", id), ("namespace", namespace)] {
        if name.is_empty()
            || name.len() > MAX_ID
            || name.starts_with('.')
            || !name.bytes().all(plain)
        {
            return Err(Error::InvalidValue {
                origin: "attach".to_owned(),
                key: key.to_owned(),
                value: name.to_owned(),
                allowed: format!(
                    "1 to {MAX_ID} letters, digits, dots, dashes and underscores, not starting with a dot"
                ),
            });
        }
    }
    Ok(pods_dir(state_dir).join(file_name(namespace, id)))
}

fn file_name(namespace: &str, id: &str) -> String {
    format!("{id}@{namespace}.json")
}

/// Writes a state to a file of root's alone.
fn write_file(path: &Path, state: &impl Serialize) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    let mut text = serde_json::to_vec_pretty(state)?;
    text.push(b'\n');
    file.write_all(&text)
}

fn scan(state_dir: &Path, is_known: &dyn Fn(&str) -> bool) -> Result<(Vec<PodState>, Vec<Stale>)> {
    let (mut live, mut stale) = (Vec::new(), Vec::new());
    let dir = pods_dir(state_dir);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((live, stale)),
        Err(e) => return Err(Error::io(format!("read directory {}", dir.display()), e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(format!("read directory {}", dir.display()), e))?;
        paths.push(entry.path());
    }
    paths.sort();
    for path in paths {
        let Some(file) = name_of(&path).filter(|name| !is_known(name)) else {
            continue;
        };
        let text = match fs::read(&path) {
            Ok(text) => text,
            // The pod went away between the listing and the reading.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            // One file that cannot be read must not hide the others.
            Err(e) => {
                stale.push(Stale {
                    file,
                    reason: format!("it cannot be read: {e}"),
                    owner_gone: false,
                });
                continue;
            }
        };
        match serde_json::from_slice::<PodState>(&text) {
            Ok(state) if state.owner_lives() => live.push(state),
            Ok(state) => stale.push(Stale {
                file,
                reason: format!("its owner, process {}, is gone", state.owner_pid),
                owner_gone: true,
            }),
            Err(e) => stale.push(Stale {
                file,
                reason: format!("not a state file of this version: {e}"),
                owner_gone: false,
            }),
        }
    }
    Ok((live, stale))
}

fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    (path.extension() == Some(OsStr::new("json")) && !name.starts_with('.'))
        .then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::{Degraded, Part, SocketCounters, WorkerState};
    use super::*;
    use crate::policy::{Profile, WorkerPolicy};

    fn pod(id: &str) -> PodState {
        PodState {
            id: id.to_owned(),
            namespace: "test".to_owned(),
            owner_pid: std::process::id(),
            owner_start: start_time(std::process::id()).expect("this process has started"),
            worker_policy: WorkerPolicy::Auto,
            profile: Profile::Latency,
            interfaces: Vec::new(),
            worker: None,
            worker_reason: "none".to_owned(),
            busy_poll_us: Some(20),
            busy_poll_reason: "auto".to_owned(),
            busy_poll_mode: Default::default(),
            prefer_busy_poll: false,
            sockets: SocketCounters::default(),
            cpuset: None,
            short_way: None,
            rests: false,
            degraded: vec![Degraded {
                part: Part::Worker,
                reason: "why".to_owned(),
            }],
        }
    }

    #[test]
    fn half_written_files_of_the_dead_are_removed_and_no_others() {
        let dir = tempfile::tempdir().expect("tempdir");
        sweep_unfinished(dir.path()).expect("nothing there");
        let pods = pods_dir(dir.path());
        fs::create_dir_all(&pods).expect("mkdir");
        let mut child = std::process::Command::new("true").spawn().expect("true");
        let dead = child.id();
        child.wait().expect("wait");
        let kept = [
            format!(".a@test.{}.tmp", std::process::id()),
            ".a@test.x.tmp".to_owned(),
            format!("a@test.{dead}.tmp"),
        ];
        for name in kept.iter().chain([&format!(".a@test.{dead}.tmp")]) {
            fs::write(pods.join(name), "").expect("write");
        }
        sweep_unfinished(dir.path()).expect("sweep");
        let left: BTreeSet<String> = fs::read_dir(&pods)
            .expect("read")
            .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
            .collect();
        assert_eq!(left, BTreeSet::from(kept));
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("metadata").permissions().mode() & 0o777
    }

    #[test]
    fn a_state_file_is_private_and_comes_back_as_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().join("run/kbp");
        let mut state = pod("a.b-c_1");
        write(&root, &state).expect("write");
        state.busy_poll_us = None;
        write(&root, &state).expect("replace");

        assert_eq!(mode(&root), 0o700);
        assert_eq!(mode(&root.join("pods")), 0o700);
        assert_eq!(mode(&root.join("pods/a.b-c_1@test.json")), 0o600);
        assert_eq!(
            fs::read_dir(root.join("pods")).expect("list").count(),
            1,
            "no temporary file stays"
        );
        assert_eq!(read_all(&root).expect("read"), [state]);
        assert_eq!(stale(&root).expect("stale"), []);

        remove(&root, "test", "a.b-c_1").expect("remove");
        remove(&root, "test", "a.b-c_1").expect("removing twice is fine");
        assert_eq!(read_all(&root).expect("read"), []);
    }

    #[test]
    fn an_id_is_one_pods_in_its_namespace_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (here, mut there) = (pod("c"), pod("c"));
        there.namespace = "other".to_owned();
        write(dir.path(), &here).expect("write");
        write(dir.path(), &there).expect("write");
        assert_eq!(read_all(dir.path()).expect("read").len(), 2);
        remove(dir.path(), "test", "c").expect("remove");
        assert_eq!(read_all(dir.path()).expect("read"), [there]);
    }

    #[test]
    fn files_of_dead_owners_and_foreign_files_are_stale() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut dead = pod("dead");
        // Same pid, but it started at another time: the id was used again.
        dead.owner_start += 1;
        write(dir.path(), &dead).expect("write");
        fs::write(dir.path().join("pods/broken.json"), "{").expect("write");
        fs::write(dir.path().join("pods/notes.txt"), "mine").expect("write");
        fs::create_dir(dir.path().join("pods/dir.json")).expect("mkdir");

        assert_eq!(read_all(dir.path()).expect("read"), []);
        let stale = stale(dir.path()).expect("stale");
        assert_eq!(
            stale.iter().map(|s| s.file.as_str()).collect::<Vec<_>>(),
            ["broken.json", "dead@test.json", "dir.json"]
        );
        assert!(stale[0].reason.contains("not a state file"), "{stale:?}");
        assert!(
            stale[1].reason.contains(&std::process::id().to_string()),
            "{stale:?}"
        );
        assert!(stale[2].reason.contains("cannot be read"), "{stale:?}");
        assert!(!stale[2].owner_gone, "nobody knows: {stale:?}");
    }

    #[test]
    fn an_id_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().expect("tempdir");
        for id in ["", "../x", "a/b", ".hidden", "a\nb", &"x".repeat(201)] {
            let error = write(dir.path(), &pod(id)).expect_err(id).to_string();
            assert!(error.contains("letters, digits"), "{error}");
            assert!(remove(dir.path(), "test", id).is_err(), "{id}");
            assert!(remove(dir.path(), id, "pod").is_err(), "{id}");
        }
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn no_directory_means_no_pods() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(read_all(&dir.path().join("none")).expect("read"), []);
    }

    #[test]
    fn cpus_are_taken_by_real_cpusets_and_dedicated_workers_of_others() {
        let dir = tempfile::tempdir().expect("tempdir");
        let online: CpuSet = "0-7".parse().expect("online");
        let worker = |policy, cpu| {
            Some(WorkerState {
                kind: "sqpoll".to_owned(),
                policy,
                tid: 1,
                cpu,
                idle_class: false,
                lease_ms: 100,
            })
        };
        for (id, cpuset, worker) in [
            ("own", Some("2-3"), None),
            ("all", Some("0-7"), None),
            ("none", None, worker(WorkerPolicy::Dedicated, 5)),
            ("idle", None, worker(WorkerPolicy::Idle, 6)),
            ("me", Some("1"), worker(WorkerPolicy::Dedicated, 7)),
        ] {
            let mut state = pod(id);
            state.cpuset = cpuset.map(str::to_owned);
            state.worker = worker;
            write(dir.path(), &state).expect("write");
        }
        let taken = taken_cpus(dir.path(), "test", "me", &online).expect("taken");
        assert_eq!(taken.to_string(), "2-3,5");
    }
}
