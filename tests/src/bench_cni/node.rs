//! Calls of plugins on a node that is a network namespace.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kbp_kernel::netns::Netns;
use kbp_tests::binaries::reference_cni_dir;
use serde_json::Value;

use crate::plugin::Arm;

/// Where the plugins are.
#[derive(Debug, Clone)]
pub(crate) struct Plugins {
    kbp: PathBuf,
    reference: PathBuf,
}

impl Plugins {
    /// `kbp` and the directory of the reference plugins.
    pub(crate) fn find(kbp: PathBuf) -> Result<Self> {
        ensure!(
            kbp.is_file(),
            "{} is missing: run `make build`",
            kbp.display()
        );
        let reference = reference_cni_dir()?;
        for name in ["ptp", "bridge", "host-local"] {
            ensure!(
                reference.join(name).is_file(),
                "{name} is missing in {}: apt-get install containernetworking-plugins",
                reference.display()
            );
        }
        Ok(Self { kbp, reference })
    }
}

/// A node: a network namespace, and a directory for leases.
#[derive(Debug)]
pub(crate) struct Node {
    netns: Netns,
    plugins: Plugins,
    leases: PathBuf,
}

/// A pod's network namespace. It lives by its file descriptor: nothing of it outlives this process.
#[derive(Debug)]
pub(crate) struct Pod {
    netns: Netns,
    id: String,
}

impl Pod {
    pub(crate) fn new(id: String) -> Result<Self> {
        Ok(Self {
            netns: Netns::create()?,
            id,
        })
    }

    /// Several with names from `prefix`.
    pub(crate) fn several(prefix: &str, count: usize) -> Result<Vec<Self>> {
        (0..count)
            .map(|n| Self::new(format!("{prefix}{n}")))
            .collect()
    }
}

impl Node {
    pub(crate) fn new(netns: Netns, plugins: &Plugins, leases: PathBuf) -> Self {
        Self {
            netns,
            plugins: plugins.clone(),
            leases,
        }
    }

    pub(crate) fn leases(&self) -> &Path {
        &self.leases
    }

    /// Time from before the start of the plugin to after its end, as the runtime waits for it.
    pub(crate) fn call(&self, arm: Arm, verb: &str, pod: &Pod, config: &Value) -> Result<Duration> {
        let binary = match arm {
            Arm::KbpHostLocal | Arm::KbpLocal => self.plugins.kbp.clone(),
            Arm::Ptp | Arm::Bridge => self.plugins.reference.join(arm.binary()),
        };
        let netns = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            pod.netns.as_fd().as_raw_fd()
        );
        let mut command = Command::new(&binary);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.plugins.reference)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let input = config.to_string();
        let (begun, child) = self.netns.run(|| (Instant::now(), command.spawn()))?;
        let mut child = child.with_context(|| format!("start {}", binary.display()))?;
        // VERSION does not read its input.
        let _ = child
            .stdin
            .take()
            .map(|mut stdin| stdin.write_all(input.as_bytes()));
        let output = child
            .wait_with_output()
            .with_context(|| format!("wait for {}", binary.display()))?;
        let took = begun.elapsed();
        ensure!(
            output.status.success(),
            "{} {verb}: {} {} {}",
            arm.name(),
            output.status,
            String::from_utf8_lossy(&output.stdout).trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(took)
    }

    /// The same call for all pods at once.
    pub(crate) fn call_all(
        &self,
        arm: Arm,
        verb: &str,
        pods: &[Pod],
        config: &Value,
    ) -> Result<Vec<Duration>> {
        let barrier = Barrier::new(pods.len());
        thread::scope(|scope| {
            let calls: Vec<_> = pods
                .iter()
                .map(|pod| {
                    scope.spawn(|| {
                        barrier.wait();
                        self.call(arm, verb, pod, config)
                    })
                })
                .collect();
            calls
                .into_iter()
                .map(|call| call.join().map_err(|_| anyhow!("a caller panicked"))?)
                .collect()
        })
    }
}
