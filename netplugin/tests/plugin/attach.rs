//! What ADD makes, and what it answers.

use std::path::Path;

use kbp_kernel::link::{Batch, LinkKind};
use kbp_kernel::netns::Netns;
use serde_json::{Value, json};

use crate::traffic::{ip, path_mtu, tcp_transfer, udp_echo};
use crate::world::{
    HOST_V4, LISTING_VERSIONS, OUTSIDE_V4, OUTSIDE_V6, Pod, UPLINK_MTU, World, command,
    environment, run, set_sysctl, sysctl,
};

#[test]
fn the_result_has_the_shape_of_the_configs_version() {
    for version in LISTING_VERSIONS {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let config = world.config(version, json!({ "dns": { "nameservers": ["10.77.0.1"] } }));
        let result = world.add(&pod, &config);
        let (host, eth0) = (&result["interfaces"][0], &result["interfaces"][1]);
        let name = host["name"].as_str().expect("a name");
        let links = [(world.route(), name, host), (pod.route(), "eth0", eth0)];
        for (mut route, name, interface) in links {
            let link = route.link_by_name(name).expect("read").expect("the link");
            assert_eq!(
                (link.kind, link.up, link.mtu.0),
                (LinkKind::Veth, true, 65535)
            );
            let mac = link.mac.expect("a MAC");
            assert_eq!(interface["mac"], mac.to_string());
            assert_eq!(
                mac.0[0] & 3,
                2,
                "{mac} is not unicast and locally administered"
            );
        }
        let new = version == "1.1.0";
        let family = |n: &str| {
            if version.starts_with("0.") {
                json!({ "version": n })
            } else {
                json!({})
            }
        };
        let join = |mut a: Value, b: Value| {
            a.as_object_mut()
                .expect("object")
                .extend(b.as_object().expect("object").clone());
            a
        };
        let mtu = |mtu: u32| {
            if new {
                json!({ "mtu": mtu })
            } else {
                json!({})
            }
        };
        let expected = json!({
            "cniVersion": version,
            "interfaces": [
                join(json!({ "name": name, "mac": host["mac"] }), mtu(65535)),
                join(json!({ "name": "eth0", "mac": eth0["mac"], "sandbox": pod.path() }), mtu(65535)),
            ],
            "ips": [
                join(json!({ "interface": 1, "address": "10.77.0.2/16", "gateway": "10.77.0.1" }), family("4")),
                join(json!({ "interface": 1, "address": "fd77::2/64", "gateway": "fd77::1" }), family("6")),
            ],
            "routes": [
                json!({ "dst": "10.77.0.0/16", "gw": "10.77.0.1" }),
                json!({ "dst": "fd77::/64", "gw": "fd77::1" }),
                join(json!({ "dst": "0.0.0.0/0", "gw": "10.77.0.1" }), mtu(1400)),
                join(json!({ "dst": "::/0", "gw": "fd77::1" }), mtu(1400)),
            ],
            "dns": { "nameservers": ["10.77.0.1"] },
        });
        assert_eq!(result, expected);
    }
}

#[test]
fn the_smallest_config_works() {
    let world = World::new();
    let config = json!({
        "cniVersion": "1.0.0", "name": "kbptest", "type": "kbp",
        "ipam": { "type": "host-local", "subnet": "10.77.0.0/24", "dataDir": world.path("leases") },
    });
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let result = world.add(&a, &config);
    world.add(&b, &config);
    assert_eq!(
        result["routes"],
        json!([{ "dst": "10.77.0.0/24", "gw": "10.77.0.1" }])
    );
    assert!(result.get("dns").is_none());
    assert_eq!(
        udp_echo(&a.netns, &b.netns, ip("10.77.0.3"), 1000),
        ip("10.77.0.2")
    );
    assert_eq!(
        udp_echo(&world.host, &a.netns, ip("10.77.0.2"), 1000),
        ip("10.77.0.1")
    );
    assert_eq!(world.sysctl("net/ipv4/ip_forward"), "1");
    assert_eq!(
        world.sysctl("net/ipv6/conf/all/forwarding"),
        "0",
        "no pod has an IPv6 address"
    );
    assert_eq!(world.nftables(), "", "nobody asked for masquerading");
    world.quiet("DEL", &a, &config);
    world.quiet("DEL", &b, &config);
}

#[test]
fn a_default_route_and_an_mtu_come_from_the_config() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let more = json!({ "isDefaultGateway": true, "mtu": 1300, "ipam": { "routes": null } });
    let result = world.add(&pod, &world.config("1.1.0", more));
    assert_eq!(
        result["routes"][2],
        json!({ "dst": "0.0.0.0/0", "gw": "10.77.0.1", "mtu": 1300 })
    );
    assert_eq!(path_mtu(&pod.netns, ip(OUTSIDE_V4)), 1300);
    tcp_transfer(&pod.netns, &world.outside, ip(OUTSIDE_V6), 100_000);
}

