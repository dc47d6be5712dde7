//! Every version in every mode: ADD, CHECK, traffic over IPv4 and IPv6 (to the host, to another pod, masqueraded to
//! the world; UDP and TCP; small, as large as the uplink takes, jumbo), DEL, DEL again.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::traffic::{ip, tcp_transfer, udp_echo};
use crate::world::{
    Answer, HOST_V4, HOST_V6, LISTING_VERSIONS, OUTSIDE_V4, OUTSIDE_V6, Pod, REFERENCE_PLUGINS,
    UPLINK_MTU, VERSIONS, World, address, environment, has_check, run,
};

#[test]
fn every_version_in_mode_routed() {
    lives_and_dies_in_every_version(&json!({}));
}

#[test]
fn every_version_in_mode_bridge() {
    lives_and_dies_in_every_version(&json!({ "mode": "bridge", "isGateway": true }));
}

#[test]
fn every_version_in_mode_tune_behind_ptp() {
    for version in LISTING_VERSIONS {
        tuned_life(version, "ptp", false);
    }
}

#[test]
fn every_version_in_mode_tune_behind_bridge() {
    for version in LISTING_VERSIONS {
        tuned_life(version, "bridge", false);
    }
}

#[test]
fn mode_tune_behind_dual_stack_ptp() {
    tuned_life("1.0.0", "ptp", true);
}

#[test]
fn mode_tune_behind_dual_stack_bridge() {
    tuned_life("1.0.0", "bridge", true);
}

/// Calls a reference plugin in the host's namespace.
pub(crate) fn reference(
    world: &World,
    plugin: &str,
    verb: &str,
    pod: &Pod,
    config: &Value,
) -> Answer {
    let mut environment = environment(verb, &pod.id, &pod.path(), &world.cni_path());
    // The plugin bridge needs iptables for masquerading only; it looks for it all the same.
    environment.insert("PATH".into(), "/usr/sbin:/usr/bin:/sbin:/bin".into());
    run(
        &world.host,
        &Path::new(REFERENCE_PLUGINS).join(plugin),
        &environment,
        &config.to_string(),
    )
}

/// The config of a reference plugin, which make no veth in 1.1.0 yet: 1.0.0 then.
pub(crate) fn reference_config(world: &World, version: &str, plugin: &str, dual: bool) -> Value {
    let version = if version == "1.1.0" { "1.0.0" } else { version };
    let mut ranges = vec![json!([{ "subnet": "10.77.0.0/16" }])];
    if dual {
        ranges.push(json!([{ "subnet": "fd77::/64" }]));
    }
    json!({
        "cniVersion": version, "name": "kbptest", "type": plugin,
        "bridge": "cni0", "isDefaultGateway": plugin == "bridge",
        "ipam": { "type": "host-local", "dataDir": world.path("leases"), "ranges": ranges },
    })
}

fn tuned_life(version: &str, plugin: &str, dual: bool) {
    let world = World::new();
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let first = reference_config(&world, version, plugin, dual);
    let tune = json!({ "cniVersion": version, "name": "kbptest", "type": "kbp", "mode": "tune" });
    let results = [&a, &b].map(|pod| {
        let answer = reference(&world, plugin, "ADD", pod, &first);
        assert!(answer.ok, "{plugin} {version}: {answer:?}");
        let mut result: Value = serde_json::from_str(&answer.stdout).expect("a result");
        result["cniVersion"] = json!(version);
        result
    });
    if dual {
        // The plugin bridge does not wait for the address of its bridge.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !world.route().is_local(ip("fd77::1")).expect("look up") {
            assert!(Instant::now() < deadline, "fd77::1 does not come");
            std::thread::yield_now();
        }
    }
    let before = (world.dump(), a.dump(), b.dump());
    for (pod, result) in [&a, &b].into_iter().zip(&results) {
        let passed = world.add(pod, &with_result(&tune, result));
        assert_eq!(passed, *result, "{plugin} {version}");
    }
    for (pod, result) in [&a, &b].into_iter().zip(&results) {
        assert!(world.dump().contains("pfifo"), "{}", world.dump());
        if has_check(version) {
            world.quiet("CHECK", pod, &with_result(&tune, result));
        }
    }
    for family in 0..if dual { 2 } else { 1 } {
        let (ip_a, ip_b) = (address(&results[0], family), address(&results[1], family));
        let gateway = ip(["10.77.0.1", "fd77::1"][family]);
        for size in [1, 1400, 9000] {
            assert_eq!(udp_echo(&a.netns, &b.netns, ip_b, size), ip_a);
            assert_eq!(udp_echo(&b.netns, &world.host, gateway, size), ip_b);
            udp_echo(&world.host, &a.netns, ip_a, size);
        }
        tcp_transfer(&a.netns, &b.netns, ip_b, 300_000);
        tcp_transfer(&a.netns, &world.host, gateway, 300_000);
        tcp_transfer(&world.host, &b.netns, ip_b, 300_000);
    }
    // In the order of the runtime: the last plugin first.
    for (pod, result) in [&a, &b].into_iter().zip(&results) {
        world.quiet("DEL", pod, &with_result(&tune, result));
        world.quiet("DEL", pod, &with_result(&tune, result));
    }
    assert_eq!((world.dump(), a.dump(), b.dump()), before);
    for (pod, result) in [&a, &b].into_iter().zip(&results) {
        let answer = reference(&world, plugin, "DEL", pod, &with_result(&first, result));
        assert!(answer.ok, "{answer:?}");
        world.quiet("DEL", pod, &tune);
    }
}

