//! A cgroup in which an idle-class thread is idle towards containers, too.
//!
//! `SCHED_IDLE` makes a thread give way to the threads of its own cgroup only. Between cgroups the weights of the cgroups count, and
//! that of an idle-class thread alone in one is an ordinary weight: it takes its half of a CPU from a container, and is not preempted
//! when the container's thread wakes. Nor is the root cgroup a way out, since the scheduler's autogroups make a group of each session
//! there. What is idle towards everybody is a cgroup at the top with `cpu.idle` set (5.15+). With cgroup v1 a thread can be moved into it
//! alone. With v2 only a process can, so there a worker's thread belongs to a process of its own where its kind allows that
//! ([`wants_own_process`]); else it is looked at whether somebody has put this process into such a cgroup.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use kbp_kernel::process;
use nix::errno::Errno;

/// At the top of the hierarchy; shared by all processes of kbp, and removed by the last.
const NAME: &str = "kbp-idle";

/// Another process may remove the group between two steps; each try takes it microseconds.
const TRIES: u32 = 20;

/// A stay in the idle cgroup; dropping it ends that, and must be done before the thread ends.
#[derive(Debug)]
pub(super) struct IdleStay {
    root: PathBuf,
    /// To which ids are written.
    list: &'static str,
    /// A thread's with version 1, else a process'.
    id: u32,
}

/// What threads are moved with.
const THREADS: &str = "tasks";

/// What processes are moved with.
const PROCESSES: &str = "cgroup.procs";

/// Has thread `tid`, of this process or one of its own, give way to all other cgroups; None where it does already. Else why it will not.
pub(super) fn enter(tid: u32) -> Result<Option<IdleStay>, String> {
    match here()? {
        Mounted::V1(root) => join(&root, THREADS, tid).map(Some),
        Mounted::V2(root) => {
            let Err(reason) = gives_way_as_a_whole(&root) else {
                return Ok(None);
            };
            let process = process::process_of(tid).map_err(|e| e.to_string())?;
            if process == std::process::id() {
                return Err(reason);
            }
            enable_controller(&root)?;
            join(&root, PROCESSES, process).map(Some)
        }
    }
}

/// Whether a worker can give way to all other cgroups only if its thread belongs to a process of its own.
pub(super) fn wants_own_process() -> bool {
    matches!(here(), Ok(Mounted::V2(root)) if gives_way_as_a_whole(&root).is_err())
}

fn read(path: impl AsRef<Path>) -> Result<String, String> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn here() -> Result<Mounted, String> {
    mounted(&read("/proc/self/mountinfo")?)
        .ok_or_else(|| "no cgroup controller cpu is mounted".to_owned())
}

fn gives_way_as_a_whole(root: &Path) -> Result<(), String> {
    let own = read("/proc/self/cgroup")?;
    let autogroups = read("/proc/sys/kernel/sched_autogroup_enabled");
    idle_as_a_whole(root, &own, autogroups.is_ok_and(|on| on.trim() != "0"))
}

/// Has the cgroups at the top of version 2 have weights, as OCI runtimes do for theirs.
fn enable_controller(root: &Path) -> Result<(), String> {
    // The only cgroup that has no type is the machine's root.
    if root.join("cgroup.type").exists() {
        return Err(format!(
            "{} is only a part of the machine's cgroups (a cgroup namespace)",
            root.display()
        ));
    }
    let file = root.join("cgroup.subtree_control");
    if read(&file)?.split_whitespace().any(|c| c == "cpu") {
        return Ok(());
    }
    fs::write(&file, "+cpu").map_err(|e| format!("enable cpu in {}: {e}", file.display()))
}

#[derive(Debug, PartialEq, Eq)]
enum Mounted {
    V1(PathBuf),
    V2(PathBuf),
}

/// Where the controller `cpu` is: a hierarchy of version 1 has it for itself, else it is version 2's.
fn mounted(mountinfo: &str) -> Option<Mounted> {
    let mut v2 = None;
    for line in mountinfo.lines() {
        let Some((place, kind)) = line.split_once(" - ") else {
            continue;
        };
        let mut place = place.split(' ').skip(3);
        let (Some(root), Some(point)) = (place.next(), place.next()) else {
            continue;
        };
        let mut kind = kind.split(' ');
        match (kind.next(), kind.nth(1)) {
            // Only of the whole hierarchy: the top of what a container sees is not idle towards its neighbours.
            (Some("cgroup"), Some(options))
                if root == "/" && options.split(',').any(|o| o == "cpu") =>
            {
                return Some(Mounted::V1(point.into()));
            }
            // Nor is one group that is mounted for itself, as a service has it that may write to no other.
            (Some("cgroup2"), _) if root == "/" => v2 = Some(Mounted::V2(point.into())),
            _ => {}
        }
    }
    v2
}

