//! A node with one pod: two namespaces with a veth between them, and a state directory. All of it vanishes with it.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::link::{Batch, Link, RouteSocket, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::{CpuId, CpuSet, MacAddr, Mtu, cpu, netstat, process, sockopt};
use kbp_poller::attach::{AttachRequest, Attachment, Outcome, attach};
use kbp_poller::config::Config;
use kbp_poller::policy::{Policy, WorkerPolicy};
use kbp_poller::window::Window;
use kbp_poller::worker::LEASE;

pub(crate) const HOST_ADDRESS: &str = "10.200.0.1/30";
const POD_ADDRESS: &str = "10.200.0.2/30";

/// Longest wait for anything; generous, since other tests use the same CPUs. The CPUs of an emulated machine are slow and may
/// run by turns, and a worker gets a packet only while it runs beside the sender.
fn bound() -> Duration {
    let emulated = std::env::var_os("KBP_SERIES").is_some();
    Duration::from_secs(if emulated { 120 } else { 60 })
}

pub(crate) struct Node {
    pub(crate) host: Netns,
    pub(crate) pod: Netns,
    dir: tempfile::TempDir,
}

impl Node {
    /// A node whose pod has a veth that is up and as a CNI plugin without an idea of kbp makes it.
    pub(crate) fn new() -> Self {
        let node = Self::empty();
        node.add_veth("vhost0", "eth0", 1);
        node.address("vhost0", "eth0");
        node
    }

    /// A node whose pod has nothing but its loopback.
    pub(crate) fn empty() -> Self {
        Self {
            host: Netns::create().expect("host namespace"),
            pod: Netns::create().expect("pod namespace"),
            dir: tempfile::Builder::new()
                .prefix("kbp-poller-test-")
                .tempdir()
                .expect("directory"),
        }
    }

    /// Adds a pair between host and pod, both ends up.
    pub(crate) fn add_veth(&self, host_name: &str, pod_name: &str, number: u8) {
        let mut batch = Batch::new();
        batch.create_veth(&VethPair {
            host_name,
            host_mac: MacAddr([2, 0, 0, 0, number, 1]),
            pod_name,
            pod_mac: MacAddr([2, 0, 0, 0, number, 2]),
            pod_netns: &self.pod,
            mtu: Mtu(1500),
            tx_queue_len: 0,
        });
        execute(&self.host, &batch);
        let mut batch = Batch::new();
        batch.set_up(self.pod_link(pod_name).index);
        execute(&self.pod, &batch);
    }

    pub(crate) fn address(&self, host_name: &str, pod_name: &str) {
        for (netns, name, address) in [
            (&self.host, host_name, HOST_ADDRESS),
            (&self.pod, pod_name, POD_ADDRESS),
        ] {
            let mut batch = Batch::new();
            let index = link(netns, name).expect("link").index;
            batch.add_address(index, address.parse().expect("address"), false);
            execute(netns, &batch);
        }
    }

    pub(crate) fn host_link(&self, name: &str) -> Link {
        link(&self.host, name).expect("host link")
    }

    pub(crate) fn pod_link(&self, name: &str) -> Link {
        link(&self.pod, name).expect("pod link")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A config file of this node with `text` in it.
    pub(crate) fn config_file(&self, text: &str) -> PathBuf {
        let path = self.dir.path().join("config.toml");
        let state_dir = format!("state-dir = {:?}\n", self.state_dir());
        std::fs::write(&path, state_dir + text).expect("write config");
        path
    }

    pub(crate) fn config(&self, text: &str) -> Config {
        Config::read(&self.config_file(text)).expect("config")
    }

    /// Asks for a worker that gets its share of a CPU however busy the machine is; an idle-class one gets none of a
    /// CPU that is never idle.
    pub(crate) fn dedicated(&self, id: &str) -> AttachRequest {
        let config = format!("cpus = \"{}\"", any_cpu());
        self.request(id, WorkerPolicy::Dedicated, &config)
    }

    /// What a shim would ask for, with `text` in the node's config.
    pub(crate) fn request(&self, id: &str, worker: WorkerPolicy, config: &str) -> AttachRequest {
        AttachRequest {
            id: id.to_owned(),
            namespace: "test".to_owned(),
            netns: self.pod.try_clone().expect("handle"),
            policy: Policy {
                worker,
                ..Policy::default()
            },
            cpuset: None,
            window: Window {
                micros: None,
                reason: "none in this test".to_owned(),
            },
            degraded: Vec::new(),
            config: self.config(config),
        }
    }

    /// Attaches from the host's namespace.
    pub(crate) fn attach(&self, request: AttachRequest) -> kbp_poller::Result<Outcome> {
        self.host.run(|| attach(request)).expect("enter the host")
    }

    /// Attaches what must be attachable.
    pub(crate) fn attached(&self, request: AttachRequest) -> Attachment {
        match self.attach(request).expect("attach") {
            Outcome::Attached(attachment) => attachment,
            other => panic!("not attached: {other:?}"),
        }
    }

    /// Files below the state directory, relative to it.
    pub(crate) fn state_files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for dir in ["pods", "cpu"] {
            let Ok(entries) = std::fs::read_dir(self.state_dir().join(dir)) else {
                continue;
            };
            for entry in entries {
                let name = entry.expect("entry").file_name();
                files.push(format!("{dir}/{}", name.display()));
            }
        }
        files
    }

