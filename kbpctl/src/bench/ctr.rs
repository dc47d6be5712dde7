//! The node's containerd, through its own `ctr`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Weak;
use std::time::Duration;

use anyhow::{Context, Result};

use super::interrupt::{Input, Interrupt, Output};

/// Longest that one call may take, a measurement aside.
const LIMIT: Duration = Duration::from_secs(30);

/// One containerd and one namespace of it.
#[derive(Debug, Clone)]
pub(crate) struct Ctr {
    /// `ctr`, by name or path.
    pub(crate) program: PathBuf,
    /// Its socket.
    pub(crate) address: PathBuf,
    /// Namespace; empty for calls that need none.
    pub(crate) namespace: String,
    pub(crate) interrupt: Interrupt,
    /// What every call holds open: as long as one runs, the keeper knows that more may come of it.
    pub(crate) held: Weak<OwnedFd>,
}

impl Ctr {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--address").arg(&self.address);
        if !self.namespace.is_empty() {
            command.args(["--namespace", &self.namespace]);
        }
        command.args(arguments);
        command
    }

    /// Runs `ctr` to its end.
    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let held = self.held.upgrade();
        let input = match &held {
            Some(held) => Input::Hold(held),
            None => Input::Bytes(b""),
        };
        self.interrupt.run(self.command(arguments), input, LIMIT)
    }

    fn good(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.good()
    }

    /// Version of the server.
    pub(crate) fn version(&self) -> Result<String> {
        let said = self.good(&["version"]).map_err(|error| {
            let missing = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
            let told = match error.chain().filter_map(|e| e.downcast_ref()).any(missing) {
                true => "no client of containerd: name one by --ctr, such as --ctr /usr/bin/ctr".to_owned(),
                false => format!(
                    "containerd does not answer on {}: start it, or name its socket by --address (k3s: /run/k3s/containerd/containerd.sock)",
                    self.address.display()
                ),
            };
            error.context(told)
        })?;
        let server = said.split("Server:").nth(1).unwrap_or_default();
        let version = server
            .lines()
            .find_map(|l| l.trim().strip_prefix("Version:"));
        Ok(version.unwrap_or("unknown").trim().to_owned())
    }

    /// containerd's own default spec.
    pub(crate) fn spec(&self) -> Result<serde_json::Value> {
        let text = self.good(&["oci", "spec"])?;
        serde_json::from_str(&text).context("read containerd's default spec")
    }

    /// Starts a container of a whole spec.
    pub(crate) fn start(&self, id: &str, spec: &Path, runtime: &str) -> Result<()> {
        let spec = spec.display().to_string();
        self.good(&[
            "run",
            "--runtime",
            runtime,
            "--detach",
            "--config",
            &spec,
            id,
        ])
        .with_context(|| format!("start a container with the runtime {runtime}"))
        .map(drop)
    }

    /// Runs a command in a container to its end.
    pub(crate) fn exec(
        &self,
        id: &str,
        exec_id: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<Output> {
        let mut arguments = vec!["tasks", "exec", "--exec-id", exec_id, id];
        arguments.extend(command);
        let command = self.command(&arguments);
        self.interrupt.run_or_kill(command, limit)
    }

    /// Ends a container and removes it.
    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        // One without a task, or whose task goes just now.
        let task = self.run(&["tasks", "delete", "--force", id])?;
        self.good(&["containers", "delete", id])
            .map(drop)
            .with_context(|| format!("(deleting its task said: {})", task.stderr.trim()))
    }

    /// Ends everything in the namespace and removes that, too.
    pub(crate) fn remove_everything(&self) -> Result<()> {
        const ROUNDS: u32 = 50;
        let mut last = Ok(());
        for _ in 0..ROUNDS {
            let containers = self.good(&["containers", "ls", "--quiet"])?;
            let tasks = self.good(&["tasks", "ls", "--quiet"])?;
            let ids: std::collections::BTreeSet<&str> =
                containers.lines().chain(tasks.lines()).collect();
            if ids.is_empty() {
                // A start that was under way when the bench ended may bring one more; then the namespace is not empty.
                let removed = self.run(&["namespaces", "remove", &self.namespace])?;
                if removed.is_good() || removed.stderr.contains("not found") {
                    return Ok(());
                }
                last = removed.good().map(drop);
            }
            for id in ids {
                if let Err(error) = self.remove(id) {
                    last = Err(error);
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        last.with_context(|| format!("remove the containerd namespace {}", self.namespace))
    }
}
