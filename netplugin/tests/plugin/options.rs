//! Options that modes `routed` and `bridge` share.

use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::traffic::{ip, path_mtu, udp_echo};
use crate::world::{Pod, World, set_sysctl, sysctl};

const MODES: [&str; 2] = ["routed", "bridge"];

fn config(world: &World, mode: &str, mut more: Value) -> Value {
    more["mode"] = json!(mode);
    more["isDefaultGateway"] = json!(true);
    world.config("1.1.0", more)
}

#[test]
fn sysctls_are_the_pods_alone() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        set_sysctl(&pod.netns, "net/ipv4/ip_default_ttl", "64");
        let ttl = world.sysctl("net/ipv4/ip_default_ttl");
        let config = config(
            &world,
            mode,
            json!({ "sysctl": {
            "net.ipv4.ip_default_ttl": "33", "net/ipv4/conf/IFNAME/log_martians": "1", "net.ipv4.ip_local_port_range": "20000 30000",
        } }),
        );
        let result = world.add(&pod, &config);
        assert_eq!(sysctl(&pod.netns, "net/ipv4/ip_default_ttl"), "33");
        assert_eq!(sysctl(&pod.netns, "net/ipv4/conf/eth0/log_martians"), "1");
        assert_eq!(world.sysctl("net/ipv4/ip_default_ttl"), ttl);
        let check = with_result(&config, &result);
        world.quiet("CHECK", &pod, &check);
        set_sysctl(&pod.netns, "net/ipv4/ip_default_ttl", "44");
        world
            .call("CHECK", &pod, &check)
            .assert_error(103, &["ip_default_ttl", "\"44\"", "\"33\""]);
    }
}

#[test]
fn sysctls_of_a_failed_add_are_put_back() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        set_sysctl(&pod.netns, "net/ipv4/ip_default_ttl", "64");
        let before = (world.dump(), pod.dump());
        let config = config(
            &world,
            mode,
            json!({ "sysctl": {
            "net.ipv4.ip_default_ttl": "33", "net.ipv4.kbp_never": "1",
        } }),
        );
        world
            .call("ADD", &pod, &config)
            .assert_error(5, &["net/ipv4/kbp_never"]);
        assert_eq!(sysctl(&pod.netns, "net/ipv4/ip_default_ttl"), "64");
        assert_eq!((world.dump(), pod.dump()), before);
    }
}

#[test]
fn static_routes_go_to_the_pod_beside_those_of_ipam() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let config = config(
            &world,
            mode,
            json!({ "routes": [
            { "dst": "10.50.0.0/16", "mtu": 1300, "priority": 7 }, { "dst": "fd50::/64", "gw": "fd77::1" },
        ] }),
        );
        let result = world.add(&pod, &config);
        let routes = result["routes"].as_array().expect("routes");
        let find = |dst: &str| {
            routes
                .iter()
                .find(|r| r["dst"] == dst)
                .unwrap_or_else(|| panic!("{dst} in {result}"))
        };
        assert_eq!(find("10.50.0.0/16")["gw"], "10.77.0.1");
        assert_eq!(find("10.50.0.0/16")["priority"], 7);
        assert_eq!(find("fd50::/64")["gw"], "fd77::1");
        assert_eq!(path_mtu(&pod.netns, ip("10.50.0.1")), 1300);
        world.quiet("CHECK", &pod, &with_result(&config, &result));
    }
}

#[test]
fn both_ends_have_as_many_queues_as_asked_for() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let result = world.add(&pod, &config(&world, mode, json!({ "numQueues": 2 })));
        let link = pod
            .route()
            .link_by_name("eth0")
            .expect("read")
            .expect("eth0");
        assert_eq!(link.rx_queues, 2);
        let interfaces = result["interfaces"].as_array().expect("interfaces");
        let host_end = interfaces[interfaces.len() - 2]["name"]
            .as_str()
            .expect("a name");
        let link = world
            .route()
            .link_by_name(host_end)
            .expect("read")
            .expect("host end");
        assert_eq!(link.rx_queues, 2);
        udp_echo(&world.host, &pod.netns, ip("10.77.0.2"), 1000);
    }
}

#[test]
fn an_annotation_of_the_pod_chooses_the_profile() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        let config = config(
            &world,
            mode,
            json!({ "profile": "latency", "runtimeConfig": {
            "io.kubernetes.cri.pod-annotations": { "kbp.io/profile": "throughput", "example.org/x": "y" },
        } }),
        );
        world.add(&pod, &config);
        let features = kbp_kernel::ethtool::features(&pod.netns, "eth0").expect("features");
        assert!(features.gro && features.tso, "{mode}");
    }
}

#[test]
fn a_pod_reaches_itself_through_a_port_of_the_host() {
    for mode in MODES {
        let world = World::new();
        let pod = Pod::new("pod-a");
        world.add(&pod, &config(&world, mode, json!({ "hairpinMode": true })));
        // As portmap publishes a port, for the pod itself, too.
        for line in [
            "add table ip publish",
            "add chain ip publish pre { type nat hook prerouting priority dstnat; }",
            "add chain ip publish post { type nat hook postrouting priority srcnat; }",
            "add rule ip publish pre ip daddr 192.0.2.1 udp dport 8080 dnat to 10.77.0.2:80",
            "add rule ip publish post ip saddr 10.77.0.2 ip daddr 10.77.0.2 masquerade",
        ] {
            world.host_command("nft", &[line]);
        }
        let bind =
            |address: &str| crate::traffic::udp(&pod.netns, address.parse().expect("an address"));
        let (server, client) = (bind("10.77.0.2:80"), bind("10.77.0.2:0"));
        client
            .send_to(b"to myself", "192.0.2.1:8080")
            .expect("send");
        let mut buffer = [0; 64];
        let (n, peer) = server
            .recv_from(&mut buffer)
            .unwrap_or_else(|error| panic!("{mode}: {error}"));
        assert_eq!(
            (&buffer[..n], peer.ip()),
            (&b"to myself"[..], ip("10.77.0.1")),
            "{mode}"
        );
        server.send_to(b"back", peer).expect("send back");
        let (n, from) = client
            .recv_from(&mut buffer)
            .unwrap_or_else(|error| panic!("{mode}: {error}"));
        assert_eq!(
            (&buffer[..n], from.to_string()),
            (&b"back"[..], "192.0.2.1:8080".to_owned()),
            "{mode}"
        );
    }
}
