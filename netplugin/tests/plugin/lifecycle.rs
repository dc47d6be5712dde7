//! Parts of the lives of attachments in mode `routed`; the whole ones are in `matrix`.

use kbp_kernel::ethtool::{self, Features};
use serde_json::{Value, json};

use crate::traffic::{ip, path_mtu, udp_echo};
use crate::world::{OUTSIDE_V4, OUTSIDE_V6, Pod, World, address, command};

/// A config as the runtime gives it for later calls.
pub(crate) fn with_result(config: &Value, result: &Value) -> Value {
    let mut config = config.clone();
    config["prevResult"] = result.clone();
    config
}

#[test]
fn a_vanished_namespace_leaves_nothing_after_del() {
    let world = World::new();
    let config = world.config("1.0.0", json!({}));
    world.forward();
    let before = world.dump();
    let pod = Pod::new("pod-a");
    let path = pod.path();
    let result = world.add(&pod, &config);
    assert_eq!(world.leases().len(), 2);
    drop(pod);
    // The kernel takes a namespace down in its own time; DEL must work before, during and after.
    let environment = crate::world::environment("DEL", "pod-a", &path, &world.cni_path());
    for _ in 0..2 {
        let answer = world.call_with(&environment, &with_result(&config, &result).to_string());
        assert!(answer.ok, "{answer:?}");
    }
    assert_eq!(world.dump(), before);
}

#[test]
fn del_of_what_never_was_succeeds() {
    let world = World::new();
    let before = world.dump();
    let pod = Pod::new("never");
    world.quiet("DEL", &pod, &world.config("1.0.0", json!({})));
    // A config that ADD would refuse is no reason to leave things behind.
    world.quiet(
        "DEL",
        &pod,
        &world.config(
            "1.0.0",
            json!({ "mode": "other", "mtu": "x", "profile": 7 }),
        ),
    );
    assert_eq!(world.dump(), before);
    assert_eq!(
        world.sysctl("net/ipv4/ip_forward"),
        "0",
        "DEL has no business with that"
    );
}

#[test]
fn check_finds_each_thing_that_was_changed() {
    let world = World::new();
    let config = world.config("1.1.0", json!({}));
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &config);
    let config = with_result(&config, &result);
    let host_end = result["interfaces"][0]["name"]
        .as_str()
        .expect("a name")
        .to_owned();
    let host_end = host_end.as_str();
    world.quiet("CHECK", &pod, &config);

    let in_pod = |arguments: &[&str]| {
        command(&pod.netns, "ip", arguments);
    };
    let in_host = |arguments: &[&str]| {
        world.host_command("ip", arguments);
    };
    let features = |netns, name: &str, gro, tso| {
        ethtool::set_features(netns, name, Features { gro, tso }).expect("set features");
    };
    let via = [
        "via",
        "10.77.0.1",
        "dev",
        "eth0",
        "proto",
        "static",
        "onlink",
        "mtu",
        "1400",
    ];
    let default = |verb: &'static str| [&["route", verb, "default"][..], &via].concat();
    // What is broken, the part of the message that has to name it, and how it is mended.
    type Step<'a> = Box<dyn Fn() + 'a>;
    let steps: Vec<(Step<'_>, &str, Step<'_>)> = vec![
        (
            Box::new(|| in_pod(&["address", "del", "fd77::2/64", "dev", "eth0"])),
            "eth0 lacks the address fd77::2/64",
            Box::new(|| {
                in_pod(&[
                    "address",
                    "add",
                    "fd77::2/64",
                    "dev",
                    "eth0",
                    "nodad",
                    "noprefixroute",
                ])
            }),
        ),
        (
            Box::new(|| in_pod(&default("del"))),
            "the route to 0.0.0.0/0 via 10.77.0.1 mtu 1400 is missing in the pod",
            Box::new(|| in_pod(&default("add"))),
        ),
        (
            Box::new(|| in_pod(&["neighbour", "del", "10.77.0.1", "dev", "eth0"])),
            "eth0 lacks the permanent neighbour 10.77.0.1",
            Box::new(|| {
                let mac = result["interfaces"][0]["mac"].as_str().expect("a MAC");
                in_pod(&[
                    "neighbour",
                    "add",
                    "10.77.0.1",
                    "dev",
                    "eth0",
                    "lladdr",
                    mac,
                    "nud",
                    "permanent",
                ]);
            }),
        ),
        (
            Box::new(|| in_host(&["route", "del", "10.77.0.2/32"])),
            "the host's route to 10.77.0.2/32 over kbp",
            Box::new(|| in_host(&["route", "add", "10.77.0.2/32", "dev", host_end])),
        ),
        (
            Box::new(|| in_host(&["link", "set", host_end, "alias", "x"])),
            "has the alias \"x\" instead of \"kbp:kbptest/pod-a/eth0\"",
            Box::new(|| in_host(&["link", "set", host_end, "alias", "kbp:kbptest/pod-a/eth0"])),
        ),
        (
            Box::new(|| features(&pod.netns, "eth0", false, false)),
            "eth0 has GRO off instead of on",
            Box::new(|| features(&pod.netns, "eth0", true, true)),
        ),
        (
            Box::new(|| features(&world.host, host_end, true, true)),
            "has TSO on instead of off",
            Box::new(|| features(&world.host, host_end, false, false)),
        ),
        (
            Box::new(|| in_pod(&["link", "set", "eth0", "mtu", "1500"])),
            "eth0 has MTU 1500 instead of 65535",
            Box::new(|| in_pod(&["link", "set", "eth0", "mtu", "65535"])),
        ),
        (
            Box::new(|| {
                world.host_command("tc", &["qdisc", "del", "dev", host_end, "root"]);
            }),
            "has no qdisc",
            // Any other one will do.
            Box::new(|| {
                world.host_command(
                    "tc",
                    &["qdisc", "replace", "dev", host_end, "root", "bfifo"],
                );
            }),
        ),
        (
            Box::new(|| in_pod(&["link", "set", "eth0", "address", "02:00:00:00:00:09"])),
            "eth0 has the MAC 02:00:00:00:00:09 instead of",
            Box::new(|| {
                let mac = result["interfaces"][1]["mac"].as_str().expect("a MAC");
                in_pod(&["link", "set", "eth0", "address", mac]);
                // The kernel forgets neighbours, permanent ones too, with a change of address.
                let mac = result["interfaces"][0]["mac"].as_str().expect("a MAC");
                for gateway in ["10.77.0.1", "fd77::1"] {
                    in_pod(&[
                        "neighbour",
                        "add",
                        gateway,
                        "dev",
                        "eth0",
                        "lladdr",
                        mac,
                        "nud",
                        "permanent",
                    ]);
                }
            }),
        ),
        (
            Box::new(|| {
                world.host_command(
                    "nft",
                    &["delete", "element", "inet", "kbp", "pods4", "{ 10.77.0.2 }"],
                );
            }),
            "10.77.0.2 is not masqueraded",
            Box::new(|| {
                let comment = format!("{{ 10.77.0.2 comment \"kbptest/{host_end}\" }}");
                world.host_command("nft", &["add", "element", "inet", "kbp", "pods4", &comment]);
            }),
        ),
        (
            Box::new(|| in_host(&["link", "del", host_end])),
            "does not exist",
            Box::new(|| {}),
        ),
    ];
    let last = steps.len() - 1;
    for (n, (breaks, names, mends)) in steps.into_iter().enumerate() {
        breaks();
        world
            .call("CHECK", &pod, &config)
            .assert_error(103, &[names]);
        mends();
        if n < last {
            let answer = world.call("CHECK", &pod, &config);
            assert!(answer.ok, "after {names:?} was mended: {answer:?}");
        }
    }
}

