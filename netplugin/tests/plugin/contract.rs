//! Lines of the contract that no other file is about.

use std::fs;
use std::net::{IpAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kbp_kernel::netns::Netns;
use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::matrix::{reference, reference_config};
use crate::node::keeping;
use crate::traffic::{any, ip, tcp_transfer, udp};
use crate::world::{OUTSIDE_V4, Pod, World, address, command, environment, path, run};

const MODES: [&str; 2] = ["routed", "bridge"];

#[test]
fn success_and_failure_speak_on_stdout_and_by_exit_status_in_every_mode() {
    for mode in ["routed", "bridge", "tune"] {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let config = world.config("1.1.0", json!({ "mode": mode, "txQueueLen": "x" }));
        let answer = world.call("ADD", &pod, &config);
        answer.assert_error(7, &["txQueueLen", "\"x\""]);
        let error: Value = serde_json::from_str(&answer.stdout).expect("JSON");
        let keys: Vec<_> = error.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["cniVersion", "code", "msg"], "{mode}");
        assert_eq!(
            (&error["cniVersion"], answer.stderr.as_str()),
            (&json!("1.1.0"), "")
        );
    }
}

#[test]
fn an_add_whose_caller_has_gone_is_undone() {
    let world = World::new();
    world.forward();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({}));
    let before = (world.dump(), pod.dump());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let plugin = Command::new(env!("CARGO_BIN_EXE_kbp"));
    let said = world.failing_add(plugin, writer, &pod, &config);
    assert!(said.contains("write the result to stdout"), "{said}");
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn what_is_opened_is_not_mistaken_for_a_standard_file_that_was_closed() {
    let world = World::new();
    world.forward();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({}));
    let before = (world.dump(), pod.dump());
    // Without its input it has nothing to do; without its outputs it cannot say so.
    let mut plugin = Command::new("/bin/sh");
    plugin.args(["-c", "exec \"$0\" <&- >&- 2>&-", env!("CARGO_BIN_EXE_kbp")]);
    world.failing_add(plugin, Stdio::null(), &pod, &config);
    // Its result goes nowhere, rather than into a socket of its own.
    let mut plugin = Command::new("/bin/sh");
    plugin.args([
        "-c",
        "\"$0\" >&- 2>&-; exit $(($? + 1))",
        env!("CARGO_BIN_EXE_kbp"),
    ]);
    world.failing_add(plugin, Stdio::null(), &pod, &config);
    world.quiet("DEL", &pod, &config);
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn the_plugins_own_namespace_is_refused_in_every_mode() {
    for mode in ["routed", "bridge", "tune"] {
        let world = World::new();
        let before = world.dump();
        let config = world.config(
            "1.0.0",
            json!({ "mode": mode, "prevResult": { "cniVersion": "1.0.0" } }),
        );
        let environment = environment("ADD", "pod-a", &path(&world.host), &world.cni_path());
        world
            .call_with(&environment, &config.to_string())
            .assert_error(4, &["CNI_NETNS", "the plugin itself"]);
        assert_eq!(world.dump(), before, "{mode}");
    }
}

#[test]
fn ipam_gets_the_whole_config_and_the_same_environment_in_every_version() {
    for version in crate::world::VERSIONS {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let answer = if version < "0.3.0" {
            r#"{ "ip4": { "ip": "10.77.0.9/16", "gateway": "10.77.0.1" } }"#
        } else {
            r#"{ "ips": [{ "address": "10.77.0.9/16", "gateway": "10.77.0.1" }] }"#
        };
        let body = format!(
            "cat > $0.$CNI_COMMAND; env > $0.$CNI_COMMAND.env; [ $CNI_COMMAND = ADD ] && echo '{answer}'; exit 0"
        );
        world.ipam_script("own-ipam", &body);
        let config = world.config(
            version,
            json!({ "ipam": { "type": "own-ipam" }, "x-unknown": [{ "deep": null }] }),
        );
        let result = world.add(&pod, &config);
        assert_eq!(address(&result, 0), ip("10.77.0.9"));
        world.quiet("DEL", &pod, &config);
        for verb in ["ADD", "DEL"] {
            let read = |name: String| fs::read_to_string(world.path(&name)).expect("what IPAM got");
            let stdin: Value =
                serde_json::from_str(&read(format!("own-ipam.{verb}"))).expect("JSON");
            assert_eq!(stdin, config, "{version} {verb}");
            let got = read(format!("own-ipam.{verb}.env"));
            for (key, value) in environment(verb, &pod.id, &pod.path(), &world.cni_path()) {
                assert!(
                    got.contains(&format!("{key}={value}\n")),
                    "{version} {verb}: {key} in {got}"
                );
            }
        }
    }
}

