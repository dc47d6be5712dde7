//! What it is all for: the pod end has a NAPI instance, and packets to the pod go through it. The host end gets one from whoever polls it.

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::link::RouteSocket;
use kbp_kernel::napi::NetdevSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::sockopt;
use kbp_kernel::{Error, NapiId};
use kbp_poller::attach::{AttachRequest, Outcome, attach};
use kbp_poller::config::Config;
use kbp_poller::policy::{Policy, WorkerPolicy};
use kbp_poller::window::Window;
use kbp_tests::lab::LIMIT;
use kbp_tests::wait_until;
use serde_json::json;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use crate::lifecycle::with_result;
use crate::traffic::udp;
use crate::world::{Pod, World, environment};

/// The NAPI instances of a link; None: this kernel does not tell (before 6.8).
pub(crate) fn napis(netns: &Netns, name: &str) -> Option<Vec<NapiId>> {
    let link = RouteSocket::open_in(netns)
        .expect("open")
        .link_by_name(name)
        .expect("read")
        .expect("the link");
    match NetdevSocket::open_in(netns).and_then(|mut socket| socket.napis(link.index)) {
        Ok(napis) => Some(napis.into_iter().map(|napi| napi.id).collect()),
        Err(Error::Unsupported { .. }) => None,
        Err(error) => panic!("napi-get: {error}"),
    }
}

/// Whether there is exactly one NAPI instance, as far as the kernel tells.
fn is_one(napis: &Option<Vec<NapiId>>) -> bool {
    napis.as_ref().is_none_or(|napis| napis.len() == 1)
}

/// Whether there is none, as far as the kernel tells.
fn is_none(napis: &Option<Vec<NapiId>>) -> bool {
    napis.as_ref().is_none_or(Vec::is_empty)
}

fn qdisc(netns: &Netns, name: &str) -> Option<String> {
    let mut route = RouteSocket::open_in(netns).expect("open");
    route.link_by_name(name).expect("read").expect("it").qdisc
}

/// Whether a packet came through one of them, or, where the kernel does not tell which there are, through any at all:
/// packets that pass no NAPI instance have none in every kernel.
fn passed(napis: &Option<Vec<NapiId>>, napi: Option<NapiId>) -> bool {
    napi.is_some_and(|napi| napis.as_ref().is_none_or(|napis| napis.contains(&napi)))
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
fn packets_to_the_pod_pass_the_napi_of_its_end() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &world.config("1.0.0", json!({})));
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let (at_host, at_pod) = (napis(&world.host, host_end), napis(&pod.netns, "eth0"));
    assert!(
        is_none(&at_host) && is_one(&at_pod),
        "{at_host:?} {at_pod:?}"
    );
    // What the ring of the pod end has no room for waits.
    assert_eq!(qdisc(&world.host, host_end).as_deref(), Some("pfifo"));
    assert_eq!(qdisc(&pod.netns, "eth0").as_deref(), Some("noqueue"));
    for (gateway, address) in [("10.77.0.1", "10.77.0.2"), ("fd77::1", "fd77::2")] {
        let to_pod = napi_of_a_packet(&world.host, gateway, &pod.netns, address);
        let to_host = napi_of_a_packet(&pod.netns, address, &world.host, gateway);
        assert!(passed(&at_pod, to_pod), "{to_pod:?} of {at_pod:?}");
        assert_eq!(to_host, None, "nobody polls the host end");
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
        for (netns, name, gro, tso) in [
            (&world.host, host_end, false, tso),
            (&pod.netns, "eth0", true, true),
        ] {
            let features = ethtool::features(netns, name).expect("features");
            assert_eq!((features.gro, features.tso), (gro, tso), "{profile} {name}");
        }
        assert!(is_one(&napis(&pod.netns, "eth0")));
        let qdisc = world.host_command("tc", &["qdisc", "show", "dev", host_end]);
        assert!(qdisc.contains("limit 300p"), "{qdisc}");
    }
}

