//! Network namespaces of pods, and CNI plugins called as libcni does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kbp_kernel::netns::Netns;
use serde_json::{Value, json};

use crate::binaries::{bin_dir, reference_cni_dir};
use crate::command;
use crate::{Error, Result, Sandbox};

/// Longest that one plugin may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A named network namespace inside a sandbox; removed when dropped.
#[derive(Debug)]
pub struct PodNetns<'s> {
    sandbox: &'s Sandbox,
    name: String,
}

impl<'s> PodNetns<'s> {
    /// Makes `/run/netns/<name>`, which is private to the sandbox.
    pub fn new(sandbox: &'s Sandbox, name: &str) -> Result<Self> {
        sandbox.ip(&format!("netns add {name}"))?;
        let netns = Self {
            sandbox,
            name: name.to_owned(),
        };
        sandbox.ip(&format!("-n {name} link set lo up"))?;
        Ok(netns)
    }

    /// Its path inside the sandbox.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// A handle on it.
    pub fn open(&self) -> Result<Netns> {
        Ok(Netns::open(&self.sandbox.inside(self.path()))?)
    }

    /// Runs `ip` inside it.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        self.sandbox.ip(&format!("-n {} {arguments}", self.name))
    }

    /// Runs a program inside it, in the sandbox's mount namespace.
    pub fn command(&self, program: &str) -> std::process::Command {
        let mut command = self.sandbox.command("nsenter");
        command
            .arg(format!("--net={}", self.path().display()))
            .arg("--")
            .arg(program);
        command
    }

    /// Removes it now; fails when it is not there.
    pub fn remove(self) -> Result<()> {
        self.sandbox
            .ip(&format!("netns delete {}", self.name))
            .map(drop)
    }
}

impl Drop for PodNetns<'_> {
    fn drop(&mut self) {
        // After remove(), or when the sandbox was cleaned up, there is none.
        let _ = self.sandbox.ip(&format!("netns delete {}", self.name));
    }
}

/// A list of CNI plugins.
#[derive(Debug, Clone)]
pub struct Network<'s> {
    sandbox: &'s Sandbox,
    name: String,
    version: String,
    plugins: Vec<Value>,
}

/// What an ADD answered.
#[derive(Debug, Clone)]
pub struct Attached {
    /// The last plugin's result.
    pub result: Value,
}

impl Attached {
    /// The first address of that family, without its prefix length.
    pub fn address(&self, v6: bool) -> Option<String> {
        let addresses = self.result["ips"]
            .as_array()?
            .iter()
            .filter_map(|ip| ip["address"].as_str());
        addresses
            .map(|a| a.split('/').next().unwrap_or(a))
            .find(|a| a.contains(':') == v6)
            .map(str::to_owned)
    }

    /// The first IPv4 address.
    pub fn ipv4(&self) -> Result<String> {
        self.address(false).ok_or_else(|| Error::Command {
            command: "CNI ADD".to_owned(),
            reason: format!("the result has no IPv4 address: {}", self.result),
        })
    }
}

impl<'s> Network<'s> {
    /// A list of plugins in the order of their calls, each the plugin's own part of the config.
    pub fn new(
        sandbox: &'s Sandbox,
        name: &str,
        version: &str,
        plugins: impl IntoIterator<Item = Value>,
    ) -> Self {
        Self {
            sandbox,
            name: name.to_owned(),
            version: version.to_owned(),
            plugins: plugins.into_iter().collect(),
        }
    }

    /// The smallest network of kbp's own plugin, IPv4.
    pub fn kbp(sandbox: &'s Sandbox) -> Self {
        Self::new(
            sandbox,
            "kbpnet",
            "1.0.0",
            [json!({ "type": "kbp", "ipam": host_local(sandbox, "10.88.0.0/16") })],
        )
    }

    /// The reference `ptp` plugin, which it is compared with.
    pub fn ptp(sandbox: &'s Sandbox) -> Self {
        Self::new(
            sandbox,
            "ptpnet",
            "1.0.0",
            [
                json!({ "type": "ptp", "ipMasq": false, "ipam": host_local(sandbox, "10.89.0.0/16") }),
            ],
        )
    }

