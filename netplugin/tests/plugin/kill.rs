//! The plugin is killed at any point of ADD and DEL. After GC nothing is left, and no address is lost.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use kbp_kernel::ethtool;
use kbp_kernel::link::RouteSocket;
use kbp_kernel::netns::Netns;
use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::local_ipam::{addresses, local, small};
use crate::matrix::{reference, reference_config};
use crate::node::{keeping, quiet};
use crate::random::Random;
use crate::world::{Pod, World, answer, environment, start};

const PODS: usize = 6;

/// How many calls: a thousand in a soak.
fn rounds(few: usize) -> usize {
    match std::env::var_os("KBP_SOAK") {
        Some(_) => 1000,
        None => few,
    }
}

#[test]
fn killed_at_any_point_it_leaves_nothing_that_gc_does_not_clear() {
    killed(rounds(200), &json!({}));
}

#[test]
fn killed_at_any_point_in_mode_bridge_it_leaves_nothing_that_gc_does_not_clear() {
    killed(
        rounds(100),
        &json!({ "mode": "bridge", "isDefaultGateway": true, "hairpinMode": true }),
    );
}

fn killed(rounds: usize, more: &Value) {
    let mut random = Random::new();

    let world = World::new();
    world.forward();
    // As many addresses as pods: one that is lost is missed.
    let last = PODS + 1;
    let ranges = json!([
        [{ "subnet": "10.77.0.0/24", "rangeEnd": format!("10.77.0.{last}") }],
        [{ "subnet": "fd77::/64", "rangeEnd": format!("fd77::{last}") }],
    ]);
    let mut config = local(&world, json!({ "ranges": ranges }));
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    let pods: Vec<_> = (0..PODS).map(|n| Pod::new(&format!("pod-{n}"))).collect();
    quiet(&world, "GC", &keeping(&config, &[]));
    // The nftables table comes with the first and stays with the last: before is after one of each.
    // The shortest of some, so that most kills come before the end also when the machine was busy for a moment.
    let add_takes = (0..5).map(|_| {
        let started = Instant::now();
        world.add(&pods[0], &config);
        let took = started.elapsed();
        world.quiet("DEL", &pods[0], &config);
        took
    });
    let add_takes = add_takes.min().expect("five");
    let before = world.dump();

    // The runtime's view: whom an ADD has succeeded for.
    let mut live: BTreeMap<usize, Value> = BTreeMap::new();
    let mut killed = 0;
    for round in 0..rounds {
        let n = random.below(PODS as u64) as usize;
        let pod = &pods[n];
        let verb = if live.contains_key(&n) { "DEL" } else { "ADD" };
        let delay = add_takes.mul_f64(random.below(1000) as f64 / 1000.0);
        let environment = environment(verb, &pod.id, &pod.path(), &world.cni_path());
        let plugin = Path::new(env!("CARGO_BIN_EXE_kbp"));
        let mut child = start(&world.host, plugin, &environment, &config.to_string());
        kill_after(&mut child, delay);
        let answer = answer(child);
        match (verb, answer.ok) {
            ("ADD", true) => {
                let result = serde_json::from_str(&answer.stdout).expect("a result");
                live.insert(n, result);
            }
            ("DEL", true) => drop(live.remove(&n)),
            _ => {
                // It may have been killed between its result and its end; an error is something else.
                let said: Option<Value> = serde_json::from_str(&answer.stdout).ok();
                assert!(
                    said.is_none_or(|said| said.get("code").is_none()),
                    "round {round}: it failed by itself: {answer:?}"
                );
                killed += 1;
                live.remove(&n);
                // The runtime may repeat DEL, or forget the container until GC.
                if random.below(2) == 0 {
                    world.quiet("DEL", pod, &config);
                } else {
                    collect(&world, &config, &pods, &live);
                }
            }
        }
    }
    println!("{killed} of {rounds} calls were killed in time");
    assert!(
        killed > rounds / 10,
        "only {killed} of {rounds} calls were killed in time"
    );

    // Every address can still be had.
    for (n, pod) in pods.iter().enumerate() {
        live.entry(n).or_insert_with(|| world.add(pod, &config));
    }
    collect(&world, &config, &pods, &live);
    let mut all: Vec<_> = live.values().flat_map(addresses).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 2 * PODS, "{all:?}");
    collect(&world, &config, &pods, &BTreeMap::new());
    assert_eq!(world.dump(), before);
}

