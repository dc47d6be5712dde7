//! A shim without containerd: the test speaks to it as containerd does, and receives its events.
//!
//! Everything is below one temporary directory, the OCI runtime's state and the sockets too; dropping the [`World`] ends
//! the servers it started, by their pids, and has the shim's own `delete` clean up. When the process of the test is killed, a guard does.

#![allow(dead_code, reason = "no test uses all of it")]

mod arm;
mod shim;

use std::collections::HashMap;
use std::fs;
use std::future::Future;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::shim_async::{Client, Events, create_events};
use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::{Value, json};
use tokio::sync::watch;

pub(crate) use self::arm::{Arm, arms, run};
pub(crate) use self::shim::{Shim, exec_request};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_containerd-shim-kbp-v1");
pub(crate) const NAMESPACE: &str = "test";
const LIMIT: Duration = Duration::from_secs(60);

/// Waits, but not for ever.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future)
        .await
        .expect("an answer in time")
}

/// Looks again until `done`, but not for ever.
pub(crate) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..LIMIT.as_millis() / 10 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} has not come about within {LIMIT:?}");
}

/// Cleans up after a process that could not; see its own words.
const GUARD: &str = include_str!("guard.sh");

/// The temporary directory and what lives in it.
pub(crate) struct World {
    dir: tempfile::TempDir,
    events: watch::Receiver<Vec<Happened>>,
    _events_server: Server,
    servers: Mutex<Vec<u32>>,
    bundles: Mutex<Vec<String>>,
    log_readers: Mutex<Vec<fs::File>>,
    sockets: Mutex<Vec<PathBuf>>,
    pub(crate) arm: Arm,
    pub(crate) options: Options,
    // Last, so that nothing is left for it when it goes, and something is guarded until then.
    _guard: Guard,
}

/// The process of [`GUARD`].
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An event as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Happened {
    pub(crate) topic: String,
    pub(crate) type_url: String,
    pub(crate) value: Vec<u8>,
}

struct EventSink(watch::Sender<Vec<Happened>>);

#[async_trait]
impl Events for EventSink {
    async fn forward(
        &self,
        _: &TtrpcContext,
        request: containerd_shim_protos::shim::events::ForwardRequest,
    ) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        assert_eq!(envelope.namespace, NAMESPACE);
        let event = envelope.event.unwrap_or_default();
        let happened = Happened {
            topic: envelope.topic,
            type_url: event.type_url,
            value: event.value,
        };
        self.0.send_modify(|all| all.push(happened));
        Ok(Empty::new())
    }
}

impl World {
    pub(crate) async fn new(arm: Arm) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kbp-shim-")
            .tempdir_in("/tmp")
            .expect("a directory");
        let root = dir.path();
        let guard = Command::new("/bin/sh")
            .args(["-c", GUARD, "guard"])
            .arg(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Where it is told to end with its group, it is still needed.
            .process_group(0)
            .spawn()
            .expect("start a guard");
        for name in [
            "rootfs/bin",
            "rootfs/proc",
            "rootfs/dev",
            "rootfs/tmp",
            "bundles",
            "runc",
            "kbp",
        ] {
            fs::create_dir_all(root.join(name)).expect("make a directory");
        }
        fs::copy("/bin/busybox", root.join("rootfs/bin/busybox"))
            .expect("busybox-static is installed");
        let config = format!("state-dir = {:?}\n", root.join("kbp"));
        fs::write(root.join("kbp.toml"), config).expect("write the config");

        let (sender, events) = watch::channel(Vec::new());
        let mut server = Server::new()
            .bind(&format!("unix://{}", root.join("events.sock").display()))
            .expect("listen for events")
            .register_service(create_events(Arc::new(EventSink(sender))));
        server.start().await.expect("serve events");
        let mut options = Options {
            root: root.join("runc").display().to_string(),
            ..Default::default()
        };
        if arm == Arm::KbpWithCrun {
            options.binary_name = add_crun(root).display().to_string();
        }
        Self {
            arm,
            log_readers: Mutex::default(),
            sockets: Mutex::default(),
            events,
            _events_server: server,
            servers: Mutex::default(),
            bundles: Mutex::default(),
            options,
            dir,
            _guard: Guard(guard),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Of the directory, and so of this world alone.
    fn name(&self) -> String {
        let name = self.dir.path().file_name().expect("a name");
        name.to_string_lossy().into_owned()
    }

    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.path("bundles").join(id)
    }

    pub(crate) fn any_options(&self) -> Any {
        Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: self.options.write_to_bytes().expect("encode"),
            ..Default::default()
        }
    }

