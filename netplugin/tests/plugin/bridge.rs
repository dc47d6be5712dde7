//! Mode `bridge`.

use kbp_kernel::link::{Batch, Bridge, RouteSocket};
use kbp_kernel::netns::Netns;
use kbp_kernel::{MacAddr, Mtu, ethtool};
use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::traffic::{ip, path_mtu, tcp_transfer, udp_arrives, udp_echo};
use crate::world::{HOST_V4, HOST_V6, OUTSIDE_V4, OUTSIDE_V6, Pod, UPLINK_MTU, World, address};

fn gateway(world: &World, more: Value) -> Value {
    let mut config = world.config("1.1.0", json!({ "mode": "bridge", "isGateway": true }));
    let more = more.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(more);
    config
}

fn failing_add(world: &World, pod: &Pod, config: &Value, code: u64, parts: &[&str]) {
    let before = (world.dump(), pod.dump());
    world.call("ADD", pod, config).assert_error(code, parts);
    assert_eq!((world.dump(), pod.dump()), before, "{parts:?}");
}

#[test]
fn the_result_lists_bridge_host_end_and_pod_end_and_they_are_pollable() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &gateway(&world, json!({ "isDefaultGateway": true })));
    let interfaces = result["interfaces"].as_array().expect("interfaces");
    let names: Vec<_> = interfaces
        .iter()
        .map(|i| i["name"].as_str().expect("a name"))
        .collect();
    assert_eq!((names.len(), names[0], names[2]), (3, "kbp0", "eth0"));
    assert!(
        result["ips"]
            .as_array()
            .expect("ips")
            .iter()
            .all(|ip| ip["interface"] == 2)
    );
    assert!(interfaces[0].get("sandbox").is_none() && interfaces[1].get("sandbox").is_none());
    assert!(interfaces.iter().all(|interface| interface["mtu"] == 65535));
    let bridge = world
        .route()
        .link_by_name("kbp0")
        .expect("read")
        .expect("the bridge");
    assert_eq!(interfaces[0]["mac"], bridge.mac.expect("a MAC").to_string());
    assert_eq!(world.sysctl("net/ipv6/conf/kbp0/accept_ra"), "0");
    for (netns, name, gro, tso) in [
        (&world.host, names[1], false, false),
        (&pod.netns, "eth0", true, true),
    ] {
        let features = ethtool::features(netns, name).expect("features");
        assert_eq!((features.gro, features.tso), (gro, tso), "{name}");
    }
    // What leaves through the node fits its uplink, what stays on the bridge need not.
    assert_eq!(path_mtu(&pod.netns, ip(OUTSIDE_V4)), 1400);
    assert_eq!(path_mtu(&pod.netns, ip("10.77.0.1")), 65535);
    tcp_transfer(&pod.netns, &world.outside, ip(OUTSIDE_V6), 100_000);
}

#[test]
fn a_mere_switch_gives_no_address_to_the_host() {
    let world = World::new();
    let config = world.config(
        "1.0.0",
        json!({ "mode": "bridge", "bridge": "sw0", "ipMasq": false }),
    );
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    world.add(&a, &config);
    let result = world.add(&b, &config);
    world.quiet("CHECK", &b, &with_result(&config, &result));
    udp_echo(&a.netns, &b.netns, ip("10.77.0.3"), 1000);
    udp_echo(&a.netns, &b.netns, ip("fd77::3"), 1000);
    assert!(!world.dump().contains("10.77.0.1/"), "{}", world.dump());
    assert_eq!(world.sysctl("net/ipv4/ip_forward"), "0");
    // Nobody narrows what leaves, so the ports are as wide as the uplink.
    assert_eq!(
        path_mtu(&a.netns, ip("10.77.0.3")),
        i32::try_from(UPLINK_MTU).expect("small")
    );
}

