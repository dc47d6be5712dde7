//! ADD that fails at each of its steps: the node, the pod and the leases are as they were.

use kbp_kernel::link::{Batch, Route, VethPair};
use kbp_kernel::{MacAddr, Mtu};
use serde_json::{Value, json};

use crate::world::{Answer, Pod, World, environment, path};

/// An ADD that has to fail and to leave nothing.
fn failing_add(world: &World, pod: &Pod, config: &Value) -> Answer {
    let before = (world.dump(), pod.dump());
    let answer = world.call("ADD", pod, config);
    assert!(!answer.ok, "{answer:?}");
    assert_eq!((world.dump(), pod.dump()), before, "{answer:?}");
    answer
}

/// A pair between host and pod that kbp has not made.
fn foreign_pair(world: &World, pod: &Pod, host_name: &str, pod_name: &str) {
    let pair = VethPair {
        host_name,
        host_mac: MacAddr([2, 0, 0, 0, 2, 1]),
        pod_name,
        pod_mac: MacAddr([2, 0, 0, 0, 2, 2]),
        pod_netns: &pod.netns,
        mtu: Mtu(1500),
        tx_queue_len: 1000,
    };
    world
        .route()
        .execute(Batch::new().create_veth(&pair))
        .expect("create a pair");
}

#[test]
fn an_interface_that_exists_in_the_pod_is_not_touched() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    foreign_pair(&world, &pod, "other", "eth0");
    failing_add(&world, &pod, &world.config("1.0.0", json!({})))
        .assert_error(102, &["eth0", "pod-a", "DEL"]);
}

#[test]
fn an_ipam_plugin_is_not_told_of_an_add_that_is_refused() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    foreign_pair(&world, &pod, "other", "eth0");
    let told = world.path("told");
    world.ipam_script(
        "own-ipam",
        &format!("read -r _ && echo >{}", told.display()),
    );
    let config = world.config("1.0.0", json!({ "ipam": { "type": "own-ipam" } }));
    failing_add(&world, &pod, &config).assert_error(102, &["eth0 exists already"]);
    assert!(!told.exists(), "it has got the config");
    assert!(!world.ipam_calls().contains(&"DEL".to_owned()));
}

#[test]
fn an_ipam_plugin_that_talks_too_much_or_leaves_a_process_behind_has_answered() {
    let world = World::new();
    let good = r#"{ "cniVersion": "1.0.0", "ips": [{ "address": "10.77.0.9/16" }] }"#;
    let much = "head -c 1048576 /dev/zero | tr '\\0' x >&2";
    for (name, on_add) in [
        (
            "late-talk",
            format!("cat >/dev/null; echo '{good}'; {much}; echo last >&2"),
        ),
        (
            "early-talk",
            format!("{much}; echo last >&2; cat >/dev/null; echo '{good}'"),
        ),
        // It holds stdout and stderr until DEL ends it.
        (
            "daemon",
            format!(
                "cat >/dev/null; echo last >&2; sleep 300 & echo $! >{}; echo '{good}'",
                world.path("pid").display()
            ),
        ),
    ] {
        let stop = format!(
            "[ $CNI_COMMAND-{name} != DEL-daemon ] || kill $(cat {})",
            world.path("pid").display()
        );
        world.ipam_script(
            name,
            &format!("case $CNI_COMMAND in ADD) {on_add};; *) {stop};; esac"),
        );
        let pod = Pod::new(name);
        let ipam = json!({ "type": name, "ranges": null, "routes": null });
        let config = world.config("1.0.0", json!({ "ipamTimeout": 20, "ipam": ipam }));
        let answer = world.call("ADD", &pod, &config);
        assert!(
            answer.ok && answer.stdout.contains("10.77.0.9/16"),
            "{answer:?}"
        );
        assert!(answer.stderr.trim_end().ends_with("last"), "{answer:?}");
        world.quiet("DEL", &pod, &config);
    }
}

#[test]
fn adding_twice_fails_and_leaves_the_first_one_whole() {
    let world = World::new();
    let config = world.config("1.0.0", json!({}));
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &config);
    failing_add(&world, &pod, &config).assert_error(102, &["eth0 exists already"]);
    // The same container in another namespace.
    let twin = Pod::new("pod-a");
    failing_add(&world, &twin, &config).assert_error(102, &["exists already", "another namespace"]);
    world.quiet(
        "CHECK",
        &pod,
        &crate::lifecycle::with_result(&config, &result),
    );
}