#[test]
fn an_add_that_was_killed_after_its_lease_can_be_repeated() {
    let world = World::new();
    let config = small(&world, "10.77.0.3");
    let pod = Pod::new("pod-a");
    // As a kill between the lease and the link leaves it.
    let lease = addresses(&world.add(&pod, &config));
    let result_links = world.host_command("ip", &["-o", "link", "show", "type", "veth"]);
    let host_end = result_links
        .split_whitespace()
        .find_map(|word| word.strip_prefix("kbp")?.split('@').next())
        .expect("the host end");
    world.host_command("ip", &["link", "del", &format!("kbp{host_end}")]);
    assert_eq!(world.leases(), ["10.77.0.2"]);
    assert_eq!(
        addresses(&world.add(&pod, &config)),
        lease,
        "the same container keeps its address"
    );
    assert_eq!(world.leases(), ["10.77.0.2"]);
    world.quiet("DEL", &pod, &config);
    assert!(world.leases().is_empty());
}

/// What mode `tune` changes of an end.
fn tunable(netns: &Netns, name: &str) -> (ethtool::Features, Option<String>, Option<String>) {
    let mut route = RouteSocket::open_in(netns).expect("open a socket");
    let link = route.link_by_name(name).expect("read").expect("the link");
    let features = ethtool::features(netns, name).expect("features");
    (features, link.alias, link.qdisc)
}

#[test]
fn killed_at_any_point_in_mode_tune_del_puts_back_what_was() {
    let mut random = Random::new();
    let world = World::new();
    let pod = Pod::new("pod-a");
    let first = reference_config(&world, "1.0.0", "ptp", false);
    let answer_of_ptp = reference(&world, "ptp", "ADD", &pod, &first);
    assert!(answer_of_ptp.ok, "{answer_of_ptp:?}");
    let result = serde_json::from_str::<Value>(&answer_of_ptp.stdout).expect("a result");
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    let ends = || (tunable(&world.host, host_end), tunable(&pod.netns, "eth0"));
    let tune = json!({ "cniVersion": "1.0.0", "name": "kbptest", "type": "kbp", "mode": "tune" });
    let tune = with_result(&tune, &result);
    let before = ends();
    // The shortest of some, so that most kills come before the end also when the machine was busy for a moment.
    let mut add_takes = Duration::MAX;
    let mut tuned = before.clone();
    for _ in 0..5 {
        let started = Instant::now();
        world.add(&pod, &tune);
        add_takes = add_takes.min(started.elapsed());
        tuned = ends();
        assert_ne!(before, tuned);
        world.quiet("DEL", &pod, &tune);
        assert_eq!(ends(), before);
    }

    let rounds = rounds(100);
    let mut killed = 0;
    for round in 0..rounds {
        for verb in ["ADD", "DEL"] {
            let delay = add_takes.mul_f64(random.below(1000) as f64 / 1000.0);
            let environment = environment(verb, &pod.id, &pod.path(), &world.cni_path());
            let plugin = Path::new(env!("CARGO_BIN_EXE_kbp"));
            let mut child = start(&world.host, plugin, &environment, &tune.to_string());
            kill_after(&mut child, delay);
            let answer = answer(child);
            let said: Option<Value> = serde_json::from_str(&answer.stdout).ok();
            assert!(
                said.is_none_or(|said| said.get("code").is_none()),
                "round {round}: it failed by itself: {answer:?}"
            );
            killed += usize::from(!answer.ok);
        }
        // What an ADD that was killed has left undone, the next one does, and DEL undoes both.
        if random.below(2) == 0 {
            world.add(&pod, &tune);
            assert_eq!(ends(), tuned, "round {round}");
        }
        world.quiet("DEL", &pod, &tune);
        assert_eq!(ends(), before, "round {round}");
    }
    println!("{killed} of {} calls were killed in time", 2 * rounds);
    assert!(
        killed > rounds / 20,
        "only {killed} calls were killed in time"
    );
}

/// Kills a process at that time, unless it ends before.
fn kill_after(child: &mut std::process::Child, delay: Duration) {
    let deadline = Instant::now() + delay;
    while Instant::now() < deadline {
        if child.try_wait().expect("wait").is_some() {
            return;
        }
        std::thread::yield_now();
    }
    child.kill().expect("kill the plugin");
}

/// GC by what the runtime knows; who is alive has to stay whole.
fn collect(world: &World, config: &Value, pods: &[Pod], live: &BTreeMap<usize, Value>) {
    let valid: Vec<_> = live.keys().map(|n| &pods[*n]).collect();
    quiet(world, "GC", &keeping(config, &valid));
    for (n, result) in live {
        world.quiet("CHECK", &pods[*n], &with_result(config, result));
    }
    assert_eq!(world.leases().len(), 2 * live.len());
}
