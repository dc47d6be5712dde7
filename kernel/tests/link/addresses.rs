//! Addresses and permanent neighbours.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use kbp_kernel::{Error, IfIndex};

use crate::pair::{HOST_MAC, POD_MAC, Pair};

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn addresses_of_both_families_are_usable_at_once() {
    let mut pair = Pair::new();
    let index = pair.pod_link.index;
    pair.in_pod(|batch| {
        batch
            .add_address(index, net("10.88.0.2/32"), true)
            .add_address(index, net("fd00:88::2/128"), true);
    })
    .expect("add");
    // A tentative IPv6 address, one still under duplicate address detection, cannot be bound.
    pair.pod
        .run(|| {
            std::net::UdpSocket::bind("[fd00:88::2]:0").expect("bind v6 without waiting");
            std::net::UdpSocket::bind("10.88.0.2:0").expect("bind v4");
        })
        .expect("enter");
    let addresses = pair.pod_socket.addresses(index).expect("list");
    assert!(addresses.contains(&net("10.88.0.2/32")), "{addresses:?}");
    assert!(addresses.contains(&net("fd00:88::2/128")), "{addresses:?}");
}

#[test]
fn addresses_become_local_and_others_are_not() {
    let mut pair = Pair::new();
    let index = pair.pod_link.index;
    let own = ["10.88.0.2", "fd00:88::2"].map(ip);
    for address in own {
        assert!(
            !pair.pod_socket.is_local(address).expect("ask"),
            "{address} is there too early"
        );
    }
    pair.in_pod(|batch| {
        batch
            .add_address(index, net("10.88.0.2/24"), false)
            .add_address(index, net("fd00:88::2/64"), false);
    })
    .expect("add");
    assert!(
        pair.pod_socket.is_local(own[0]).expect("ask"),
        "the kernel adds IPv4 at once"
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while !pair.pod_socket.is_local(own[1]).expect("ask") {
        assert!(
            Instant::now() < deadline,
            "{} does not become local",
            own[1]
        );
        std::thread::yield_now();
    }
    // On the same link, but the other end's; and not on any link.
    for address in ["10.88.0.3", "fd00:88::3", "192.0.2.1", "2001:db8::1"].map(ip) {
        assert!(
            !pair.pod_socket.is_local(address).expect("ask"),
            "{address} is not local"
        );
    }
}

#[test]
fn only_the_links_own_addresses_are_listed() {
    let mut pair = Pair::new();
    let (index, loopback) = (pair.pod_link.index, IfIndex(1));
    pair.in_pod(|batch| {
        batch
            .set_up(loopback)
            .add_address(index, net("10.88.0.2/24"), false);
    })
    .expect("add");
    let on_loopback = pair.pod_socket.addresses(loopback).expect("list");
    assert_eq!(on_loopback.iter().filter(|a| a.addr().is_ipv4()).count(), 1);
    assert!(on_loopback.contains(&net("127.0.0.1/8")), "{on_loopback:?}");
    let on_link = pair.pod_socket.addresses(index).expect("list");
    assert!(!on_link.contains(&net("127.0.0.1/8")), "{on_link:?}");
    assert!(on_link.contains(&net("10.88.0.2/24")), "{on_link:?}");
}

#[test]
fn the_prefix_route_comes_unless_it_is_refused() {
    for (refused, expected) in [(false, 1), (true, 0)] {
        let mut pair = Pair::new();
        let index = pair.pod_link.index;
        pair.in_pod(|batch| {
            batch.add_address(index, net("10.88.0.2/24"), refused);
        })
        .expect("add");
        let routes = pair.pod_socket.routes().expect("list");
        let prefix = routes
            .iter()
            .filter(|r| r.destination == net("10.88.0.0/24"));
        assert_eq!(prefix.count(), expected, "{routes:?}");
    }
}

#[test]
fn an_address_that_is_there_is_refused_by_name() {
    let mut pair = Pair::new();
    let index = pair.pod_link.index;
    for (address, text) in [
        ("10.88.0.2/32", "10.88.0.2/32"),
        ("fd00::2/64", "fd00::2/64"),
    ] {
        let mut add = || {
            pair.in_pod(|batch| {
                batch.add_address(index, net(address), true);
            })
        };
        add().expect("first");
        let error = add().expect_err("twice");
        assert_eq!(error.errno(), Some(libc::EEXIST));
        assert!(
            error
                .to_string()
                .contains(&format!("add address {text} to link")),
            "{error}"
        );
    }
}

#[test]
fn addresses_of_a_missing_link_are_an_error() {
    let mut pair = Pair::new();
    let error = pair
        .pod_socket
        .addresses(IfIndex(4_000_000))
        .expect_err("no such link");
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert_eq!(error.to_string(), "link 4000000 not found");
}

#[test]
fn a_permanent_neighbour_is_added_and_replaced() {
    let mut pair = Pair::new();
    let index = pair.pod_link.index;
    for mac in [HOST_MAC, POD_MAC] {
        pair.in_pod(|batch| {
            batch
                .add_neighbour(index, ip("169.254.1.1"), mac)
                .add_neighbour(index, ip("fe80::1"), mac);
        })
        .expect("add");
        let mut neighbours = pair.pod_socket.permanent_neighbours(index).expect("list");
        neighbours.sort();
        assert_eq!(neighbours, [(ip("169.254.1.1"), mac), (ip("fe80::1"), mac)]);
    }
    // Those of the other end are its own.
    let host = pair
        .host_socket
        .permanent_neighbours(pair.host_link.index)
        .expect("list");
    assert_eq!(host, []);
}
