//! GC and STATUS, which concern the node and not one container.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::world::{Answer, Pod, World};

pub(crate) fn node_call(world: &World, verb: &str, config: &Value) -> Answer {
    let environment = [
        ("CNI_COMMAND", verb.to_owned()),
        ("CNI_PATH", world.cni_path()),
    ];
    let environment: BTreeMap<_, _> = environment
        .map(|(key, value)| (key.to_owned(), value))
        .into();
    world.call_with(&environment, &config.to_string())
}

pub(crate) fn quiet(world: &World, verb: &str, config: &Value) {
    let answer = node_call(world, verb, config);
    assert!(answer.ok && answer.stdout.is_empty(), "{verb}: {answer:?}");
}

pub(crate) fn keeping(config: &Value, pods: &[&Pod]) -> Value {
    let valid: Vec<_> = pods
        .iter()
        .map(|pod| json!({ "containerID": pod.id, "ifname": "eth0" }))
        .collect();
    let mut config = config.clone();
    config["cni.dev/valid-attachments"] = json!(valid);
    config
}

#[test]
fn gc_removes_what_is_not_valid_any_more_and_nothing_else() {
    let world = World::new();
    let config = world.config("1.1.0", json!({}));
    let other_network = world.config(
        "1.1.0",
        json!({ "name": "other", "ipam": {
        "ranges": [[{ "subnet": "10.78.0.0/16" }], [{ "subnet": "fd78::/64" }]],
    } }),
    );
    let (stays, goes, other) = (Pod::new("stays"), Pod::new("goes"), Pod::new("other"));
    let result = world.add(&stays, &config);
    world.add(&other, &other_network);
    let without = world.dump();
    world.add(&goes, &config);
    let with = world.dump();

    // Without the key there is nothing to go by.
    quiet(&world, "GC", &config);
    quiet(&world, "GC", &keeping(&config, &[&stays, &goes]));
    assert_eq!(world.dump(), with);

    // Debian's host-local knows no GC: each lease is given back with a DEL.
    quiet(&world, "GC", &keeping(&config, &[&stays]));
    assert_eq!(world.dump(), without);
    quiet(&world, "GC", &keeping(&config, &[&stays]));
    assert_eq!(world.dump(), without);
    world.quiet(
        "CHECK",
        &stays,
        &crate::lifecycle::with_result(&config, &result),
    );

    // The runtime lost a DEL and the namespace went: only the masquerade entry and the lease are left.
    let vanished = Pod::new("vanished");
    let name = world.add(&vanished, &config)["interfaces"][0]["name"]
        .as_str()
        .expect("a name")
        .to_owned();
    world.host_command("ip", &["link", "del", &name]);
    assert!(world.nftables().contains(&name));
    quiet(&world, "GC", &keeping(&config, &[&stays]));
    assert!(!world.nftables().contains(&name));
}