    /// A bundle that runs busybox with these arguments.
    pub(crate) fn add_bundle(&self, id: &str, args: &[&str]) -> PathBuf {
        self.add_bundle_with(id, args, |_| {})
    }

    pub(crate) fn add_bundle_with(
        &self,
        id: &str,
        args: &[&str],
        edit: impl FnOnce(&mut Value),
    ) -> PathBuf {
        let bundle = self.bundle(id);
        // containerd's has a directory for the runtime's work, too.
        fs::create_dir_all(bundle.join("work")).expect("make the bundle");
        nix::unistd::mkfifo(&bundle.join("log"), nix::sys::stat::Mode::S_IRWXU)
            .expect("make the log fifo");
        // containerd reads it from the start on: without a reader a stock shim waits before its first line.
        let reader = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(bundle.join("log"))
            .expect("open the log fifo");
        self.log_readers.lock().expect("not poisoned").push(reader);
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": process(args),
            "root": { "path": self.path("rootfs") },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["newinstance", "ptmxmode=0666", "mode=0620"] },
            ],
            "linux": {
                "cgroupsPath": format!("/{}-{id}", self.name()),
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }],
            },
        });
        edit(&mut spec);
        fs::write(bundle.join("config.json"), spec.to_string()).expect("write config.json");
        self.bundles
            .lock()
            .expect("not poisoned")
            .push(id.to_owned());
        bundle
    }

    /// The shim's binary in a bundle, with the environment that containerd gives it.
    pub(crate) fn binary(&self, id: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.arm.shim());
        command.args([
            "-namespace",
            NAMESPACE,
            "-address",
            &self.path("containerd.sock").display().to_string(),
        ]);
        command
            .args(["-publish-binary", "/nonexistent", "-id", id])
            .args(arguments);
        command.current_dir(self.bundle(id));
        command
            .env("TTRPC_ADDRESS", self.path("events.sock"))
            .env("KBP_CONFIG", self.path("kbp.toml"));
        match self.arm {
            Arm::Stock2 => command.env("MAX_SHIM_VERSION", "3"),
            _ => command.env_remove("MAX_SHIM_VERSION"),
        };
        command.process_group(0);
        command
    }

    /// Runs a command with `input` on its standard input.
    pub(crate) fn run(&self, mut command: Command, input: &[u8]) -> Output {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("start the shim's binary");
        // A binary that does not read it closes the pipe.
        let _ = child.stdin.take().expect("a pipe").write_all(input);
        child.wait_with_output().expect("its output")
    }

    pub(crate) fn bootstrap_params(&self, id: &str) -> Vec<u8> {
        let params = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            containerd_grpc_address: self.path("containerd.sock").display().to_string(),
            containerd_ttrpc_address: self.path("events.sock").display().to_string(),
            extensions: vec![Extension {
                value: MessageField::some(self.any_options()),
                ..Default::default()
            }],
            socket_dir: Some(self.path("s").display().to_string()),
            ..Default::default()
        };
        params.write_to_bytes().expect("encode")
    }

    /// What `start` reads: kbp's as of containerd 2.3, which tells where sockets go; the options for the older shims.
    pub(crate) fn start_input(&self, id: &str) -> Vec<u8> {
        match self.arm.is_kbp() {
            true => self.bootstrap_params(id),
            false => self.any_options().write_to_bytes().expect("encode"),
        }
    }

    /// `start` as containerd calls it, and a connection to the server.
    pub(crate) async fn start_shim(&self, id: &str) -> Shim {
        let output = self.run(self.binary(id, &["start"]), &self.start_input(id));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && stderr.is_empty(),
            "{}: {stderr}",
            output.status
        );
        self.connect_to(&output).await
    }

    /// Connects to the server that a `start` has left.
    pub(crate) async fn connect_to(&self, started: &Output) -> Shim {
        let answer = &started.stdout;
        let address = match self.arm {
            Arm::Stock1 => String::from_utf8(answer.clone()).expect("an address"),
            Arm::Stock2 => {
                let answer: Value = serde_json::from_slice(answer).expect("JSON");
                answer["address"].as_str().expect("an address").to_owned()
            }
            Arm::Kbp | Arm::KbpWithCrun => {
                let result = BootstrapResult::parse_from_bytes(answer).expect("a BootstrapResult");
                assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
                result.address
            }
        };
        self.connect(&address).await
    }

    pub(crate) async fn connect(&self, address: &str) -> Shim {
        let socket = address.trim_start_matches("unix://").into();
        self.sockets.lock().expect("not poisoned").push(socket);
        let client = Client::connect(address).await.expect("connect to the shim");
        let mut shim = Shim {
            client,
            service: self.arm.service(),
            pid: 0,
            address: address.to_owned(),
        };
        let answer = shim.connect(&api::ConnectRequest::new()).await;
        shim.pid = answer.expect("connect").shim_pid;
        self.servers.lock().expect("not poisoned").push(shim.pid);
        shim
    }

    /// A shim with a container in it that is created, not started.
    pub(crate) async fn created(&self, id: &str, args: &[&str]) -> Shim {
        self.add_bundle(id, args);
        let shim = self.start_shim(id).await;
        within(shim.create(&self.create_request(id)))
            .await
            .expect("create");
        shim
    }

    pub(crate) fn create_request(&self, id: &str) -> api::CreateTaskRequest {
        api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: self.bundle(id).display().to_string(),
            options: MessageField::some(self.any_options()),
            ..Default::default()
        }
    }

    pub(crate) fn events(&self) -> Vec<Happened> {
        self.events.borrow().clone()
    }

    pub(crate) fn topics(&self) -> Vec<String> {
        self.events().into_iter().map(|event| event.topic).collect()
    }

    /// Waits for an event and returns all that came before it, and it.
    pub(crate) async fn wait_for(&self, topic: &str) -> Vec<Happened> {
        let mut events = self.events.clone();
        let all = within(events.wait_for(|all| all.iter().any(|event| event.topic == topic))).await;
        all.expect("the events server lives").clone()
    }

    /// A fifo in the directory.
    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("make a fifo");
        path.display().to_string()
    }

    pub(crate) fn leftovers(&self, id: &str) -> Vec<String> {
        let mut left = Vec::new();
        let runc = self.path("runc").join(NAMESPACE).join(id);
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let bundle = self.bundle(id).display().to_string();
        if runc.exists() {
            left.push(format!("state {}", runc.display()));
        }
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&bundle))
                .map(|line| format!("mount {line}")),
        );
        let sockets = fs::read_dir(self.path("s")).into_iter().flatten().flatten();
        left.extend(sockets.map(|socket| format!("socket {}", socket.path().display())));
        left
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for pid in self.servers.lock().expect("not poisoned").drain(..) {
            let name = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if Path::new(name.split('\0').next().unwrap_or_default()) == self.arm.shim() {
                let _ = kbp_kernel::process::kill(pid, 9);
            }
        }
        let bundles = std::mem::take(&mut *self.bundles.lock().expect("not poisoned"));
        for id in bundles.iter().filter(|id| self.bundle(id).exists()) {
            let deleted = self.run(self.binary(id, &["delete"]), b"");
            if !deleted.status.success() {
                eprintln!("delete {id}: {}", String::from_utf8_lossy(&deleted.stderr));
            }
        }
        // A server that is killed leaves its own, which may be outside of the directory.
        for socket in self.sockets.lock().expect("not poisoned").drain(..) {
            let _ = fs::remove_file(socket);
        }
    }
}

