//! Uplinks: interfaces of the node itself. A veth end stands in for a card here; `tests/tests/kernels` has virtio.

use kbp_kernel::ethtool::{Features, set_features};
use kbp_poller::api;
use kbp_poller::engine::Engine;
use kbp_poller::uplink::{self, Uplink, UplinkState};

use crate::daemon::Daemon;
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

/// The daemon's uplinks are in its API, in its metrics and in state files.
#[test]
fn the_daemon_tells_of_its_uplinks_and_clears_what_a_killed_one_left() {
    let node = node();
    let config = format!("{}\nuplinks = [\"vhost0\", \"vhost9\"]", pool());
    let daemon = Daemon::start(&node, &config);
    let listed = daemon.client().uplinks().expect("list");
    let [polled, missing] = &listed[..] else {
        panic!("{listed:?}");
    };
    assert_eq!(polled.interface, "vhost0");
    assert_eq!((polled.degraded.as_str(), polled.napis.len()), ("", 1));
    assert_eq!(polled.worker.as_ref().expect("a worker").policy, "shared");
    assert_eq!((missing.worker.as_ref(), missing.napis.len()), (None, 0));
    assert!(
        missing.degraded.contains("no interface vhost9"),
        "{missing:?}"
    );
    assert_eq!(
        daemon.client().list().expect("list"),
        Vec::<api::Pod>::new()
    );

    let traffic = node.traffic();
    node.wait_polled(SOME);
    let text = daemon.metrics();
    let value = |start: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in\n{text}"));
        line.rsplit(' ')
            .next()
            .expect("a value")
            .parse()
            .expect("a number")
    };
    assert!(value("kbp_uplink_received_packets_total{interface=\"vhost0\"}") >= SOME);
    assert!(value("kbp_node_polled_packets_total") >= SOME);
    assert_eq!(value("kbp_uplink_polled_napis{interface=\"vhost0\"}"), 1);
    assert_eq!(value("kbp_uplink_polled_napis{interface=\"vhost9\"}"), 0);
    assert_eq!(
        value("kbp_uplink_worker{interface=\"vhost0\",policy=\"shared\""),
        1
    );
    assert_eq!(value("kbp_worker_uplinks{"), 1);
    assert_eq!(value("kbp_worker_pods{"), 0, "an uplink is no pod");

    let told = || uplink::read_all(&node.state_dir()).expect("state files");
    let names = |told: &[UplinkState]| -> Vec<String> {
        told.iter().map(|u| u.interface.clone()).collect()
    };
    assert_eq!(names(&told()), ["vhost0", "vhost9"]);
    assert_eq!(told()[0].napis, polled.napis);
    ip(&node.host, "link set vhost0 down");
    wait_until("the news", || {
        let degraded = told()[0].degraded.clone();
        degraded
            .is_some_and(|d| d.contains("is down"))
            .then_some(())
    });
    ip(&node.host, "link set vhost0 up");
    traffic.wait_taken(SOME);

    daemon.kill();
    assert_eq!(told(), [], "nobody owns them");
    let next = Daemon::start(&node, &pool());
    let left = std::fs::read_dir(node.state_dir().join("uplinks")).expect("directory");
    assert_eq!(left.count(), 0, "and the next one sweeps");
    next.end();
    let daemon = Daemon::start(&node, &config);
    assert_eq!(names(&told()), ["vhost0", "vhost9"]);
    daemon.end();
    let left = std::fs::read_dir(node.state_dir().join("uplinks")).expect("directory");
    assert_eq!(left.count(), 0);
    traffic.wait_left();
}