/// One life of two pods; `more` is what the mode adds to the config.
fn lives_and_dies_in_every_version(more: &Value) {
    for version in VERSIONS {
        let world = World::new();
        let before = world.dump();
        let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
        let (empty_a, empty_b) = (a.dump(), b.dump());
        let config = world.config(version, more.clone());
        let result_a = world.add(&a, &config);
        let result_b = world.add(&b, &config);
        let check = |pod: &Pod, result: &Value| {
            if has_check(version) {
                world.quiet("CHECK", pod, &with_result(&config, result));
            }
        };
        check(&a, &result_a);
        check(&b, &result_b);

        for (family, host, gateway, outside) in [
            (0, HOST_V4, "10.77.0.1", OUTSIDE_V4),
            (1, HOST_V6, "fd77::1", OUTSIDE_V6),
        ] {
            let (ip_a, ip_b) = (address(&result_a, family), address(&result_b, family));
            let (host, gateway, outside) = (ip(host), ip(gateway), ip(outside));
            // One byte, an uplink's worth of bytes, jumbo.
            for size in [1, UPLINK_MTU as usize - 48, 9000, 60_000] {
                assert_eq!(udp_echo(&a.netns, &b.netns, ip_b, size), ip_a);
                assert_eq!(udp_echo(&a.netns, &world.host, gateway, size), ip_a);
                assert_eq!(udp_echo(&a.netns, &world.host, host, size), ip_a);
                assert_eq!(udp_echo(&world.host, &a.netns, ip_a, size), gateway);
                assert_eq!(
                    udp_echo(&a.netns, &world.outside, outside, size),
                    host,
                    "not masqueraded"
                );
            }
            for size in [100, 300_000] {
                assert_eq!(tcp_transfer(&a.netns, &b.netns, ip_b, size), ip_a);
                assert_eq!(tcp_transfer(&b.netns, &world.host, gateway, size), ip_b);
                assert_eq!(tcp_transfer(&world.host, &b.netns, ip_b, size), gateway);
                assert_eq!(
                    tcp_transfer(&b.netns, &world.outside, outside, size),
                    host,
                    "not masqueraded"
                );
            }
        }
        check(&a, &result_a);

        let last = with_result(&config, &result_a);
        world.quiet("DEL", &a, &last);
        assert_eq!(a.dump(), empty_a);
        world.quiet("DEL", &a, &last);
        // The other one is still whole.
        check(&b, &result_b);
        assert_eq!(
            udp_echo(&b.netns, &world.outside, ip(OUTSIDE_V4), 9000),
            ip(HOST_V4)
        );
        // Without prevResult, and as it is when the namespace went first.
        let mut gone = crate::world::environment("DEL", &b.id, "", &world.cni_path());
        gone.remove("CNI_NETNS");
        for _ in 0..2 {
            let answer = world.call_with(&gone, &config.to_string());
            assert!(answer.ok && answer.stdout.is_empty(), "{answer:?}");
        }
        assert_eq!(b.dump(), empty_b);
        // A bridge stays, for the next pod.
        if more["mode"] == "bridge" {
            assert!(world.dump().contains("kbp0 "), "{}", world.dump());
            world.host_command("ip", &["link", "del", "kbp0"]);
        }
        let forwarding = |text: &str, on: &str| {
            text.replace("ip_forward 0", on)
                .replace("forwarding 0", "forwarding 1")
        };
        assert_eq!(
            world.dump(),
            forwarding(&before, "ip_forward 1"),
            "version {version}"
        );
    }
}
