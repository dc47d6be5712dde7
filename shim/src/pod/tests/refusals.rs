//! What is not there, not allowed or not understood.

use std::fs;
use std::sync::Mutex;

use containerd_shim_protos::ttrpc::Code;
use kbp_poller::state::Part;
use serde_json::json;

use super::bench::*;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_touched_on_the_hosts_network() {
    let host = fs::canonicalize("/proc/self/ns").expect("proc").join("net");
    for config in [
        json!({"linux": {"namespaces": [{"type": "pid"}]}}),
        json!({"linux": {"namespaces": [{"type": "network", "path": host}]}}),
    ] {
        let bench = Bench::new(&[Net::Host]);
        bench.create("pod", &config).await.expect("create");
        bench.start("pod").await.expect("start");
        assert_eq!(
            bench.plain.seen(),
            std::slice::from_ref(&config),
            "config.json was edited"
        );
        let state = bench.state();
        assert!(
            reasons(&state, Part::PollableVeth).contains("host's network"),
            "{state:?}"
        );
        assert_eq!(state.busy_poll_us, None);
        bench.delete("pod").await;
        bench.assert_clean();

        let mut required = config;
        required["annotations"] = json!({"kbp.io/required": "true"});
        let (code, reason) = status(bench.create("pod", &required).await.expect_err("refused"));
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(
            reason.contains("pollable-veth") && reason.contains("host's network"),
            "{reason}"
        );
        assert_eq!(
            bench
                .plain
                .calls()
                .iter()
                .filter(|c| *c == "create pod")
                .count(),
            1
        );
        bench.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_annotations_and_configs_are_refused_by_name() {
    for (annotations, config, named) in [
        (
            json!({"kbp.io/worker": "fast"}),
            "",
            ["kbp.io/worker", "fast", "dedicated"],
        ),
        (
            json!({"kbp.io/busy-poll": "-1"}),
            "",
            ["kbp.io/busy-poll", "-1", "off"],
        ),
        (
            json!({"kbp.io/colour": "red"}),
            "",
            ["kbp.io/colour", "kbp.io/profile", "known"],
        ),
        (
            json!({}),
            "worker = \"fast\"",
            ["config.toml", "fast", "shared"],
        ),
        (json!({}), "worker = ", ["config.toml", "line", ""]),
    ] {
        let bench = Bench::with(Plain::default(), config);
        let (code, reason) = status(
            bench
                .create("pod", &own_network(annotations))
                .await
                .expect_err("refused"),
        );
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(named.iter().all(|n| reason.contains(n)), "{reason}");
        assert!(bench.plain.calls().is_empty());
        bench.assert_clean();
        // The pod is not spoilt for a better one.
        if config.is_empty() {
            bench.create("pod", &plain_config()).await.expect("create");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_told_or_refused() {
    for (disable, parts) in [
        (
            "seccomp-notify",
            &[Part::SocketBusyPoll, Part::EpollBusyPoll][..],
        ),
        ("epoll-params", &[Part::EpollBusyPoll][..]),
    ] {
        let config = format!("disable = [\"{disable}\"]");
        let plain = Plain {
            nets: Mutex::new(vec![Net::Veth]),
            ..Plain::default()
        };
        let bench = Bench::with(plain, &config);
        bench.create("pod", &plain_config()).await.expect("create");
        let state = bench.state();
        let degraded: Vec<Part> = state.degraded.iter().map(|d| d.part).collect();
        assert_eq!(degraded, parts);
        assert!(
            state.degraded.iter().all(|d| d.reason.contains(disable)),
            "{state:?}"
        );
        let trapped = bench.plain.seen()[0]["linux"]["seccomp"]["syscalls"][0]["names"].clone();
        let expected = if disable == "epoll-params" {
            json!(["bind", "connect", "listen"])
        } else {
            json!(null)
        };
        assert_eq!(trapped, expected);
        bench.delete("pod").await;
        bench.assert_clean();

        let (code, reason) = status(bench.create("pod", &required()).await.expect_err("refused"));
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(
            reason.contains(disable) && reason.contains(&parts[0].to_string()),
            "{reason}"
        );
        assert_eq!(bench.config_of("pod"), required());
        bench.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_in_the_way_is_told_or_refused() {
    let taken = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/other.sock"});
    let conditional = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["connect"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}]});
    for (profile, named) in [
        (taken, "/run/other.sock"),
        (conditional, "conditions on connect"),
    ] {
        let bench = Bench::new(&[Net::Veth]);
        let mut config = plain_config();
        config["linux"]["seccomp"] = profile.clone();
        bench.create("pod", &config).await.expect("create");
        assert!(
            reasons(&bench.state(), Part::SocketBusyPoll).contains(named),
            "{:?}",
            bench.state()
        );
        bench.delete("pod").await;

        config["annotations"] = required()["annotations"].clone();
        let (code, reason) = status(bench.create("pod", &config).await.expect_err("refused"));
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(reason.contains(named), "{reason}");
        assert_eq!(bench.config_of("pod"), config, "put back");
        bench.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_pod_that_cannot_be_polled_is_taken_back() {
    let bench = Bench::new(&[Net::Bridge]);
    let (code, reason) = status(bench.create("pod", &required()).await.expect_err("refused"));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        reason.contains("pollable-veth") && reason.contains("eth0"),
        "{reason}"
    );
    assert_eq!(
        bench.plain.calls(),
        ["create pod", "kill pod", "wait pod", "delete pod"]
    );
    assert_eq!(bench.config_of("pod"), required(), "put back");
    bench.assert_clean();

    // The same at the start: nothing came.
    let bench = Bench::new(&[Net::Empty]);
    bench.create("pod", &required()).await.expect("create");
    let (code, reason) = status(bench.start("pod").await.expect_err("refused"));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(reason.contains("no interface"), "{reason}");
    assert_eq!(
        bench.plain.calls(),
        ["create pod", "state pod", "kill pod", "wait pod"]
    );
    // The caller deletes it, as after any start that failed.
    bench.delete("pod").await;
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_further_container_with_a_network_of_its_own_is_told_or_refused() {
    let bench = Bench::new(&[Net::Veth, Net::Empty]);
    bench.create("pod", &plain_config()).await.expect("create");
    assert_eq!(reasons(&bench.state(), Part::PollableVeth), "");
    bench
        .create("other", &plain_config())
        .await
        .expect("create");
    let reason = reasons(&bench.state(), Part::PollableVeth);
    assert!(
        reason.contains("container other") && reason.contains("network of its own"),
        "{reason}"
    );
    bench.delete("other").await;
    bench.delete("pod").await;
    bench.assert_clean();

    let bench = Bench::new(&[Net::Veth]);
    bench.create("pod", &required()).await.expect("create");
    let refused = bench.create("other", &required()).await;
    let (code, reason) = status(refused.expect_err("refused"));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(reason.contains("network of its own"), "{reason}");
    bench.delete("pod").await;
    bench.assert_clean();
}