#[test]
fn a_second_address_of_a_family_is_refused_where_the_result_has_no_room_for_it() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let ipam = json!({ "type": "kbp-local", "routes": null, "ranges": [
        [{ "subnet": "10.77.0.0/16" }], [{ "subnet": "10.78.0.0/16" }],
    ] });
    let config = |version| world.config(version, json!({ "ipam": ipam }));
    let before = (world.dump(), pod.dump());
    world
        .call("ADD", &pod, &config("0.2.0"))
        .assert_error(1, &["10.77.0.2/16", "10.78.0.2/16", "\"0.2.0\"", "0.3.0"]);
    assert_eq!((world.dump(), pod.dump()), before);
    world.add(&pod, &config("0.3.0"));
}

#[test]
fn unknown_keys_and_capabilities_of_other_plugins_are_ignored() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let config = world.config(
            "1.1.0",
            json!({
                "mode": mode, "isGateway": true, "keepAddrPrefixes": [1], "x": { "y": 2 },
                "args": { "cni": { "labels": [] }, "org.example": 1 },
                "runtimeConfig": {
                    "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }],
                    "bandwidth": { "ingressRate": 1000 }, "x": null,
                },
            }),
        );
        let result = world.add(&pod, &config);
        world.quiet("CHECK", &pod, &with_result(&config, &result));
        assert!(
            !world.nftables().contains("8080"),
            "portMappings are the plugin portmap's"
        );
        world.quiet("DEL", &pod, &config);
    }
}

#[test]
fn del_works_with_a_config_that_was_changed_since_add() {
    for (was, is) in [
        ("routed", "bridge"),
        ("bridge", "routed"),
        ("bridge", "tune"),
    ] {
        let world = World::new();
        world.forward();
        let before = world.dump();
        let pod = Pod::new("pod-a");
        world.add(
            &pod,
            &world.config("1.0.0", json!({ "mode": was, "isGateway": true })),
        );
        // Not even valid any more.
        let changed = json!({ "mode": is, "ipMasq": 5, "mtu": "x", "bridge": "a/b", "sysctl": [], "profile": {} });
        for _ in 0..2 {
            world.quiet("DEL", &pod, &world.config("1.0.0", changed.clone()));
        }
        if was == "bridge" {
            world.host_command("ip", &["link", "del", "kbp0"]);
        }
        assert_eq!(world.dump(), before, "{was} to {is}");
    }
}

#[test]
fn the_binary_can_be_replaced_between_add_and_del() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({}));
    let installed = world.path("kbp");
    let install = || {
        let new = world.path(".kbp.new");
        fs::copy(env!("CARGO_BIN_EXE_kbp"), &new).expect("copy");
        fs::rename(new, &installed).expect("rename");
    };
    for (verb, config) in [("ADD", &config), ("DEL", &config)] {
        install();
        let environment = environment(verb, &pod.id, &pod.path(), &world.cni_path());
        let answer = run(
            &world.host,
            Path::new(&installed),
            &environment,
            &config.to_string(),
        );
        assert!(answer.ok, "{verb}: {answer:?}");
    }
    assert!(world.leases().is_empty());
}