#[test]
fn every_range_of_the_network_is_reached_with_the_full_mtu() {
    let world = World::new();
    let more = json!({ "ipam": { "ranges": [[{ "subnet": "10.77.0.0/30" }, { "subnet": "10.78.0.0/24" }]] } });
    let config = world.config("1.0.0", more);
    // The first range holds one pod beside its gateway; the second one gets its address from the second range.
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let one = world.add(&a, &config);
    let two = world.add(&b, &config);
    assert_eq!(one["ips"][0]["address"], "10.77.0.2/30");
    assert_eq!(two["ips"][0]["address"], "10.78.0.2/24");
    assert_eq!(path_mtu(&a.netns, ip("10.78.0.2")), 65535);
    assert_eq!(path_mtu(&b.netns, ip("10.77.0.2")), 65535);
    // Neither is masqueraded towards the other.
    assert_eq!(
        udp_echo(&a.netns, &b.netns, ip("10.78.0.2"), 60_000),
        ip("10.77.0.2")
    );
    assert_eq!(
        udp_echo(&b.netns, &a.netns, ip("10.77.0.2"), 60_000),
        ip("10.78.0.2")
    );
}

#[test]
fn the_mac_is_the_one_asked_for() {
    let world = World::new();
    let config = world.config("1.0.0", json!({ "mac": "02:AA:00:00:00:01" }));
    let a = Pod::new("pod-a");
    assert_eq!(
        world.add(&a, &config)["interfaces"][1]["mac"],
        "02:aa:00:00:00:01"
    );
    let b = Pod::new("pod-b");
    let mut environment = environment("ADD", &b.id, &b.path(), &world.cni_path());
    environment.insert(
        "CNI_ARGS".into(),
        "IgnoreUnknown=1;K8S_POD_NAME=x;MAC=02:aa:00:00:00:02".into(),
    );
    let answer = world.call_with(&environment, &config.to_string());
    let result: Value = serde_json::from_str(&answer.stdout).expect("a result");
    assert_eq!(result["interfaces"][1]["mac"], "02:aa:00:00:00:02");
    assert_eq!(
        udp_echo(&a.netns, &b.netns, ip("10.77.0.3"), 100),
        ip("10.77.0.2")
    );
}

#[test]
fn an_address_is_given_that_the_runtime_asks_for() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config(
        "1.0.0",
        json!({ "runtimeConfig": { "ips": ["10.77.5.5/16", "fd77::55/64"] } }),
    );
    let result = world.add(&pod, &config);
    assert_eq!(result["ips"][0]["address"], "10.77.5.5/16");
    assert_eq!(result["ips"][1]["address"], "fd77::55/64");
}

#[test]
fn ipam_without_gateways_gets_link_local_ones() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config(
        "1.0.0",
        json!({ "ipMasq": false, "isDefaultGateway": true, "ipam": {
            "type": "static", "ranges": null, "routes": null,
            "addresses": [{ "address": "10.77.0.9/32" }, { "address": "fd77::9/128" }],
        } }),
    );
    let result = world.add(&pod, &config);
    assert_eq!(result["ips"][0]["gateway"], "169.254.1.1");
    assert_eq!(result["ips"][1]["gateway"], "fe80::1");
    let last = crate::lifecycle::with_result(&config, &result);
    world.quiet("CHECK", &pod, &last);
    assert_eq!(
        udp_echo(&pod.netns, &world.host, ip("169.254.1.1"), 60_000),
        ip("10.77.0.9")
    );
    udp_echo(&world.host, &pod.netns, ip("10.77.0.9"), 60_000);
    udp_echo(&world.host, &pod.netns, ip("fd77::9"), 60_000);
    udp_echo(&pod.netns, &world.host, ip(HOST_V4), 60_000);
    world.quiet("DEL", &pod, &last);
}

#[test]
fn a_previous_result_is_kept() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let previous = json!({
        "cniVersion": "1.0.0", "x-other": [1, { "deep": true }],
        "interfaces": [{ "name": "lo", "sandbox": pod.path(), "x": 1 }],
        "ips": [{ "address": "127.0.0.1/8", "interface": 0 }],
    });
    let config = world.config("1.0.0", json!({ "prevResult": previous }));
    let result = world.add(&pod, &config);
    assert_eq!(result["x-other"], previous["x-other"]);
    assert_eq!(result["interfaces"][0], previous["interfaces"][0]);
    assert_eq!(result["interfaces"][2]["name"], "eth0");
    assert_eq!(result["ips"][0], previous["ips"][0]);
    assert_eq!(result["ips"][1]["interface"], 2);
    world.quiet(
        "CHECK",
        &pod,
        &crate::lifecycle::with_result(&config, &result),
    );
}

