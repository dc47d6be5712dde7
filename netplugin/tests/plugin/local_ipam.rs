//! The built-in IPAM: what it leases, takes back and refuses, and that it shares a node with host-local.

use std::collections::BTreeSet;
use std::path::Path;
use std::thread;

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::node::{keeping, node_call, quiet};
use crate::world::{Answer, Pod, REFERENCE_PLUGINS, World, environment, run};

/// A config with the built-in IPAM and what `ipam` says.
pub(crate) fn local(world: &World, ipam: Value) -> Value {
    let mut config = world.config("1.1.0", json!({ "ipam": ipam }));
    config["ipam"]["type"] = json!("kbp-local");
    config
}

/// One range of as many addresses as `last` says, after the gateway.
pub(crate) fn small(world: &World, last: &str) -> Value {
    local(
        world,
        json!({ "ranges": [[{ "subnet": "10.77.0.0/24", "rangeEnd": last }]] }),
    )
}

pub(crate) fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().expect("addresses");
    let text = |ip: &Value| ip["address"].as_str().expect("text").to_owned();
    ips.iter().map(text).collect()
}

/// ADD that has to fail and to leave nothing.
fn failing(world: &World, pod: &Pod, config: &Value) -> Answer {
    let before = (world.dump(), pod.dump());
    let answer = world.call("ADD", pod, config);
    assert!(!answer.ok, "{answer:?}");
    assert_eq!((world.dump(), pod.dump()), before);
    answer
}

#[test]
fn it_leases_in_both_families_without_any_other_program() {
    let world = World::new();
    world.forward();
    let before = world.dump();
    let resolv = world.path("resolv.conf");
    std::fs::write(&resolv, "nameserver 10.77.0.1\nsearch a.b\n").expect("write");
    let config = local(&world, json!({ "resolvConf": resolv }));
    let pod = Pod::new("pod-a");
    let call = |verb: &str, config: &Value| {
        // An empty CNI_PATH: no plugin could be found.
        let environment = environment(verb, &pod.id, &pod.path(), "");
        let answer = world.call_with(&environment, &config.to_string());
        assert!(answer.ok, "{verb}: {answer:?}");
        answer.stdout
    };
    let result: Value = serde_json::from_str(&call("ADD", &config)).expect("a result");
    assert_eq!(addresses(&result), ["10.77.0.2/16", "fd77::2/64"]);
    assert_eq!(result["ips"][1]["gateway"], "fd77::1");
    assert_eq!(
        result["dns"],
        json!({ "nameservers": ["10.77.0.1"], "search": ["a.b"] })
    );
    assert_eq!(world.leases(), ["10.77.0.2", "fd77::2"]);
    call("CHECK", &with_result(&config, &result));
    quiet(&world, "STATUS", &config);

    // The lease is not this container's any more.
    let file = world.path("leases/kbptest/10.77.0.2");
    let lease = std::fs::read(&file).expect("the lease");
    std::fs::write(&file, "other\r\neth0").expect("write");
    world
        .call("CHECK", &pod, &with_result(&config, &result))
        .assert_error(103, &["10.77.0.2", "container other"]);
    std::fs::write(&file, lease).expect("write");

    // The config may have lost everything but the place of the leases since.
    let mut later = with_result(&config, &result);
    later["ipam"] =
        json!({ "type": "kbp-local", "dataDir": config["ipam"]["dataDir"], "ranges": "x" });
    call("DEL", &later);
    call("DEL", &later);
    assert_eq!(world.dump(), before);
}

#[test]
fn addresses_go_round_and_an_exhausted_range_is_reported() {
    let world = World::new();
    world.set_sysctl("net/ipv4/ip_forward", "1");
    let config = small(&world, "10.77.0.4");
    let pods: Vec<_> = (0..5).map(|n| Pod::new(&format!("pod-{n}"))).collect();
    let add = |n: usize| addresses(&world.add(&pods[n], &config)).remove(0);
    assert_eq!(add(0), "10.77.0.2/24");
    assert_eq!(add(1), "10.77.0.3/24");
    world.quiet("DEL", &pods[0], &config);
    assert_eq!(
        add(2),
        "10.77.0.4/24",
        "not the one that was just given back"
    );
    assert_eq!(add(3), "10.77.0.2/24");
    failing(&world, &pods[4], &config)
        .assert_error(110, &["10.77.0.1 to 10.77.0.4", "no address is free"]);
    node_call(&world, "STATUS", &config).assert_error(50, &["no address is free"]);
    world.quiet("DEL", &pods[1], &config);
    quiet(&world, "STATUS", &config);
    // Half of an address pair is no lease.
    let mut dual = config.clone();
    dual["ipam"]["ranges"] = json!([[{ "subnet": "fd77::/64" }], config["ipam"]["ranges"][0]]);
    world.add(&pods[1], &config);
    failing(&world, &pods[4], &dual).assert_error(110, &["10.77.0.4"]);
    // What a killed host-local leaves half-written belongs to nobody.
    world.quiet("DEL", &pods[1], &config);
    std::fs::write(world.path("leases/kbptest/10.77.0.3"), "").expect("write");
    assert_eq!(add(4), "10.77.0.3/24");
}