#[test]
fn a_pod_of_another_plugin_with_a_smaller_mtu_is_reached_with_large_packets() {
    for mode in MODES {
        let world = World::new();
        let (ours, other) = (Pod::new("pod-a"), Pod::new("pod-b"));
        // In ranges of its own, or the bridge would have to answer for it.
        let mut ptp = reference_config(&world, "1.0.0", "ptp", true);
        ptp["name"] = json!("other");
        ptp["ipam"]["ranges"] =
            json!([[{ "subnet": "10.66.0.0/16" }], [{ "subnet": "fd66::/64" }]]);
        ptp["ipam"]["routes"] = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
        let answer = reference(&world, "ptp", "ADD", &other, &ptp);
        assert!(answer.ok, "{answer:?}");
        // With the full MTU towards everything, as if nothing were known of the other pod.
        let routes = json!([
            { "dst": "10.66.0.0/16", "mtu": 65535 },
            { "dst": "fd66::/64", "mtu": 65535 },
        ]);
        let config = world.config(
            "1.0.0",
            json!({ "mode": mode, "isGateway": true, "routes": routes }),
        );
        let result = world.add(&ours, &config);
        for (family, there) in [ip("10.66.0.2"), ip("fd66::2")].into_iter().enumerate() {
            // Before anything has told the pod of the narrow hop.
            datagrams_pass_a_narrow_hop(&ours, &other, there, mode);
            tcp_transfer(&ours.netns, &other.netns, there, 300_000);
            let here = address(&result, family);
            tcp_transfer(&other.netns, &ours.netns, here, 300_000);
        }
    }
}

/// The first datagrams may be lost to path MTU discovery: the sender is told why, and those after them arrive.
fn datagrams_pass_a_narrow_hop(ours: &Pod, other: &Pod, there: IpAddr, mode: &str) {
    let server = udp(&other.netns, (there, 0).into());
    server
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("set a timeout");
    let client = udp(&ours.netns, any(there));
    client
        .connect(server.local_addr().expect("an address"))
        .expect("connect");
    let mut buffer = [0; 10_000];
    let arrived = (0..20).any(|_| {
        let _ = client.send(&[7; 9000]);
        server.recv(&mut buffer).is_ok_and(|n| n == 9000)
    });
    assert!(
        arrived,
        "{mode}: no datagram of 9000 bytes reaches {there} behind an MTU of 1500"
    );
    // That it knows is the work of an ICMP error: nothing else has said so.
    let route = ours.command("ip", &["route", "get", &there.to_string()]);
    assert!(route.contains("mtu 1500"), "{mode}: {route}");
}

/// What it needs to know is in its config, on this node and in the kernel: nobody is asked over the network, whatever the environment says
/// of an API server.
#[test]
fn no_verb_speaks_to_the_network() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    // What it has begun and sent, and what has come for it.
    let counters = |netns: &Netns| {
        let text = command(netns, "cat", &["/proc/thread-self/net/snmp"]);
        let of = |protocol: &str, name: &str| -> u64 {
            let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol));
            let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
            let mut both = names.split_whitespace().zip(values.split_whitespace());
            let found = both.find(|(key, _)| *key == name);
            found.expect("a counter").1.parse().expect("a number")
        };
        [of("Tcp: ", "ActiveOpens"), of("Udp: ", "OutDatagrams")]
    };
    let call = |verb: &str, config: &Value| {
        let mut environment = environment(verb, &pod.id, &pod.path(), &world.cni_path());
        for (key, value) in [
            ("KUBERNETES_SERVICE_HOST", OUTSIDE_V4),
            ("KUBERNETES_SERVICE_PORT", "6443"),
            ("KUBECONFIG", "/etc/kubernetes/admin.conf"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAME=web;K8S_POD_NAMESPACE=default",
            ),
        ] {
            environment.insert(key.to_owned(), value.to_owned());
        }
        let answer = world.call_with(&environment, &config.to_string());
        assert!(answer.ok, "{verb}: {answer:?}");
        answer.stdout
    };
    for mode in MODES {
        let config = world.config("1.1.0", json!({ "mode": mode }));
        let result = serde_json::from_str(&call("ADD", &config)).expect("a result");
        call("CHECK", &with_result(&config, &result));
        call("STATUS", &config);
        call("GC", &keeping(&config, &[&pod]));
        call("DEL", &config);
        for netns in [&world.host, &pod.netns] {
            assert_eq!(counters(netns), [0, 0], "{mode}");
        }
    }
    // One that did would be seen, though nobody answers there.
    let server = (ip(OUTSIDE_V4), 6443).into();
    let asked = world
        .host
        .run(|| TcpStream::connect_timeout(&server, Duration::from_secs(30)));
    assert!(asked.expect("enter").is_err());
    assert_eq!(counters(&world.host), [1, 0]);
}
