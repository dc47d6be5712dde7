//! Mode `tune`, chained after another plugin.

use kbp_kernel::ethtool;
use kbp_kernel::link::Batch;
use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::matrix::{reference, reference_config};
use crate::world::{Pod, World, command};

fn tune(more: Value) -> Value {
    let mut config =
        json!({ "cniVersion": "1.0.0", "name": "kbptest", "type": "kbp", "mode": "tune" });
    let more = more.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(more);
    config
}

/// A pod with a veth of the plugin ptp, and that plugin's result.
fn ptp(world: &World) -> (Pod, Value) {
    let pod = Pod::new("pod-a");
    let config = reference_config(world, "1.0.0", "ptp", false);
    let answer = reference(world, "ptp", "ADD", &pod, &config);
    assert!(answer.ok, "{answer:?}");
    let result = serde_json::from_str(&answer.stdout).expect("a result");
    (pod, result)
}

fn host_end(result: &Value) -> String {
    result["interfaces"][0]["name"]
        .as_str()
        .expect("a name")
        .to_owned()
}

#[test]
fn what_is_tuned_is_recorded_and_put_back() {
    for (profile, tso) in [("latency", false), ("throughput", true)] {
        let world = World::new();
        let (pod, result) = ptp(&world);
        let name = host_end(&result);
        let index = world
            .route()
            .link_by_name(&name)
            .expect("read")
            .expect("host end")
            .index;
        world
            .route()
            .execute(Batch::new().set_alias(index, "of ptp; was here"))
            .expect("set the alias");
        let before = (world.dump(), pod.dump());
        let config = tune(json!({ "profile": profile, "txQueueLen": 77 }));
        let chained = with_result(&config, &result);
        for _ in 0..2 {
            // The second ADD must not take what the first one made for what was there before.
            world.add(&pod, &chained);
            for (netns, name, gro, tso, queue) in [
                (&world.host, name.as_str(), false, tso, "limit 77p"),
                (&pod.netns, "eth0", true, true, "noqueue"),
            ] {
                let features = ethtool::features(netns, name).expect("features");
                assert_eq!((features.gro, features.tso), (gro, tso), "{profile} {name}");
                let qdisc = command(netns, "tc", &["qdisc", "show", "dev", name]);
                assert!(qdisc.contains(queue), "{qdisc}");
            }
        }
        let link = world
            .route()
            .link_by_name(&name)
            .expect("read")
            .expect("host end");
        let alias = link.alias.expect("a record");
        assert!(
            alias.starts_with("kbp-tuned: ") && alias.ends_with("of ptp; was here"),
            "{alias}"
        );
        world.quiet("CHECK", &pod, &chained);
        command(&pod.netns, "ethtool", &["-K", "eth0", "gro", "off"]);
        world
            .call("CHECK", &pod, &chained)
            .assert_error(103, &["eth0 has GRO off"]);
        world.quiet("DEL", &pod, &chained);
        assert_eq!((world.dump(), pod.dump()), before);
        for (netns, name) in [(&world.host, name.as_str()), (&pod.netns, "eth0")] {
            let features = ethtool::features(netns, name).expect("features");
            assert_eq!((features.gro, features.tso), (false, true), "{name}");
        }
    }
}

#[test]
fn prev_result_passes_through_with_what_kbp_does_not_know_and_its_interfaces_are_not_believed() {
    let world = World::new();
    let (pod, _) = ptp(&world);
    let previous = json!({
        "cniVersion": "1.0.0", "x-more": { "deep": [null, 1.5] },
        "interfaces": [
            { "name": "uplink", "mac": "00:00:00:00:00:00", "x": {} },
            { "name": "eth0", "sandbox": "/nowhere" },
        ],
        "ips": [{ "address": "10.9.9.9/24", "interface": 1 }], "routes": null, "dns": {},
    });
    let result = world.add(&pod, &with_result(&tune(json!({})), &previous));
    assert_eq!(result, previous);
    let uplink = ethtool::features(&world.host, "uplink").expect("features");
    assert!(!uplink.gro, "the list was believed");
    assert!(ethtool::features(&pod.netns, "eth0").expect("features").gro);
}

#[test]
fn a_qdisc_that_somebody_wanted_stays() {
    let world = World::new();
    let (pod, result) = ptp(&world);
    command(
        &pod.netns,
        "tc",
        &[
            "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "1gbit", "burst", "1mb",
            "latency", "50ms",
        ],
    );
    let before = (world.dump(), pod.dump());
    let chained = with_result(&tune(json!({})), &result);
    world.add(&pod, &chained);
    assert!(pod.dump().contains("tbf"), "{}", pod.dump());
    world.quiet("CHECK", &pod, &chained);
    world.quiet("DEL", &pod, &chained);
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn what_cannot_be_polled_is_left_alone_and_named() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let previous =
        json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": pod.path() }] });
    let chained = with_result(&tune(json!({})), &previous);
    let required = with_result(&tune(json!({ "required": true })), &previous);
    for (setup, reason) in [
        (vec![], "no interface eth0"),
        (
            vec!["link add eth0 type bridge", "link set eth0 up"],
            "eth0 is a bridge",
        ),
        (
            vec!["link del eth0", "link add eth0 type veth peer name other"],
            "other end is in the pod itself",
        ),
    ] {
        for line in setup {
            command(&pod.netns, "ip", &line.split(' ').collect::<Vec<_>>());
        }
        let before = (world.dump(), pod.dump());
        let answer = world.call("ADD", &pod, &chained);
        assert!(answer.ok && answer.stderr.contains(reason), "{answer:?}");
        let passed: Value = serde_json::from_str(&answer.stdout).expect("a result");
        assert_eq!(passed, previous);
        world
            .call("ADD", &pod, &required)
            .assert_error(104, &[reason, "required"]);
        world.quiet("CHECK", &pod, &chained);
        world.quiet("DEL", &pod, &chained);
        assert_eq!((world.dump(), pod.dump()), before);
    }
}

#[test]
fn an_alias_without_room_for_a_record_is_not_lost() {
    let world = World::new();
    let (pod, result) = ptp(&world);
    let index = world
        .route()
        .link_by_name(&host_end(&result))
        .expect("read")
        .expect("host end")
        .index;
    world
        .route()
        .execute(Batch::new().set_alias(index, &"a".repeat(250)))
        .expect("set the alias");
    let before = (world.dump(), pod.dump());
    world
        .call("ADD", &pod, &with_result(&tune(json!({})), &result))
        .assert_error(100, &["alias", "too long"]);
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn del_without_the_namespace_or_after_a_changed_config_leaves_nothing() {
    let world = World::new();
    let (pod, result) = ptp(&world);
    world.add(&pod, &with_result(&tune(json!({})), &result));
    let mut gone = crate::world::environment("DEL", &pod.id, "", &world.cni_path());
    gone.remove("CNI_NETNS");
    let answer = world.call_with(&gone, &tune(json!({})).to_string());
    assert!(answer.ok && answer.stdout.is_empty(), "{answer:?}");
    // The config was mode routed when ADD ran.
    let world = World::new();
    world.forward();
    let before = world.dump();
    let routed = world.config("1.0.0", json!({}));
    let pod = Pod::new("pod-b");
    world.add(&pod, &routed);
    world.quiet(
        "DEL",
        &pod,
        &world.config("1.0.0", json!({ "mode": "tune" })),
    );
    assert_eq!(world.dump(), before);
}
