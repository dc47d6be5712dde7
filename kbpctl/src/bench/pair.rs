//! A server and a client of one arm, in containers or not, and the processes around them.

mod root;
mod sockperf;

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kbp_kernel::CpuId;
use kbp_kernel::link::{Batch, RouteSocket};
use kbp_kernel::netns::Netns;
use kbp_poller::state;
use serde_json::Value;

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