#[test]
fn packets_over_the_bridge_pass_the_napi_of_the_pod_that_receives_them() {
    let world = World::new();
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let config = world.config("1.0.0", json!({ "mode": "bridge", "isGateway": true }));
    let result = world.add(&a, &config);
    world.add(&b, &config);
    let host_end = result["interfaces"][1]["name"].as_str().expect("a name");
    let (at_host, at_a) = (napis(&world.host, host_end), napis(&a.netns, "eth0"));
    assert!(is_none(&at_host) && is_one(&at_a), "{at_host:?} {at_a:?}");
    for (gateway, from_b, to_a) in [
        ("10.77.0.1", "10.77.0.3", "10.77.0.2"),
        ("fd77::1", "fd77::3", "fd77::2"),
    ] {
        let of_pod = napi_of_a_packet(&b.netns, from_b, &a.netns, to_a);
        let of_host = napi_of_a_packet(&world.host, gateway, &a.netns, to_a);
        let to_host = napi_of_a_packet(&a.netns, to_a, &world.host, gateway);
        assert_eq!(of_pod, of_host);
        assert!(passed(&at_a, of_pod), "{of_pod:?} of {at_a:?}");
        assert_eq!(to_host, None, "nobody polls the host end");
    }
}

#[test]
fn packets_to_a_tuned_veths_pod_pass_the_napi_of_its_end() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let first = crate::matrix::reference_config(&world, "1.0.0", "ptp", false);
    let answer = crate::matrix::reference(&world, "ptp", "ADD", &pod, &first);
    assert!(answer.ok, "{answer:?}");
    let result: serde_json::Value = serde_json::from_str(&answer.stdout).expect("a result");
    let to_pod = || napi_of_a_packet(&world.host, "10.77.0.1", &pod.netns, "10.77.0.2");
    let tune = json!({ "cniVersion": "1.0.0", "name": "kbptest", "type": "kbp", "mode": "tune" });
    world.add(&pod, &crate::lifecycle::with_result(&tune, &result));
    // The plugin ptp lets the kernel choose how many queues there are.
    let at_pod = napis(&pod.netns, "eth0");
    assert!(passed(&at_pod, to_pod()));
    world.quiet("DEL", &pod, &tune);
    assert!(!passed(&at_pod, to_pod()), "it is as it was");
}

/// Who keeps the pod may lead packets past its NAPI, by TSO at the host end, and says so. From anybody else it is a difference.
#[test]
fn check_bears_with_tso_at_the_host_end_while_packets_take_the_short_way() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({}));
    let result = world.add(&pod, &config);
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let file = world.path("kbp.toml");
    let state_dir = format!("state-dir = {:?}\n", world.path("run"));
    fs::write(&file, state_dir).expect("write the node's config");
    let check = || {
        let mut environment = environment("CHECK", &pod.id, &pod.path(), &world.cni_path());
        environment.insert("KBP_CONFIG".to_owned(), file.display().to_string());
        world.call_with(&environment, &with_result(&config, &result).to_string())
    };
    let features = || ethtool::features(&world.host, host_end).expect("features");
    let set_tso = |tso: bool| {
        let wanted = Features { tso, ..features() };
        ethtool::set_features(&world.host, host_end, wanted).expect("switch TSO");
    };
    let is_a_difference = || {
        set_tso(true);
        let differs = format!("{host_end} has TSO on instead of off");
        check().assert_error(103, &[&differs]);
        set_tso(false);
        let answer = check();
        assert!(answer.ok, "{answer:?}");
    };
    is_a_difference();

    let request = AttachRequest {
        id: pod.id.clone(),
        namespace: "test".to_owned(),
        netns: pod.netns.try_clone().expect("handle"),
        policy: Policy {
            worker: WorkerPolicy::None,
            ..Policy::default()
        },
        cpuset: None,
        window: Window {
            micros: None,
            reason: "none in this test".to_owned(),
        },
        degraded: Vec::new(),
        config: Config::read(&file).expect("the node's config"),
    };
    let outcome = world.host.run(|| attach(request)).expect("enter");
    let Outcome::Attached(attachment) = outcome.expect("attach") else {
        panic!("it has a veth");
    };
    for short in [true, false, true] {
        attachment.set_short_way(short.then_some("many packets"));
        wait_until("the way of the packets", LIMIT, || {
            let now = features();
            match now.tso == short {
                true => Ok(()),
                false => Err(format!("{now:?}")),
            }
        })
        .expect("TSO follows");
        let answer = check();
        assert!(answer.ok, "short way: {short}: {answer:?}");
    }
    attachment.detach().expect("detach");
    is_a_difference();
    world.quiet("DEL", &pod, &config);
}
