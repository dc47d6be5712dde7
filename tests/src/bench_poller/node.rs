//! The daemon with many pods on one shared worker: what attaching, keeping and losing it cost.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use kbp_kernel::netns::Netns;
use kbp_kernel::process;
use kbp_kernel::{CpuId, CpuSet, cpu};
use kbp_poller::api::{self, AttachRequest};
use kbp_poller::client::{Attached, Client};
use kbp_tests::bench::cpu::Placement;
use kbp_tests::binaries::kbp_binary;
use kbp_tests::{Sandbox, wait_until};
use serde::Serialize;

use crate::road::{Latency, Road};
use crate::veths::{Node, Pod};

/// Longest wait for anything of the daemon's.
const LIMIT: Duration = Duration::from_secs(20);
const PODS: u8 = 100;
/// What an attach or detach should take at most.
const GOAL_MS: f64 = 2.0;
/// As many as the goal for an idle node speaks of.
const SILENT: u8 = 50;
/// Longer than a lease and than the longest time between two looks at a silent pod.
const SILENCE: Duration = Duration::from_millis(1000);
/// Packets of all pods after a silence: so often.
const WAKES: usize = 10;

/// A call of the daemon's API, as its client saw it.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Call {
    pub(crate) ms: f64,
    /// How long the threads of client and daemon waited for a CPU meanwhile.
    pub(crate) waited_ms: f64,
}

impl Call {
    /// Whether it took longer than it should.
    pub(crate) fn is_slow(&self) -> bool {
        self.ms > GOAL_MS
    }
}

/// What one run found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    pub(crate) attaches: Vec<Call>,
    pub(crate) detaches: Vec<Call>,
    pub(crate) kib_a_pod: f64,
    /// Share of one core that the daemon and its worker used, with nobody talking.
    pub(crate) silent_50_pods: f64,
    /// The first packet of a pod after a silence, over all pods, whose workers sleep: on stock veths and attached, in nanoseconds. A
    /// round alone has too few of them for a 99th percentile.
    #[serde(skip)]
    pub(crate) first: [Histogram<u64>; 2],
    /// Packets after the daemon was killed, and over a stock veth.
    pub(crate) killed: Latency,
    pub(crate) stock: Latency,
}

struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    fn start(node: &Node, sandbox: &Sandbox, cpu: CpuId) -> Result<Self> {
        let dir = sandbox.dir().join("poller");
        let config = sandbox.dir().join("poller.toml");
        std::fs::write(&config, format!("state-dir = {dir:?}\ncpus = \"{cpu}\"\n"))
            .with_context(|| format!("write {}", config.display()))?;
        let mut command = Command::new(kbp_binary("kbp-poller")?);
        command
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // As on a node: it may run anywhere, unlike the thread that starts it.
        let pinned = cpu::allowed()?;
        process::set_affinity(0, &cpu::usable()?)?;
        let child = node.netns.run(|| command.spawn())?;
        process::set_affinity(0, &pinned)?;
        let daemon = Self {
            child: child.context("start kbp-poller")?,
            dir,
        };
        let ready = daemon.dir.join(api::READY);
        let pid = format!("{}\n", daemon.child.id());
        wait_until(
            "the daemon to serve",
            LIMIT,
            || match std::fs::read_to_string(&ready) {
                Ok(text) if text == pid => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )?;
        Ok(daemon)
    }

    fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.dir.join(api::SOCKET), LIMIT)?)
    }

    fn resident_kib(&self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let number = line.and_then(|l| l.split_whitespace().next());
        number.context("no VmRSS")?.parse().context("VmRSS")
    }

    fn threads(&self) -> Result<impl Iterator<Item = u32>> {
        let pid = self.child.id();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).context("its threads")?;
        Ok(tasks.filter_map(|t| t.ok()?.file_name().to_str()?.parse().ok()))
    }

    /// CPU time of all its threads, the worker's included.
    fn cpu_time(&self) -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for tid in self.threads()? {
            sum += process::cpu_time(self.child.id(), tid)?;
        }
        Ok(sum)
    }

    /// Times a call of its client, which is this thread.
    fn timed<T>(&self, call: impl FnOnce() -> T) -> Result<(Call, T)> {
        let pid = self.child.id();
        // What the worker waits for delays no call.
        let of_worker = |tid: &u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"));
            name.is_ok_and(|name| name.starts_with("iou-sqp-"))
        };
        let threads: Vec<u32> = self.threads()?.filter(|tid| !of_worker(tid)).collect();
        let waited = || -> Result<Duration> {
            let own = process::turns(std::process::id(), nix::unistd::gettid().as_raw() as u32)?;
            let mut sum = own.waited;
            for tid in &threads {
                sum += process::turns(pid, *tid)?.waited;
            }
            Ok(sum)
        };
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let before = waited()?;
        let begin = Instant::now();
        let answer = call();
        let took = begin.elapsed();
        let call = Call {
            ms: millis(took),
            waited_ms: millis(waited()?.saturating_sub(before)),
        };
        Ok((call, answer))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn request(pod: &Pod) -> AttachRequest {
    AttachRequest {
        id: format!("pod{}", pod.number),
        namespace: "bench".to_owned(),
        netns: path_of(&pod.netns),
        worker: "shared".to_owned(),
        bound: true,
        ..AttachRequest::default()
    }
}