#[test]
fn all_ports_have_one_mtu_and_another_is_refused() {
    let world = World::new();
    let pods = ["a", "b", "c"].map(Pod::new);
    world.add(&pods[0], &gateway(&world, json!({ "mtu": 9000 })));
    failing_add(
        &world,
        &pods[1],
        &gateway(&world, json!({ "mtu": 1500 })),
        7,
        &["mtu: 1500", "9000", "kbp0"],
    );
    world.add(&pods[1], &gateway(&world, json!({ "mtu": 9000 })));
    // Without a wish of its own a pod gets what the others have.
    world.add(&pods[2], &gateway(&world, json!({})));
    assert_eq!(path_mtu(&pods[2].netns, ip("10.77.0.1")), 9000);
    for pod in &pods {
        world.quiet("DEL", pod, &gateway(&world, json!({})));
    }
    // With the last port the old MTU means nothing any more, unless it was set by hand.
    world.add(&pods[0], &gateway(&world, json!({ "mtu": 1500 })));
    world.quiet("DEL", &pods[0], &gateway(&world, json!({})));
    world.host_command("ip", &["link", "set", "kbp0", "mtu", "1600"]);
    failing_add(
        &world,
        &pods[0],
        &gateway(&world, json!({ "mtu": 3000 })),
        7,
        &["mtu: 3000", "1600", "by hand"],
    );
    world.add(&pods[0], &gateway(&world, json!({ "mtu": 1600 })));
}

#[test]
fn a_bridge_that_exists_is_adopted_and_a_pod_reaches_itself_through_it_with_hairpin() {
    for hairpin in [false, true] {
        let world = World::new();
        for arguments in ["link add br7 type bridge", "addr add 10.77.0.1/16 dev br7"] {
            let arguments: Vec<_> = arguments.split(' ').collect();
            world.host_command("ip", &arguments);
        }
        let config = gateway(&world, json!({ "bridge": "br7", "hairpinMode": hairpin }));
        let pod = Pod::new("pod-a");
        let result = world.add(&pod, &config);
        world.quiet("CHECK", &pod, &with_result(&config, &result));
        let host_end = result["interfaces"][1]["name"].as_str().expect("a name");
        let port = world
            .route()
            .link_by_name(host_end)
            .expect("read")
            .expect("the port");
        assert_eq!(port.hairpin, hairpin);
        world.host_command(
            "bridge",
            &[
                "link",
                "set",
                "dev",
                host_end,
                "hairpin",
                if hairpin { "off" } else { "on" },
            ],
        );
        world
            .call("CHECK", &pod, &with_result(&config, &result))
            .assert_error(103, &["hairpin mode"]);
        world.quiet("DEL", &pod, &config);
        assert!(
            world.dump().contains("br7 "),
            "the bridge is not ours to remove"
        );
    }
}

#[test]
fn check_finds_what_was_changed() {
    let world = World::new();
    let config = gateway(&world, json!({}));
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &config);
    let host_end = result["interfaces"][1]["name"]
        .as_str()
        .expect("a name")
        .to_owned();
    let check = with_result(&config, &result);
    for (breaks, names, mends) in [
        (
            format!("link set {host_end} nomaster"),
            "not a port of kbp0",
            format!("link set {host_end} master kbp0"),
        ),
        (
            "addr del 10.77.0.1/16 dev kbp0".into(),
            "lacks the address 10.77.0.1",
            "addr add 10.77.0.1/16 dev kbp0".into(),
        ),
        (
            "link set kbp0 down".into(),
            "kbp0 is down",
            "link set kbp0 up".into(),
        ),
        (
            "link set kbp0 mtu 1500".into(),
            "kbp0 has MTU 1500",
            "link set kbp0 mtu 65535".into(),
        ),
    ] {
        let run = |line: &str| world.host_command("ip", &line.split(' ').collect::<Vec<_>>());
        run(&breaks);
        world
            .call("CHECK", &pod, &check)
            .assert_error(103, &[names]);
        run(&mends);
        let answer = world.call("CHECK", &pod, &check);
        // An IPv6 address goes with its link's IPv4 ones not, but with its link.
        assert!(
            answer.ok || answer.error().1.contains("fd77::1"),
            "{answer:?}"
        );
    }
}

#[test]
fn an_address_that_moves_to_another_pod_is_reached_at_once() {
    let world = World::new();
    let more = json!({ "ipam": {
        "type": "static", "addresses": [
            { "address": "10.77.0.9/16", "gateway": "10.77.0.1" },
            { "address": "fd77::9/64", "gateway": "fd77::1" },
        ],
    } });
    let mut config = gateway(&world, more);
    config["cniVersion"] = json!("1.0.0");
    // Its port keeps the bridge up in between, or the kernel forgets its neighbours.
    let resident = Pod::new("resident");
    world.add(&resident, &gateway(&world, json!({})));
    for id in ["first", "second"] {
        let pod = Pod::new(id);
        world.add(&pod, &config);
        // The second time host and resident have the MAC of the first one in mind.
        for address in ["10.77.0.9", "fd77::9"] {
            udp_echo(&world.host, &pod.netns, ip(address), 100);
            udp_echo(&resident.netns, &pod.netns, ip(address), 100);
        }
        world.quiet("DEL", &pod, &config);
    }
}

