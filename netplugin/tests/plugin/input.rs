//! Input that no runtime should send: each refused with its code, by name, without touching anything.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::world::{Pod, VERSIONS, World, environment};

fn change(
    mut environment: BTreeMap<String, String>,
    name: &str,
    value: Option<&str>,
) -> BTreeMap<String, String> {
    match value {
        Some(value) => environment.insert(name.into(), value.into()),
        None => environment.remove(name),
    };
    environment
}

#[test]
fn a_wrong_environment_is_refused() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let before = (world.dump(), pod.dump());
    let good = |verb: &str| environment(verb, "pod-a", &pod.path(), &world.cni_path());
    let config = world.config("1.0.0", json!({})).to_string();
    let long = "c".repeat(200);
    for (verb, name, value, parts) in [
        (
            "add",
            "CNI_ARGS",
            None,
            vec![
                "CNI_COMMAND",
                "\"add\"",
                "ADD, DEL, CHECK, GC, STATUS, VERSION",
            ],
        ),
        ("", "CNI_ARGS", None, vec!["CNI_COMMAND", "\"\""]),
        (
            "ADD",
            "CNI_CONTAINERID",
            None,
            vec!["ADD needs CNI_CONTAINERID in the environment"],
        ),
        (
            "ADD",
            "CNI_NETNS",
            None,
            vec!["ADD needs CNI_NETNS in the environment"],
        ),
        (
            "ADD",
            "CNI_NETNS",
            Some(""),
            vec!["ADD needs CNI_NETNS in the environment"],
        ),
        (
            "CHECK",
            "CNI_IFNAME",
            None,
            vec!["CHECK needs CNI_IFNAME in the environment"],
        ),
        (
            "DEL",
            "CNI_CONTAINERID",
            None,
            vec!["DEL needs CNI_CONTAINERID in the environment"],
        ),
        (
            "DEL",
            "CNI_IFNAME",
            Some(""),
            vec!["DEL needs CNI_IFNAME in the environment"],
        ),
        (
            "ADD",
            "CNI_CONTAINERID",
            Some("../x"),
            vec!["CNI_CONTAINERID", "\"../x\"", "allowed"],
        ),
        (
            "ADD",
            "CNI_CONTAINERID",
            Some(&long),
            vec!["CNI_CONTAINERID", "200 bytes", "at most"],
        ),
        (
            "ADD",
            "CNI_IFNAME",
            Some("sixteen-bytes-ab"),
            vec!["CNI_IFNAME", "sixteen-bytes-ab", "1 to 15 bytes"],
        ),
        (
            "ADD",
            "CNI_IFNAME",
            Some("a/b"),
            vec!["CNI_IFNAME", "\"a/b\""],
        ),
        (
            "ADD",
            "CNI_IFNAME",
            Some(".."),
            vec!["CNI_IFNAME", "\"..\""],
        ),
        (
            "ADD",
            "CNI_IFNAME",
            Some("a b"),
            vec!["CNI_IFNAME", "\"a b\""],
        ),
        (
            "ADD",
            "CNI_ARGS",
            Some("MAC"),
            vec!["CNI_ARGS", "\"MAC\"", "KEY=VALUE"],
        ),
    ] {
        let environment = change(good(verb), name, value);
        world
            .call_with(&environment, &config)
            .assert_error(4, &parts);
    }
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn a_wrong_config_is_refused() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let before = (world.dump(), pod.dump());
    for (more, code, parts) in [
        (
            json!({ "cniVersion": "0.5.0" }),
            1,
            [
                "\"0.5.0\"",
                "0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0",
            ],
        ),
        (
            json!({ "cniVersion": "2.0.0" }),
            1,
            ["\"2.0.0\"", "0.3.1, 0.4.0, 1.0.0, 1.1.0"],
        ),
        (json!({ "cniVersion": 1 }), 7, ["cniVersion", "1"]),
        (json!({ "name": null }), 7, ["name", "\"\""]),
        (json!({ "name": "a/b" }), 7, ["name", "\"a/b\""]),
        (
            json!({ "name": "n".repeat(112) }),
            7,
            ["name", "at most 111 bytes"],
        ),
        (
            json!({ "mode": "ipvlan" }),
            2,
            ["mode: \"ipvlan\"", "\"routed\", \"bridge\", \"tune\""],
        ),
        (
            json!({ "mode": ["routed"] }),
            7,
            ["mode: [\"routed\"]", "\"routed\", \"bridge\", \"tune\""],
        ),
        (
            json!({ "mode": "bridge", "vlan": 4095 }),
            7,
            ["vlan: 4095", "0 (none) to 4094"],
        ),
        (
            json!({ "mode": "bridge", "bridge": "a/b" }),
            7,
            ["bridge: \"a/b\"", "1 to 15 bytes"],
        ),
        (
            json!({ "mode": "tune", "ipam": null }),
            7,
            ["prevResult is missing", "\"tune\""],
        ),
        (
            json!({ "sysctl": { "kernel.shmmax": "1" } }),
            7,
            ["sysctl.kernel.shmmax", "net.*"],
        ),
        (json!({ "numQueues": 65 }), 7, ["numQueues: 65", "1 to 64"]),
        (
            json!({ "routes": [{ "gw": "10.77.0.1" }] }),
            7,
            ["routes: [", "dst"],
        ),
        (json!({ "mtu": 65536 }), 7, ["mtu: 65536", "68 to 65535"]),
        (json!({ "mtu": 67 }), 7, ["mtu: 67", "68 to 65535"]),
        (
            json!({ "mtu": "1500" }),
            7,
            ["mtu: \"1500\"", "68 to 65535"],
        ),
        (
            json!({ "mtu": 1000 }),
            7,
            ["mtu: 1000", "at least 1280 with an IPv6 address (fd77::2)"],
        ),
        (
            json!({ "ipMasq": "true" }),
            7,
            ["ipMasq: \"true\"", "true, false"],
        ),
        (
            json!({ "profile": "fast" }),
            7,
            ["profile: \"fast\"", "\"latency\", \"throughput\""],
        ),
        (
            json!({ "txQueueLen": -1 }),
            7,
            ["txQueueLen: -1", "1 to 1000000"],
        ),
        (
            json!({ "mac": "ff:ff:ff:ff:ff:ff" }),
            7,
            ["mac: \"ff:ff:ff:ff:ff:ff\"", "unicast"],
        ),
        (
            json!({ "runtimeConfig": { "mac": "x" } }),
            7,
            ["runtimeConfig.mac: \"x\"", "unicast"],
        ),
        (json!({ "dns": [] }), 7, ["dns: []", "object"]),
        (json!({ "prevResult": [] }), 7, ["prevResult: []", "object"]),
        (
            json!({ "ipam": null }),
            7,
            ["ipam is missing", "host-local"],
        ),
        (
            json!({ "ipam": { "type": "../host-local" } }),
            7,
            ["ipam.type: \"../host-local\"", "CNI_PATH"],
        ),
        (
            json!({ "ipamTimeout": 0 }),
            7,
            ["ipamTimeout: 0", "1 to 600 seconds"],
        ),
    ] {
        let config = world.config("1.0.0", more);
        world.call("ADD", &pod, &config).assert_error(code, &parts);
    }
    let environment = environment("ADD", "pod-a", &pod.path(), &world.cni_path());
    for (input, code, part) in [
        ("", 6, "empty; the runtime has to write it"),
        ("{", 6, "line 1 column 1; correct the file"),
        ("[]", 6, "not a JSON object"),
        ("{} {}", 6, "not JSON"),
        (&"[".repeat(100_000), 6, "not JSON"),
    ] {
        world
            .call_with(&environment, input)
            .assert_error(code, &[part]);
    }
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn check_without_a_usable_result_is_refused() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    world.add(&pod, &world.config("1.0.0", json!({})));
    for (more, code, part) in [
        (json!({}), 7, "prevResult is missing"),
        (
            json!({ "prevResult": {} }),
            7,
            "no \"eth0\" inside a sandbox",
        ),
        (
            json!({ "prevResult": { "interfaces": 1 } }),
            6,
            "interfaces",
        ),
        (
            json!({ "prevResult": { "interfaces": [{ "name": "eth0", "sandbox": "x", "mac": "y" }] } }),
            6,
            "\"y\"",
        ),
        (json!({ "cniVersion": "0.3.1" }), 1, "0.3.1"),
    ] {
        world
            .call("CHECK", &pod, &world.config("1.0.0", more))
            .assert_error(code, &[part]);
    }
}

