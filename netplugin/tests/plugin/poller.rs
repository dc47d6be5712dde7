//! `"poller": true`: pods are registered with a daemon, here one that answers as a test wants it. The real one is in
//! the end-to-end tests.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kbp_poller::api::Pod as Polled;
use kbp_poller::api::{
    AttachRequest, AttachResponse, DetachRequest, DetachResponse, Frame, Kind, ListResponse,
    Outcome, Request, Response, Status, next_frame,
};
use prost::Message;
use serde_json::{Value, json};

use crate::inject::every_step_with;
use crate::lifecycle::with_result;
use crate::node::{keeping, node_call, quiet};
use crate::world::{Pod, World};

/// How a daemon answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Well,
    Refusing,
    Silent,
    Nonsense,
}

/// A daemon that keeps what is registered, as `namespace id profile worker`.
#[derive(Clone)]
struct Daemon {
    socket: PathBuf,
    registered: Arc<Mutex<BTreeSet<String>>>,
}

impl Daemon {
    /// It serves until the test's process ends.
    fn start(world: &World, manner: Manner) -> Self {
        let socket = world.path(&format!("{manner:?}.sock"));
        let listener = UnixListener::bind(&socket).expect("bind");
        let daemon = Self {
            socket,
            registered: Arc::default(),
        };
        let serving = daemon.clone();
        thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming() {
                let stream = stream.expect("accept");
                match manner {
                    Manner::Silent => silent.push(stream),
                    _ => serving.serve(stream, manner),
                }
            }
        });
        daemon
    }

    fn registered(&self) -> Vec<String> {
        let registered = self.registered.lock().expect("the list");
        registered.iter().cloned().collect()
    }

    fn serve(&self, mut stream: UnixStream, manner: Manner) {
        let mut received = Vec::new();
        loop {
            while let Some((frame, length)) = next_frame(&received).expect("a frame") {
                received.drain(..length);
                let answer = match manner {
                    Manner::Nonsense => b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
                    _ => self.answer(&frame, manner == Manner::Refusing),
                };
                // A client that has what it wants may be gone.
                let _ = stream.write_all(&answer);
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(n) => received.extend_from_slice(&buffer[..n]),
            }
        }
    }

    fn answer(&self, frame: &Frame, refuse: bool) -> Vec<u8> {
        let request = Request::decode(&frame.payload[..]).expect("a request");
        let status = refuse.then(|| Status {
            code: 8,
            message: "no room for another pod".to_owned(),
        });
        let payload = match status {
            Some(_) => Vec::new(),
            None => self.carry_out(&request),
        };
        Frame {
            stream: frame.stream,
            kind: Kind::Response,
            flags: 0,
            payload: Response { status, payload }.encode_to_vec(),
        }
        .encode()
    }

    fn carry_out(&self, request: &Request) -> Vec<u8> {
        let mut registered = self.registered.lock().expect("the list");
        match request.method.as_str() {
            "Attach" => {
                let attach = AttachRequest::decode(&request.payload[..]).expect("an attach");
                assert!(
                    attach.netns.starts_with("/proc/") && !attach.bound,
                    "{attach:?}"
                );
                let AttachRequest {
                    id,
                    namespace,
                    profile,
                    worker,
                    ..
                } = attach;
                registered.insert(format!("{namespace} {id} {profile} {worker}"));
                let pod = Polled {
                    id,
                    namespace,
                    ..Polled::default()
                };
                AttachResponse {
                    outcome: Outcome::Attached.into(),
                    pod: Some(pod),
                }
                .encode_to_vec()
            }
            "Detach" => {
                let detach = DetachRequest::decode(&request.payload[..]).expect("a detach");
                let key = format!("{} {} ", detach.namespace, detach.id);
                let before = registered.len();
                registered.retain(|entry| !entry.starts_with(&key));
                let was_attached = registered.len() < before;
                DetachResponse { was_attached }.encode_to_vec()
            }
            "List" => {
                let pods = registered.iter().map(|entry| {
                    let mut words = entry.split(' ').map(str::to_owned);
                    let namespace = words.next().unwrap_or_default();
                    let id = words.next().unwrap_or_default();
                    Polled {
                        id,
                        namespace,
                        ..Polled::default()
                    }
                });
                ListResponse {
                    pods: pods.collect(),
                    uplinks: Vec::new(),
                }
                .encode_to_vec()
            }
            other => panic!("{other} was called"),
        }
    }
}