#[test]
fn what_cannot_be_done_leaves_no_bridge_and_no_address() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let with = |more| gateway(&world, more);
    failing_add(
        &world,
        &pod,
        &with(json!({ "bridge": "uplink" })),
        7,
        &["bridge: \"uplink\"", "another kind"],
    );
    failing_add(
        &world,
        &pod,
        &with(json!({ "mtu": 1000 })),
        7,
        &["mtu: 1000", "1280"],
    );
    failing_add(
        &world,
        &pod,
        &with(json!({ "sysctl": { "net.ipv4.ip_default_ttl": "33", "net.ipv4.kbp_never": "1" } })),
        5,
        &["net/ipv4/kbp_never"],
    );
    let twice = json!([{ "dst": "10.9.0.0/16" }, { "dst": "10.9.0.0/16", "gw": "10.77.0.8" }]);
    failing_add(
        &world,
        &pod,
        &with(json!({ "routes": twice })),
        100,
        &["10.9.0.0/16"],
    );
    // Another gateway is at work in the pods' range.
    world.host_command("ip", &["link", "add", "br7", "type", "bridge"]);
    world.host_command("ip", &["addr", "add", "10.77.0.200/16", "dev", "br7"]);
    world.host_command("ip", &["link", "set", "br7", "up"]);
    failing_add(
        &world,
        &pod,
        &with(json!({ "bridge": "br7" })),
        7,
        &["10.77.0.200/16", "10.77.0.1/16"],
    );
    assert_eq!(
        udp_echo(&world.host, &world.outside, ip(OUTSIDE_V4), 10),
        ip(HOST_V4)
    );
}

fn in_vlan(world: &World, vlan: u16) -> Value {
    let more = json!({ "mode": "bridge", "bridge": "sw0", "vlan": vlan, "ipMasq": false });
    world.config("1.0.0", more)
}

/// Whether this kernel can keep the VLANs of a bridge apart: seen by trying.
fn filters_vlans() -> bool {
    let netns = Netns::create().expect("create a namespace");
    let mut socket = RouteSocket::open_in(&netns).expect("open a socket");
    let bridge = Bridge {
        name: "try",
        mac: MacAddr([2, 0, 0, 0, 9, 9]),
        mtu: Mtu(1500),
        vlan_filtering: true,
    };
    match socket.execute(Batch::new().create_bridge(&bridge)) {
        Ok(()) => true,
        Err(error) if error.errno() == Some(nix::libc::EOPNOTSUPP) => false,
        Err(error) => panic!("create a bridge: {error}"),
    }
}

#[test]
fn pods_of_one_vlan_reach_each_other_and_no_other() {
    let world = World::new();
    let [a, b, other] = ["pod-a", "pod-b", "other"].map(Pod::new);
    if !filters_vlans() {
        let named = ["vlan: 7", "CONFIG_BRIDGE_VLAN_FILTERING"];
        failing_add(&world, &a, &in_vlan(&world, 7), 2, &named);
        world.host_command("ip", &["link", "add", "sw0", "type", "bridge"]);
        failing_add(&world, &a, &in_vlan(&world, 7), 2, &named);
        return;
    }
    world.add(&a, &in_vlan(&world, 7));
    let result = world.add(&b, &in_vlan(&world, 7));
    world.add(&other, &in_vlan(&world, 8));
    // In VLAN 1, as every port is that nobody has put elsewhere.
    let plain = Pod::new("plain");
    world.add(&plain, &in_vlan(&world, 0));
    udp_echo(&a.netns, &b.netns, ip("10.77.0.3"), 1000);
    udp_echo(&a.netns, &b.netns, ip("fd77::3"), 1000);
    for (far, addresses) in [
        (&other, ["10.77.0.4", "fd77::4"]),
        (&plain, ["10.77.0.5", "fd77::5"]),
    ] {
        for address in addresses {
            let arrived = udp_arrives(&a.netns, &far.netns, ip(address));
            assert!(!arrived, "{address} is in another VLAN");
        }
    }
    let check = with_result(&in_vlan(&world, 7), &result);
    world.quiet("CHECK", &b, &check);
    let port = result["interfaces"][1]["name"].as_str().expect("a name");
    world.host_command("bridge", &["vlan", "add", "dev", port, "vid", "9"]);
    world
        .call("CHECK", &b, &check)
        .assert_error(103, &["VLAN 7 alone"]);
    for pod in [&a, &b, &other, &plain] {
        world.quiet("DEL", pod, &in_vlan(&world, 7));
    }
}