#[test]
fn gc_is_forwarded_to_an_ipam_plugin_that_knows_it() {
    let world = World::new();
    let script = |versions: &str, on_gc: &str| {
        let body = format!(
            r#"case $CNI_COMMAND in
            VERSION) echo '{{ "cniVersion": "1.0.0", "supportedVersions": [{versions}] }}';;
            GC) {on_gc};;
            esac"#,
        );
        world.ipam_script("own-ipam", &body);
    };
    let config = world.config("1.1.0", json!({ "ipam": { "type": "own-ipam" } }));
    let with_key = keeping(&config, &[]);
    let since = |n: usize| world.ipam_calls()[n..].to_vec();

    script(r#""1.0.0", "1.1.0""#, "cat > $0.stdin");
    quiet(&world, "GC", &with_key);
    assert_eq!(since(0), ["VERSION", "GC"]);
    let stdin = std::fs::read_to_string(world.path("own-ipam.stdin")).expect("the input");
    assert_eq!(
        serde_json::from_str::<Value>(&stdin).expect("JSON"),
        with_key,
        "the whole config"
    );
    quiet(&world, "GC", &config);
    assert_eq!(since(2), [""; 0], "without the key nothing is done");

    script(r#""0.4.0", "1.0.0""#, "exit 1");
    quiet(&world, "GC", &with_key);
    assert_eq!(since(2), ["VERSION"]);

    script(
        r#""1.1.0""#,
        r#"echo '{ "code": 78, "msg": "lock" }'; exit 1"#,
    );
    node_call(&world, "GC", &with_key).assert_error(78, &["IPAM plugin own-ipam: lock"]);
}

#[test]
fn gc_refuses_a_list_that_it_cannot_read() {
    let world = World::new();
    let pod = Pod::new("stays");
    let mut config = world.config("1.1.0", json!({}));
    world.add(&pod, &config);
    let before = world.dump();
    for wrong in [
        json!("x"),
        json!({}),
        json!([{ "containerID": "stays" }]),
        json!([{ "containerID": 1, "ifname": "eth0" }]),
    ] {
        config["cni.dev/valid-attachments"] = wrong;
        node_call(&world, "GC", &config)
            .assert_error(7, &["cni.dev/valid-attachments", "containerID"]);
    }
    assert_eq!(world.dump(), before);
    node_call(&world, "GC", &world.config("1.0.0", json!({})))
        .assert_error(1, &["\"1.0.0\" has no GC"]);
}

#[test]
fn status_tells_whether_an_add_could_work() {
    let world = World::new();
    let config = |more| world.config("1.1.0", more);
    quiet(&world, "STATUS", &config(json!({})));
    node_call(
        &world,
        "STATUS",
        &config(json!({ "ipam": { "type": "missing" } })),
    )
    .assert_error(50, &["\"missing\""]);
    node_call(&world, "STATUS", &config(json!({ "ipam": null }))).assert_error(7, &["ipam"]);
    node_call(&world, "STATUS", &config(json!({ "mode": "ipvlan" }))).assert_error(2, &["ipvlan"]);
    node_call(&world, "STATUS", &world.config("1.0.0", json!({})))
        .assert_error(1, &["\"1.0.0\" has no STATUS"]);

    quiet(&world, "STATUS", &config(json!({ "mode": "bridge" })));
    quiet(
        &world,
        "STATUS",
        &config(json!({ "mode": "tune", "ipam": null })),
    );
    let taken = config(json!({ "mode": "bridge", "bridge": "uplink" }));
    node_call(&world, "STATUS", &taken).assert_error(50, &["\"uplink\"", "another kind"]);

    let ipam = config(json!({ "ipam": { "type": "own-ipam" } }));
    world.ipam_script(
        "own-ipam",
        r#"case $CNI_COMMAND in
        VERSION) echo '{ "supportedVersions": ["1.1.0"] }';;
        STATUS) echo '{ "code": 51, "msg": "no lease server" }'; exit 1;;
        esac"#,
    );
    node_call(&world, "STATUS", &ipam).assert_error(51, &["IPAM plugin own-ipam: no lease server"]);
    assert_eq!(world.ipam_calls(), ["VERSION", "STATUS"]);
    world.ipam_script("own-ipam", "kill -9 $$");
    node_call(&world, "STATUS", &ipam).assert_error(50, &["own-ipam", "signal: 9"]);
}

#[test]
fn gc_removes_pods_of_mode_bridge_and_leaves_those_of_mode_tune() {
    let world = World::new();
    let config = world.config("1.1.0", json!({ "mode": "bridge", "isGateway": true }));
    let (stays, goes, tuned) = (Pod::new("stays"), Pod::new("goes"), Pod::new("tuned"));
    let result = world.add(&stays, &config);
    let first = crate::matrix::reference_config(&world, "1.0.0", "ptp", false);
    let answer = crate::matrix::reference(&world, "ptp", "ADD", &tuned, &first);
    assert!(answer.ok, "{answer:?}");
    let tune = json!({ "cniVersion": "1.1.0", "name": "kbptest", "type": "kbp", "mode": "tune" });
    let of_ptp = serde_json::from_str(&answer.stdout).expect("a result");
    world.add(&tuned, &crate::lifecycle::with_result(&tune, &of_ptp));
    let without = world.dump();
    world.add(&goes, &config);
    // What another plugin has made is that plugin's to collect.
    quiet(&world, "GC", &keeping(&tune, &[&stays, &goes]));
    quiet(&world, "GC", &keeping(&config, &[&stays, &tuned]));
    assert_eq!(world.dump(), without);
    world.quiet(
        "CHECK",
        &stays,
        &crate::lifecycle::with_result(&config, &result),
    );
}

#[test]
fn gc_goes_on_past_errors_and_reports_them_joined() {
    let world = World::new();
    world.set_sysctl("net/ipv4/ip_forward", "1");
    world.ipam_script(
        "half",
        r#"case $CNI_COMMAND in
        VERSION) echo '{ "supportedVersions": ["1.0.0"] }';;
        ADD) echo "{ \"ips\": [{ \"address\": \"10.77.0.${CNI_CONTAINERID#pod-}/16\", \"gateway\": \"10.77.0.1\" }] }";;
        *) echo "{ \"code\": 77, \"msg\": \"not $CNI_CONTAINERID\" }"; exit 1;;
        esac"#,
    );
    let config = world.config("1.1.0", json!({ "ipam": { "type": "half" } }));
    let before = world.dump();
    let pods = ["pod-8", "pod-9"].map(Pod::new);
    for pod in &pods {
        world.add(pod, &config);
    }
    let answer = node_call(&world, "GC", &keeping(&config, &[]));
    let (code, msg, details) = answer.error();
    assert_eq!(code, 77, "{answer:?}");
    for id in ["pod-8", "pod-9"] {
        assert!(
            format!("{msg} {details}").contains(&format!("not {id}")),
            "{answer:?}"
        );
    }
    assert_eq!(world.dump(), before);
}
