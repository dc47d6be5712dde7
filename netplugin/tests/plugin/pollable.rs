//! What it is all for: both ends have a NAPI instance, and packets go through it.

use kbp_kernel::NapiId;
use kbp_kernel::ethtool;
use kbp_kernel::link::RouteSocket;
use kbp_kernel::napi::NetdevSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::sockopt;
use serde_json::json;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use crate::traffic::udp;
use crate::world::{Pod, World};

/// The NAPI instances of a link.
pub(crate) fn napis(netns: &Netns, name: &str) -> Vec<NapiId> {
    let link = RouteSocket::open_in(netns)
        .expect("open")
        .link_by_name(name)
        .expect("read")
        .expect("the link");
    assert_eq!(link.qdisc.as_deref(), Some("pfifo"));
    let napis = NetdevSocket::open_in(netns)
        .expect("open")
        .napis(link.index)
        .expect("napi-get");
    napis.into_iter().map(|napi| napi.id).collect()
}

/// The NAPI instance through which a datagram came that `client` sent to `server`.
fn napi_of_a_packet(client: &Netns, from: &str, server: &Netns, to: &str) -> Option<NapiId> {
    let address = |text: &str| SocketAddr::new(text.parse().expect("an address"), 0);
    let (client, server) = (udp(client, address(from)), udp(server, address(to)));
    client
        .send_to(b"x", server.local_addr().expect("an address"))
        .expect("send");
    server.recv(&mut [0; 8]).expect("receive");
    sockopt::incoming_napi(server.as_fd()).expect("SO_INCOMING_NAPI_ID")
}

#[test]
fn packets_pass_the_napi_of_the_end_that_receives_them() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &world.config("1.0.0", json!({})));
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let (at_host, at_pod) = (napis(&world.host, host_end), napis(&pod.netns, "eth0"));
    assert_eq!((at_host.len(), at_pod.len()), (1, 1));
    for (gateway, address) in [("10.77.0.1", "10.77.0.2"), ("fd77::1", "fd77::2")] {
        let to_pod = napi_of_a_packet(&world.host, gateway, &pod.netns, address);
        let to_host = napi_of_a_packet(&pod.netns, address, &world.host, gateway);
        assert_eq!(to_pod, Some(at_pod[0]));
        assert_eq!(to_host, Some(at_host[0]));
    }
}

#[test]
fn the_profile_decides_segmentation_offload() {
    for (profile, tso) in [("latency", false), ("throughput", true)] {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let result = world.add(
            &pod,
            &world.config("1.0.0", json!({ "profile": profile, "txQueueLen": 300 })),
        );
        let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
        for (netns, name) in [(&world.host, host_end), (&pod.netns, "eth0")] {
            let features = ethtool::features(netns, name).expect("features");
            assert_eq!(
                (features.gro, features.tso),
                (true, tso),
                "{profile} {name}"
            );
            assert_eq!(napis(netns, name).len(), 1);
        }
        let qdisc = world.host_command("tc", &["qdisc", "show", "dev", host_end]);
        assert!(qdisc.contains("limit 300p"), "{qdisc}");
    }
}

#[test]
fn packets_over_the_bridge_pass_the_napi_of_the_end_that_receives_them() {
    let world = World::new();
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let config = world.config("1.0.0", json!({ "mode": "bridge", "isGateway": true }));
    let result = world.add(&a, &config);
    world.add(&b, &config);
    let host_end = result["interfaces"][1]["name"].as_str().expect("a name");
    let (at_host, at_a) = (napis(&world.host, host_end), napis(&a.netns, "eth0"));
    assert_eq!((at_host.len(), at_a.len()), (1, 1));
    for (gateway, from_b, to_a) in [
        ("10.77.0.1", "10.77.0.3", "10.77.0.2"),
        ("fd77::1", "fd77::3", "fd77::2"),
    ] {
        let of_pod = napi_of_a_packet(&b.netns, from_b, &a.netns, to_a);
        let of_host = napi_of_a_packet(&world.host, gateway, &a.netns, to_a);
        let to_host = napi_of_a_packet(&a.netns, to_a, &world.host, gateway);
        assert_eq!((of_pod, of_host), (Some(at_a[0]), Some(at_a[0])));
        assert_eq!(to_host, Some(at_host[0]));
    }
}

#[test]
fn packets_of_a_tuned_veth_pass_the_napi_of_the_end_that_receives_them() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let first = crate::matrix::reference_config(&world, "1.0.0", "ptp", false);
    let answer = crate::matrix::reference(&world, "ptp", "ADD", &pod, &first);
    assert!(answer.ok, "{answer:?}");
    let result: serde_json::Value = serde_json::from_str(&answer.stdout).expect("a result");
    let to_pod = || napi_of_a_packet(&world.host, "10.77.0.1", &pod.netns, "10.77.0.2");
    let to_host = || napi_of_a_packet(&pod.netns, "10.77.0.2", &world.host, "10.77.0.1");
    let tune = json!({ "cniVersion": "1.0.0", "name": "kbptest", "type": "kbp", "mode": "tune" });
    world.add(&pod, &crate::lifecycle::with_result(&tune, &result));
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    // The plugin ptp lets the kernel choose how many queues there are.
    let (at_host, at_pod) = (napis(&world.host, host_end), napis(&pod.netns, "eth0"));
    let passed =
        |napis: &[NapiId], napi: Option<NapiId>| napi.is_some_and(|id| napis.contains(&id));
    assert!(passed(&at_pod, to_pod()) && passed(&at_host, to_host()));
    world.quiet("DEL", &pod, &tune);
    assert!(!passed(&at_pod, to_pod()), "it is as it was");
}
