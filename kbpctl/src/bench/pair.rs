//! A server and a client of one arm, in containers or not, and the processes around them.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kbp_kernel::CpuId;
use kbp_kernel::link::{Batch, RouteSocket};
use kbp_kernel::netns::Netns;
use kbp_poller::state;
use serde_json::{Value, json};

use super::app::App;
use super::arm::{Arm, Link, Runtime};
use super::around::{Around, idle_group};
use super::cni::Network;
use super::command;
use super::ctr::Ctr;
use super::interrupt::Interrupt;
use super::keeper::{Attachment, Keeper};
use crate::load::{Measured, Talk};

/// Port of the servers that are this program.
const PORT: u16 = 7007;
/// Port of the server at which a neighbour's flood is aimed.
pub(super) const DISCARD: u16 = 7009;
/// Longest that a container takes to start, on a busy machine.
const START: Duration = Duration::from_secs(20);
/// Where this program and the shared directory are in a container.
const PROGRAM: &str = "/kbpctl";
const SHARED: &str = "/bench";

/// The node as a bench uses it.
pub(crate) struct Node {
    pub(crate) ctr: Ctr,
    pub(crate) keeper: Keeper,
    pub(crate) interrupt: Interrupt,
    pub(crate) stock_runtime: String,
    pub(crate) kbp_runtime: String,
    pub(crate) stock_network: Network,
    pub(crate) kbp_network: Network,
    pub(crate) cni_bin: Vec<PathBuf>,
    pub(crate) state_dir: PathBuf,
    pub(crate) client_cpu: CpuId,
    pub(crate) server_cpu: CpuId,
    /// containerd's own default spec.
    spec: Value,
    /// For ids.
    count: u32,
}

/// What one measurement is.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) talk: Talk,
    /// The program that answers, where that is not this one.
    pub(crate) app: Option<App>,
    pub(crate) seconds: f64,
    pub(crate) warm_up: f64,
    pub(crate) rate: Option<f64>,
    pub(crate) size: usize,
    pub(crate) hog: bool,
    pub(crate) flood: Option<f64>,
    /// Also ask sockperf, in the same containers.
    pub(crate) sockperf: bool,
}

/// What one measurement of one arm found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) measured: Measured,
    /// Parts of kbp that were not active.
    pub(crate) inactive: Vec<String>,
    /// sockperf's median and 99th percentile of the round trip, in µs.
    pub(crate) sockperf: Option<(f64, f64)>,
}