fn config(world: &World, socket: &std::path::Path, more: Value) -> Value {
    let mut config = world.config("1.1.0", json!({ "poller": true, "pollerSocket": socket }));
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

/// A config for a veth that the plugin ptp has made.
fn tuned(world: &World, pod: &Pod, mut config: Value) -> Value {
    let first = crate::matrix::reference_config(world, "1.0.0", "ptp", false);
    let answer = crate::matrix::reference(world, "ptp", "ADD", pod, &first);
    assert!(answer.ok, "{answer:?}");
    let result = serde_json::from_str(&answer.stdout).expect("a result");
    config["mode"] = json!("tune");
    config.as_object_mut().expect("an object").remove("ipam");
    with_result(&config, &result)
}

#[test]
fn every_mode_registers_its_pods_and_del_gc_and_check_know_of_it() {
    let world = World::new();
    let daemon = Daemon::start(&world, Manner::Well);
    let fail = json!({ "onUnavailable": "fail" });
    let routed = config(&world, &daemon.socket, fail.clone());
    let mut bridge = routed.clone();
    bridge["mode"] = json!("bridge");
    bridge["profile"] = json!("throughput");
    bridge["runtimeConfig"] =
        json!({ "io.kubernetes.cri.pod-annotations": { "kbp.io/worker": "shared" } });
    let pods = ["routed", "bridge", "tuned"].map(Pod::new);
    let tuned = tuned(&world, &pods[2], config(&world, &daemon.socket, fail));
    let entries = [
        "cni.kbptest bridge.eth0 throughput shared",
        "cni.kbptest routed.eth0 latency ",
        "cni.kbptest tuned.eth0 latency ",
    ];
    let configs = [routed, bridge, tuned];
    for (pod, config) in pods.iter().zip(&configs) {
        let result = world.add(pod, config);
        world.quiet("CHECK", pod, &with_result(config, &result));
    }
    assert_eq!(daemon.registered(), entries);
    quiet(&world, "STATUS", &configs[0]);

    world.quiet("DEL", &pods[1], &configs[1]);
    assert_eq!(daemon.registered(), entries[1..]);
    quiet(&world, "GC", &keeping(&configs[0], &[&pods[0]]));
    assert_eq!(daemon.registered(), entries[1..2]);
    world
        .call("CHECK", &pods[2], &configs[2])
        .assert_error(103, &["kbp-poller does not poll it"]);
    for (pod, config) in pods.iter().zip(&configs) {
        world.quiet("DEL", pod, config);
    }
    assert!(daemon.registered().is_empty());
}

#[test]
fn a_daemon_that_is_absent_or_refuses_or_is_silent_costs_little_and_fails_only_what_wants_it() {
    // One ADD asks once, and once more to take back what it got no answer to; the rest is a busy machine's. Without a limit a silent daemon
    // would be waited for without end.
    const BOUND: Duration = Duration::from_secs(60);
    let world = World::new();
    world.forward();
    let pod = Pod::new("pod-a");
    let before = (world.dump(), pod.dump());
    let absent = (world.path("absent.sock"), "no kbp-poller serves");
    let others = [
        (Manner::Refusing, "no room for another pod"),
        (Manner::Silent, "within 200 ms"),
        (Manner::Nonsense, "ttrpc"),
    ]
    .map(|(manner, why)| (Daemon::start(&world, manner).socket, why));
    for (socket, why) in others.into_iter().chain([absent]) {
        let started = Instant::now();
        let fail = config(&world, &socket, json!({ "onUnavailable": "fail" }));
        world
            .call("ADD", &pod, &fail)
            .assert_error(105, &[why, "pod-a", "onUnavailable"]);
        assert_eq!((world.dump(), pod.dump()), before, "{why}");
        node_call(&world, "STATUS", &fail).assert_error(50, &[why]);

        let degrade = config(&world, &socket, json!({}));
        let answer = world.call("ADD", &pod, &degrade);
        assert!(answer.ok && answer.stderr.contains(why), "{answer:?}");
        quiet(&world, "STATUS", &degrade);
        let result = serde_json::from_str(&answer.stdout).expect("a result");
        world.quiet("CHECK", &pod, &with_result(&degrade, &result));
        // Whatever the config says of it.
        world.quiet("DEL", &pod, &fail);
        assert_eq!((world.dump(), pod.dump()), before, "{why}");
        assert!(started.elapsed() < BOUND, "{why}: {:?}", started.elapsed());
    }
}

#[test]
fn every_step_of_add_leaves_registrations_as_they_were() {
    let world = World::new();
    let daemon = Daemon::start(&world, Manner::Well);
    let registered = || daemon.registered().join("\n");
    let fail = config(&world, &daemon.socket, json!({ "onUnavailable": "fail" }));
    let other = Pod::new("other");
    world.add(&other, &fail);
    let pod = Pod::new("pod-a");
    let failed = every_step_with(&world, &pod, &fail, |_| {}, registered);
    assert!(failed > 15, "{failed} steps failed");
    // The last one had no step left to fail.
    world.quiet("DEL", &pod, &fail);
    let behind = Pod::new("behind");
    let tune = tuned(&world, &behind, fail);
    let failed = every_step_with(&world, &behind, &tune, |_| {}, registered);
    assert!(failed > 10, "{failed} steps failed");
    world.quiet("DEL", &behind, &tune);
    assert_eq!(registered(), "cni.kbptest other.eth0 latency ");
}

#[test]
fn a_result_that_cannot_be_written_takes_its_registration_back() {
    let world = World::new();
    let daemon = Daemon::start(&world, Manner::Well);
    let pod = Pod::new("pod-a");
    let config = config(&world, &daemon.socket, json!({}));
    world.unread_add(&pod, &config);
    assert!(daemon.registered().is_empty());
}

#[test]
fn status_asks_for_what_polling_takes_only_where_it_is_required() {
    let world = World::new();
    quiet(
        &world,
        "STATUS",
        &world.config("1.1.0", json!({ "required": true })),
    );
    // A process that may make no namespace cannot try.
    let config = |required| {
        world
            .config("1.1.0", json!({ "required": required }))
            .to_string()
    };
    for (required, ok) in [(false, true), (true, false)] {
        let file = world.path("config.json");
        std::fs::write(&file, config(required)).expect("write");
        let mut command = std::process::Command::new("setpriv");
        command
            .args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"])
            .arg(env!("CARGO_BIN_EXE_kbp"))
            .env("CNI_COMMAND", "STATUS")
            .env("CNI_PATH", world.cni_path())
            .stdin(std::fs::File::open(&file).expect("open the config"));
        let output = world.host.run(|| command.output()).expect("enter");
        let output = output.expect("run setpriv");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.success(), ok, "{output:?}");
        assert!(
            ok || said.contains("required") && said.contains("\"code\":50"),
            "{said}"
        );
    }
}
