//! Uplinks that are virtio-net cards: `eth0` is the node's, and at the other end of its wire `eth1` is the world.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kbp_kernel::link::RouteSocket;
use kbp_kernel::napi::{NetdevSocket, Threaded};
use kbp_kernel::netns::Netns;
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_poller::api;
use kbp_poller::client::Client;
use kbp_poller::config::Config;
use kbp_poller::engine::Engine;
use kbp_poller::uplink::Uplink;
use kbp_tests::binaries::kbp_binary;
use kbp_tests::command::{self, Running};

use crate::known::Known;
use crate::node::{any_cpu, ip, wait_until};

const NODE: &str = "10.77.0.1";

/// Datagrams from the world until it is dropped.
struct Flow {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flow {
    fn from(world: &Netns) -> Self {
        let sink = UdpSocket::bind((NODE, 7)).expect("sink");
        let source = world.run(|| UdpSocket::bind("10.77.0.2:0")).expect("enter");
        let source = source.expect("source");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Nobody reads: what counts is who took it off the card.
                let _ = source.send_to(&[0; 64], (NODE, 7));
                std::thread::sleep(Duration::from_micros(200));
            }
            drop(sink);
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("flow");
        }
    }
}

fn config_file(dir: &Path, config: &str) -> PathBuf {
    let path = dir.join("config.toml");
    let text = format!(
        "state-dir = {:?}\ncpus = \"{}\"\nuplinks = [\"eth0\"]\n{config}",
        dir.join("run"),
        any_cpu()
    );
    std::fs::write(&path, text).expect("config");
    path
}

fn uplink(dir: &Path, config: &str) -> (Engine, Uplink) {
    let path = config_file(dir, config);
    let config = Config::read(&path).expect("config");
    let engine = Engine::start().expect("engine");
    let uplink = engine.uplink(&config.uplinks[0], &config).expect("uplink");
    (engine, uplink)
}

/// The node, and the world at the other end of its wire; made once in the life of a machine.
fn wire() -> (Netns, Netns) {
    let node = Netns::current().expect("own namespace");
    let path = Path::new("/run/netns/world");
    let is_new = !path.exists();
    if is_new {
        let added = Command::new("ip").args(["netns", "add", "world"]).status();
        assert!(added.expect("ip").success());
    }
    let world = Netns::open(path).expect("namespace");
    if is_new {
        ip(&node, "link set eth1 netns world");
        for (netns, link, address) in [(&node, "eth0", NODE), (&world, "eth1", "10.77.0.2")] {
            ip(netns, &format!("address add {address}/24 dev {link}"));
            ip(netns, &format!("link set {link} up"));
        }
    }
    (node, world)
}

fn threaded(node: &Netns) -> Vec<Threaded> {
    let link = RouteSocket::open_in(node).and_then(|mut s| s.link_by_name("eth0"));
    let link = link.expect("ask").expect("eth0").index;
    let napis = NetdevSocket::open_in(node).and_then(|mut s| s.napis(link));
    napis
        .expect("list")
        .iter()
        .filter_map(|n| n.threaded)
        .collect()
}

/// Waits until the packets of busy polling are more.
fn wait_polled(node: &Netns) {
    let start = busy_poll_rx_packets(node).expect("counter");
    wait_until("packets to be polled off the card", || {
        (busy_poll_rx_packets(node).expect("counter") >= start + 10).then_some(())
    });
}