fn join(root: &Path, list: &'static str, id: u32) -> Result<IdleStay, String> {
    let dir = root.join(NAME);
    let failed = |what: &str, error: Error| format!("{what} {}: {error}", dir.display());
    // The directory vanished meanwhile.
    let gone = |error: &Error| {
        error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
    };
    for _ in 0..TRIES {
        match fs::create_dir(&dir) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed("make", e)),
            _ => {}
        }
        match fs::write(dir.join("cpu.idle"), "1") {
            Ok(()) => {}
            Err(e) if gone(&e) && !dir.exists() => continue,
            Err(e) => {
                let _ = fs::remove_dir(&dir);
                return Err(failed("set cpu.idle (Linux 5.15) of", e));
            }
        }
        match fs::write(dir.join(list), id.to_string()) {
            Ok(()) => {
                return Ok(IdleStay {
                    root: root.to_owned(),
                    list,
                    id,
                });
            }
            Err(e) if gone(&e) && !dir.exists() => {}
            Err(e) => {
                let _ = fs::remove_dir(&dir);
                return Err(failed("move a worker to", e));
            }
        }
    }
    Err(format!(
        "{} vanished {TRIES} times while it was set up",
        dir.display()
    ))
}

/// Whether this process is in a branch that is idle from the top; `own` is its `/proc/PID/cgroup`.
fn idle_as_a_whole(root: &Path, own: &str, autogroups: bool) -> Result<(), String> {
    let path = own.lines().find_map(|l| l.strip_prefix("0::"));
    let path = path.ok_or("this process is in no cgroup of version 2")?;
    let Some(top) = path.split('/').find(|part| !part.is_empty()) else {
        // Of a cgroup namespace the root is anything; of the machine's it has no weight.
        if root.join("cpu.idle").exists() || autogroups {
            return Err(
                "this process is at the root of its cgroup namespace, where threads compete by session"
                    .to_owned(),
            );
        }
        return Ok(());
    };
    let file = root.join(top).join("cpu.idle");
    match fs::read_to_string(&file) {
        Ok(idle) if idle.trim() == "1" => Ok(()),
        _ => Err(format!(
            "cgroup v2 lets no thread be moved alone, and {} is not 1",
            file.display()
        )),
    }
}

impl Drop for IdleStay {
    fn drop(&mut self) {
        // While it is in there, the group cannot be removed; the kernel takes its time to end a thread.
        let _ = fs::write(self.root.join(self.list), self.id.to_string());
        // Busy while other workers use it.
        let _ = fs::remove_dir(self.root.join(NAME));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controller_is_found_where_it_is() {
        let v1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
                  33 31 0:30 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct\n\
                  32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
                  42 31 0:39 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(mounted(v1), Some(Mounted::V1("/sys/fs/cgroup/cpu".into())));
        let joint = v1.replace("rw,cpu\n", "rw,cpu,cpuacct\n");
        assert_eq!(
            mounted(&joint),
            Some(Mounted::V1("/sys/fs/cgroup/cpu".into()))
        );
        // A container's part of the hierarchy is not its top.
        let part = v1.replace("0:29 /", "0:29 /docker/1");
        assert_eq!(
            mounted(&part),
            Some(Mounted::V2("/sys/fs/cgroup/unified".into()))
        );
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mounted(v2), Some(Mounted::V2("/sys/fs/cgroup".into())));
        let and_a_part =
            format!("{v2}31 30 0:26 /kbp-idle /sys/fs/cgroup/kbp-idle rw - cgroup2 cgroup2 rw\n");
        assert_eq!(mounted(&and_a_part), mounted(v2));
        assert_eq!(mounted("1 1 8:1 / / rw - ext4 /dev/sda1 rw\n"), None);
    }

    #[test]
    fn with_version_2_only_the_branch_at_the_top_counts() {
        let root = tempfile::tempdir().expect("directory");
        let group = root.path().join("kbp.slice/kbp-poller.service");
        fs::create_dir_all(&group).expect("groups");
        fs::write(group.join("cpu.idle"), "1\n").expect("write");
        fs::write(root.path().join("kbp.slice/cpu.idle"), "0\n").expect("write");
        let own = "0::/kbp.slice/kbp-poller.service\n";
        let reason = idle_as_a_whole(root.path(), own, true).expect_err("an ordinary slice");
        assert!(reason.contains("kbp.slice/cpu.idle is not 1"), "{reason}");
        fs::write(root.path().join("kbp.slice/cpu.idle"), "1\n").expect("write");
        assert_eq!(idle_as_a_whole(root.path(), own, true), Ok(()));
        // Threads of the root compete one by one unless sessions make groups of them.
        assert_eq!(idle_as_a_whole(root.path(), "0::/\n", false), Ok(()));
        assert!(idle_as_a_whole(root.path(), "0::/\n", true).is_err());
        assert!(idle_as_a_whole(root.path(), "1:cpu:/\n", false).is_err());
    }
}