#[test]
fn a_host_end_name_that_is_taken_is_not_touched() {
    let world = World::new();
    let config = world.config("1.0.0", json!({}));
    let pod = Pod::new("pod-a");
    let result = world.add(&pod, &config);
    let name = result["interfaces"][0]["name"].as_str().expect("a name");
    world.quiet("DEL", &pod, &config);
    let other = Pod::new("other");
    foreign_pair(&world, &other, name, "y");
    failing_add(&world, &pod, &config).assert_error(102, &[name, "taken"]);
}

#[test]
fn a_namespace_that_is_gone_or_is_none_is_named() {
    let world = World::new();
    let config = world.config("1.0.0", json!({})).to_string();
    let before = world.dump();
    let host = path(&world.host);
    for (netns, code, parts) in [
        (
            "/run/netns/kbp-never-was",
            3,
            [
                "/run/netns/kbp-never-was",
                "does not exist; its runtime has to make it",
            ],
        ),
        (
            "/proc/4194305/ns/net",
            3,
            [
                "/proc/4194305/ns/net",
                "does not exist; its runtime has to make it",
            ],
        ),
        ("/proc/self/ns/uts", 4, ["/proc/self/ns/uts", "CNI_NETNS"]),
        ("/etc/passwd", 4, ["/etc/passwd", "CNI_NETNS"]),
        ("/proc/self/ns/net", 4, ["CNI_NETNS", "the plugin itself"]),
        (&host, 4, ["CNI_NETNS", "the plugin itself"]),
    ] {
        let environment = environment("ADD", "pod-a", netns, &world.cni_path());
        world
            .call_with(&environment, &config)
            .assert_error(code, &parts);
        assert_eq!(world.dump(), before, "{netns}");
    }
}

#[test]
fn an_ipam_plugin_that_is_missing_is_named() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({ "ipam": { "type": "host-locl" } }));
    let path = world.cni_path();
    failing_add(&world, &pod, &config).assert_error(101, &["\"host-locl\"", &path, "ipam.type"]);
    // A file that cannot be executed is none.
    std::fs::write(world.path("host-locl"), "#!/bin/sh\n").expect("write");
    failing_add(&world, &pod, &config).assert_error(101, &["\"host-locl\"", &path]);
    let mut environment = environment("ADD", &pod.id, &pod.path(), "");
    environment.remove("CNI_PATH");
    world
        .call_with(&environment, &config.to_string())
        .assert_error(101, &["CNI_PATH is empty"]);
}

#[test]
fn an_ipam_plugin_that_cannot_be_run_is_not_asked_to_undo() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({ "ipam": { "type": "own-ipam" } }));
    for text in [
        "#!/nonexistent/interpreter\n",
        "\u{7f}ELF of another machine",
    ] {
        world.ipam_script("own-ipam", "");
        std::fs::write(world.path("own-ipam"), text).expect("write");
        let answer = failing_add(&world, &pod, &config);
        answer.assert_error(101, &["own-ipam ADD: ", "interpreter"]);
        assert_eq!(answer.error().2, "");
    }
}

#[test]
fn what_ipam_says_of_its_own_failure_is_passed_on() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    // Both addresses of the range are the network's and the gateway's own, or taken.
    let config = world.config(
        "1.0.0",
        json!({ "ipam": { "ranges": [[{ "subnet": "10.77.0.0/30" }]] } }),
    );
    world.add(&pod, &config);
    let second = Pod::new("pod-b");
    failing_add(&world, &second, &config).assert_error(
        999,
        &["IPAM plugin host-local: ", "no IP addresses available"],
    );

    world.ipam_script(
        "own-ipam",
        r#"echo "to the log" >&2; echo '{ "code": 11, "msg": "busy with 10.1", "details": "more" }'; exit 1"#,
    );
    let config = world.config(
        "1.0.0",
        json!({ "name": "other", "ipam": { "type": "own-ipam" } }),
    );
    let answer = failing_add(&world, &second, &config);
    answer.assert_error(11, &["IPAM plugin own-ipam: busy with 10.1"]);
    assert!(
        answer.error().2.contains("more") && answer.error().2.contains("to the log"),
        "{answer:?}"
    );
}

