//! What a sandbox holds besides what every sandbox holds: before and after, the lists must be the same.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use crate::command::wait_until;
use crate::network::lease_dir;
use crate::{Result, Sandbox};

/// Everything in a sandbox that a container, a shim, a plugin or a poller may leave; one line a thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers {
    found: BTreeSet<String>,
    /// What matters to nobody, by how its line begins.
    tolerated: Option<&'static str>,
}

/// How the line of a shim's socket begins.
const SHIM_SOCKET: &str = "shim socket";

impl Leftovers {
    /// Takes stock. containerd itself, its sockets and its store are not listed.
    pub fn of(sandbox: &Sandbox) -> Result<Self> {
        let mut found = BTreeSet::new();
        links(sandbox, &mut found)?;
        processes(sandbox, &mut found);
        mounts(sandbox, &mut found);
        cgroups(sandbox, &mut found);
        let run = sandbox.dir().join("run");
        for (what, dir) in [
            (SHIM_SOCKET, run.join("containerd/s")),
            ("fifo", run.join("containerd/fifo")),
            ("kbp state", run.join("kbp")),
            ("runc state", run.join("containerd/runc")),
            ("network namespace", run.join("netns")),
            ("lease", lease_dir(sandbox)),
        ] {
            files(what, &dir, &mut found);
        }
        // Bundles are directories, below their containerd namespace; one that is empty is as much a leftover as a full one.
        for root in [
            run.join("containerd/io.containerd.runtime.v2.task"),
            sandbox.dir().join("root/io.containerd.runtime.v2.task"),
        ] {
            let namespaces = std::fs::read_dir(root).into_iter().flatten().flatten();
            for entry in
                namespaces.flat_map(|n| std::fs::read_dir(n.path()).into_iter().flatten().flatten())
            {
                found.insert(format!("bundle: {}", entry.path().display()));
            }
        }
        Ok(Self {
            found,
            tolerated: None,
        })
    }

    /// The same where shims may leave their sockets: containerd's own shim does now and then, when many of its containers end at once.
    pub fn bearing_with_shim_sockets(self) -> Self {
        Self {
            tolerated: Some(SHIM_SOCKET),
            ..self
        }
    }

    /// What is in `self` and was not in `before`.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let tolerated = |line: &str| before.tolerated.is_some_and(|t| line.starts_with(t));
        let new = self.found.difference(&before.found);
        new.filter(|line| !tolerated(line)).cloned().collect()
    }

    /// Waits until nothing is left that was not there `before`. Some of it goes a moment after the call that ends it: a veth with its
    /// namespace, a shim with its last container.
    pub fn wait_until_clean(sandbox: &Sandbox, before: &Self) -> Result<()> {
        wait_until(
            "removal of everything that the test made",
            crate::lab::LIMIT,
            || {
                let now = Self::of(sandbox).map_err(|e| e.to_string())?;
                let left = now.since(before);
                if left.is_empty() {
                    Ok(())
                } else {
                    Err(format!("\n{}", left.join("\n")))
                }
            },
        )
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.found.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

fn links(sandbox: &Sandbox, found: &mut BTreeSet<String>) -> Result<()> {
    for line in sandbox.ip("-o link show")?.lines() {
        // `7: veth1@if2: <…>`
        if let Some(name) = line.split(": ").nth(1) {
            found.insert(format!("link: {}", name.split('@').next().unwrap_or(name)));
        }
    }
    Ok(())
}

/// Everything that runs in the sandbox's mount namespace or in a cgroup of its containers, with polling threads by name.
fn processes(sandbox: &Sandbox, found: &mut BTreeSet<String>) {
    let own = std::fs::read_link(format!("/proc/{}/ns/mnt", sandbox.pid())).ok();
    for pid in numbers(Path::new("/proc")) {
        let dir = Path::new("/proc").join(pid.to_string());
        let in_node = own.is_some() && std::fs::read_link(dir.join("ns/mnt")).ok() == own;
        let in_cgroup = std::fs::read_to_string(dir.join("cgroup"))
            .is_ok_and(|text| text.contains(&format!("/{}/", sandbox.name())));
        if !in_node && !in_cgroup {
            continue;
        }
        let comm = std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
        let state = std::fs::read_to_string(dir.join("stat")).unwrap_or_default();
        let zombie = state
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('Z'));
        // The harness' own: the keeper, containerd and the tools that this function's caller runs at this moment.
        if zombie
            || pid == sandbox.pid()
            || ["containerd", "ctr", "nsenter", "ip"].contains(&comm.trim())
        {
            continue;
        }
        found.insert(format!("process: {pid} {}", comm.trim()));
        for tid in numbers(&dir.join("task")) {
            let name =
                std::fs::read_to_string(dir.join(format!("task/{tid}/comm"))).unwrap_or_default();
            if name.starts_with("iou-") {
                found.insert(format!("polling thread: {tid} {}", name.trim()));
            }
        }
    }
}

fn mounts(sandbox: &Sandbox, found: &mut BTreeSet<String>) {
    let table =
        std::fs::read_to_string(format!("/proc/{}/mounts", sandbox.pid())).unwrap_or_default();
    for line in table.lines() {
        let mut words = line.split(' ').skip(1);
        if let (Some(target), Some(kind)) = (words.next(), words.next()) {
            found.insert(format!("mount ({kind}): {target}"));
        }
    }
}

fn cgroups(sandbox: &Sandbox, found: &mut BTreeSet<String>) {
    // v1: a tree a controller; v2: one tree.
    let root = Path::new("/sys/fs/cgroup");
    let trees = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    for tree in trees.chain([root.to_path_buf()]) {
        for entry in std::fs::read_dir(tree.join(sandbox.name()))
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.path().is_dir() {
                found.insert(format!("cgroup: {}", entry.path().display()));
            }
        }
    }
}

fn files(what: &str, dir: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.ends_with("kbp/runtimes") {
            // What the OCI runtimes said of themselves is the node's, not a pod's.
            continue;
        }
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            files(what, &path, found);
        } else if !["lock", "last_reserved_ip.0"]
            .contains(&entry.file_name().to_string_lossy().as_ref())
        {
            // host-local's lock and its last address stay by design.
            found.insert(format!("{what}: {}", path.display()));
        }
    }
}

fn numbers(dir: &Path) -> Vec<u32> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}
