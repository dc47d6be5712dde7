//! A pod from its first container to its last.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::{Code, r#async::TtrpcContext};
use kbp_poller::state::{self, Part};
use serde_json::json;

use super::super::cleanup::cleanup_in;
use super::bench::*;
use crate::sockets;

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_and_leaves_nothing() {
    let bench = Bench::new(&[Net::Veth]);
    bench.create("pod", &plain_config()).await.expect("create");
    let seen = &bench.plain.seen()[0];
    assert_eq!(
        seen["linux"]["seccomp"]["listenerPath"],
        json!(sockets::directory(&bench.state_dir(), "test", "pod").join("seccomp.sock"))
    );
    let state = bench.state();
    assert_eq!(
        (state.id.as_str(), state.namespace.as_str()),
        ("pod", "test")
    );
    assert_eq!(state.interfaces.len(), 1, "{state:?}");
    assert_eq!(state.interfaces[0].pod_interface, "eth0");
    assert!(state.busy_poll_us.is_some());
    assert_eq!(state.degraded, []);
    bench.start("pod").await.expect("start");
    bench.delete("pod").await;
    bench.assert_clean();
    assert_eq!(
        bench.plain.calls(),
        ["create pod", "start pod", "delete pod"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_veth_may_come_between_create_and_start() {
    let bench = Bench::new(&[Net::Empty]);
    let pid = bench.create("pod", &required()).await.expect("create");
    let before = bench.state();
    assert!(before.interfaces.is_empty());
    assert!(reasons(&before, Part::PollableVeth).contains("no interface"));
    add_veth(pid);
    bench.start("pod").await.expect("start");
    let after = bench.state();
    assert_eq!(after.interfaces.len(), 1, "{after:?}");
    assert_eq!(after.degraded, []);
    bench.delete("pod").await;
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_never_comes_is_told() {
    let bench = Bench::new(&[Net::Empty]);
    bench.create("pod", &plain_config()).await.expect("create");
    bench.start("pod").await.expect("start");
    assert!(reasons(&bench.state(), Part::PollableVeth).contains("no interface"));
    // Exec'd processes are nothing to attach for.
    let request = api::StartRequest {
        id: "pod".to_owned(),
        exec_id: "e".to_owned(),
        ..Default::default()
    };
    bench
        .service
        .start(&TtrpcContext::default(), request)
        .await
        .expect("start an exec");
    assert_eq!(
        bench.plain.calls(),
        ["create pod", "state pod", "start pod", "start pod"]
    );
    bench.delete("pod").await;
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_creation_leaves_nothing() {
    let bench = Bench::with(
        Plain {
            fails: Some("pod"),
            ..Plain::default()
        },
        "",
    );
    let (_, reason) = status(
        bench
            .create("pod", &plain_config())
            .await
            .expect_err("failed"),
    );
    assert_eq!(reason, "OCI runtime create failed");
    assert!(bench.plain.seen()[0]["linux"]["seccomp"].is_object());
    assert_eq!(bench.config_of("pod"), plain_config(), "put back");
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_containers_policy_holds_for_the_pod() {
    let bench = Bench::new(&[Net::Veth, Net::Empty]);
    let mut sandbox = plain_config();
    sandbox["annotations"]["io.kubernetes.cri.container-type"] = json!("sandbox");
    bench
        .create("pod", &sandbox)
        .await
        .expect("create the sandbox");
    bench.start("pod").await.expect("start the sandbox");
    let shared = bench.state().busy_poll_us;

    // Malformed annotations are refused as they are in the first container, and the pod goes on.
    let nonsense = own_network(json!({"kbp.io/worker": "nonsense"}));
    let (code, reason) = status(bench.create("bad", &nonsense).await.expect_err("refused"));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        reason.contains("kbp.io/worker") && reason.contains("nonsense"),
        "{reason}"
    );
    assert_eq!(bench.state().busy_poll_us, shared);

    // Its own annotations do not count; its own limits do.
    let mut app = own_network(json!({"kbp.io/busy-poll": "500"}));
    app["linux"]["resources"] = json!({"cpu": {"quota": 1000, "period": 100_000}});
    bench.create("app", &app).await.expect("create the app");
    bench.start("app").await.expect("start the app");
    let state = bench.state();
    assert!(shared.is_some());
    assert_eq!(state.busy_poll_us, None, "{state:?}");
    assert!(state.busy_poll_reason.contains("quota"), "{state:?}");
    assert_eq!(bench.plain.seen()[1], app, "no window, no listener");
    assert_eq!(state.interfaces.len(), 1);

    bench.delete("app").await;
    assert_eq!(bench.state().busy_poll_us, shared);
    bench.delete("pod").await;
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_the_limits_changes_the_window() {
    let bench = Bench::new(&[Net::Veth]);
    bench.create("pod", &plain_config()).await.expect("create");
    let before = bench.state();
    assert!(before.busy_poll_us.is_some());
    bench
        .update("pod", json!({"cpu": {"quota": 1000, "period": 100_000}}))
        .await;
    assert_eq!(bench.state().busy_poll_us, None);
    bench
        .update("pod", json!({"memory": {"limit": 1 << 30}}))
        .await;
    assert_eq!(bench.state().busy_poll_us, None);
    bench.update("pod", json!({"cpu": {"quota": -1}})).await;
    assert_eq!(bench.state().busy_poll_us, before.busy_poll_us);
    assert_eq!(
        bench
            .plain
            .calls()
            .iter()
            .filter(|c| *c == "update pod")
            .count(),
        3
    );
    bench.delete("pod").await;
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_window_follows_another_pod_that_comes_to_the_same_cpus() {
    let bench = Bench::new(&[Net::Veth]);
    let mut config = plain_config();
    config["linux"]["resources"]["cpu"] = json!({"cpus": "0"});
    bench.create("pod", &config).await.expect("create");
    let own = bench.state();
    let other = state::PodState {
        id: "other".to_owned(),
        ..own.clone()
    };
    assert_eq!(own.cpuset.as_deref(), Some("0"), "{own:?}");
    state::write(&bench.state_dir(), &other).expect("write the other's state");
    // As after calls were answered.
    bench.service.pod.count();
    state::remove(&bench.state_dir(), &other.namespace, &other.id).expect("remove it");
    let now = bench.state();
    assert!(
        now.busy_poll_us < own.busy_poll_us && now.busy_poll_us.is_some(),
        "{} then {}",
        own.busy_poll_reason,
        now.busy_poll_reason
    );
    assert!(now.busy_poll_reason.contains("another kbp pod"), "{now:?}");
    bench.delete("pod").await;
    bench.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_creation_of_the_same_id_does_not_disturb_the_first() {
    let bench = Bench::new(&[Net::Veth, Net::Empty]);
    bench.create("pod", &plain_config()).await.expect("create");
    let before = bench.state();
    let again = own_network(json!({"kbp.io/worker": "nonsense"}));
    bench
        .create("pod", &again)
        .await
        .expect("the plain service decides");
    assert_eq!(bench.plain.seen()[1], again);
    assert_eq!(bench.state(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn state_answers_while_a_container_is_created() {
    let plain = Plain {
        gate: Some(("pod", tokio::sync::Semaphore::new(0))),
        ..Plain::default()
    };
    let bench = Arc::new(Bench::with(plain, ""));
    let creating = tokio::spawn({
        let bench = bench.clone();
        async move { bench.create("pod", &plain_config()).await }
    });
    bench.wait_for_call("create pod").await;
    bench
        .service
        .state(&TtrpcContext::default(), api::StateRequest::default())
        .await
        .expect("state");
    bench.open_gate();
    creating.await.expect("no panic").expect("create");
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_takes_the_rest_along() {
    let bench = Bench::new(&[Net::Veth]);
    bench.create("pod", &plain_config()).await.expect("create");
    let shutdown = |now| {
        let request = api::ShutdownRequest {
            id: "pod".to_owned(),
            now,
            ..Default::default()
        };
        async {
            bench
                .service
                .shutdown(&TtrpcContext::default(), request)
                .await
                .expect("shutdown")
        }
    };
    shutdown(false).await;
    assert_eq!(bench.state().interfaces.len(), 1, "there is a container");
    shutdown(true).await;
    bench.assert_clean();
    assert_eq!(
        bench
            .plain
            .calls()
            .iter()
            .filter(|c| *c == "shutdown ")
            .count(),
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_after_a_killed_shim_removes_everything_once_and_again() {
    let bench = Bench::new(&[Net::Empty]);
    bench.create("pod", &plain_config()).await.expect("create");
    let bundle = bench.dir.path().join("pod");
    fs::write(bundle.join(".config.json.kbp"), "{").expect("write");
    assert!(sockets::directory(&bench.state_dir(), "test", "pod").exists());
    // Another containerd namespace's pod of that id is not this one's to remove.
    cleanup_in(&bench.state_dir(), "other", "pod", &bundle);
    assert_eq!(bench.state().id, "pod");
    for _ in 0..2 {
        cleanup_in(&bench.state_dir(), "test", "pod", &bundle);
        bench.assert_clean();
        assert_eq!(
            fs::read_dir(&bundle).expect("list").count(),
            1,
            "config.json alone"
        );
    }
    cleanup_in(
        Path::new("/nonexistent"),
        "test",
        "pod",
        Path::new("/nonexistent"),
    );
}

/// Two containers without a sandbox, of which the first comes to nothing: the pod is the other one's.
#[tokio::test(flavor = "multi_thread")]
async fn another_container_stands_in_for_a_first_one_that_failed() {
    let bench = Bench::with(
        Plain {
            nets: Mutex::new(vec![Net::Veth]),
            fails: Some("pod"),
            gate: Some(("pod", tokio::sync::Semaphore::new(0))),
            ..Plain::default()
        },
        "",
    );
    let bench = Arc::new(bench);
    let first = tokio::spawn({
        let bench = bench.clone();
        async move { bench.create("pod", &plain_config()).await }
    });
    bench.wait_for_call("create pod").await;
    bench
        .create("other", &plain_config())
        .await
        .expect("create the other");
    assert!(
        state::read_all(&bench.state_dir())
            .expect("states")
            .is_empty(),
        "the network is the first one's to find"
    );
    bench.open_gate();
    first.await.expect("no panic").expect_err("it fails");

    let state = bench.state();
    assert_eq!(state.interfaces.len(), 1, "{state:?}");
    assert_eq!(state.degraded, [], "its network is the pod's now");
    bench.start("other").await.expect("start");
    bench.delete("other").await;
    bench.assert_clean();
}

/// The same, when the first one goes after its creation, before there was an interface.
#[tokio::test(flavor = "multi_thread")]
async fn another_container_stands_in_for_a_first_one_that_went() {
    let bench = Bench::new(&[Net::Empty, Net::Empty]);
    bench.create("pod", &plain_config()).await.expect("create");
    let pid = bench
        .create("other", &plain_config())
        .await
        .expect("create");
    bench.delete("pod").await;
    add_veth(pid);
    bench.start("other").await.expect("start");
    let state = bench.state();
    assert_eq!(
        (state.interfaces.len(), state.degraded.as_slice()),
        (1, [].as_slice()),
        "{state:?}"
    );
    bench.delete("other").await;
    bench.assert_clean();
}
