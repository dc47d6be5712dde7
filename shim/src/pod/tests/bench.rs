//! A plain service that makes real processes in real network namespaces, but no containers, and a pod around it.

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

use super::super::decorator::{Decorator, decorate_with};
use super::super::*;

pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// What the network of a container is like when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Net {
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
pub(super) struct Plain {
    pub(super) calls: Mutex<Vec<String>>,
    pub(super) children: Mutex<Vec<Sleeper>>,
    /// `config.json` of each creation, as the OCI runtime would have read it.
    pub(super) seen: Mutex<Vec<Value>>,
    pub(super) nets: Mutex<Vec<Net>>,
    /// The container whose creation fails.
    pub(super) fails: Option<&'static str>,
    /// The container whose creation waits, and for what.
    pub(super) gate: Option<(&'static str, tokio::sync::Semaphore)>,
}

impl Plain {
    pub(super) fn note(&self, call: &str, id: &str) {
        self.calls
            .lock()
            .expect("lock")
            .push(format!("{call} {id}"));
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.calls.lock().expect("lock").clone()
    }

    pub(super) fn seen(&self) -> Vec<Value> {
        self.seen.lock().expect("lock").clone()
    }

    fn pid(&self, id: &str) -> Option<u32> {
        let children = self.children.lock().expect("lock");
        let sleeper = children.iter().find(|s| s.id == id)?;
        Some(sleeper.child.id())
    }

    pub(super) fn spawn(&self, id: &str, net: Net) -> u32 {
        let mut command = Command::new(if net == Net::Host { "sleep" } else { "unshare" });
        if net != Net::Host {
            command.args(["--net", "sleep"]);
        }
        command.arg("1000").stdin(Stdio::null());
        // A test that is killed leaves no namespace, and so no veth.
        kbp_kernel::process::end_with_parent(&mut command);
        let child = command.spawn().expect("run a process");
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
pub(super) struct Sleeper {
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
pub(super) fn add_veth(pid: u32) {
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

pub(super) fn add_bridge(pid: u32) {
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
        if let Some((id, gate)) = &self.gate
            && *id == request.id
        {
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
        if self.fails == Some(request.id.as_str()) {
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
        let started = self.calls().contains(&format!("start {}", request.id));
        let status = match started {
            true => api::Status::RUNNING,
            false => api::Status::CREATED,
        };
        Ok(api::StateResponse {
            pid: self.pid(&request.id).unwrap_or(0),
            status: status.into(),
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
pub(super) struct Bench {
    pub(super) plain: Arc<Plain>,
    pub(super) service: Decorator,
    pub(super) dir: tempfile::TempDir,
}

impl Bench {
    pub(super) fn new(nets: &[Net]) -> Self {
        Self::with(
            Plain {
                nets: Mutex::new(nets.iter().rev().copied().collect()),
                ..Plain::default()
            },
            "",
        )
    }

    pub(super) fn with(plain: Plain, config: &str) -> Self {
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

    pub(super) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Makes the bundle of a container.
    pub(super) fn bundle(&self, id: &str, config: &Value) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(&bundle).expect("make the bundle");
        fs::write(bundle.join("config.json"), config.to_string()).expect("write config.json");
        bundle
    }

    pub(super) async fn create(&self, id: &str, config: &Value) -> ttrpc::Result<u32> {
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

    /// Waits until the plain service has been called.
    pub(super) async fn wait_for_call(&self, call: &str) {
        let until = Instant::now() + LIMIT;
        while !self.plain.calls().iter().any(|c| c == call) {
            assert!(Instant::now() < until, "{call} has not come");
            tokio::task::yield_now().await;
        }
    }

    /// Lets the creation go on that waits.
    pub(super) fn open_gate(&self) {
        let (_, gate) = self.plain.gate.as_ref().expect("a gate");
        gate.add_permits(1);
    }

    pub(super) async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.service
            .start(&TtrpcContext::default(), request)
            .await
            .map(drop)
    }

    pub(super) async fn delete(&self, id: &str) {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.service
            .delete(&TtrpcContext::default(), request)
            .await
            .expect("delete");
    }

    pub(super) async fn update(&self, id: &str, resources: Value) {
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

    pub(super) fn state(&self) -> PodState {
        let mut states = state::read_all(&self.state_dir()).expect("read the states");
        assert_eq!(states.len(), 1, "{states:?}");
        states.remove(0)
    }

    /// Nothing of a pod is there: no state, no socket, no claim.
    pub(super) fn assert_clean(&self) {
        for place in ["pods", "notify", "cpu"] {
            let left: Vec<_> = fs::read_dir(self.state_dir().join(place))
                .into_iter()
                .flatten()
                .collect();
            assert!(left.is_empty(), "{place}: {left:?}");
        }
    }

    pub(super) fn config_of(&self, id: &str) -> Value {
        let text =
            fs::read(self.dir.path().join(id).join("config.json")).expect("read config.json");
        serde_json::from_slice(&text).expect("JSON")
    }
}

/// A container's configuration with a network of its own and these annotations.
pub(super) fn own_network(annotations: Value) -> Value {
    json!({"annotations": annotations, "linux": {"namespaces": [{"type": "network"}], "resources": {}}})
}

pub(super) fn required() -> Value {
    own_network(json!({"kbp.io/required": "true", "kbp.io/worker": "none"}))
}

pub(super) fn plain_config() -> Value {
    own_network(json!({"kbp.io/worker": "none"}))
}

pub(super) fn status(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

pub(super) fn reasons(state: &PodState, part: Part) -> String {
    state
        .degraded
        .iter()
        .filter(|d| d.part == part)
        .map(|d| d.reason.as_str())
        .collect::<Vec<_>>()
        .join("; ")
}