#[test]
fn an_ipam_plugin_that_breaks_gets_a_del() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let good = r#"{ "cniVersion": "1.0.0", "ips": [{ "address": "10.77.0.9/16" }] }"#;
    for (name, on_add, code, part) in [
        ("crash", "kill -SEGV $$", 101, "signal: 11"),
        ("status", "echo broken; exit 7", 101, "exit status: 7"),
        ("silent", "exit 0", 101, "returned no address"),
        (
            "noip",
            "echo '{ \"cniVersion\": \"1.0.0\", \"ips\": [] }'",
            101,
            "returned no address",
        ),
        ("text", "echo hello", 6, "something else than a JSON object"),
        ("list", "echo '[1]'", 6, "something else than a JSON object"),
        (
            "wrong",
            "echo '{ \"ips\": [{ \"address\": \"10.1\" }] }'",
            6,
            "10.1",
        ),
        (
            "hang",
            "exec sleep 300",
            11,
            "did not answer ADD within 1 s",
        ),
        (
            "child",
            "sleep 300 & wait",
            11,
            "did not answer ADD within 1 s",
        ),
        (
            "late-status",
            &format!("echo '{good}'; exit 7"),
            101,
            "exit status: 7",
        ),
        (
            "late-text",
            &format!("echo '{good}'; sleep 0.1; echo more"),
            6,
            "something else than a JSON object",
        ),
        (
            "late-hang",
            &format!("echo '{good}'; exec sleep 300"),
            11,
            "did not answer ADD within 1 s",
        ),
        (
            "gateway",
            &format!(
                "echo '{}'",
                good.replace("/16\"", "/16\", \"gateway\": \"10.77.0.9\"")
            ),
            101,
            "10.77.0.9",
        ),
    ] {
        world.ipam_script(name, &format!("case $CNI_COMMAND in ADD) {on_add};; esac"));
        let config = world.config(
            "1.0.0",
            json!({ "ipamTimeout": 1, "ipam": { "type": name } }),
        );
        failing_add(&world, &pod, &config).assert_error(
            code,
            &[name, part].map(|p| if p == "gateway" { "gateway" } else { p }),
        );
        let calls = world.ipam_calls();
        assert_eq!(calls[calls.len() - 2..], ["ADD", "DEL"], "{name}");
    }
}

#[test]
fn a_route_that_exists_on_the_host_undoes_everything() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let uplink = world
        .route()
        .link_by_name("uplink")
        .expect("read")
        .expect("uplink")
        .index;
    for (destination, more) in [("10.77.0.2/32", json!({})), ("fd77::3/128", json!({}))] {
        let clash = Route::new(destination.parse().expect("a range"), uplink);
        world
            .route()
            .execute(Batch::new().add_route(&clash))
            .expect("add a route");
        failing_add(&world, &pod, &world.config("1.0.0", more)).assert_error(100, &[destination]);
        world
            .route()
            .execute(Batch::new().delete_route(&clash))
            .expect("delete the route");
    }
}

#[test]
fn a_route_that_the_pod_cannot_have_undoes_everything() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let twice = json!([{ "dst": "10.9.0.0/16" }, { "dst": "10.9.0.0/16", "gw": "10.77.0.8" }]);
    let config = world.config("1.0.0", json!({ "ipam": { "routes": twice } }));
    failing_add(&world, &pod, &config).assert_error(100, &["10.9.0.0/16"]);
}

#[test]
fn an_address_that_the_kernel_refuses_undoes_everything() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config(
        "1.0.0",
        json!({ "ipam": { "type": "static", "ranges": null, "addresses": [{ "address": "ff02::5/64" }] } }),
    );
    failing_add(&world, &pod, &config).assert_error(100, &["ff02::5"]);
}

#[test]
fn a_masquerade_that_is_refused_undoes_everything() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    // Somebody's table of the same name in which our set is of another type.
    world.host_command("nft", &["add", "table", "inet", "kbp"]);
    world.host_command(
        "nft",
        &[
            "add",
            "set",
            "inet",
            "kbp",
            "pods4",
            "{ type inet_service; }",
        ],
    );
    failing_add(&world, &pod, &world.config("1.0.0", json!({}))).assert_error(100, &["kbp"]);
}

