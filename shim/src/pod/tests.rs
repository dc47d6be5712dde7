//! The decorator around a plain service that makes real processes in real network namespaces, but no containers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::{self, Code, r#async::TtrpcContext};
use kbp_kernel::link::{Batch, RouteSocket, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::{MacAddr, Mtu};
use kbp_poller::config::Config;
use kbp_poller::state::{self, Part, PodState};
use serde_json::{Value, json};

use super::cleanup::cleanup_in;
use super::decorator::{Decorator, decorate_with};
use super::*;
use crate::sockets;

const LIMIT: Duration = Duration::from_secs(10);

/// What the network of a container is like when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Net {
    /// The host's.
    Host,
    /// A new one that stays empty.
    Empty,
    /// A new one with a veth.
    Veth,
    /// A new one with an interface that cannot be polled.
    Bridge,
}

/// A plain service: its containers are processes that sleep.
#[derive(Default)]
struct Plain {
    calls: Mutex<Vec<String>>,
    children: Mutex<Vec<Sleeper>>,
    /// `config.json` of each creation, as the OCI runtime would have read it.
    seen: Mutex<Vec<Value>>,
    nets: Mutex<Vec<Net>>,
    fail_create: bool,
    /// Creations wait for this.
    gate: Option<tokio::sync::Semaphore>,
}

impl Plain {
    fn note(&self, call: &str, id: &str) {
        self.calls
            .lock()
            .expect("lock")
            .push(format!("{call} {id}"));
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().expect("lock").clone()
    }

    fn seen(&self) -> Vec<Value> {
        self.seen.lock().expect("lock").clone()
    }

    fn pid(&self, id: &str) -> u32 {
        let children = self.children.lock().expect("lock");
        let sleeper = children.iter().find(|s| s.id == id).expect("a child");
        sleeper.child.id()
    }

    fn spawn(&self, id: &str, net: Net) -> u32 {
        let mut command = Command::new(if net == Net::Host { "sleep" } else { "unshare" });
        if net != Net::Host {
            command.args(["--net", "sleep"]);
        }
        let child = command
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .expect("run a process");
        let pid = child.id();
        self.children.lock().expect("lock").push(Sleeper {
            id: id.to_owned(),
            child,
        });
        let until = Instant::now() + LIMIT;
        let host = Netns::current().expect("own namespace");
        // It is itself for a moment before it has a namespace of its own.
        while net != Net::Host
            && Netns::of_process(pid).is_ok_and(|n| n.is_same(&host).expect("compare"))
        {
            assert!(Instant::now() < until, "no namespace of its own");
            std::thread::yield_now();
        }
        pid
    }
}

/// A process that ends with this.
struct Sleeper {
    id: String,
    child: Child,
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

/// Gives the namespace of a process a veth, whose host end goes with it.
fn add_veth(pid: u32) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let netns = Netns::of_process(pid).expect("namespace");
    let mac = |last| MacAddr([0x02, 0x6b, 0x62, 0x70, number as u8, last]);
    let host_name = format!("kt{}-{number}", std::process::id());
    let mut batch = Batch::new();
    batch.create_veth(&VethPair {
        host_name: &host_name,
        host_mac: mac(1),
        pod_name: "eth0",
        pod_mac: mac(2),
        pod_netns: &netns,
        mtu: Mtu(1500),
        tx_queue_len: 1000,
    });
    RouteSocket::open()
        .expect("netlink")
        .execute(&batch)
        .expect("make a veth");
    let mut inside = RouteSocket::open_in(&netns).expect("netlink");
    let link = inside
        .link_by_name("eth0")
        .expect("ask")
        .expect("the pod end");
    let mut batch = Batch::new();
    batch.set_up(link.index);
    inside.execute(&batch).expect("set it up");
}

fn add_bridge(pid: u32) {
    for words in ["link add eth0 type bridge", "link set eth0 up"] {
        let done = Command::new("nsenter")
            .args(["--net", "--target", &pid.to_string(), "ip"])
            .args(words.split(' '))
            .status()
            .expect("run ip");
        assert!(done.success(), "{words}");
    }
}

