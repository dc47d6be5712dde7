//! Interfaces that are veths, and all the others.

use kbp_kernel::link::{Batch, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::{MacAddr, Mtu};
use kbp_poller::endpoint::{Found, find};
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::state::Part;

use crate::node::{Node, execute, ip, link};

fn not_pollable(node: &Node) -> Vec<String> {
    match find(&node.host, &node.pod).expect("find") {
        Found::Endpoints {
            veths,
            not_pollable,
        } if veths.is_empty() => not_pollable,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_veth_is_found_from_both_sides() {
    let node = Node::new();
    let Found::Endpoints {
        veths,
        not_pollable,
    } = find(&node.host, &node.pod).expect("find")
    else {
        panic!("nothing found")
    };
    assert_eq!(not_pollable, Vec::<String>::new());
    let [veth] = &veths[..] else {
        panic!("{veths:?}")
    };
    assert_eq!(
        (veth.pod_name.as_str(), veth.host_name.as_str()),
        ("eth0", "vhost0")
    );
    assert_eq!(veth.pod_index, node.pod_link("eth0").index);
    assert_eq!(veth.host_index, node.host_link("vhost0").index);
}

#[test]
fn a_lone_loopback_is_empty_even_beside_the_kernels_own_tunnels() {
    let node = Node::empty();
    assert_eq!(find(&node.host, &node.pod).expect("find"), Found::Empty);
    // Down, as the kernel's fallback tunnels are.
    ip(&node.pod, "link add br0 type bridge");
    assert_eq!(find(&node.host, &node.pod).expect("find"), Found::Empty);
}

#[test]
fn the_host_is_the_host() {
    let node = Node::new();
    assert_eq!(
        find(&node.host, &node.host).expect("find"),
        Found::HostNetwork
    );
}

#[test]
fn other_kinds_are_named_and_left_alone() {
    for (make, name, kind) in [
        ("link add br0 type bridge", "br0", "bridge"),
        ("link add vx0 type vxlan id 7 dstport 4789", "vx0", "vxlan"),
    ] {
        let node = Node::empty();
        ip(&node.pod, make);
        ip(&node.pod, &format!("link set {name} up"));
        let reasons = not_pollable(&node);
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert!(
            reasons[0].starts_with(&format!("{name} is a {kind}: it has no NAPI of its own")),
            "{reasons:?}"
        );

        let state = node
            .attached(node.request("a", WorkerPolicy::Idle, ""))
            .state();
        assert_eq!(state.degraded.len(), 1, "{state:?}");
        assert_eq!(state.degraded[0].part, Part::PollableVeth);
        assert_eq!(state.degraded[0].reason, reasons[0]);
        assert_eq!(state.worker, None);

        let mut request = node.request("a", WorkerPolicy::Idle, "");
        request.policy.required = true;
        let error = node.attach(request).expect_err("required").to_string();
        assert!(error.contains(&reasons[0]), "{error}");
    }
}

#[test]
fn a_macvlan_beside_a_veth_is_named_and_the_veth_is_polled() {
    let node = Node::new();
    ip(&node.pod, "link add link eth0 name mv0 type macvlan");
    ip(&node.pod, "link set mv0 up");
    let state = node
        .attached(node.request("a", WorkerPolicy::Idle, ""))
        .state();
    assert_eq!(state.interfaces.len(), 1);
    assert!(state.worker.is_some());
    let [degraded] = &state.degraded[..] else {
        panic!("{state:?}")
    };
    assert!(
        degraded
            .reason
            .starts_with("mv0 is a macvlan: its packets come through its parent"),
        "{degraded:?}"
    );
}

#[test]
fn a_veth_whose_other_end_is_elsewhere_is_not_polled() {
    let elsewhere = Netns::create().expect("third namespace");
    let node = Node::empty();
    let pair = |host_name, pod_netns| VethPair {
        host_name,
        host_mac: MacAddr([2, 0, 0, 0, 9, 1]),
        pod_name: "eth0",
        pod_mac: MacAddr([2, 0, 0, 0, 9, 2]),
        pod_netns,
        mtu: Mtu(1500),
        tx_queue_len: 0,
    };
    let mut batch = Batch::new();
    batch.create_veth(&pair("third", &node.pod));
    execute(&elsewhere, &batch);
    // A veth of the host that has the same index as the other end elsewhere must not be taken for it.
    let index = link(&elsewhere, "third").expect("link").index;
    let other_pod = Netns::create().expect("another pod");
    let mut batch = Batch::new();
    batch.create_veth(&pair("decoy", &other_pod));
    execute(&node.host, &batch);
    assert_eq!(node.host_link("decoy").index, index, "the decoy");
    let reasons = not_pollable(&node);
    assert_eq!(
        reasons,
        ["eth0 is a veth whose other end is not in the host's network namespace"]
    );
}

#[test]
fn a_veth_inside_the_pod_is_not_polled() {
    let node = Node::empty();
    ip(&node.pod, "link add va type veth peer name vb");
    let mut reasons = not_pollable(&node);
    reasons.sort();
    assert_eq!(
        reasons,
        [
            "va is a veth whose other end is in the pod itself",
            "vb is a veth whose other end is in the pod itself"
        ]
    );
}