#[test]
fn forwarding_that_cannot_be_switched_on_undoes_everything() {
    // /proc/sys is read-only in a mount namespace of its own, as in many containers.
    let world = World::new();
    let pod = Pod::new("pod-a");
    let before = (world.dump(), pod.dump());
    let config = world.path("config.json");
    std::fs::write(
        &config,
        world
            .config(
                "1.0.0",
                json!({ "ipam": { "ranges": [[{ "subnet": "10.77.0.0/16" }]] } }),
            )
            .to_string(),
    )
    .expect("write");
    // accept_ra of the new link is written too: only ip_forward is made read-only.
    let script = format!(
        "mount -o bind,ro /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/ip_forward && exec {} < {}",
        env!("CARGO_BIN_EXE_kbp"),
        config.display(),
    );
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script])
        .envs(environment("ADD", "pod-a", &pod.path(), &world.cni_path()));
    let output = world
        .host
        .run(|| command.output())
        .expect("enter")
        .expect("run");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let answer = Answer {
        ok: output.status.success(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    };
    answer.assert_error(5, &["/proc/sys/net/ipv4/ip_forward"]);
    assert_eq!((world.dump(), pod.dump()), before);
}

#[test]
fn a_result_that_cannot_be_written_undoes_everything() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    world.forward();
    let before = (world.dump(), pod.dump());
    let stderr = world.unread_add(&pod, &world.config("1.0.0", json!({})));
    assert!(stderr.contains("write the result to stdout"), "{stderr}");
    assert_eq!((world.dump(), pod.dump()), before, "{stderr}");
}

#[test]
fn an_undo_that_fails_is_told_and_keeps_the_first_error() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    world.ipam_script(
        "stubborn",
        "echo '{ \"code\": 77, \"msg\": \"never\" }'; [ $CNI_COMMAND = ADD ] && exit 3; exit 1",
    );
    world.ipam_script(
        "late",
        r#"case $CNI_COMMAND in
           ADD) echo '{ "ips": [{ "address": "ff02::5/64" }] }';;
           *) echo '{ "code": 77, "msg": "never" }'; exit 1;;
           esac"#,
    );
    let answer = failing_add(
        &world,
        &pod,
        &world.config("1.0.0", json!({ "ipam": { "type": "late" } })),
    );
    answer.assert_error(100, &["ff02::5"]);
    assert!(
        answer
            .error()
            .2
            .contains("could not be undone: IPAM plugin late: never"),
        "{answer:?}"
    );
    // An error that IPAM reports itself is not answered with a DEL: the lease may belong to one that lives.
    failing_add(
        &world,
        &pod,
        &world.config("1.0.0", json!({ "ipam": { "type": "stubborn" } })),
    )
    .assert_error(77, &["never"]);
    assert_eq!(world.ipam_calls(), ["ADD", "DEL", "ADD"]);
}

#[test]
fn del_goes_on_past_a_failure_and_reports_it() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    world.ipam_script(
        "half",
        r#"case $CNI_COMMAND in
           ADD) echo '{ "ips": [{ "address": "10.77.0.9/16", "gateway": "10.77.0.1" }] }';;
           *) echo '{ "code": 77, "msg": "not now" }'; exit 1;;
           esac"#,
    );
    let config = world.config("1.0.0", json!({ "ipam": { "type": "half" } }));
    world.set_sysctl("net/ipv4/ip_forward", "1");
    let before = world.dump();
    world.add(&pod, &config);
    assert_ne!(world.dump(), before);
    for _ in 0..2 {
        world
            .call("DEL", &pod, &config)
            .assert_error(77, &["IPAM plugin half: not now"]);
        assert_eq!(world.dump(), before);
    }
}

#[test]
fn del_with_a_config_that_lost_its_ipam_section_removes_the_rest() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config("1.0.0", json!({}));
    world.add(&pod, &config);
    let lost = world.config("1.0.0", json!({ "ipam": null }));
    world
        .call("DEL", &pod, &lost)
        .assert_error(7, &["ipam is missing"]);
    assert!(!world.dump().contains("kbptest"), "{}", world.dump());
    // The leases are still there for a DEL that can name their plugin.
    assert_eq!(world.leases().len(), 2);
    world.quiet("DEL", &pod, &config);
    assert_eq!(world.leases().len(), 0);
}