/// Waits until they are not.
fn wait_left(node: &Netns) {
    let count = || busy_poll_rx_packets(node).expect("counter");
    let mut last = (count(), Instant::now());
    wait_until("interrupts to have the card back", || {
        let now = count();
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_millis(200)).then_some(())
    });
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn a_virtio_card_is_polled_in_a_guest() {
    let known = Known::here();
    let (node, world) = wire();
    let dir = tempfile::tempdir().expect("directory");
    let flow = Flow::from(&world);

    let (engine, uplink_) = uplink(dir.path(), "");
    if !known.sqpoll {
        let told = uplink_.state().degraded.expect("a reason");
        let why = if known.napi_ids {
            "not on this machine"
        } else {
            "no netlink family netdev"
        };
        assert!(told.contains(why), "{told}");
        assert_eq!(uplink_.state().worker, None);
        return;
    }
    let state = uplink_.state();
    assert_eq!(state.degraded, None);
    assert_eq!(state.worker.expect("a worker").kind, "sqpoll");
    wait_polled(&node);
    ip(&node, "link set eth0 down");
    wait_until("the news", || uplink_.state().degraded);
    ip(&node, "link set eth0 up");
    wait_polled(&node);
    drop((uplink_, engine));
    wait_left(&node);

    if known.kthread {
        let (_engine, uplink_) = uplink(dir.path(), "worker = \"dedicated\"\n");
        let state = uplink_.state();
        assert_eq!(state.degraded, None);
        assert_eq!(state.worker.expect("a worker").kind, "kthread");
        let polls = || threaded(&node).contains(&Threaded::BusyPoll);
        wait_until("the card's own thread", || polls().then_some(()));
        drop(uplink_);
        assert!(!polls(), "the card is given back");
    }
    drop(flow);
}

const LIMIT: Duration = Duration::from_secs(60);

/// The whole way: the config file, the daemon, its API, `kbpctl status`, the metrics.
#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn the_daemon_polls_a_virtio_card_and_says_so_in_a_guest() {
    let known = Known::here();
    let (node, world) = wire();
    let dir = tempfile::tempdir().expect("directory");
    let run = dir.path().join("run");
    let config = config_file(dir.path(), "");
    let mut serve = Command::new(kbp_binary("kbp-poller").expect("kbp-poller"));
    serve.arg("serve").arg("--config").arg(&config);
    let mut daemon = Running::start(serve).expect("start kbp-poller");
    wait_until("the daemon to serve", || {
        run.join(api::READY).exists().then_some(())
    });
    let uplink = || {
        let mut client = Client::connect(&run.join(api::SOCKET), LIMIT).expect("connect");
        client.uplinks().expect("list").remove(0)
    };
    let status = || {
        let mut status = Command::new(kbp_binary("kbpctl").expect("kbpctl"));
        status.args(["status", "--json", "--state-dir"]).arg(&run);
        let output = command::run(status, LIMIT).expect("kbpctl");
        let json: serde_json::Value = serde_json::from_str(&output.stdout).expect("JSON");
        json["uplinks"][0].clone()
    };
    let metric = || {
        let mut stream = UnixStream::connect(run.join("metrics.sock")).expect("connect");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
            .expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read");
        let name = "kbp_uplink_polled_napis{interface=\"eth0\"} ";
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.parse::<usize>().expect("a number")
    };
    if known.sqpoll {
        let flow = Flow::from(&world);
        let told = uplink();
        assert_eq!(told.degraded, "");
        assert_eq!(told.worker.expect("a worker").kind, "sqpoll");
        assert_eq!(status()["worker"]["kind"], "sqpoll");
        assert_eq!(metric(), told.napis.len());
        wait_polled(&node);
        ip(&node, "link set eth0 down");
        wait_until("the news", || {
            uplink().degraded.contains("is down").then_some(())
        });
        assert_eq!(metric(), 0);
        ip(&node, "link set eth0 up");
        wait_polled(&node);
        assert_eq!(uplink().degraded, "");
        drop(flow);
    } else {
        let reason = uplink().degraded;
        assert_ne!(reason, "");
        assert_eq!(status()["degraded"], reason);
        assert_eq!(metric(), 0);
    }
    let sigterm = 15;
    assert!(kbp_kernel::process::kill(daemon.pid(), sigterm).expect("signal"));
    daemon.wait(LIMIT).expect("the end of the daemon");
    assert!(status().is_null(), "no uplink without a daemon");
}
