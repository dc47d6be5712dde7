//! Runtimes start many pods at once.

use std::collections::BTreeSet;
use std::thread;

use serde_json::{Value, json};

use crate::traffic::{ip, udp_echo};
use crate::world::{HOST_V4, OUTSIDE_V4, Pod, World};

#[test]
fn many_attachments_at_once_are_all_whole_and_all_go() {
    at_once(json!({}));
}

/// The first of them, whichever that is, makes the bridge, its addresses and its MTU.
#[test]
fn many_attachments_at_once_share_a_bridge_that_none_of_them_found() {
    at_once(json!({ "mode": "bridge", "isDefaultGateway": true }));
}

fn at_once(more: Value) {
    const PODS: usize = 24;
    let is_bridge = more["mode"] == "bridge";
    let world = World::new();
    world.forward();
    let before = world.dump();
    let config = world.config("1.0.0", more);
    let pods: Vec<_> = (0..PODS).map(|n| Pod::new(&format!("pod-{n}"))).collect();

    let results: Vec<_> = thread::scope(|scope| {
        let adding: Vec<_> = pods
            .iter()
            .map(|pod| {
                scope.spawn(|| {
                    let result = world.add(pod, &config);
                    let address = result["ips"][1]["address"]
                        .as_str()
                        .expect("an IPv6 address");
                    let address = ip(address.split('/').next().expect("an address"));
                    // The kernel is busiest now, and late with IPv6.
                    assert!(
                        pod.route().is_local(address).expect("look up"),
                        "{address} is not in use yet"
                    );
                    result
                })
            })
            .collect();
        adding
            .into_iter()
            .map(|add| add.join().expect("ADD"))
            .collect()
    });
    let addresses: BTreeSet<_> = results
        .iter()
        .map(|result| result["ips"][0]["address"].to_string())
        .collect();
    assert_eq!(addresses.len(), PODS);
    for (pod, result) in pods.iter().zip(&results) {
        world.quiet(
            "CHECK",
            pod,
            &crate::lifecycle::with_result(&config, result),
        );
    }
    for pod in [&pods[0], &pods[PODS - 1]] {
        assert_eq!(
            udp_echo(&pod.netns, &world.outside, ip(OUTSIDE_V4), 100),
            ip(HOST_V4)
        );
    }
    // Half of them go while others come.
    let (gone, stay) = pods.split_at(PODS / 2);
    let newer: Vec<_> = (0..PODS / 2)
        .map(|n| Pod::new(&format!("newer-{n}")))
        .collect();
    thread::scope(|scope| {
        for (old, new) in gone.iter().zip(&newer) {
            scope.spawn(|| world.quiet("DEL", old, &config));
            scope.spawn(|| world.add(new, &config));
        }
    });
    for pod in stay.iter().chain(&newer) {
        assert_eq!(
            udp_echo(&pod.netns, &world.outside, ip(OUTSIDE_V4), 100),
            ip(HOST_V4)
        );
    }
    thread::scope(|scope| {
        for pod in stay.iter().chain(&newer) {
            scope.spawn(|| world.quiet("DEL", pod, &config));
        }
    });
    if is_bridge {
        world.host_command("ip", &["link", "del", "kbp0"]);
    }
    assert_eq!(world.dump(), before);
}
