//! Link events.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use kbp_kernel::IfIndex;
use kbp_kernel::link::{LinkEvent, LinkEvents, VethPair};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::pair::{Pair, veth};

/// Events until `done`, with a bound.
fn wait_for(events: &mut LinkEvents, done: impl Fn(&HashSet<LinkEvent>) -> bool) {
    let mut seen = HashSet::new();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        seen.extend(events.read().expect("read"));
        if done(&seen) {
            return;
        }
        assert!(Instant::now() < deadline, "{seen:?}");
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(100u8)).expect("poll");
    }
}

#[test]
fn changes_and_removal_are_announced() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    let mut events = LinkEvents::subscribe(&pair.host).expect("subscribe");
    // Nothing but what the kernel tells late: a worker of its own announces the carrier.
    let early = events.read().expect("read");
    assert!(
        early.iter().all(|e| *e == LinkEvent::Changed(index)),
        "{early:?}"
    );

    pair.on_host(|batch| {
        batch.set_down(index);
    })
    .expect("down");
    wait_for(&mut events, |seen| {
        seen.contains(&LinkEvent::Changed(index))
    });

    pair.on_host(|batch| {
        batch.delete_link(index);
    })
    .expect("delete");
    wait_for(&mut events, |seen| {
        seen.contains(&LinkEvent::Removed(index))
    });
}

#[test]
fn a_link_that_leaves_a_bridge_is_not_gone() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    let ip = |arguments: &str| {
        let run = || {
            Command::new("ip")
                .args(arguments.split_whitespace())
                .status()
        };
        let status = pair.host.run(run).expect("enter").expect("run ip");
        assert!(status.success(), "ip {arguments}");
    };
    ip("link add br0 type bridge");
    ip("link set kbphost master br0");
    let bridge = pair
        .host_socket
        .link_by_name("br0")
        .expect("ask")
        .expect("br0");
    let port = pair
        .host_socket
        .link_by_index(index)
        .expect("ask")
        .expect("port");
    assert_eq!(port.master, Some(bridge.index));

    let mut events = LinkEvents::subscribe(&pair.host).expect("subscribe");
    ip("link set kbphost nomaster");
    // The end of the announcements: they come in order.
    ip("link add last type bridge");
    let last: IfIndex = pair
        .host_socket
        .link_by_name("last")
        .expect("ask")
        .expect("last")
        .index;
    wait_for(&mut events, |seen| {
        assert!(!seen.contains(&LinkEvent::Removed(index)), "{seen:?}");
        seen.contains(&LinkEvent::Changed(last)) && seen.contains(&LinkEvent::Changed(index))
    });
}

#[test]
fn what_the_socket_could_not_hold_is_told() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    let mut events = LinkEvents::subscribe(&pair.host).expect("subscribe");
    // About 1.5 KiB an event, and twice as many events as fit the default 208 KiB.
    pair.on_host(|batch| {
        for n in 0..500 {
            batch.set_alias(index, &format!("alias {n}"));
        }
    })
    .expect("change often");
    let seen = events.read().expect("read");
    assert_eq!(seen.last(), Some(&LinkEvent::Lost));
    // And goes on.
    pair.on_host(|batch| {
        batch.set_down(index);
    })
    .expect("down");
    wait_for(&mut events, |seen| {
        seen.contains(&LinkEvent::Changed(index))
    });
}

#[test]
fn only_the_links_asked_for_are_announced() {
    let mut pair = Pair::new();
    let pod = pair.pod.try_clone().expect("clone");
    pair.on_host(|batch| {
        batch.create_veth(&VethPair {
            pod_name: "eth1",
            ..veth("one", &pod)
        });
        batch.create_veth(&VethPair {
            pod_name: "eth2",
            ..veth("two", &pod)
        });
    })
    .expect("more links");
    let mut index = |name| {
        pair.host_socket
            .link_by_name(name)
            .expect("ask")
            .expect(name)
            .index
    };
    let (one, two, other) = (index("one"), index("two"), pair.host_link.index);
    let mut events = LinkEvents::subscribe(&pair.host).expect("subscribe");
    events.watch_only(&[one, two]).expect("filter");
    pair.on_host(|batch| {
        batch
            .set_alias(other, "not ours")
            .set_alias(one, "first")
            .set_alias(two, "second");
    })
    .expect("change");
    // Each once at least: what the kernel says of their carriers may come as late.
    let told = |events: &mut LinkEvents| -> HashSet<LinkEvent> {
        events.read().expect("read").into_iter().collect()
    };
    let both = [one, two].map(LinkEvent::Changed);
    assert_eq!(told(&mut events), HashSet::from(both));

    // Another choice replaces the first.
    events.watch_only(&[other]).expect("filter");
    pair.on_host(|batch| {
        batch
            .delete_link(one)
            .set_alias(other, "ours now")
            .set_alias(two, "not now");
    })
    .expect("change");
    assert_eq!(
        told(&mut events),
        HashSet::from([LinkEvent::Changed(other)])
    );
}