#[async_trait]
impl Task for Plain {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        self.note("create", &request.id);
        if let Some(gate) = &self.gate {
            gate.acquire().await.expect("open").forget();
        }
        let text =
            fs::read(Path::new(&request.bundle).join("config.json")).expect("read config.json");
        let config: Value = serde_json::from_slice(&text).expect("JSON");
        let socket = config["linux"]["seccomp"]["listenerPath"].as_str();
        if let Some(socket) = socket.filter(|s| s.ends_with("/seccomp.sock")) {
            // What a runtime does: the notifier has to listen by now.
            std::os::unix::net::UnixStream::connect(socket).expect("connect to the notifier");
        }
        self.seen.lock().expect("lock").push(config);
        if self.fail_create {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                Code::UNKNOWN,
                "OCI runtime create failed",
            )));
        }
        let net = self.nets.lock().expect("lock").pop().unwrap_or(Net::Empty);
        let pid = self.spawn(&request.id, net);
        match net {
            Net::Veth => add_veth(pid),
            Net::Bridge => add_bridge(pid),
            Net::Host | Net::Empty => {}
        }
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.note("state", &request.id);
        let pid = if self.gate.is_some() {
            0
        } else {
            self.pid(&request.id)
        };
        Ok(api::StateResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        self.note("start", &request.id);
        Ok(api::StartResponse::default())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        assert_eq!((request.signal, request.all), (9, true));
        self.note("kill", &request.id);
        Ok(Empty::default())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        self.note("wait", &request.id);
        Ok(api::WaitResponse::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.note("delete", &request.id);
        Ok(api::DeleteResponse::default())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.note("update", &request.id);
        Ok(Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        self.note("shutdown", "");
        Ok(Empty::default())
    }
}

/// A pod under test, in a state directory of its own.
struct Bench {
    plain: Arc<Plain>,
    service: Decorator,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(nets: &[Net]) -> Self {
        Self::with(
            Plain {
                nets: Mutex::new(nets.iter().rev().copied().collect()),
                ..Plain::default()
            },
            "",
        )
    }

    fn with(plain: Plain, config: &str) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("config.toml");
        let state_dir = dir.path().join("state");
        fs::write(&path, format!("state-dir = {state_dir:?}\n{config}")).expect("write the config");
        let plain = Arc::new(plain);
        let context = Context {
            namespace: "test".to_owned(),
            pod_id: "pod".to_owned(),
        };
        let load = Box::new(move || Config::read(&path));
        Self {
            service: decorate_with(plain.clone(), context, load),
            plain,
            dir,
        }
    }

    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Makes the bundle of a container.
    fn bundle(&self, id: &str, config: &Value) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(&bundle).expect("make the bundle");
        fs::write(bundle.join("config.json"), config.to_string()).expect("write config.json");
        bundle
    }

    async fn create(&self, id: &str, config: &Value) -> ttrpc::Result<u32> {
        let request = api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: self.bundle(id, config).to_str().expect("UTF-8").to_owned(),
            ..Default::default()
        };
        self.service
            .create(&TtrpcContext::default(), request)
            .await
            .map(|r| r.pid)
    }

    async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.service
            .start(&TtrpcContext::default(), request)
            .await
            .map(drop)
    }

    async fn delete(&self, id: &str) {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.service
            .delete(&TtrpcContext::default(), request)
            .await
            .expect("delete");
    }

    async fn update(&self, id: &str, resources: Value) {
        let any = Any {
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(any),
            ..Default::default()
        };
        self.service
            .update(&TtrpcContext::default(), request)
            .await
            .expect("update");
    }

    fn state(&self) -> PodState {
        let mut states = state::read_all(&self.state_dir()).expect("read the states");
        assert_eq!(states.len(), 1, "{states:?}");
        states.remove(0)
    }

    /// Nothing of a pod is there: no state, no socket, no claim.
    fn assert_clean(&self) {
        for place in ["pods", "notify", "cpu"] {
            let left: Vec<_> = fs::read_dir(self.state_dir().join(place))
                .into_iter()
                .flatten()
                .collect();
            assert!(left.is_empty(), "{place}: {left:?}");
        }
    }

    fn config_of(&self, id: &str) -> Value {
        let text =
            fs::read(self.dir.path().join(id).join("config.json")).expect("read config.json");
        serde_json::from_slice(&text).expect("JSON")
    }
}

/// A container's configuration with a network of its own and these annotations.
fn own_network(annotations: Value) -> Value {
    json!({"annotations": annotations, "linux": {"namespaces": [{"type": "network"}], "resources": {}}})
}

fn required() -> Value {
    own_network(json!({"kbp.io/required": "true", "kbp.io/worker": "none"}))
}

fn plain_config() -> Value {
    own_network(json!({"kbp.io/worker": "none"}))
}

fn status(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

fn reasons(state: &PodState, part: Part) -> String {
    state
        .degraded
        .iter()
        .filter(|d| d.part == part)
        .map(|d| d.reason.as_str())
        .collect::<Vec<_>>()
        .join("; ")
}

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
async fn a_failed_creation_leaves_nothing() {
    let bench = Bench::with(
        Plain {
            fail_create: true,
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

    // Its own annotations do not count, good or bad; its own limits do.
    let mut app = own_network(json!({"kbp.io/worker": "nonsense"}));
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
        gate: Some(tokio::sync::Semaphore::new(0)),
        ..Plain::default()
    };
    let bench = Arc::new(Bench::with(plain, ""));
    let creating = tokio::spawn({
        let bench = bench.clone();
        async move { bench.create("pod", &plain_config()).await }
    });
    let until = Instant::now() + LIMIT;
    while bench.plain.calls().is_empty() {
        assert!(Instant::now() < until);
        tokio::task::yield_now().await;
    }
    bench
        .service
        .state(&TtrpcContext::default(), api::StateRequest::default())
        .await
        .expect("state");
    bench.plain.gate.as_ref().expect("gate").add_permits(1);
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