/// The path by which another process reaches a namespace of this one.
fn path_of(netns: &Netns) -> String {
    let fd = netns.as_fd().as_raw_fd();
    format!("/proc/{}/fd/{fd}", std::process::id())
}

fn attach(daemon: &Daemon, client: &mut Client, pods: &[Pod]) -> Result<Vec<Call>> {
    let one = |pod: &Pod| {
        let (call, answer) = daemon.timed(|| {
            client.renew(LIMIT);
            client.attach(&request(pod))
        })?;
        match answer? {
            Attached::Pod(state) => ensure!(state.degraded.is_empty(), "{:?}", state.degraded),
            other => bail!("a pod was not attached: {other:?}"),
        }
        Ok(call)
    };
    pods.iter().map(one).collect()
}

fn detach(daemon: &Daemon, client: &mut Client, pods: &[Pod]) -> Result<Vec<Call>> {
    let one = |pod: &Pod| {
        let (call, was_there) = daemon.timed(|| {
            client.renew(LIMIT);
            client.detach("bench", &format!("pod{}", pod.number), false)
        })?;
        ensure!(was_there?, "pod {} was not attached", pod.number);
        Ok(call)
    };
    pods.iter().map(one).collect()
}

/// One packet of every pod after each silence: on stock veths and on polled ones, by turns, so that both see the same minutes.
fn first_packets(stock: &mut [Road], polled: &mut [Road]) -> Result<[Histogram<u64>; 2]> {
    let mut all = [Road::histogram()?, Road::histogram()?];
    for wake in 0..WAKES {
        // Not to await anything: the silence is what is measured.
        std::thread::sleep(SILENCE);
        for arm in [wake % 2, (wake + 1) % 2] {
            let roads = if arm == 0 { &mut *stock } else { &mut *polled };
            for road in roads {
                all[arm].record(road.one()?)?;
            }
        }
    }
    Ok(all)
}

pub(crate) fn measure(sandbox: &Sandbox, place: Placement, seconds: f64) -> Result<Sample> {
    std::thread::scope(|scope| {
        let measured = scope.spawn(|| {
            // The worker has the other CPU.
            process::set_affinity(0, &CpuSet::from_iter([place.client]))?;
            on_cpu(sandbox, place.server, seconds)
        });
        measured
            .join()
            .map_err(|_| anyhow::anyhow!("the bench of the daemon panicked"))?
    })
}

fn on_cpu(sandbox: &Sandbox, worker: CpuId, seconds: f64) -> Result<Sample> {
    let roads = |node: &Node, pods: &[Pod]| -> Result<Vec<Road>> {
        pods.iter().map(|p| Road::new(node, p, worker)).collect()
    };
    let make = |node: &Node| -> Result<Vec<Pod>> {
        (0..PODS).map(|number| node.pod(number, false)).collect()
    };
    let stock_node = Node::new()?;
    let stock_pods = make(&stock_node)?;
    let mut stock_roads = roads(&stock_node, &stock_pods)?;

    let node = Node::new()?;
    let pods = make(&node)?;
    let daemon = Daemon::start(&node, sandbox, worker)?;
    let mut client = daemon.client()?;
    let (first, rest) = pods.split_first().context("there are pods")?;
    // What is allocated once is not a pod's.
    attach(&daemon, &mut client, std::slice::from_ref(first))?;
    let before = daemon.resident_kib()?;
    let attaches = attach(&daemon, &mut client, rest)?;
    let kib_a_pod = (daemon.resident_kib()? - before) / f64::from(PODS - 1);

    let mut kbp_roads = roads(&node, &pods)?;
    // The first of all resolves nothing and has every cache cold: it is no wake-up.
    for road in stock_roads.iter_mut().chain(&mut kbp_roads) {
        road.one()?;
    }
    // A worker that has just fallen asleep still has the packets come its way.
    std::thread::sleep(SILENCE);
    let first = first_packets(&mut stock_roads, &mut kbp_roads)?;

    let (kept, gone) = pods.split_at(usize::from(SILENT));
    let detaches = detach(&daemon, &mut client, gone)?;
    std::thread::sleep(SILENCE);
    let (used, since) = (daemon.cpu_time()?, Instant::now());
    std::thread::sleep(2 * SILENCE);
    let silent_50_pods = (daemon.cpu_time()? - used).as_secs_f64() / since.elapsed().as_secs_f64();

    ensure!(!kept.is_empty(), "pods are left");
    let (road, stock) = (
        kbp_roads.first_mut().context("a road")?,
        stock_roads.first_mut().context("a road")?,
    );
    stock.singles(seconds)?;
    let stock = stock.latency();
    // In the middle of a ping-pong, so that the worker is awake.
    road.singles(seconds)?;
    drop(daemon);
    road.singles(seconds)?;
    Ok(Sample {
        attaches,
        detaches,
        kib_a_pod,
        silent_50_pods,
        first,
        killed: road.latency(),
        stock,
    })
}
