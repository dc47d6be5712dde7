//! The files that users copy, and what other plugins make of our results.

use std::fs;
use std::path::{Path, PathBuf};

use kbp_kernel::ethtool;
use serde_json::{Value, json};

use crate::matrix::reference;
use crate::traffic::{ip, udp_echo};
use crate::world::{
    HOST_V4, LISTING_VERSIONS, OUTSIDE_V4, Pod, REFERENCE_PLUGINS, World, environment, has_check,
    run,
};

fn config_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../config")
        .join(name)
}

/// A plugin's part of a list, as the runtime gives it to the plugin.
fn of_list(list: &Value, n: usize, more: &[(&str, Value)]) -> Value {
    let mut config = list["plugins"][n].clone();
    config["cniVersion"] = list["cniVersion"].clone();
    config["name"] = list["name"].clone();
    for (key, value) in more {
        config[*key] = value.clone();
    }
    config
}

#[test]
fn every_example_works() {
    let mut count = 0;
    for entry in fs::read_dir(config_dir("cni")).expect("config/cni") {
        let path = entry.expect("directory entry").path();
        if path
            .extension()
            .is_none_or(|extension| extension != "conflist")
        {
            continue;
        }
        count += 1;
        let text = fs::read_to_string(&path).expect("read");
        let list: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let world = World::new();
        if list["plugins"][0]["type"] != "kbp" {
            chained_example(&list);
            continue;
        }
        let mut config = of_list(&list, 0, &[]);
        // Only where the leases are kept differs: the machine's own are none of the test's business.
        config["ipam"]["dataDir"] = json!(world.path("leases"));
        let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
        let result = world.add(&a, &config);
        world.add(&b, &config);
        assert_eq!(
            udp_echo(&a.netns, &b.netns, ip("10.88.0.3"), 60_000),
            ip("10.88.0.2")
        );
        if config["ipMasq"] == true {
            assert_eq!(
                udp_echo(&a.netns, &world.outside, ip(OUTSIDE_V4), 1000),
                ip(HOST_V4)
            );
        }
        if result["ips"].as_array().expect("addresses").len() == 2 {
            assert_eq!(
                udp_echo(&a.netns, &b.netns, ip("fd88::3"), 60_000),
                ip("fd88::2")
            );
        }
        for pod in [&a, &b] {
            world.quiet("DEL", pod, &config);
        }
    }
    assert_eq!(count, 7, "examples in config/cni");
}

/// A list whose first plugin is another one, and whose second is kbp.
fn chained_example(list: &Value) {
    let world = World::new();
    let mut first = of_list(list, 0, &[]);
    first["ipam"]["dataDir"] = json!(world.path("leases"));
    let plugin = first["type"].as_str().expect("a plugin").to_owned();
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    for pod in [&a, &b] {
        let answer = reference(&world, &plugin, "ADD", pod, &first);
        assert!(answer.ok, "{plugin}: {answer:?}");
        let result: Value = serde_json::from_str(&answer.stdout).expect("a result");
        let tune = of_list(list, 1, &[("prevResult", result.clone())]);
        assert_eq!(world.add(pod, &tune), result);
        let features = ethtool::features(&pod.netns, "eth0").expect("features");
        assert!(features.gro, "{plugin}");
    }
    udp_echo(&a.netns, &b.netns, ip("10.88.0.3"), 9000);
    for pod in [&a, &b] {
        world.quiet("DEL", pod, &of_list(list, 1, &[]));
        let answer = reference(&world, &plugin, "DEL", pod, &first);
        assert!(answer.ok, "{plugin}: {answer:?}");
    }
}

#[test]
fn the_sysctl_file_makes_the_host_ends_strict_and_nothing_else() {
    let world = World::new();
    world.set_sysctl("net/ipv4/conf/default/rp_filter", "2");
    world.set_sysctl("net/ipv4/conf/uplink/rp_filter", "2");
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &world.config("1.0.0", json!({})));
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let key = |link: &str| format!("net/ipv4/conf/{link}/rp_filter");
    assert_eq!(world.sysctl(&key(host_end)), "2");
    let file = config_dir("sysctl.d/99-kbp.conf");
    world.host_command("sysctl", &["--load", file.to_str().expect("text")]);
    assert_eq!(world.sysctl(&key(host_end)), "1");
    assert_eq!(world.sysctl(&key("uplink")), "2");
    assert_eq!(
        udp_echo(&pod.netns, &world.outside, ip(OUTSIDE_V4), 1000),
        ip(HOST_V4)
    );
}

#[test]
fn a_reference_plugin_later_in_the_chain_understands_the_result() {
    for version in LISTING_VERSIONS
        .into_iter()
        .filter(|version| *version != "1.1.0")
    {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let result = world.add(&pod, &world.config(version, json!({})));
        let next = json!({
            "cniVersion": version, "name": "kbptest", "type": "tuning", "prevResult": result,
            "sysctl": { "net.ipv4.conf.eth0.log_martians": "1" }, "dataDir": world.path("tuning"),
        });
        let environment = environment("ADD", &pod.id, &pod.path(), &world.cni_path());
        let tuning = Path::new(REFERENCE_PLUGINS).join("tuning");
        let answer = run(&world.host, &tuning, &environment, &next.to_string());
        assert!(answer.ok, "{answer:?}");
        let mut passed: Value = serde_json::from_str(&answer.stdout).expect("a result");
        // The reference plugins write this key even when it says nothing.
        assert_eq!(
            passed
                .as_object_mut()
                .and_then(|passed| passed.remove("dns")),
            Some(json!({}))
        );
        assert_eq!(passed, result, "version {version}");
        if has_check(version) {
            world.quiet(
                "CHECK",
                &pod,
                &crate::lifecycle::with_result(&world.config(version, json!({})), &passed),
            );
        }
    }
}

/// The first column of every table of keys: a key that is not read would be documented for nothing.
#[test]
fn every_documented_key_is_read() {
    let text = fs::read_to_string(config_dir("cni/README.md")).expect("read");
    let tables = text.split("## Built-in IPAM").next().expect("a part");
    let tables = tables.split("## Keys").nth(1).expect("the tables of keys");
    let keys: Vec<_> = tables
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    assert!(keys.len() > 20, "{keys:?}");
    for key in keys {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "net", "mode": "bridge",
            "ipam": { "type": "kbp-local", "subnet": "10.77.0.0/16" },
        });
        config[key] = json!([[1]]);
        let variable = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => "ADD",
                "CNI_CONTAINERID" => "c1",
                "CNI_NETNS" => "/run/netns/x",
                "CNI_IFNAME" => "eth0",
                _ => return None,
            };
            Some(value.into())
        };
        let error =
            kbp_netplugin::rehearse(variable, config.to_string().as_bytes()).expect_err(key);
        assert!(
            error["msg"].as_str().expect("text").contains(key),
            "{key}: {error}"
        );
    }
}