#[test]
fn the_gateway_of_a_vlan_is_a_link_of_its_own() {
    let world = World::new();
    let [a, b, other] = ["pod-a", "pod-b", "other"].map(Pod::new);
    let in_vlan = |vlan: u16, n: u16| {
        let name = format!("net{n}");
        let more = json!({ "bridge": "sw0", "vlan": vlan, "name": name });
        let mut config = gateway(&world, more);
        config["ipam"]["ranges"] = json!([
            [{ "subnet": format!("10.{n}.0.0/16") }],
            [{ "subnet": format!("fd{n}::/64") }],
        ]);
        config
    };
    let config = in_vlan(7, 71);
    if !filters_vlans() {
        let named = ["vlan: 7", "CONFIG_BRIDGE_VLAN_FILTERING"];
        failing_add(&world, &a, &config, 2, &named);
        return;
    }
    world.forward();
    // What fails after the gateway was made leaves neither it nor the bridge.
    let mut refused = config.clone();
    refused["sysctl"] = json!({ "net.ipv4.kbp_never": "1" });
    failing_add(&world, &a, &refused, 5, &["net/ipv4/kbp_never"]);

    let result = world.add(&a, &config);
    let of_b = address(&world.add(&b, &config), 1);
    let of_other = address(&world.add(&other, &in_vlan(8, 72)), 0);
    for (pod, to) in [
        (&a, ["10.71.0.1", "fd71::1"]),
        (&b, ["10.71.0.1", "fd71::1"]),
        (&other, ["10.72.0.1", "fd72::1"]),
    ] {
        for gateway in to {
            udp_echo(&pod.netns, &world.host, ip(gateway), 1000);
        }
        // Masqueraded, by the gateway.
        for (outside, seen) in [(OUTSIDE_V4, HOST_V4), (OUTSIDE_V6, HOST_V6)] {
            let from = udp_echo(&pod.netns, &world.outside, ip(outside), 1000);
            assert_eq!(from, ip(seen));
        }
    }
    // From VLAN to VLAN over both gateways.
    udp_echo(&a.netns, &other.netns, of_other, 1000);
    udp_echo(&a.netns, &b.netns, of_b, 1000);
    let check = with_result(&config, &result);
    world.quiet("CHECK", &a, &check);
    world.host_command("ip", &["address", "flush", "dev", "sw0.7"]);
    world
        .call("CHECK", &a, &check)
        .assert_error(103, &["sw0.7 lacks the address 10.71.0.1"]);
    for (pod, config) in [(&a, &config), (&b, &config), (&other, &in_vlan(8, 72))] {
        world.quiet("DEL", pod, config);
    }
    // It stays, like the bridge, and is used again.
    world.add(&a, &config);
    udp_echo(&a.netns, &world.host, ip("10.71.0.1"), 1000);
    world.quiet("DEL", &a, &config);
}

#[test]
fn a_bridge_that_others_use_is_not_made_to_filter_vlans() {
    let world = World::new();
    let pods = ["pod-a", "pod-b"].map(Pod::new);
    world.add(&pods[0], &in_vlan(&world, 0));
    let named = ["vlan: 7", "sw0", "vlan_filtering 1"];
    failing_add(&world, &pods[1], &in_vlan(&world, 7), 7, &named);
    world.quiet("DEL", &pods[0], &in_vlan(&world, 0));
    // Without ports it is free, and what cannot be done then is undone.
    if filters_vlans() {
        let mut config = in_vlan(&world, 7);
        config["sysctl"] = json!({ "net.ipv4.kbp_never": "1" });
        failing_add(&world, &pods[1], &config, 5, &["net/ipv4/kbp_never"]);
        let bridge = world.route().link_by_name("sw0").expect("read");
        assert!(!bridge.expect("the bridge").vlan_filtering);
        world.add(&pods[1], &in_vlan(&world, 7));
        let bridge = world.route().link_by_name("sw0").expect("read");
        assert!(bridge.expect("the bridge").vlan_filtering);
    }
}
