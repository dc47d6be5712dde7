//! The busy-poll counter, and with it the proof that a prepared veth is polled and a stock one is not.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kbp_kernel::ethtool::{Features, set_features};
use kbp_kernel::netns::Netns;
use kbp_kernel::netstat::busy_poll_rx_packets;
use kbp_kernel::sockopt::set_busy_poll;
use kbp_kernel::{CpuSet, Micros, cpu, process};

use crate::pair::{POD_MAC, Pair};

/// Packets after which one that was never polled will not be: where they are, on an idle machine nearly all are.
const MANY: u64 = 1_000;
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_new_namespace_has_polled_nothing() {
    let netns = Netns::create().expect("namespace");
    assert_eq!(busy_poll_rx_packets(&netns).expect("read"), 0);
}

/// Sends to a busy-polling socket in the pod until `enough` of its packets were polled, or until it has received
/// `all`; how many were polled.
fn polled(pair: &mut Pair, enough: u64, all: u64) -> u64 {
    let (host, pod) = (pair.host_link.index, pair.pod_link.index);
    pair.on_host(|batch| {
        batch
            .add_address(host, "10.7.0.1/24".parse().expect("prefix"), false)
            .add_neighbour(host, "10.7.0.2".parse().expect("address"), POD_MAC);
    })
    .expect("host address");
    pair.in_pod(|batch| {
        batch.add_address(pod, "10.7.0.2/24".parse().expect("prefix"), false);
    })
    .expect("pod address");

    let receiver = pair
        .pod
        .run(|| UdpSocket::bind("10.7.0.2:7000"))
        .expect("enter")
        .expect("bind");
    let sender = pair
        .host
        .run(|| UdpSocket::bind("10.7.0.1:0"))
        .expect("enter")
        .expect("bind");
    receiver
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("timeout");
    set_busy_poll(receiver.as_fd(), Micros(20_000)).expect("SO_BUSY_POLL");

    // On one CPU the packets would be handled where they are sent, before the receiver is back.
    let usable = cpu::usable().expect("CPUs");
    let mut cpus = usable.iter();
    let (Some(here), Some(there)) = (cpus.next(), cpus.next()) else {
        panic!("this test takes two CPUs");
    };
    let pin = |cpu| process::set_affinity(0, &CpuSet::from_iter([cpu])).expect("pin");
    let (done, received) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            pin(there);
            while !done.load(Ordering::Relaxed) {
                // A timeout is fine: the sender may be done.
                let one = receiver.recv(&mut [0; 64]).is_ok();
                received.fetch_add(one.into(), Ordering::Relaxed);
            }
        });
        pin(here);
        let deadline = Instant::now() + LIMIT;
        let mut count = 0;
        while count < enough && received.load(Ordering::Relaxed) < all {
            if Instant::now() > deadline {
                done.store(true, Ordering::Relaxed);
                panic!("{received:?} packets were received in {LIMIT:?}, {count} of them polled");
            }
            sender.send_to(&[1; 64], "10.7.0.2:7000").expect("send");
            // Time for the receiver to come back and poll.
            thread::sleep(Duration::from_micros(200));
            count = busy_poll_rx_packets(&pair.pod).expect("read");
        }
        done.store(true, Ordering::Relaxed);
        count
    })
}

#[test]
fn packets_of_a_prepared_veth_are_polled() {
    let mut pair = Pair::new();
    for (netns, link) in [(&pair.host, "kbphost"), (&pair.pod, "eth0")] {
        set_features(
            netns,
            link,
            Features {
                gro: true,
                tso: false,
            },
        )
        .expect("prepare");
    }
    let count = polled(&mut pair, 10, u64::MAX);
    assert!(count >= 10, "{count} packets polled");
}

#[test]
fn packets_of_a_stock_veth_are_not() {
    let mut pair = Pair::new();
    let count = polled(&mut pair, 1, MANY);
    assert_eq!(count, 0);
}

#[test]
fn gro_alone_does_not_let_packets_be_polled() {
    let mut pair = Pair::new();
    for (netns, link) in [(&pair.host, "kbphost"), (&pair.pod, "eth0")] {
        set_features(
            netns,
            link,
            Features {
                gro: true,
                tso: true,
            },
        )
        .expect("prepare");
    }
    let count = polled(&mut pair, 1, MANY);
    assert_eq!(count, 0);
}
