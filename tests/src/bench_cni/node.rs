//! Calls of plugins on a node that is a network namespace.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kbp_kernel::netns::Netns;
use kbp_tests::binaries::reference_cni_dir;
use serde_json::Value;

use crate::plugin::Arm;

/// A plugin starts in a millisecond, on a busy machine in some more.
const PATIENCE: Duration = Duration::from_secs(10);

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
        let started = self.start(arm, verb, pod)?;
        let begun = started.begun;
        started.finish(arm, verb, config)?;
        Ok(begun.elapsed())
    }

    /// Time from when a plugin that has started gets its input to after its end.
    pub(crate) fn work(&self, arm: Arm, verb: &str, pod: &Pod, config: &Value) -> Result<Duration> {
        let started = self.start(arm, verb, pod)?;
        started.await_reading()?;
        let begun = Instant::now();
        started.finish(arm, verb, config)?;
        Ok(begun.elapsed())
    }

    fn start(&self, arm: Arm, verb: &str, pod: &Pod) -> Result<Started> {
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
        let (begun, child) = self.netns.run(|| (Instant::now(), command.spawn()))?;
        let child = child.with_context(|| format!("start {}", binary.display()))?;
        Ok(Started { begun, child })
    }

    /// The same call for all pods at once.
    pub(crate) fn call_all(
        &self,
        arm: Arm,
        verb: &str,
        pods: &[Pod],
        config: &Value,
    ) -> Result<Vec<Duration>> {
        self.at_once(pods, |pod, barrier| {
            barrier.wait();
            self.call(arm, verb, pod, config)
        })
    }

    /// As [`Node::work`] for all pods at once: every plugin has started before the first gets its input.
    pub(crate) fn work_all(
        &self,
        arm: Arm,
        verb: &str,
        pods: &[Pod],
        config: &Value,
    ) -> Result<Vec<Duration>> {
        self.at_once(pods, |pod, barrier| {
            let started = self
                .start(arm, verb, pod)
                .and_then(|started| started.await_reading().map(|()| started));
            // Also when it failed, for the others wait here.
            barrier.wait();
            let begun = Instant::now();
            started?.finish(arm, verb, config)?;
            Ok(begun.elapsed())
        })
    }

    fn at_once(
        &self,
        pods: &[Pod],
        call: impl Fn(&Pod, &Barrier) -> Result<Duration> + Sync,
    ) -> Result<Vec<Duration>> {
        let barrier = Barrier::new(pods.len());
        thread::scope(|scope| {
            let calls: Vec<_> = pods
                .iter()
                .map(|pod| scope.spawn(|| call(pod, &barrier)))
                .collect();
            calls
                .into_iter()
                .map(|call| call.join().map_err(|_| anyhow!("a caller panicked"))?)
                .collect()
        })
    }
}

/// A plugin that waits for its input.
struct Started {
    begun: Instant,
    child: Child,
}

impl Started {
    /// Waits until it reads its stdin, which is the first thing that kbp does.
    fn await_reading(&self) -> Result<()> {
        let call = format!("{} 0x0 ", nix::libc::SYS_read);
        let path = format!("/proc/{}/syscall", self.child.id());
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(&path).is_ok_and(|text| text.starts_with(&call)) {
            ensure!(
                Instant::now() < deadline,
                "the plugin does not read its input within {PATIENCE:?}"
            );
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Gives it its input and waits for its end.
    fn finish(mut self, arm: Arm, verb: &str, config: &Value) -> Result<()> {
        // VERSION does not read its input.
        let _ = self
            .child
            .stdin
            .take()
            .map(|mut stdin| stdin.write_all(config.to_string().as_bytes()));
        let output = self
            .child
            .wait_with_output()
            .with_context(|| format!("wait for {}", arm.name()))?;
        ensure!(
            output.status.success(),
            "{} {verb}: {} {} {}",
            arm.name(),
            output.status,
            String::from_utf8_lossy(&output.stdout).trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}