    /// Starts a stream of datagrams from the pod to the host, on another CPU than [`any_cpu`]: a worker on the sender's
    /// own CPU never runs while a packet is sent, so softirq would take them all.
    pub(crate) fn traffic(&self) -> Traffic {
        let any = (Ipv4Addr::UNSPECIFIED, 0);
        let sink = self.host.run(|| UdpSocket::bind(any)).expect("enter");
        let sink = sink.expect("socket on the host");
        let source = self.pod.run(|| UdpSocket::bind(any)).expect("enter");
        let source = source.expect("socket in the pod");
        let host: ipnet::IpNet = HOST_ADDRESS.parse().expect("address");
        let port = sink.local_addr().expect("address").port();
        // The kernel notes the CPU of a packet for connected sockets only.
        source.connect((host.addr(), port)).expect("connect");
        let from = source.local_addr().expect("address");
        sink.connect(from).expect("connect");
        sink.set_nonblocking(true)
            .expect("a sink that never blocks");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let taken = Arc::new(AtomicU64::new(0));
        let took = Arc::clone(&taken);
        let elsewhere: CpuSet = cpu::usable()
            .expect("cpus")
            .iter()
            .filter(|c| *c != any_cpu())
            .collect();
        assert!(!elsewhere.is_empty(), "this test takes two CPUs");
        let thread = std::thread::spawn(move || {
            process::set_affinity(0, &elsewhere).expect("pin the sender");
            while !stopped.load(Ordering::Relaxed) {
                // While the link is down there is no route: go on when it is up again.
                let _ = source.send(&[0; 64]);
                while sink.recv(&mut [0; 64]).is_ok() {
                    let cpu = sockopt::incoming_cpu(sink.as_fd()).expect("ask");
                    took.fetch_add(u64::from(cpu == Some(any_cpu())), Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Traffic {
            stop,
            taken,
            thread: Some(thread),
        }
    }

    /// Packets that were busy-polled on the host's side.
    pub(crate) fn polled(&self) -> u64 {
        netstat::busy_poll_rx_packets(&self.host).expect("counter")
    }

    /// Waits until the worker polls, and still does when a lease that nobody has renewed would be over.
    pub(crate) fn wait_kept_polling(&self) {
        self.wait_polled(1);
        let over = Instant::now() + 2 * LEASE;
        wait_until("a lease to be over", || {
            (Instant::now() >= over).then_some(())
        });
        self.wait_polled(1);
    }

    /// Waits until the worker has polled `more` packets from now on. On a busy machine it gets few, since it takes those only that come while
    /// it has its CPU.
    pub(crate) fn wait_polled(&self, more: u64) {
        let start = self.polled();
        wait_until("packets to be polled", || {
            (self.polled() >= start + more).then_some(())
        });
    }
}

/// Datagrams until it is dropped.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    taken: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Traffic {
    /// Waits until `more` packets from now on were handled on [`any_cpu`], where they are not sent: by a worker there. Holds
    /// for every kind of worker, while a NAPI's own thread is in none of the counters of busy polling.
    pub(crate) fn wait_taken(&self, more: u64) {
        let start = self.taken.load(Ordering::Relaxed);
        wait_until("packets to be handled on the worker's CPU", || {
            (self.taken.load(Ordering::Relaxed) >= start + more).then_some(())
        });
    }

    /// Waits until nothing is handled on [`any_cpu`] any more.
    pub(crate) fn wait_left(&self) {
        let mut last = (self.taken.load(Ordering::Relaxed), Instant::now());
        wait_until("softirq to have the packets back", || {
            let now = self.taken.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            (last.1.elapsed() > Duration::from_millis(100)).then_some(())
        });
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("traffic");
        }
    }
}

/// Polls for something that happens by itself.
pub(crate) fn wait_until<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> T {
    let bound = bound();
    let until = Instant::now() + bound;
    loop {
        if let Some(value) = there() {
            return value;
        }
        assert!(
            Instant::now() < until,
            "waited {bound:?} in vain for {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until a polling thread uses no CPU any more.
pub(crate) fn wait_parked(tid: u32) {
    let used = || process::cpu_time(tid, tid).expect("cpu time");
    // It polls without a pause while it is awake, so a span without any use means that it sleeps.
    let mut last = (used(), Instant::now());
    wait_until("the worker to park", || {
        let now = used();
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_millis(100)).then_some(())
    });
}

/// Whether there is a thread of that id, of this process or of one beside it.
pub(crate) fn thread_lives(tid: u32) -> bool {
    Path::new(&format!("/proc/{tid}")).exists()
}

/// A CPU that this process may use.
pub(crate) fn any_cpu() -> CpuId {
    let cpus = cpu::usable().expect("cpus");
    cpus.iter().last().expect("a CPU")
}

pub(crate) fn execute(netns: &Netns, batch: &Batch) {
    let mut socket = RouteSocket::open_in(netns).expect("socket");
    socket.execute(batch).expect("batch");
}

pub(crate) fn link(netns: &Netns, name: &str) -> Option<Link> {
    let mut socket = RouteSocket::open_in(netns).expect("socket");
    socket.link_by_name(name).expect("ask")
}

/// Runs `ip` in a namespace: for the kinds of links that kbp itself never makes.
pub(crate) fn ip(netns: &Netns, args: &str) {
    let status = netns
        .run(|| Command::new("ip").args(args.split(' ')).status())
        .expect("enter")
        .expect("run ip (package iproute2)");
    assert!(status.success(), "ip {args}: {status}");
}
