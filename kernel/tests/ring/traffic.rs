//! The thread really receives a veth's packets, in namespaces that are not its owner's.

use std::net::UdpSocket;

use kbp_kernel::NapiId;
use kbp_kernel::ethtool::{Features, set_features};
use kbp_kernel::napi::{NapiSettings, NetdevSocket};
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_kernel::ring::{PollRing, RingOptions};

use crate::pair::{HOST_MAC, POD_MAC, Pair};
use crate::{LIMIT, eventually, options};

/// A polled veth with a socket at each end.
pub(crate) struct Road {
    pub(crate) pair: Pair,
    pub(crate) host: UdpSocket,
    pub(crate) pod: UdpSocket,
}

impl Road {
    pub(crate) fn new() -> Self {
        let mut pair = Pair::new();
        let (host, pod) = (pair.host_link.index, pair.pod_link.index);
        let net = |text: &str| text.parse().expect("an address with prefix");
        let ip = |text: &str| text.parse().expect("an address");
        pair.on_host(|batch| {
            batch
                .add_address(host, net("10.0.0.1/24"), false)
                .add_neighbour(host, ip("10.0.0.2"), POD_MAC);
        })
        .expect("host end");
        pair.in_pod(|batch| {
            batch
                .add_address(pod, net("10.0.0.2/24"), false)
                .add_neighbour(pod, ip("10.0.0.1"), HOST_MAC);
        })
        .expect("pod end");
        let pollable = Features {
            gro: true,
            tso: false,
        };
        set_features(&pair.host, "kbphost", pollable).expect("host end");
        set_features(&pair.pod, "eth0", pollable).expect("pod end");
        let bind = |address: &str| UdpSocket::bind(address).expect("bind");
        let on_host = pair
            .host
            .run(|| bind("10.0.0.1:7"))
            .expect("host namespace");
        let in_pod = pair.pod.run(|| bind("10.0.0.2:7")).expect("pod namespace");
        on_host.connect("10.0.0.2:7").expect("connect");
        in_pod.connect("10.0.0.1:7").expect("connect");
        for socket in [&on_host, &in_pod] {
            socket.set_read_timeout(Some(LIMIT)).expect("timeout");
        }
        Self {
            pair,
            host: on_host,
            pod: in_pod,
        }
    }

    pub(crate) fn host_napi(&self) -> NapiId {
        let napis = NetdevSocket::open_in(&self.pair.host)
            .expect("netdev")
            .napis(self.pair.host_link.index);
        napis.expect("list")[0].id
    }

    fn pod_napi(&self) -> NapiId {
        let napis = NetdevSocket::open_in(&self.pair.pod)
            .expect("netdev")
            .napis(self.pair.pod_link.index);
        napis.expect("list")[0].id
    }

    /// Packets from the pod that a poller took, of `count` that all arrived.
    pub(crate) fn polled_from_pod(&self, count: usize) -> u64 {
        let before = busy_poll_rx_packets(&self.pair.host).expect("counter");
        for _ in 0..count {
            self.pod.send(b"x").expect("send");
            assert_eq!(self.host.recv(&mut [0; 8]).expect("receive"), 1);
        }
        busy_poll_rx_packets(&self.pair.host).expect("counter") - before
    }
}

#[test]
fn packets_go_through_the_thread_while_it_is_awake_and_through_softirq_otherwise() {
    let road = Road::new();
    assert_eq!(road.polled_from_pod(200), 0, "nobody polls yet");
    let mut ring = PollRing::new(&options(300)).expect("ring");
    ring.add(road.host_napi()).expect("add");
    assert_eq!(road.polled_from_pod(200), 0, "the ring still sleeps");
    for _ in 0..2 {
        eventually("the thread takes packets", || {
            ring.wake().expect("wake");
            road.polled_from_pod(100) > 0
        });
        eventually("asleep", || ring.is_asleep());
        assert_eq!(road.polled_from_pod(200), 0, "asleep, and no packet lost");
    }
    ring.remove(road.host_napi()).expect("remove");
    ring.wake().expect("wake");
    eventually("awake", || !ring.is_asleep());
    assert_eq!(
        road.polled_from_pod(200),
        0,
        "awake, but it was told to leave this one"
    );
}

#[test]
fn one_thread_polls_both_ends_in_two_namespaces() {
    let road = Road::new();
    let mut ring = PollRing::new(&options(60_000)).expect("ring");
    ring.add(road.host_napi()).expect("add");
    ring.add(road.pod_napi()).expect("add");
    ring.wake().expect("wake");
    let (host, pod) = (&road.pair.host, &road.pair.pod);
    eventually("packets at both ends", || {
        for _ in 0..50 {
            road.pod.send(b"x").expect("send");
            road.host.recv(&mut [0; 8]).expect("receive");
            road.host.send(b"x").expect("send");
            road.pod.recv(&mut [0; 8]).expect("receive");
        }
        let counters = [host, pod].map(|netns| busy_poll_rx_packets(netns).expect("counter"));
        counters.iter().all(|packets| *packets > 0)
    });
}

/// With `prefer` and the instance's own timers set, softirq leaves the packets to the poller: most of them, on an idle machine.
#[test]
fn a_preferring_thread_takes_more_than_half_of_the_packets() {
    let road = Road::new();
    let settings = NapiSettings {
        gro_flush_timeout: Some(20_000_000),
        defer_hard_irqs: Some(100),
        ..NapiSettings::default()
    };
    let mut netdev = NetdevSocket::open_in(&road.pair.host).expect("netdev");
    netdev.set(road.host_napi(), settings).expect("settings");
    let mut ring = PollRing::new(&RingOptions {
        prefer: true,
        ..options(60_000)
    })
    .expect("ring");
    ring.add(road.host_napi()).expect("add");
    ring.wake().expect("wake");
    // Other work on this CPU may hold the thread off for a while, so it gets a few tries.
    eventually("more than half", || road.polled_from_pod(400) > 200);
}

#[test]
fn a_device_that_goes_leaves_the_thread_polling_the_others() {
    let (first, second) = (Road::new(), Road::new());
    let mut ring = PollRing::new(&options(60_000)).expect("ring");
    ring.add(first.host_napi()).expect("add");
    ring.add(second.host_napi()).expect("add");
    ring.wake().expect("wake");
    let gone = first.host_napi();
    drop(first);
    eventually("the other is polled", || second.polled_from_pod(100) > 0);
    ring.remove(gone).expect("remove what is gone");
    assert!(!ring.is_asleep());
}
