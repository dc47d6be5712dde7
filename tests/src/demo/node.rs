//! The private node of the demo: one containerd, the images, and pods of either arm on it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kbp_kernel::CpuId;
use kbp_poller::state::{self, PodState};
use kbp_tests::binaries::{kbp_binary, program};
use kbp_tests::{
    Containerd, Generation, Network, PodNetns, Rootfs, Run, Runtime, Sandbox, command, wait_until,
};
use serde_json::{Value, json};

/// One of the two things that are compared: a runtime with the CNI plugin that belongs to it. Everything else is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Arm {
    /// `io.containerd.runc.v2` and the reference plugin `ptp`.
    Stock,
    /// `io.containerd.kbp.v1` and the plugin `kbp`.
    Kbp,
}

impl Arm {
    /// As in the tables and in `result.json`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Kbp => "kbp",
        }
    }

    fn runtime(self) -> Runtime {
        match self {
            Self::Stock => Runtime::Stock,
            Self::Kbp => Runtime::Kbp,
        }
    }

    fn network(self, sandbox: &Sandbox) -> Network<'_> {
        match self {
            Self::Stock => Network::ptp(sandbox),
            Self::Kbp => Network::kbp(sandbox),
        }
    }
}

/// A containerd with the demo's images.
pub(crate) struct Node<'s> {
    containerd: Containerd<'s>,
    /// containerd's own default spec.
    spec: Value,
    /// The image, mounted.
    root: PathBuf,
}

/// What a container is to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Container<'a> {
    /// Its id, and the name of its network namespace.
    pub(crate) id: &'a str,
    /// Its command line.
    pub(crate) command: &'a [&'a str],
    /// The one CPU of its cpuset.
    pub(crate) cpu: CpuId,
}

impl<'s> Node<'s> {
    /// Starts containerd in `sandbox` and makes the image from the machine's own binaries and the demo's echo pair.
    pub(crate) fn start(sandbox: &'s Sandbox) -> Result<Self> {
        let containerd = Containerd::start(sandbox, Generation::Machine)
            .context("start a private containerd")?;
        let root = import_image(&containerd).context("make the image")?;
        let spec = containerd.ctr(["oci", "spec"])?.success()?.stdout;
        let spec = serde_json::from_str(&spec).context("read containerd's default spec")?;
        Ok(Self {
            containerd,
            spec,
            root,
        })
    }

    /// Versions of what runs, by the programs' own words: `containerd 1.6.20~ds1, runc 1.1.5+ds1, Redis 7.0.15, iperf 3.12`.
    pub(crate) fn versions(&self) -> Result<String> {
        // Program, and which word of its first line is the version.
        let programs = [
            ("containerd", "containerd", 2),
            ("runc", "runc", 2),
            ("redis-server", "Redis", 2),
            ("iperf3", "iperf", 1),
        ];
        let mut versions = Vec::new();
        for (program, name, word) in programs {
            let mut version = self.containerd.command(program);
            version.arg("--version");
            let text = command::run(version, Duration::from_secs(10))?
                .success()?
                .stdout;
            let found = text
                .lines()
                .next()
                .and_then(|line| line.split_whitespace().nth(word));
            versions.push(format!(
                "{name} {}",
                found
                    .unwrap_or("of unknown version")
                    .trim_start_matches("v=")
            ));
        }
        Ok(versions.join(", "))
    }

    /// Starts a container in a network namespace of its own.
    pub(crate) fn pod(&self, arm: Arm, container: Container<'_>) -> Result<Pod<'_, 's>> {
        let sandbox = self.containerd.sandbox();
        let id = container.id;
        let netns = PodNetns::new(sandbox, id)?;
        let network = arm.network(sandbox);
        let attached = network
            .add(id, &netns, "eth0")
            .with_context(|| format!("attach {id} to the network"))?;
        let address = attached.ipv4()?;
        let pod = Pod {
            node: self,
            id: id.to_owned(),
            address,
            network,
            netns,
        };
        let config = sandbox.dir().join(format!("{id}.json"));
        let spec = self.spec_of(&container, &pod.netns.path());
        std::fs::write(&config, spec.to_string())
            .with_context(|| format!("write {}", config.display()))?;
        let run = Run::spec(id, &config).runtime(arm.runtime());
        self.containerd
            .start_container(run)
            .with_context(|| format!("start {id} under {}", arm.runtime().name()))?;
        Ok(pod)
    }