#[test]
fn check_knows_the_host_ends_mtu_without_a_result_that_says_it() {
    let world = World::new();
    let config = world.config("1.0.0", json!({}));
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &config);
    assert!(result["interfaces"][0].get("mtu").is_none(), "{result}");
    let config = with_result(&config, &result);
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let set = |mtu| world.host_command("ip", &["link", "set", host_end, "mtu", mtu]);
    set("1500");
    world
        .call("CHECK", &pod, &config)
        .assert_error(103, &["has MTU 1500 instead of 65535"]);
    set("65535");
    world.quiet("CHECK", &pod, &config);
}

#[test]
fn check_asks_ipam() {
    let world = World::new();
    let config = world.config("1.0.0", json!({}));
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &config);
    for lease in world.leases() {
        std::fs::remove_file(world.path("leases/kbptest").join(lease))
            .expect("take the lease away");
    }
    let answer = world.call("CHECK", &pod, &with_result(&config, &result));
    assert!(
        answer.error().1.contains("IPAM plugin host-local"),
        "{answer:?}"
    );
}

#[test]
fn only_what_leaves_the_node_is_cut_to_the_uplinks_mtu() {
    let world = World::new();
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let config = world.config("1.1.0", json!({}));
    let result = world.add(&a, &config);
    let other = world.add(&b, &config);
    let mtu = |address: &str| path_mtu(&a.netns, ip(address));
    assert_eq!(mtu(OUTSIDE_V4), 1400);
    assert_eq!(mtu("10.77.0.1"), 65535);
    assert_eq!(mtu(&address(&other, 0).to_string()), 65535);
    assert_eq!(path_mtu(&world.host, address(&other, 0)), 65535);
    // Over IPv6 by counting: how many packets is one large datagram?
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let received = || {
        world
            .route()
            .link_by_name(host_end)
            .expect("read")
            .expect("host end")
            .rx_packets
    };
    let packets = |netns, address| {
        let before = received();
        udp_echo(&a.netns, netns, address, 60_000);
        received() - before
    };
    for (far, near) in [
        (ip(OUTSIDE_V4), address(&other, 0)),
        (ip(OUTSIDE_V6), address(&other, 1)),
    ] {
        let (to_far, to_near) = (packets(&world.outside, far), packets(&b.netns, near));
        // The kernel's own chatter (MLD, duplicate detection of link-local addresses) may be among them.
        assert!(
            (43..60).contains(&to_far) && (1..20).contains(&to_near),
            "{to_far} {to_near}"
        );
    }
}