    /// The reference `bridge` plugin.
    pub fn bridge(sandbox: &'s Sandbox) -> Self {
        let ipam = host_local(sandbox, "10.90.0.0/16");
        Self::new(
            sandbox,
            "brnet",
            "1.0.0",
            [json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam })],
        )
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Attaches a container; a failed attachment is undone as libcni's callers do, by DEL.
    pub fn add(&self, container: &str, netns: &PodNetns<'_>, interface: &str) -> Result<Attached> {
        let mut previous = None;
        for plugin in &self.plugins {
            match self.call(
                "ADD",
                plugin,
                previous.as_ref(),
                container,
                Some(&netns.path()),
                interface,
            ) {
                Ok(result) => previous = Some(result),
                Err(error) => {
                    let _ = self.del(container, Some(netns), interface);
                    return Err(error);
                }
            }
        }
        Ok(Attached {
            result: previous.unwrap_or(Value::Null),
        })
    }

    /// Detaches a container; without a namespace when that is gone.
    pub fn del(
        &self,
        container: &str,
        netns: Option<&PodNetns<'_>>,
        interface: &str,
    ) -> Result<()> {
        let path = netns.map(PodNetns::path);
        for plugin in self.plugins.iter().rev() {
            self.call("DEL", plugin, None, container, path.as_deref(), interface)?;
        }
        Ok(())
    }

    /// Checks a container's attachment.
    pub fn check(
        &self,
        container: &str,
        netns: &PodNetns<'_>,
        interface: &str,
        attached: &Attached,
    ) -> Result<()> {
        for plugin in &self.plugins {
            self.call(
                "CHECK",
                plugin,
                Some(&attached.result),
                container,
                Some(&netns.path()),
                interface,
            )?;
        }
        Ok(())
    }

    fn call(
        &self,
        verb: &str,
        plugin: &Value,
        previous: Option<&Value>,
        container: &str,
        netns: Option<&Path>,
        interface: &str,
    ) -> Result<Value> {
        let mut config = plugin.clone();
        config["cniVersion"] = json!(self.version);
        config["name"] = json!(self.name);
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        let kind = config["type"].as_str().unwrap_or_default().to_owned();
        let reference = reference_cni_dir()?;
        let mut search = vec![reference.clone()];
        if let Ok(own) = bin_dir() {
            search.insert(0, own);
        }
        let Some(binary) = search.iter().map(|d| d.join(&kind)).find(|p| p.is_file()) else {
            return Err(Error::Missing {
                what: format!("CNI plugin {kind} in {}", search.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" or ")),
                remedy: "run `make build` for kbp's, apt-get install containernetworking-plugins for the others".to_owned(),
            });
        };
        let mut command = self.sandbox.command(&binary);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns.unwrap_or(Path::new("")))
            .env("CNI_IFNAME", interface)
            .env("CNI_ARGS", "")
            .env(
                "CNI_PATH",
                search
                    .iter()
                    .map(|p| p.display().to_string())
                    .collect::<Vec<_>>()
                    .join(":"),
            );
        let output = command::run_with_input(command, config.to_string().as_bytes(), LIMIT)?;
        let answer: Option<Value> = serde_json::from_str(&output.stdout).ok();
        match (output.code, answer) {
            (Some(0), Some(answer)) => Ok(answer),
            (Some(0), None) if output.stdout.trim().is_empty() && verb != "ADD" => Ok(Value::Null),
            (_, answer) => {
                let message = answer
                    .as_ref()
                    .map(|a| format!("code {}: {} {}", a["code"], a["msg"], a["details"]));
                Err(Error::Command {
                    command: format!("CNI {verb} by {kind}"),
                    reason: message.unwrap_or_else(|| output.to_string()),
                })
            }
        }
    }

    /// The addresses that host-local has handed out of this network and not taken back.
    pub fn leases(&self) -> Vec<String> {
        let dir = lease_dir(self.sandbox).join(&self.name);
        let names = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok());
        names
            .filter(|n| n.starts_with(|c: char| c.is_ascii_digit()) || n.contains(':'))
            .collect()
    }
}

/// An IPAM section with its leases inside the sandbox.
pub fn host_local(sandbox: &Sandbox, subnet: &str) -> Value {
    json!({
        "type": "host-local", "ranges": [[{ "subnet": subnet }]], "routes": [{ "dst": "0.0.0.0/0" }],
        "dataDir": lease_dir(sandbox),
    })
}

/// Where host-local keeps its leases.
pub(crate) fn lease_dir(sandbox: &Sandbox) -> PathBuf {
    sandbox.dir().join("leases")
}