    /// containerd's default spec with the few things that a pod sets: the same for both arms, and nothing of kbp in it.
    fn spec_of(&self, container: &Container<'_>, netns: &Path) -> Value {
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(container.command);
        // An image's configuration would say so; containerd's bare default has no environment.
        spec["process"]["env"] =
            json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        spec["root"] = json!({ "path": self.root, "readonly": false });
        spec["hostname"] = json!(container.id);
        spec["linux"]["cgroupsPath"] = json!(format!(
            "/{}/{}",
            self.containerd.sandbox().name(),
            container.id
        ));
        spec["linux"]["resources"]["cpu"] = json!({ "cpus": container.cpu.to_string() });
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|n| n["type"] != "network");
            namespaces.push(json!({ "type": "network", "path": netns }));
        }
        spec
    }

    /// What kbp says of the pods that run now.
    pub(crate) fn states(&self) -> Result<Vec<PodState>> {
        let dir = self.containerd.sandbox().dir().join("run/kbp");
        state::read_all(&dir)
            .with_context(|| format!("read the state files below {}", dir.display()))
    }

    /// What `kbpctl status` prints now.
    pub(crate) fn status(&self) -> Result<String> {
        let mut status = self.containerd.command(kbp_binary("kbpctl")?);
        status.arg("status");
        Ok(command::run(status, Duration::from_secs(10))?
            .success()?
            .stdout)
    }
}

/// Makes one image that has every program of the demo, imports it, and mounts it as containerd would for a container.
fn import_image(containerd: &Containerd<'_>) -> Result<PathBuf> {
    const REFERENCE: &str = "docker.io/library/kbp-demo:local";
    let dir = containerd.sandbox().dir();
    let rootfs = Rootfs::busybox(&dir.join("image"))?;
    for (name, package) in [
        ("redis-server", "redis-server"),
        ("redis-benchmark", "redis-tools"),
        ("iperf3", "iperf3"),
    ] {
        rootfs.binary(&program(name, package)?, &format!("/usr/bin/{name}"))?;
    }
    for name in ["udp-echo", "udp-rr"] {
        rootfs.binary(&kbp_binary(name)?, &format!("/usr/bin/{name}"))?;
    }
    let archive = rootfs.archive(REFERENCE, &["/bin/sh"], dir)?;
    containerd.import(&archive)?;
    let root = dir.join("rootfs");
    std::fs::create_dir(&root).with_context(|| format!("create {}", root.display()))?;
    let target = root.display().to_string();
    containerd
        .ctr(["images", "mount", "--rw", REFERENCE, &target])?
        .success()?;
    Ok(root)
}

/// A running container with its network namespace; all of it goes with [`Pod::remove`], else with the sandbox.
pub(crate) struct Pod<'n, 's> {
    node: &'n Node<'s>,
    id: String,
    address: String,
    network: Network<'s>,
    netns: PodNetns<'s>,
}

impl Pod<'_, '_> {
    /// Its IPv4 address.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Runs a command in the container to its end and returns what it printed.
    pub(crate) fn exec(&self, command: &[&str]) -> Result<String> {
        let output = self.node.containerd.exec(&self.id, command)?;
        Ok(output
            .success()
            .with_context(|| format!("{} in {}", command.join(" "), self.id))?
            .stdout)
    }

    /// Waits until something in the container's network namespace is bound to `port`.
    pub(crate) fn wait_for_port(&self, table: &str, port: u16) -> Result<()> {
        let pid = self.node.containerd.pid(&self.id)?;
        let path = format!("/proc/{pid}/net/{table}");
        let what = format!("{table} port {port} of {}", self.id);
        Ok(wait_until(&what, Duration::from_secs(10), || {
            let sockets = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
            if has_local_port(&sockets, port) {
                Ok(())
            } else {
                Err(sockets)
            }
        })?)
    }

    /// Ends the container and removes it, its address and its namespace.
    pub(crate) fn remove(self) -> Result<()> {
        self.node.containerd.remove(&self.id)?;
        self.network.del(&self.id, Some(&self.netns), "eth0")?;
        self.netns.remove()?;
        Ok(())
    }
}

/// Whether a table like `/proc/net/tcp` has a socket with that local port.
fn has_local_port(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1))
        .any(|local| local.ends_with(&suffix))
}

/// Every part of kbp that is not active in `states`, with its reason; an error when there are no states at all.
pub(crate) fn inactive_parts(states: &[PodState], pods: usize) -> Result<Vec<String>> {
    if states.len() < pods {
        bail!(
            "kbp runs {pods} pods but has state files for {} only",
            states.len()
        );
    }
    let mut parts: Vec<String> = states
        .iter()
        .flat_map(|s| &s.degraded)
        .map(|d| format!("{}: {}", d.part, d.reason))
        .collect();
    parts.sort();
    parts.dedup();
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_by_the_local_column_only() {
        let table =
            "  sl  local_address rem_address   st\n   0: 00000000:18EB 0100007F:0007 0A 0\n";
        assert!(has_local_port(table, 6379));
        assert!(!has_local_port(table, 7));
    }
}