impl Node {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a setting of the command line"
    )]
    pub(crate) fn new(
        ctr: Ctr,
        keeper: Keeper,
        interrupt: Interrupt,
        runtimes: (String, String),
        networks: (Network, Network),
        cni_bin: Vec<PathBuf>,
        state_dir: PathBuf,
        cpus: (CpuId, CpuId),
    ) -> Result<Self> {
        let spec = ctr.spec()?;
        let node = Self {
            ctr,
            keeper,
            interrupt,
            stock_runtime: runtimes.0,
            kbp_runtime: runtimes.1,
            stock_network: networks.0,
            kbp_network: networks.1,
            cni_bin,
            state_dir,
            client_cpu: cpus.0,
            server_cpu: cpus.1,
            spec,
            count: 0,
        };
        node.make_root()?;
        Ok(node)
    }

    fn dir(&self) -> &Path {
        &self.keeper.kept().dir
    }

    fn shared(&self) -> PathBuf {
        self.dir().join("shared")
    }

    /// A root with nothing in it: programs and libraries are the node's own, mounted read-only, so the two sides of a comparison run
    /// the same files, and whatever is installed can be measured.
    fn make_root(&self) -> Result<()> {
        let root = self.dir().join("root");
        let make = |dir: &Path| {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))
        };
        for dir in [
            "proc", "sys", "dev", "run", "etc", "tmp", "var/log", "bench",
        ] {
            make(&root.join(dir))?;
        }
        make(&self.shared())?;
        for (name, is_dir) in system_dirs() {
            match is_dir {
                true => make(&root.join(&name))?,
                false => {
                    let from = Path::new("/").join(&name);
                    let target = std::fs::read_link(&from)
                        .with_context(|| format!("read {}", from.display()))?;
                    let link = root.join(&name);
                    symlink(target, &link).with_context(|| format!("link {}", link.display()))?;
                }
            }
        }
        let files = [
            ("kbpctl", ""),
            ("etc/ld.so.cache", ""),
            (
                "etc/passwd",
                "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            ),
            ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ];
        for (name, text) in files {
            let file = root.join(name);
            std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        }
        for app in App::ALL {
            if let Some((name, text)) = app.config() {
                let file = self.shared().join(name);
                std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
            }
        }
        Ok(())
    }

    fn spec_of(
        &self,
        id: &str,
        command: &[String],
        cpu: CpuId,
        netns: &Path,
        arm: &Arm,
    ) -> Result<Value> {
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(command);
        spec["process"]["terminal"] = json!(false);
        spec["process"]["cwd"] = json!("/");
        // Nothing of the person's own environment.
        spec["process"]["env"] =
            json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        spec["root"] = json!({ "path": self.dir().join("root"), "readonly": false });
        spec["hostname"] = json!(id);
        spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.keeper.kept().name));
        spec["linux"]["resources"]["cpu"] = json!({ "cpus": cpu.to_string() });
        let annotations: serde_json::Map<String, Value> = arm
            .annotations
            .iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect();
        spec["annotations"] = Value::Object(annotations);
        let own = std::env::current_exe().context("find this program")?;
        let bind = |from: &Path, to: &str, mode: &str| json!({ "type": "bind", "source": from, "destination": to, "options": ["rbind", mode] });
        let mut mounts = vec![
            bind(&own, PROGRAM, "ro"),
            bind(&self.shared(), SHARED, "rw"),
        ];
        for (name, is_dir) in system_dirs() {
            if is_dir {
                mounts.push(bind(&Path::new("/").join(&name), &format!("/{name}"), "ro"));
            }
        }
        let cache = Path::new("/etc/ld.so.cache");
        if cache.exists() {
            mounts.push(bind(cache, "/etc/ld.so.cache", "ro"));
        }
        match spec["mounts"].as_array_mut() {
            Some(there) => there.extend(mounts),
            None => spec["mounts"] = json!(mounts),
        }
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|n| n["type"] != "network");
            namespaces.push(json!({ "type": "network", "path": netns }));
        }
        Ok(spec)
    }

    /// Starts a container attached to the arm's network.
    fn pod(&mut self, arm: &Arm, role: &str, command: &[String], cpu: CpuId) -> Result<Pod> {
        self.interrupt.check()?;
        self.count += 1;
        let id = format!("{}-{role}-{}", self.keeper.kept().name, self.count);
        let (netns, path) = new_netns()?;
        let network = match &arm.link {
            Link::Kbp => self.kbp_network.clone(),
            Link::File(file) => Network::read(file, &self.cni_bin)?,
            Link::Stock | Link::Loopback => self.stock_network.clone(),
        };
        let runtime = match &arm.runtime {
            Runtime::Stock => &self.stock_runtime,
            Runtime::Kbp => &self.kbp_runtime,
            Runtime::Named(name) => name,
        };
        self.keeper.note(&Attachment {
            network: network.clone(),
            container: id.clone(),
            netns: path.clone(),
        })?;
        let address = network
            .add(&id, &path, &self.interrupt)
            .with_context(|| format!("attach a pod of the arm {}", arm.name))?;
        let spec = self.spec_of(&id, command, cpu, &path, arm)?;
        let file = self.dir().join(format!("{id}.json"));
        std::fs::write(&file, spec.to_string())
            .with_context(|| format!("write {}", file.display()))?;
        self.ctr.start(&id, &file, runtime)?;
        Ok(Pod {
            id,
            address,
            network,
            path,
            _netns: netns,
        })
    }

    fn remove(&self, pod: &Pod) -> Result<()> {
        self.ctr.remove(&pod.id)?;
        pod.network.del(&pod.id, &pod.path, &self.interrupt)
    }

    /// Measures `job` under `arm` once, with a fresh pair.
    pub(crate) fn measure(&mut self, arm: &Arm, job: &Job) -> Result<Found> {
        let mut around = Around::default();
        let cpus = [self.client_cpu, self.server_cpu].into_iter();
        let cpus: std::collections::BTreeSet<CpuId> = cpus.collect();
        if arm.spinners {
            let group = idle_group(&self.keeper.kept().name)?;
            for cpu in &cpus {
                around.spin(*cpu, Some(&group))?;
            }
        }
        if job.hog {
            for cpu in &cpus {
                around.spin(*cpu, None)?;
            }
        }
        match arm.link {
            Link::Loopback => self.on_loopback(job, &mut around),
            _ => self.in_containers(arm, job),
        }
    }

    fn in_containers(&mut self, arm: &Arm, job: &Job) -> Result<Found> {
        self.count += 1;
        let (ready, out) = (
            format!("ready-{}", self.count),
            format!("out-{}", self.count),
        );
        let bind = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
        let (command, port) = match job.app {
            Some(app) => (
                app.command(Ipv4Addr::UNSPECIFIED, app.port(), SHARED),
                app.port(),
            ),
            None => (
                command::server(PROGRAM, job, arm, bind, &format!("{SHARED}/{ready}"), None),
                PORT,
            ),
        };
        let server = self.pod(arm, "server", &command, self.server_cpu)?;
        if job.app.is_none() {
            let file = self.shared().join(&ready);
            self.interrupt
                .until("the server's start", START, || file.exists().then_some(()))?;
        }
        let pause = [PROGRAM, "load", "pause"].map(str::to_owned);
        let client = self.pod(arm, "client", &pause, self.client_cpu)?;
        let neighbour = match job.flood {
            Some(rate) => {
                let to = SocketAddr::from((server.address, DISCARD));
                let command = [
                    PROGRAM,
                    "load",
                    "flood",
                    "--to",
                    &to.to_string(),
                    "--rate",
                    &rate.to_string(),
                    "--size",
                    "64",
                ]
                .map(str::to_owned);
                let stock: Arm = "stock".parse().map_err(anyhow::Error::msg)?;
                // On the client's CPU it would be a hog; a neighbour sends from wherever there is room.
                Some(self.pod(
                    &Arm {
                        link: arm.link.clone(),
                        ..stock
                    },
                    "neighbour",
                    &command,
                    self.server_cpu,
                )?)
            }
            None => None,
        };
        let to = SocketAddr::from((server.address, port));
        let command = command::client(PROGRAM, job, arm, to, &format!("{SHARED}/{out}"), None);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let limit = Duration::from_secs_f64(job.seconds + job.warm_up) + START;
        let said = self.ctr.exec(&client.id, "measure", &command, limit)?;
        let file = self.shared().join(&out);
        let measured = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).context("read what the client found")?,
            Err(_) => {
                said.good().context("the client found nothing")?;
                bail!("the client ended without a result")
            }
        };
        let sockperf = match job.sockperf {
            true => Some(self.sockperf(&server, &client, job)?),
            false => None,
        };
        let inactive = match arm.runtime {
            Runtime::Kbp => self.inactive(&[&server, &client])?,
            _ => Vec::new(),
        };
        for pod in [Some(&client), Some(&server), neighbour.as_ref()]
            .into_iter()
            .flatten()
        {
            self.remove(pod)?;
        }
        Ok(Found {
            measured,
            inactive,
            sockperf,
        })
    }

    /// The same question to a tool that is not ours, in the same containers.
    fn sockperf(&self, server: &Pod, client: &Pod, job: &Job) -> Result<(f64, f64)> {
        const PORT: &str = "11111";
        let size = job.size.max(14).to_string();
        // In the background of a shell that ends: of a detached exec containerd 1.6 keeps the pipes for good.
        let serve =
            format!("sockperf server --ip 0.0.0.0 --port {PORT} </dev/null >/dev/null 2>&1 &");
        self.ctr
            .exec(&server.id, "sockperf", &["sh", "-c", &serve], START)?
            .good()?;
        let to = server.address.to_string();
        // It takes whole seconds only; fewer than ours, so that --quick stays quick.
        let seconds = job.seconds.floor().max(1.0).to_string();
        let out = format!("sockperf-{}", self.count);
        // Bound to a port: left alone, sockperf's UDP client neither binds nor connects, so kbp never sees its socket; kbpctl's connects.
        // Again where its server was not there yet, or a second held too few requests for its taste.
        // Into a file: what ctr prints of a process that ends is not always whole.
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do sockperf ping-pong --ip {to} --port {PORT} --time {seconds} --msg-size {size} --full-rtt --client_port 11112 >{SHARED}/{out} 2>&1; grep -q percentile {SHARED}/{out} && exit; sleep 0.1; done"
        );
        let limit = Duration::from_secs_f64(10.0 * job.seconds.ceil()) + START;
        let said = self
            .ctr
            .exec(&client.id, "sockperf", &["sh", "-c", &script], limit)?;
        let text = std::fs::read_to_string(self.shared().join(&out)).unwrap_or_default();
        sockperf_percentiles(&text).with_context(|| {
            format!(
                "sockperf gave no percentiles (is it installed?): {text} {}",
                said.stderr
            )
        })
    }

    /// What kbp says it could not give to these pods.
    fn inactive(&self, pods: &[&Pod]) -> Result<Vec<String>> {
        let states = state::read_all(&self.state_dir)?;
        let mut parts = Vec::new();
        for pod in pods {
            let Some(state) = states
                .iter()
                .find(|s| s.is(&self.keeper.kept().name, &pod.id))
            else {
                parts.push(format!(
                    "kbp says nothing of a pod that it should run (state directory {})",
                    self.state_dir.display()
                ));
                continue;
            };
            parts.extend(
                state
                    .degraded
                    .iter()
                    .map(|d| format!("{}: {}", d.part, d.reason)),
            );
        }
        parts.sort();
        parts.dedup();
        Ok(parts)
    }

    fn on_loopback(&mut self, job: &Job, around: &mut Around) -> Result<Found> {
        let stock: Arm = "stock".parse().map_err(anyhow::Error::msg)?;
        let (netns, _path) = new_netns()?;
        self.count += 1;
        let own = std::env::current_exe().context("find this program")?;
        let own = own.display().to_string();
        let (ready, out) = (
            self.shared().join(format!("ready-{}", self.count)),
            self.shared().join(format!("out-{}", self.count)),
        );
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let path = ready.display().to_string();
        let command = command::server(&own, job, &stock, at, &path, Some(self.server_cpu));
        around.start(&netns, &command)?;
        self.interrupt
            .until("the server's start", START, || ready.exists().then_some(()))?;
        let command = command::client(
            &own,
            job,
            &stock,
            at,
            &out.display().to_string(),
            Some(self.client_cpu),
        );
        around.start(&netns, &command)?;
        let limit = Duration::from_secs_f64(job.seconds + job.warm_up) + START;
        let text = self
            .interrupt
            .until("the client's result", limit, || std::fs::read(&out).ok())?;
        Ok(Found {
            measured: serde_json::from_slice(&text).context("read what the client found")?,
            inactive: Vec::new(),
            sockperf: None,
        })
    }
}

