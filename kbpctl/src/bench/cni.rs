//! Networks: lists of CNI plugins, called as libcni does.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::interrupt::{Input, Interrupt};

/// Longest that one plugin may take.
const LIMIT: Duration = Duration::from_secs(20);
/// The interface in the pod.
pub(crate) const INTERFACE: &str = "eth0";

/// A list of plugins and where they are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Network {
    list: Value,
    path: Vec<PathBuf>,
}

impl Network {
    /// From a file of the node.
    pub(crate) fn read(file: &Path, path: &[PathBuf]) -> Result<Self> {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("read the network {}", file.display()))?;
        let mut list: Value = serde_json::from_str(&text)
            .with_context(|| format!("the network {} is no JSON", file.display()))?;
        if list["plugins"].is_null() && list["type"].is_string() {
            list = json!({ "cniVersion": list["cniVersion"], "name": list["name"], "plugins": [list] });
        }
        if !list["plugins"].is_array() || !list["name"].is_string() {
            bail!(
                "the network {} has no \"name\" or no \"plugins\"",
                file.display()
            );
        }
        Ok(Self {
            list,
            path: path.to_vec(),
        })
    }

    /// One plugin with addresses of the bench's own range, its leases in the bench's own directory.
    pub(crate) fn own(kind: &str, name: &str, slot: u8, dir: &Path, path: &[PathBuf]) -> Self {
        let plugin = json!({ "type": kind, "ipam": {
            "type": "host-local", "dataDir": dir.join("leases"),
            "ranges": [[{ "subnet": format!("198.18.{slot}.0/24") }]], "routes": [{ "dst": "0.0.0.0/0" }],
        }});
        Self {
            list: json!({ "cniVersion": "1.0.0", "name": name, "plugins": [plugin] }),
            path: path.to_vec(),
        }
    }

    /// An error when a plugin of it is not there.
    pub(crate) fn check(&self) -> Result<()> {
        for plugin in self.plugins() {
            let kind = plugin["type"].as_str().unwrap_or_default();
            self.find(kind)?;
            if let Some(ipam) = plugin["ipam"]["type"].as_str()
                && ipam != "kbp-local"
            {
                self.find(ipam)?;
            }
        }
        Ok(())
    }

    fn plugins(&self) -> &[Value] {
        self.list["plugins"].as_array().map_or(&[], Vec::as_slice)
    }

    fn find(&self, kind: &str) -> Result<PathBuf> {
        crate::doctor::program::find(kind, &self.path).with_context(|| {
            let dirs: Vec<String> = self.path.iter().map(|d| d.display().to_string()).collect();
            let remedy = match kind {
                "kbp" => "make install, or --cni-bin with the directory that has it",
                _ => "install it (Debian: apt-get install containernetworking-plugins), or --cni-bin with the directory that has it",
            };
            format!("no CNI plugin {kind:?} in {}: {remedy}", dirs.join(", "))
        })
    }

    /// Attaches a container and returns its IPv4 address.
    pub(crate) fn add(
        &self,
        container: &str,
        netns: &Path,
        interrupt: &Interrupt,
    ) -> Result<std::net::Ipv4Addr> {
        let mut previous = Value::Null;
        for plugin in self.plugins() {
            previous = self.call("ADD", plugin, &previous, container, netns, interrupt)?;
        }
        let addresses = previous["ips"].as_array();
        let addresses = addresses
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok());
        addresses.into_iter().next().with_context(|| {
            format!(
                "the network {} gave no IPv4 address",
                self.list["name"].as_str().unwrap_or_default()
            )
        })
    }

    /// Detaches it; also when it was never attached, or its namespace is gone.
    pub(crate) fn del(&self, container: &str, netns: &Path, interrupt: &Interrupt) -> Result<()> {
        let mut outcome = Ok(());
        for plugin in self.plugins().iter().rev() {
            let answer = self.call("DEL", plugin, &Value::Null, container, netns, interrupt);
            if outcome.is_ok() {
                outcome = answer.map(drop);
            }
        }
        outcome
    }

    fn call(
        &self,
        verb: &str,
        plugin: &Value,
        previous: &Value,
        container: &str,
        netns: &Path,
        interrupt: &Interrupt,
    ) -> Result<Value> {
        let mut config = plugin.clone();
        config["cniVersion"] = self.list["cniVersion"].clone();
        config["name"] = self.list["name"].clone();
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        let kind = plugin["type"].as_str().unwrap_or_default();
        let mut command = Command::new(self.find(kind)?);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            // Of a namespace that is gone the path is not told.
            .env(
                "CNI_NETNS",
                if netns.exists() { netns } else { Path::new("") },
            )
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", "")
            .env("CNI_PATH", std::env::join_paths(&self.path)?);
        let output = interrupt.run(command, Input::Bytes(config.to_string().as_bytes()), LIMIT)?;
        let answer: Value = serde_json::from_str(&output.stdout).unwrap_or(Value::Null);
        if output.is_good() {
            return Ok(answer);
        }
        match answer["msg"].as_str() {
            Some(msg) => {
                let details = answer["details"].as_str().unwrap_or_default();
                bail!("CNI {verb} by {kind}: {msg} {details}")
            }
            None => output
                .good()
                .map(|_| Value::Null)
                .with_context(|| format!("CNI {verb} by {kind}")),
        }
    }
}
