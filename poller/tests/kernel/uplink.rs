//! Uplinks: interfaces of the node itself. A veth end stands in for a card here; `tests/tests/kernels` has virtio.

use kbp_kernel::ethtool::{Features, set_features};
use kbp_poller::engine::Engine;
use kbp_poller::uplink::{Uplink, UplinkState};

use crate::node::{Node, any_cpu, ip, wait_until};

/// Packets that have to be polled before it counts: softirq handles none of them on the worker's CPU.
const SOME: u64 = 10;

/// A node whose `vhost0` has a NAPI that packets go through.
fn node() -> Node {
    let node = Node::new();
    let pollable = Features {
        gro: true,
        tso: false,
    };
    set_features(&node.host, "vhost0", pollable).expect("host end");
    set_features(&node.pod, "eth0", pollable).expect("pod end");
    node
}

fn uplink(node: &Node, interface: &str, config: &str) -> (Engine, Uplink) {
    let engine = node.host.run(Engine::start).expect("enter");
    let engine = engine.expect("engine");
    let config = node.config(config);
    let uplink = engine.uplink(interface, &config).expect("uplink");
    (engine, uplink)
}

fn pool() -> String {
    format!("cpus = \"{}\"", any_cpu())
}

fn wait_for(uplink: &Uplink, what: &str, holds: impl Fn(&UplinkState) -> bool) {
    wait_until(what, || holds(&uplink.state()).then_some(()));
}

#[test]
fn it_is_polled_follows_its_link_and_is_let_go() {
    let node = node();
    let (_engine, uplink) = uplink(&node, "vhost0", &pool());
    let state = uplink.state();
    assert_eq!(state.degraded, None);
    assert_eq!(state.napis.len(), 1);
    assert_eq!(state.worker.expect("a worker").kind, "sqpoll");
    let traffic = node.traffic();
    traffic.wait_taken(SOME);

    ip(&node.host, "link set vhost0 down");
    wait_for(&uplink, "the news", |s| {
        s.napis.is_empty() && s.degraded.as_ref().is_some_and(|d| d.contains("is down"))
    });
    ip(&node.host, "link set vhost0 up");
    wait_for(&uplink, "its new NAPI", |s| {
        s.napis != state.napis && !s.napis.is_empty()
    });
    traffic.wait_taken(SOME);

    drop(uplink);
    traffic.wait_left();
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
fn one_that_comes_later_is_polled_then() {
    let node = node();
    let (_engine, uplink) = uplink(&node, "vhost9", &pool());
    let told = uplink.state().degraded.expect("a reason");
    assert!(told.contains("no interface vhost9"), "{told}");
    ip(&node.host, "link set vhost0 down");
    ip(&node.host, "link set vhost0 name vhost9");
    ip(&node.host, "link set vhost9 up");
    wait_for(&uplink, "polling", |s| {
        s.degraded.is_none() && !s.napis.is_empty()
    });
    node.traffic().wait_taken(SOME);
}

#[test]
fn what_keeps_it_from_being_polled_is_told() {
    let node = node();
    for (config, part) in [
        (String::new(), "no CPU pool"),
        (
            format!("{}\ndisable = [\"sqpoll\"]", pool()),
            "other end of the link",
        ),
        (
            format!("{}\ndisable = [\"sqpoll\", \"socket\"]", pool()),
            "switched off",
        ),
    ] {
        let (_engine, uplink) = uplink(&node, "vhost0", &config);
        let state = uplink.state();
        let told = state.degraded.expect("a reason");
        assert!(told.contains(part), "{told}");
        assert_eq!((state.worker, state.napis), (None, Vec::new()));
    }
    let (_engine, uplink) = uplink(&node, "lo", &pool());
    let told = uplink.state().degraded.expect("a reason");
    assert!(told.contains("lo"), "{told}");
}