/// A running container.
struct Pod {
    id: String,
    address: Ipv4Addr,
    network: Network,
    path: PathBuf,
    _netns: Netns,
}

/// A network namespace whose loopback is up, and a path by which others find it for as long as the handle lives.
fn new_netns() -> Result<(Netns, PathBuf)> {
    let netns = Netns::create()?;
    let mut socket = RouteSocket::open_in(&netns)?;
    let loopback = socket
        .link_by_name("lo")?
        .context("a network namespace without a loopback")?;
    let mut batch = Batch::new();
    batch.set_up(loopback.index);
    socket.execute(&batch)?;
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        netns.as_fd().as_raw_fd()
    );
    Ok((netns, PathBuf::from(path)))
}

/// Where programs and libraries are: name below `/`, and whether it is a directory (else a link to one).
fn system_dirs() -> Vec<(String, bool)> {
    [
        "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix", "gnu",
    ]
    .into_iter()
    .filter_map(|name| {
        let kind = Path::new("/")
            .join(name)
            .symlink_metadata()
            .ok()?
            .file_type();
        (kind.is_dir() || kind.is_symlink()).then(|| (name.to_owned(), kind.is_dir()))
    })
    .collect()
}

/// Median and 99th percentile, in µs.
fn sockperf_percentiles(text: &str) -> Option<(f64, f64)> {
    let at = |percentile: &str| {
        let line = text
            .lines()
            .find(|l| l.contains(&format!("percentile {percentile} =")))?;
        line.split('=').nth(1)?.trim().parse().ok()
    };
    Some((at("50.000")?, at("99.000")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockperfs_words_are_understood() {
        let text = "sockperf: ---> <MAX> observation =  100.1\nsockperf: ---> percentile 99.000 =   30.250\nsockperf: ---> percentile 50.000 =   12.345\n";
        assert_eq!(sockperf_percentiles(text), Some((12.345, 30.25)));
        assert_eq!(sockperf_percentiles("sockperf: ERROR"), None);
    }
}
