//! A flood at full rate. On kernels whose veth does that (6.16), the qdisc that kbp gives the host end makes a full ring of the pod end push back
//! instead of dropping; without the qdisc the same flood loses a few in a hundred. Counts only; times would be the machine's.

use std::io::ErrorKind;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kbp_kernel::link::{Batch, RouteSocket, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::process::Scheduling;
use kbp_kernel::ring::{PollRing, RingOptions};
use kbp_kernel::{Error, MacAddr, Mtu, NapiId, cpu};
use kbp_tests::not_tested;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::pollable::napis;
use crate::traffic::{any, ip, udp};
use crate::world::{self, World, address, command};

const DATAGRAMS: usize = 100_000;
/// Room for all of them in the receiver's socket: a slow program is not the link's fault.
const ROOM: usize = 256 << 20;
/// After that long without one nothing comes any more, once all are sent: a sender that waits for its CPU is not the
/// link's fault, either.
const SILENCE: Duration = Duration::from_secs(5);

/// Polls a NAPI on another CPU than the sender's, as kbp's workers do: only then can the sender be the faster one.
/// None where this kernel has no such ring, or there is no other CPU.
fn worker(napi: NapiId) -> Option<PollRing> {
    let options = RingOptions {
        cpu: cpu::usable().expect("CPUs").iter().last()?,
        scheduling: Scheduling::Other(0),
        lease: Duration::from_secs(1),
        prefer: false,
    };
    match PollRing::new(&options) {
        Ok(mut ring) => {
            ring.add(napi).expect("add the NAPI");
            Some(ring)
        }
        Err(Error::Unsupported { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// Sends them as fast as the kernel takes them, while `napi` is polled; how many arrived.
fn flood(from: &Netns, to: &Netns, address: IpAddr, napi: NapiId) -> usize {
    let server = udp(to, (address, 0).into());
    setsockopt(&server.as_fd(), sockopt::RcvBufForce, &ROOM).expect("SO_RCVBUFFORCE (needs root)");
    let target = server.local_addr().expect("an address");
    let client = udp(from, any(address));
    client.connect(target).expect("connect");
    // Before a neighbour has answered who has the address the kernel keeps a few hundred packets for it and drops the rest.
    // And a new link may take a second to notice that the other one is up.
    let pause = Some(Duration::from_millis(50));
    server.set_read_timeout(pause).expect("set a timeout");
    let arrives = (0..400).any(|_| {
        client.send(b"first").expect("send a first datagram");
        server.recv(&mut [0; 16]).is_ok()
    });
    assert!(arrives, "nothing arrives at {address}");
    server
        .set_read_timeout(Some(SILENCE))
        .expect("set a timeout");
    let worker = worker(napi);
    let all_sent = AtomicBool::new(false);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&server, &all_sent));
        let sender = scope.spawn(move || {
            let first = cpu::usable().expect("CPUs").iter().next().expect("a CPU");
            let mut mask = CpuSet::new();
            mask.set(first.0 as usize).expect("a CPU");
            sched_setaffinity(Pid::from_raw(0), &mask).expect("pin the sender");
            for n in 0..DATAGRAMS {
                if let Some(worker) = worker.as_ref().filter(|_| n % 1000 == 0) {
                    worker.wake().expect("wake the worker");
                }
                let sent = client.send(&n.to_ne_bytes());
                sent.unwrap_or_else(|error| panic!("send datagram {n}: {error}"));
            }
        });
        let sent = sender.join();
        all_sent.store(true, Ordering::Release);
        sent.expect("the sender");
        receiver.join().expect("the receiver")
    })
}

fn receive(server: &UdpSocket, all_sent: &AtomicBool) -> usize {
    let mut received = 0;
    while received < DATAGRAMS {
        let last = all_sent.load(Ordering::Acquire);
        match server.recv(&mut [0; 16]) {
            // Not those before it, which may come late.
            Ok(len) => received += usize::from(len == size_of::<usize>()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && last => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("receive: {error}"),
        }
    }
    received
}

/// What the links and qdiscs of a namespace have dropped so far, those that have.
fn drops(netns: &Netns) -> Vec<(String, u64)> {
    let json = |program, arguments: &[&str]| -> Value {
        let text = command(netns, program, arguments);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    };
    let links = json("ip", &["-json", "-statistics", "link", "show"]);
    let qdiscs = json("tc", &["-json", "-statistics", "qdisc", "show"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    let of_links = links.as_array().into_iter().flatten().flat_map(|link| {
        ["rx", "tx"].map(|way| {
            let name = format!("{} {way}", text(&link["ifname"]));
            (name, count(&link["stats64"][way]["dropped"]))
        })
    });
    let of_qdiscs = qdiscs.as_array().into_iter().flatten().map(|qdisc| {
        let name = format!("{} of {}", text(&qdisc["kind"]), text(&qdisc["dev"]));
        (name, count(&qdisc["drops"]))
    });
    of_links.chain(of_qdiscs).filter(|(_, n)| *n > 0).collect()
}

/// What UDP says of itself in a namespace.
fn udp_counters(netns: &Netns) -> String {
    let files = ["/proc/thread-self/net/snmp", "/proc/thread-self/net/snmp6"];
    let text = command(netns, "cat", &files);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("Udp:") || line.starts_with("Udp6"))
        .collect();
    lines.join("; ")
}

/// Whether veth pushes back on this kernel, as far as a flood over a pair of our own shows it.
fn pushes_back() -> bool {
    let [here, there] = ["here", "there"].map(world::Pod::new);
    let route = |pod: &world::Pod| RouteSocket::open_in(&pod.netns).expect("open a socket");
    let (mac_here, mac_there) = (MacAddr([2, 0, 0, 0, 7, 1]), MacAddr([2, 0, 0, 0, 7, 2]));
    let pair = VethPair {
        host_name: "eth0",
        host_mac: mac_here,
        pod_name: "eth0",
        pod_mac: mac_there,
        pod_netns: &there.netns,
        mtu: Mtu(1500),
        tx_queue_len: 1000,
    };
    let mut batch = Batch::new();
    route(&here)
        .execute(batch.create_veth(&pair))
        .expect("create a pair");
    for (pod, own, other, mac) in [
        (&here, "10.9.0.1/24", "10.9.0.2", mac_there),
        (&there, "10.9.0.2/24", "10.9.0.1", mac_here),
    ] {
        let mut socket = route(pod);
        let link = socket.link_by_name("eth0").expect("read").expect("it");
        let own = own.parse().expect("a range");
        socket
            .execute(
                Batch::new()
                    .set_up(link.index)
                    .add_address(link.index, own, false)
                    .add_neighbour(link.index, ip(other), mac)
                    .set_pfifo(link.index, 1000),
            )
            .expect("set it up");
        let pollable = kbp_kernel::ethtool::Features {
            gro: true,
            tso: false,
        };
        kbp_kernel::ethtool::set_features(&pod.netns, "eth0", pollable).expect("features");
    }
    let Some(napi) = first_napi(&there.netns, "eth0") else {
        return false;
    };
    flood(&here.netns, &there.netns, ip("10.9.0.2"), napi) == DATAGRAMS
}

fn first_napi(netns: &Netns, name: &str) -> Option<NapiId> {
    napis(netns, name)?.first().copied()
}

fn nothing_is_dropped(more: Value) {
    let world = World::new();
    let (a, b) = (world::Pod::new("pod-a"), world::Pod::new("pod-b"));
    let config = world.config("1.0.0", more);
    world.add(&a, &config);
    let to = world.add(&b, &config);
    let Some(napi) = first_napi(&b.netns, "eth0") else {
        // Kernels list NAPI instances since 6.8, and push back since 6.16.
        return not_tested("a flood without loss: this kernel's veth does not push back");
    };
    let all = || [&world.host, &a.netns, &b.netns].map(drops);
    for n in [0, 1] {
        let before = all();
        let received = flood(&a.netns, &b.netns, address(&to, n), napi);
        let after = all();
        if received == DATAGRAMS && after == before {
            continue;
        }
        if !pushes_back() {
            return not_tested("a flood without loss: this kernel's veth does not push back");
        }
        panic!(
            "{}: {received} of {DATAGRAMS} arrived; dropped by host, pod and pod before {before:?} and after {after:?}; {}",
            address(&to, n),
            udp_counters(&b.netns),
        );
    }
}

#[test]
fn a_flood_from_pod_to_pod_in_mode_routed_loses_nothing() {
    nothing_is_dropped(json!({}));
}

#[test]
fn a_flood_from_pod_to_pod_in_mode_bridge_loses_nothing() {
    nothing_is_dropped(json!({ "mode": "bridge", "isGateway": true }));
}