#[test]
fn it_works_under_strict_reverse_path_filtering() {
    let world = World::new();
    for key in ["all", "default"] {
        world.set_sysctl(&format!("net/ipv4/conf/{key}/rp_filter"), "1");
    }
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let config = world.config("1.0.0", json!({}));
    world.add(&a, &config);
    world.add(&b, &config);
    assert_eq!(
        udp_echo(&a.netns, &b.netns, ip("10.77.0.3"), 60_000),
        ip("10.77.0.2")
    );
    assert_eq!(
        udp_echo(&a.netns, &world.host, ip(HOST_V4), 60_000),
        ip("10.77.0.2")
    );
    assert_eq!(
        udp_echo(&a.netns, &world.outside, ip(OUTSIDE_V4), 60_000),
        ip(HOST_V4)
    );
}

#[test]
fn ipv6_that_the_runtime_switched_off_in_the_pod_is_switched_on() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    for key in ["all", "default", "lo"] {
        set_sysctl(
            &pod.netns,
            &format!("net/ipv6/conf/{key}/disable_ipv6"),
            "1",
        );
    }
    world.set_sysctl("net/ipv6/conf/default/disable_ipv6", "1");
    world.add(&pod, &world.config("1.0.0", json!({})));
    for link in ["lo", "eth0"] {
        assert_eq!(
            sysctl(&pod.netns, &format!("net/ipv6/conf/{link}/disable_ipv6")),
            "0"
        );
    }
    udp_echo(&pod.netns, &world.outside, ip(OUTSIDE_V6), 9000);
}

#[test]
fn a_pod_cannot_advertise_itself_as_the_hosts_router_and_the_hosts_own_router_stays() {
    let world = World::new();
    world.set_sysctl("net/ipv6/conf/default/accept_ra", "2");
    assert_eq!(world.sysctl("net/ipv6/conf/uplink/accept_ra"), "1");
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &world.config("1.0.0", json!({})));
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    assert_eq!(
        world.sysctl(&format!("net/ipv6/conf/{host_end}/accept_ra")),
        "0"
    );
    // A router ignores advertisements unless it is told otherwise.
    assert_eq!(world.sysctl("net/ipv6/conf/uplink/accept_ra"), "2");
}

#[test]
fn interfaces_are_operational_when_add_returns() {
    let world = World::new();
    let config = world
        .config("1.0.0", json!({ "ipMasq": false }))
        .to_string();
    for n in 0..4 {
        // Two namespaces with nothing in them: both ends get the same index, and then the kernel is in no hurry to
        // tell of a link (linkwatch_urgent_event in net/core/link_watch.c), least of all the second time in a second.
        let host = Netns::create().expect("create a host");
        let pod = Pod::new(&format!("pod-{n}"));
        let environment = environment("ADD", &pod.id, &pod.path(), &world.cni_path());
        let answer = run(
            &host,
            Path::new(env!("CARGO_BIN_EXE_kbp")),
            &environment,
            &config,
        );
        assert!(answer.ok, "{answer:?}");
        let result: Value = serde_json::from_str(&answer.stdout).expect("a result");
        for (netns, end) in [
            (&host, &result["interfaces"][0]),
            (&pod.netns, &result["interfaces"][1]),
        ] {
            let name = end["name"].as_str().expect("a name");
            // All links at once: asking for one of them would itself make the kernel look at it.
            let links = command(netns, "ip", &["-brief", "link"]);
            let line = links
                .lines()
                .find(|line| line.starts_with(name))
                .expect("the link");
            assert_eq!(line.split_whitespace().nth(1), Some("UP"), "{line}");
        }
    }
}

#[test]
fn a_link_of_another_owner_is_left_alone() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({}));
    let result = world.add(&pod, &config);
    let name = result["interfaces"][0]["name"].as_str().expect("a name");
    let index = world
        .route()
        .link_by_name(name)
        .expect("read")
        .expect("host end")
        .index;
    world
        .route()
        .execute(Batch::new().set_alias(index, "kbp:kbptest/somebody-else/eth0"))
        .expect("set the alias");
    world.quiet("DEL", &pod, &config);
    assert!(
        world.route().link_by_name(name).expect("read").is_some(),
        "DEL removed somebody else's link"
    );
    // Without any alias it is what an interrupted ADD has left.
    world
        .route()
        .execute(Batch::new().set_alias(index, ""))
        .expect("remove the alias");
    world.quiet("DEL", &pod, &config);
    assert!(world.route().link_by_name(name).expect("read").is_none());
}

#[test]
fn a_node_with_a_route_of_its_own_to_the_address_that_is_asked_for_has_its_default_route_found() {
    let world = World::new();
    for route in [
        ["route", "add", "203.0.113.0/24", "dev", "lo"].as_slice(),
        &["-6", "route", "add", "unreachable", "2001:db8:ffff::/48"],
    ] {
        world.host_command("ip", route);
    }
    let pod = Pod::new("pod-a");
    world.add(&pod, &world.config("1.0.0", json!({})));
    for outside in [OUTSIDE_V4, OUTSIDE_V6] {
        assert_eq!(
            path_mtu(&pod.netns, ip(outside)),
            i32::try_from(UPLINK_MTU).expect("small"),
            "{outside}"
        );
    }
}