#[test]
fn requested_addresses_are_given_or_refused() {
    let world = World::new();
    let config = |ips: Value| {
        let mut config = local(&world, json!({}));
        config["runtimeConfig"] = json!({ "ips": ips });
        config
    };
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    let result = world.add(&a, &config(json!(["fd77::99/64", "10.77.9.9"])));
    assert_eq!(addresses(&result), ["10.77.9.9/16", "fd77::99/64"]);
    failing(&world, &b, &config(json!(["10.77.9.9"])))
        .assert_error(110, &["10.77.9.9", "container pod-a"]);
    failing(&world, &b, &config(json!(["10.77.0.1"]))).assert_error(7, &["10.77.0.1", "gateway"]);
    failing(&world, &b, &config(json!(["10.99.0.1"])))
        .assert_error(7, &["10.99.0.1", "in no range"]);
    failing(&world, &b, &config(json!(["10.77.1.1", "10.77.1.2"]))).assert_error(7, &["10.77.1.2"]);
    // The wish for one address has not moved the others.
    let result = world.add(&b, &config(json!(["fd77::98"])));
    assert_eq!(addresses(&result), ["10.77.0.2/16", "fd77::98/64"]);
}

#[test]
fn it_and_host_local_respect_and_release_each_others_leases() {
    let world = World::new();
    let builtin = local(&world, json!({}));
    let mut plugin = world.config("1.0.0", json!({}));
    plugin["ipam"]["type"] = json!("host-local");
    let (a, b, c) = (Pod::new("pod-a"), Pod::new("pod-b"), Pod::new("pod-c"));
    assert_eq!(
        addresses(&world.add(&a, &plugin)),
        ["10.77.0.2/16", "fd77::2/64"]
    );
    assert_eq!(
        addresses(&world.add(&b, &builtin)),
        ["10.77.0.3/16", "fd77::3/64"]
    );
    assert_eq!(
        addresses(&world.add(&c, &plugin)),
        ["10.77.0.4/16", "fd77::4/64"]
    );
    // Each takes back what the other one has leased.
    world.quiet("DEL", &a, &builtin);
    world.quiet("DEL", &b, &plugin);
    assert_eq!(world.leases(), ["10.77.0.4", "fd77::4"]);
    // A note of host-local's DEL remains; it is not believed.
    let environment = environment("ADD", "other", "/none", REFERENCE_PLUGINS);
    let mut wish = plugin.clone();
    wish["args"] = json!({ "cni": { "ips": ["10.77.0.3"] } });
    let host_local = Path::new(REFERENCE_PLUGINS).join("host-local");
    let answer = run(&world.host, &host_local, &environment, &wish.to_string());
    assert!(answer.ok, "{answer:?}");
    world.quiet("DEL", &b, &builtin);
    assert!(
        world.leases().contains(&"10.77.0.3".to_owned()),
        "pod-b gave back another's lease"
    );
}

#[test]
fn thirty_at_once_get_addresses_of_their_own() {
    const PODS: usize = 30;
    let world = World::new();
    world.forward();
    let before = world.dump();
    let config = local(&world, json!({}));
    let pods: Vec<_> = (0..PODS).map(|n| Pod::new(&format!("pod-{n}"))).collect();
    let all: BTreeSet<_> = thread::scope(|scope| {
        let adding: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(|| addresses(&world.add(pod, &config))))
            .collect();
        adding
            .into_iter()
            .flat_map(|add| add.join().expect("ADD"))
            .collect()
    });
    assert_eq!(all.len(), 2 * PODS, "{all:?}");
    assert_eq!(world.leases().len(), 2 * PODS);
    thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| world.quiet("DEL", pod, &config));
        }
    });
    assert_eq!(world.dump(), before);
}

#[test]
fn gc_collects_leases_whose_attachment_is_not_valid() {
    let world = World::new();
    world.forward();
    let config = local(&world, json!({}));
    let (stays, goes) = (Pod::new("stays"), Pod::new("goes"));
    quiet(&world, "GC", &keeping(&config, &[]));
    let result = world.add(&stays, &config);
    let without = world.dump();
    world.add(&goes, &config);
    let lease = world.path("leases/kbptest/10.77.0.99");
    std::fs::write(&lease, "never-seen\r\neth0").expect("write");
    let with = world.dump();
    quiet(&world, "GC", &config);
    assert_eq!(
        world.dump(),
        with,
        "without the list there is nothing to go by"
    );
    quiet(&world, "GC", &keeping(&config, &[&stays]));
    assert_eq!(world.dump(), without);
    world.quiet("CHECK", &stays, &with_result(&config, &result));
}

#[test]
fn a_failed_add_gives_back_what_it_leased() {
    let world = World::new();
    let config = local(&world, json!({}));
    let pod = Pod::new("pod-a");
    // The kernel refuses the route to the pod: that is after the lease.
    world.host_command("ip", &["route", "add", "blackhole", "10.77.0.2/32"]);
    failing(&world, &pod, &config).assert_error(100, &["10.77.0.2"]);
    assert!(world.leases().is_empty());
    // Files cannot be made where a file is.
    let mut wrong = config.clone();
    wrong["ipam"]["dataDir"] = json!("/proc/version");
    failing(&world, &pod, &wrong).assert_error(5, &["/proc/version/kbptest", "dataDir"]);
    node_call(&world, "STATUS", &wrong).assert_error(50, &["/proc/version/kbptest"]);
    wrong["ipam"] = json!({ "type": "kbp-local", "ranges": [] });
    failing(&world, &pod, &wrong).assert_error(7, &["ipam.ranges", "[]"]);
}

#[test]
fn a_lock_that_another_process_keeps_is_not_waited_for_for_ever() {
    let world = World::new();
    let mut config = local(&world, json!({}));
    config["ipamTimeout"] = json!(1);
    let (a, b) = (Pod::new("pod-a"), Pod::new("pod-b"));
    world.add(&a, &config);
    let lock = std::fs::File::open(world.path("leases/kbptest/lock")).expect("open");
    let lock = Flock::lock(lock, FlockArg::LockExclusive).expect("lock");
    failing(&world, &b, &config).assert_error(11, &["kbptest/lock", "ipamTimeout"]);
    // Looking needs no lock.
    assert_eq!(world.leases().len(), 2);
    drop(lock);
    world.add(&b, &config);
}