#[test]
fn an_error_is_in_the_version_of_the_config() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    for version in VERSIONS {
        let answer = world.call("ADD", &pod, &world.config(version, json!({ "mode": "x" })));
        let error: Value = serde_json::from_str(&answer.stdout).expect("an error");
        assert_eq!(error["cniVersion"], version);
    }
}

#[test]
fn version_tells_what_is_supported_whatever_is_on_stdin() {
    let world = World::new();
    let environment = BTreeMap::from([("CNI_COMMAND".to_owned(), "VERSION".to_owned())]);
    for input in ["", "nonsense", r#"{"cniVersion":"0.3.1"}"#] {
        let answer = world.call_with(&environment, input);
        assert!(answer.ok, "{answer:?}");
        let json: Value = serde_json::from_str(&answer.stdout).expect("JSON");
        assert_eq!(
            json,
            json!({ "cniVersion": "1.1.0", "supportedVersions": VERSIONS })
        );
    }
}

#[test]
fn a_person_who_calls_it_is_told_what_it_is() {
    let world = World::new();
    let answer = world.call_with(&BTreeMap::new(), "");
    assert!(answer.ok && answer.stderr.is_empty(), "{answer:?}");
    for part in [
        "CNI plugin",
        env!("CARGO_PKG_VERSION"),
        "1.1.0",
        "CNI_COMMAND",
    ] {
        assert!(answer.stdout.contains(part), "{}", answer.stdout);
    }
}