/// A program that is crun. It refuses a machine whose cgroups are v1 but some of whose controllers are on v2's side of the hybrid
/// layout; without that side, in a mount namespace of its own, they are plain v1.
fn add_crun(root: &Path) -> PathBuf {
    let unified = "/sys/fs/cgroup/unified";
    let controllers = fs::read_to_string(format!("{unified}/cgroup.controllers"));
    if controllers.unwrap_or_default().trim().is_empty() {
        return "crun".into();
    }
    let path = root.join("oci");
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'umount {unified} && exec crun \"$@\"' crun \"$@\"\n"
    );
    fs::write(&path, script).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    path
}

/// The OCI `process` of a command of busybox.
pub(crate) fn process(args: &[&str]) -> Value {
    let args: Vec<&str> = ["/bin/busybox"]
        .into_iter()
        .chain(args.iter().copied())
        .collect();
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
    })
}

/// The status of a refused call.
pub(crate) fn refused<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("not a refusal: {other:?}"),
    }
}

/// Reads a fifo to its end, in a thread: opening waits for the shim.
pub(crate) fn read_fifo(path: &str) -> tokio::task::JoinHandle<Vec<u8>> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || fs::read(path).expect("read a fifo"))
}

/// Opens a fifo for writing; the shim holds it open for reading already.
pub(crate) fn open_writer(path: &str) -> fs::File {
    fs::OpenOptions::new()
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path)
        .expect("somebody reads it")
}

pub(crate) fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
