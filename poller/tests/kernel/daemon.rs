//! `kbp-poller serve`, as its clients see it.

mod hands;
mod host;
mod many;
mod metrics;
mod ownership;
mod pods;
mod refusals;
mod wire;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kbp_kernel::netns::Netns;
use kbp_kernel::process;
use kbp_poller::api::{self, AttachRequest, Code, Pod};
use kbp_poller::client::{Attached, Client, ClientError};

use crate::node::{Node, any_cpu, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// A running daemon; killed when it is dropped.
pub(crate) struct Daemon {
    child: Child,
    dir: PathBuf,
}

/// What is installed, where it has been built; else the one beside this test.
pub(crate) fn binary() -> PathBuf {
    let built = env!("CARGO_BIN_EXE_kbp-poller").into();
    std::env::var_os("KBP_BIN_DIR").map_or(built, |dir| Path::new(&dir).join("kbp-poller"))
}

pub(crate) fn command(node: &Node, config: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("serve")
        .arg("--config")
        .arg(node.config_file(config))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

pub(crate) fn spawn(node: &Node, command: &mut Command) -> Daemon {
    // Also when the test is killed.
    process::end_with_parent(command);
    let child = node.host.run(|| command.spawn()).expect("enter");
    Daemon {
        child: child.expect("start kbp-poller"),
        dir: node.state_dir(),
    }
}

/// What a daemon that does not start says.
fn complaint(node: &Node, mut command: Command) -> String {
    let output = node.host.run(|| command.output()).expect("enter");
    let output = output.expect("run kbp-poller");
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

impl Daemon {
    pub(crate) fn start(node: &Node, config: &str) -> Self {
        let mut daemon = spawn(node, &mut command(node, config));
        daemon.wait_ready();
        daemon
    }

    /// Waits until this one serves.
    pub(crate) fn wait_ready(&mut self) {
        let ready = self.dir.join(api::READY);
        let pid = format!("{}\n", self.pid());
        let child = &mut self.child;
        wait_until("the daemon to serve", || {
            if child.try_wait().expect("wait").is_some() {
                let mut said = String::new();
                if let Some(stderr) = &mut child.stderr {
                    stderr.read_to_string(&mut said).expect("read");
                }
                panic!("the daemon ended: {said}");
            }
            (std::fs::read_to_string(&ready).unwrap_or_default() == pid).then_some(())
        });
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn socket(&self) -> PathBuf {
        self.dir.join(api::SOCKET)
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.socket(), LIMIT).expect("connect")
    }

    pub(crate) fn signal(&self, signal: i32) {
        assert!(process::kill(self.pid(), signal).expect("signal"));
    }

    pub(crate) fn kill(mut self) {
        self.signal(SIGKILL);
        self.child.wait().expect("wait");
    }

    /// Ends it in the orderly way.
    pub(crate) fn end(mut self) {
        self.signal(SIGTERM);
        assert!(self.child.wait().expect("wait").success());
    }

    pub(crate) fn metrics(&self) -> String {
        let mut stream = UnixStream::connect(self.dir.join("metrics.sock")).expect("connect");
        stream.set_read_timeout(Some(LIMIT)).expect("limit");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("write");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        body.to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking()
            && let Some(stderr) = &mut self.child.stderr
        {
            let mut said = String::new();
            let _ = stderr.read_to_string(&mut said);
            eprintln!("--- the daemon said\n{said}");
        }
    }
}

/// The path by which another process reaches a namespace of this one.
fn path_of(netns: &Netns) -> String {
    let fd = netns.as_fd().as_raw_fd();
    format!("/proc/{}/fd/{fd}", std::process::id())
}

/// A lasting path of a namespace, as CNI runtimes make them; unmounted when it is dropped.
struct Named {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Named {
    fn new(netns: &Netns) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kbp-netns-test-")
            .tempdir()
            .expect("directory");
        let path = dir.path().join("pod");
        std::fs::write(&path, "").expect("file");
        mount(&["--bind", &path_of(netns), &path.display().to_string()]);
        Self { path, _dir: dir }
    }

    fn unmount(&self) {
        let status = Command::new("umount")
            .arg("--lazy")
            .arg(&self.path)
            .status();
        assert!(status.expect("umount").success());
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // It may be unmounted already.
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.path)
            .stderr(Stdio::null())
            .status();
    }
}

fn mount(args: &[&str]) {
    let status = Command::new("mount").args(args).status();
    assert!(status.expect("mount").success(), "{args:?}");
}

pub(crate) fn pool() -> String {
    format!("cpus = \"{}\"", any_cpu())
}

fn request(id: &str, netns: &Netns) -> AttachRequest {
    AttachRequest {
        id: id.to_owned(),
        namespace: "test".to_owned(),
        netns: path_of(netns),
        worker: "shared".to_owned(),
        bound: true,
        ..AttachRequest::default()
    }
}

fn attached(client: &mut Client, request: &AttachRequest) -> Pod {
    client.renew(LIMIT);
    match client.attach(request).expect("attach") {
        Attached::Pod(pod) => *pod,
        other => panic!("{other:?}"),
    }
}

fn refused(client: &mut Client, request: &AttachRequest) -> (Code, String) {
    match client.attach(request).expect_err("refused") {
        ClientError::Refused {
            code: Some(code),
            message,
        } => (code, message),
        other => panic!("{other}"),
    }
}

fn names(client: &mut Client) -> Vec<String> {
    client.renew(LIMIT);
    let pods = client.list().expect("list");
    pods.into_iter().map(|pod| pod.id).collect()
}
