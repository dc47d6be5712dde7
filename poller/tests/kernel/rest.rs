//! Packets that nobody polls for: while its worker rests, what a pod sends takes the way around the host end's NAPI.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::time::Duration;

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::netns::Netns;
use kbp_kernel::{NapiId, probe, sockopt};
use kbp_poller::attach::{AttachRequest, Attachment};
use kbp_poller::policy::WorkerPolicy;

use crate::node::{HOST_ADDRESS, Node, any_cpu, ip, wait_until};

/// The offloads of the host end and of the pod end.
fn ends(node: &Node) -> [Features; 2] {
    let ends = [(&node.host, "vhost0"), (&node.pod, "eth0")];
    ends.map(|(netns, name)| ethtool::features(netns, name).expect("features"))
}

/// Whether what the pod sends takes the short way, which TSO at its end means.
fn is_short(node: &Node) -> bool {
    let [host, pod] = ends(node);
    // The rest is as always: both NAPIs stay, and packets to the pod come to that of its end.
    assert!(host.gro && pod.gro && !host.tso, "{host:?} {pod:?}");
    pod.tso
}

fn wait_way(node: &Node, short: bool) {
    wait_until("the way of the packets to change", || {
        (is_short(node) == short).then_some(())
    });
}

fn shared(node: &Node, config: &str) -> AttachRequest {
    let config = format!("cpus = \"{}\"\n{config}", any_cpu());
    node.request("a", WorkerPolicy::Shared, &config)
}

/// The NAPI through which one packet comes from the pod to the node.
fn napi_of_a_packet(node: &Node) -> Option<NapiId> {
    let host: ipnet::IpNet = HOST_ADDRESS.parse().expect("address");
    let bound = |netns: &Netns| {
        netns
            .run(|| UdpSocket::bind("0.0.0.0:0"))
            .expect("enter")
            .expect("bind")
    };
    let (sink, source) = (bound(&node.host), bound(&node.pod));
    let port = sink.local_addr().expect("address").port();
    source.send_to(&[0; 64], (host.addr(), port)).expect("send");
    sink.set_read_timeout(Some(Duration::from_secs(60)))
        .expect("limit");
    sink.recv(&mut [0; 64]).expect("the packet");
    sockopt::incoming_napi(sink.as_fd()).expect("ask")
}

fn napis(attachment: &Attachment) -> [Option<u32>; 2] {
    let state = attachment.state();
    assert_eq!(state.degraded, []);
    [state.interfaces[0].host_napi, state.interfaces[0].pod_napi]
}

#[test]
fn a_pod_whose_worker_rests_sends_around_the_napi_and_is_polled_again_when_it_speaks() {
    if let Err(reason) = probe::sqpoll_napi() {
        println!("the worker of this kernel has to see packets, so that it never rests: {reason}");
        return;
    }
    let nodes = [Node::new(), Node::new(), Node::new()];
    let [node, kept, sockets] = &nodes;
    let others = [
        kept.attached(shared(kept, "disable = [\"short-way\"]")),
        sockets.attached(shared(sockets, "disable = [\"sqpoll\"]")),
    ];
    let attachment = node.attached(shared(node, ""));
    assert!(!is_short(node), "it begins as polled");
    let ids = napis(&attachment);
    wait_way(node, true);
    assert_eq!(napis(&attachment), ids, "no NAPI is made anew");
    // That TSO is kbp's own is told; whatever else somebody changes meanwhile is mended at once.
    let rests = |attachment: &Attachment| attachment.state().rests;
    wait_until("the rest to be told", || rests(&attachment).then_some(()));
    let resting = ends(node);
    for (netns, name, changed) in [
        (&node.host, "vhost0", [true, true]),
        (&node.host, "vhost0", [false, false]),
        (&node.pod, "eth0", [false, true]),
        (&node.pod, "eth0", [true, false]),
    ] {
        let [gro, tso] = changed;
        match ethtool::set_features(netns, name, Features { gro, tso }) {
            Ok(()) | Err(kbp_kernel::Error::Unsupported { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        wait_until("what was changed to be mended", || {
            (ends(node) == resting).then_some(())
        });
        assert!(rests(&attachment));
    }
    let ids = napis(&attachment);
    assert_eq!(napi_of_a_packet(node), None);
    // These have been silent for longer than the first one: all that is left is the look at their counters that would tell.
    std::thread::sleep(Duration::from_millis(500));
    assert!(!is_short(kept), "switched off");
    assert!(!is_short(sockets), "a socket knows its NAPI by packets");
    assert!(napi_of_a_packet(kept).is_some());
    drop(others);

    // A link that is made anew meanwhile is polled as well.
    ip(&node.host, "link set vhost0 down");
    ip(&node.host, "link set vhost0 up");
    wait_until("the new NAPI", || {
        let state = attachment.state();
        let now = state.interfaces.first().and_then(|i| i.host_napi);
        (now.is_some() && now != ids[0] && state.degraded.is_empty()).then_some(())
    });
    let traffic = node.traffic();
    node.wait_polled(20);
    assert!(!is_short(node));
    wait_until("the end of the rest to be told", || {
        (!rests(&attachment)).then_some(())
    });
    // What somebody else switches now is mended as ever.
    let wrong = Features {
        gro: true,
        tso: true,
    };
    match ethtool::set_features(&node.pod, "eth0", wrong) {
        // It looks whether what it set is there, and may find it mended.
        Ok(()) | Err(kbp_kernel::Error::Unsupported { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    wait_way(node, false);
    drop(traffic);
    wait_way(node, true);

    // Whoever comes next finds a pod to be polled.
    drop(attachment);
    let attachment = node.attached(shared(node, ""));
    assert!(!is_short(node));
    let _traffic = node.traffic();
    node.wait_polled(20);
    drop(attachment);
}
