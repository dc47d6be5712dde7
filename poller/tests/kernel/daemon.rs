//! `kbp-poller serve`, as its clients see it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kbp_kernel::netns::Netns;
use kbp_kernel::process;
use kbp_poller::api::{self, AttachRequest, Code, EventKind, Pod};
use kbp_poller::client::{Attached, Client, ClientError};
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::polled::{self, Polled, PolledOutcome};
use kbp_poller::state;

use crate::node::{Node, any_cpu, ip, link, wait_until};

const LIMIT: Duration = Duration::from_secs(20);
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

#[test]
fn a_pod_is_attached_polled_listed_and_ends_with_its_connection() {
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut watch = daemon.client().watch().expect("watch");
    let mut client = daemon.client();
    let pod = attached(&mut client, &request("a", &node.pod));
    assert_eq!(pod.owner_pid, daemon.pid());
    assert_eq!(pod.degraded, []);
    let worker = pod.worker.clone().expect("a worker");
    assert_eq!(
        (worker.cpu, worker.policy.as_str()),
        (any_cpu().0, "shared")
    );
    assert_eq!(pod.interfaces[0].host_interface, "vhost0");

    let states = state::read_all(&node.state_dir()).expect("state");
    assert_eq!(states.len(), 1);
    assert_eq!(states[0].owner_pid, daemon.pid());
    let traffic = node.traffic();
    node.wait_polled(200);
    drop(traffic);
    let listed = client.list().expect("list");
    assert_eq!(listed.len(), 1);
    assert!(listed[0].packets > 200, "{listed:?}");
    assert!(listed[0].bound);

    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Attached);
    // A change of the pod is told: its interface goes down.
    ip(&node.host, "link set vhost0 down");
    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Changed);
    let told = event.pod.expect("a pod");
    assert!(told.degraded[0].reason.contains("down"), "{told:?}");
    drop(client);
    let gone = loop {
        let event = watch.next_event(LIMIT).expect("an event");
        if event.kind() == EventKind::Detached {
            break event;
        }
    };
    assert_eq!(gone.pod.expect("a pod").id, "a");
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
fn a_watch_begins_with_what_is_there() {
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    attached(&mut client, &request("a", &node.pod));
    let mut watch = daemon.client().watch().expect("watch");
    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Attached);
    assert_eq!(event.pod.expect("a pod").id, "a");
    assert!(client.detach("test", "a", false).expect("detach"));
    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Detached);
    assert!(!client.detach("test", "a", false).expect("again"), "none");
}

#[test]
fn a_registered_pod_outlives_its_client_and_the_daemon_but_not_its_namespace() {
    let node = Node::new();
    let named = Named::new(&node.pod);
    let registered = AttachRequest {
        netns: named.path.display().to_string(),
        bound: false,
        ..request("cni", &node.pod)
    };
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    let (code, reason) = refused(
        &mut client,
        &AttachRequest {
            bound: false,
            ..request("cni", &node.pod)
        },
    );
    assert_eq!(code, Code::InvalidArgument);
    assert!(reason.contains("/run/netns/NAME"), "{reason}");
    attached(&mut client, &registered);
    drop(client);
    assert_eq!(names(&mut daemon.client()), ["cni"]);

    daemon.kill();
    let daemon = Daemon::start(&node, &pool());
    let pods = daemon.client().list().expect("list");
    assert_eq!((pods[0].id.as_str(), pods[0].bound), ("cni", false));
    let traffic = node.traffic();
    node.wait_polled(100);
    drop(traffic);

    named.unmount();
    wait_until("the pod to be let go", || {
        names(&mut daemon.client()).is_empty().then_some(())
    });
    daemon.kill();
    let daemon = Daemon::start(&node, &pool());
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
}

/// Two owners of one namespace never poll at the same time: what is bound comes first.
#[test]
fn a_registered_pod_waits_while_another_holds_its_namespace() {
    let node = Node::new();
    let named = Named::new(&node.pod);
    let registered = AttachRequest {
        netns: named.path.display().to_string(),
        bound: false,
        ..request("cni", &node.pod)
    };
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    attached(&mut client, &registered);
    let mut shim = daemon.client();
    attached(&mut shim, &request("shim", &node.pod));
    assert_eq!(names(&mut client), ["shim"]);
    drop(shim);
    wait_until("the registered one to go on", || {
        (names(&mut client) == ["cni"]).then_some(())
    });
    assert!(client.detach("test", "cni", false).expect("detach"));
    assert_eq!(names(&mut client), Vec::<String>::new());
}

fn polled(node: &Node, id: &str, worker: WorkerPolicy, config: &str) -> Polled {
    let request = node.request(id, worker, config);
    let outcome = node.host.run(|| polled::attach(request)).expect("enter");
    match outcome.expect("attach") {
        PolledOutcome::Attached(polled) => polled,
        other => panic!("{other:?}"),
    }
}

fn owner(node: &Node) -> Option<u32> {
    let states = state::read_all(&node.state_dir()).expect("state");
    states.first().map(|state| state.owner_pid)
}

#[test]
fn pods_go_to_the_daemon_and_back_as_it_comes_and_goes() {
    let node = Node::new();
    let own = std::process::id();
    let polled = polled(&node, "a", WorkerPolicy::Shared, &pool());
    assert!(!polled.is_at_daemon());
    assert_eq!(owner(&node), Some(own));
    let _traffic = node.traffic();
    node.wait_polled(100);
    for kill in [true, false, true] {
        let daemon = Daemon::start(&node, &pool());
        let began = Instant::now();
        wait_until("the pod to be handed over", || {
            (polled.is_at_daemon() && owner(&node) == Some(daemon.pid())).then_some(())
        });
        println!("handed over within {:?}", began.elapsed());
        assert_eq!(names(&mut daemon.client()), ["a"]);
        node.wait_polled(100);
        let began = Instant::now();
        if kill {
            daemon.kill();
        } else {
            daemon.signal(SIGTERM);
        }
        wait_until("the pod to be taken back", || {
            (!polled.is_at_daemon() && owner(&node) == Some(own)).then_some(())
        });
        println!("taken back within {:?}", began.elapsed());
        node.wait_polled(100);
    }
    drop(polled);
    assert_eq!(owner(&node), None);
}

#[test]
fn a_daemon_that_refuses_or_hangs_leaves_the_pod_where_it_is() {
    let node = Node::new();
    // Its pool is somebody else's: a required shared worker cannot be had there.
    let config = "kubelet-state = \"/nonexistent\"";
    let mut request = node.request("a", WorkerPolicy::Shared, &pool());
    request.policy.required = true;
    let daemon = Daemon::start(&node, config);
    let outcome = node.host.run(|| polled::attach(request)).expect("enter");
    let PolledOutcome::Attached(polled) = outcome.expect("attach") else {
        panic!("not attached");
    };
    assert!(!polled.is_at_daemon());
    assert_eq!(owner(&node), Some(std::process::id()));
    drop(polled);
    // One that is stopped accepts connections and answers nothing.
    daemon.signal(19);
    let began = Instant::now();
    let polled = self::polled(&node, "b", WorkerPolicy::Shared, &pool());
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(!polled.is_at_daemon());
    let _traffic = node.traffic();
    node.wait_polled(100);
    // It goes on, and is asked again.
    daemon.signal(18);
    wait_until("the pod to be handed over", || {
        polled.is_at_daemon().then_some(())
    });
    assert_eq!(owner(&node), Some(daemon.pid()));
}

/// A daemon of which this test has the reins: it reads a request, and answers when it is told to.
struct Reins {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Reins {
    /// Serves in the node's state directory, and waits for the first who comes.
    fn take(node: &Node) -> Self {
        let dir = node.state_dir();
        let listener = UnixListener::bind(dir.join(api::SOCKET)).expect("bind");
        std::fs::write(dir.join("new.pid"), "1\n").expect("write");
        std::fs::rename(dir.join("new.pid"), dir.join(api::READY)).expect("rename");
        let (stream, _) = listener.accept().expect("a client");
        stream.set_read_timeout(Some(LIMIT)).expect("limit");
        Self {
            stream,
            bytes: Vec::new(),
        }
    }

    /// The next request: its stream and its method.
    fn next(&mut self) -> (u32, String) {
        use prost::Message;
        loop {
            if let Some((frame, used)) = api::next_frame(&self.bytes).expect("a frame") {
                self.bytes.drain(..used);
                let request = api::Request::decode(frame.payload.as_slice()).expect("a request");
                return (frame.stream, request.method);
            }
            let mut byte = [0];
            self.stream.read_exact(&mut byte).expect("read");
            self.bytes.extend(byte);
        }
    }

    fn answer(&mut self, stream: u32, code: Code, message: &str) {
        use prost::Message;
        let status = api::Status {
            code: code as i32,
            message: message.to_owned(),
        };
        let response = api::Response {
            status: Some(status),
            payload: Vec::new(),
        };
        let frame = api::Frame {
            stream,
            kind: api::Kind::Response,
            flags: api::REMOTE_CLOSED,
            payload: response.encode_to_vec(),
        };
        self.stream.write_all(&frame.encode()).expect("write");
    }
}

/// When the daemon is asked to poll, its predecessor has let go: no moment has two of them. (After a `kill -9` the other way round is shown
/// with real shims.)
#[test]
fn who_hands_over_has_let_go_before_the_other_is_asked() {
    let node = Node::new();
    let polled = polled(&node, "a", WorkerPolicy::Shared, &pool());
    let _traffic = node.traffic();
    node.wait_polled(100);
    let mut daemon = Reins::take(&node);
    let (stream, method) = daemon.next();
    assert_eq!(method, "Detach", "a question whether it answers at all");
    node.wait_polled(50);
    daemon.answer(stream, Code::Ok, "");
    let (stream, method) = daemon.next();
    assert_eq!(method, "Attach");
    let (polled_then, came) = (node.polled(), node.host_link("vhost0").rx_packets);
    wait_until("many more packets", || {
        (node.host_link("vhost0").rx_packets > came + 500).then_some(())
    });
    // The round that was under way when it let go: at most 8 packets.
    let more = node.polled() - polled_then;
    assert!(more <= 8, "{more} of 500 packets were still polled");
    daemon.answer(stream, Code::Internal, "not today");
    node.wait_polled(100);
    assert!(!polled.is_at_daemon());
    assert_eq!(owner(&node), Some(std::process::id()));
}

#[test]
fn there_are_bounds_on_how_many_pods_a_daemon_takes() {
    let node = Node::new();
    let named = Named::new(&node.pod);
    let daemon = Daemon::start(&node, "");
    let mut holder = daemon.client();
    attached(&mut holder, &request("first", &node.pod));
    // They wait for the first, and so cost nothing but their place.
    let waiting = |n: usize| AttachRequest {
        id: format!("waits-{n}"),
        netns: named.path.display().to_string(),
        bound: false,
        ..request("", &node.pod)
    };
    let mut client = daemon.client();
    for n in 1..1000 {
        client.renew(LIMIT);
        assert_eq!(
            client.attach(&waiting(n)).expect("a place"),
            Attached::Waiting
        );
    }
    let (code, reason) = refused(&mut client, &waiting(1000));
    assert_eq!(code, Code::ResourceExhausted, "{reason}");
    assert!(
        reason.contains("1000") && reason.contains("detach"),
        "{reason}"
    );
    assert!(client.detach("test", "waits-1", false).expect("detach"));
    client.attach(&waiting(1000)).expect("its place");
    assert_eq!(names(&mut client), ["first"]);
}

#[test]
fn one_daemon_at_a_time_and_only_where_nobody_else_can_interfere() {
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    let socket = std::fs::metadata(daemon.socket()).expect("socket");
    assert_eq!((socket.mode() & 0o777, socket.uid()), (0o600, 0));
    let said = complaint(&node, command(&node, ""));
    let pid = format!("process {}", daemon.pid());
    assert!(
        said.contains("another kbp-poller") && said.contains(&pid),
        "{said}"
    );

    let mut open = command(&node, "");
    open.args(["--metrics", "0.0.0.0:0"]);
    // The first one goes, in the orderly way, and takes its sockets along.
    daemon.signal(SIGTERM);
    let mut daemon = daemon;
    assert!(daemon.child.wait().expect("wait").success());
    assert!(!daemon.socket().exists() && !daemon.dir.join(api::READY).exists());
    let said = complaint(&node, open);
    assert!(said.contains("only loopback"), "{said}");

    // Something that is not ours is in the place of the socket.
    for make in [
        |path: &Path| std::fs::write(path, "mine").expect("write"),
        |path: &Path| {
            drop(UnixListener::bind(path).expect("bind"));
            std::os::unix::fs::chown(path, Some(65534), None).expect("chown");
        },
    ] {
        make(&daemon.socket());
        let said = complaint(&node, command(&node, ""));
        assert!(
            said.contains("cannot be trusted") && said.contains("poller.sock"),
            "{said}"
        );
        assert!(daemon.socket().exists(), "not ours to remove");
        std::fs::remove_file(daemon.socket()).expect("remove");
    }
    let dir = node.state_dir();
    let set = |mode| std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(mode));
    set(0o777).expect("chmod");
    let said = complaint(&node, command(&node, ""));
    assert!(
        said.contains("0777") && said.contains("chmod 0700"),
        "{said}"
    );
    set(0o700).expect("chmod");
    std::os::unix::fs::chown(&dir, Some(65534), None).expect("chown");
    let said = complaint(&node, command(&node, ""));
    assert!(said.contains("user 65534"), "{said}");
    std::os::unix::fs::chown(&dir, Some(0), None).expect("chown");
    // The socket of one that was killed is no hindrance.
    Daemon::start(&node, "").kill();
    assert!(dir.join(api::SOCKET).exists());
    Daemon::start(&node, "");
}

#[test]
fn only_root_is_served_and_only_root_serves() {
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    // As an init system with another SocketMode would have it.
    for (path, mode) in [(daemon.socket(), 0o666), (node.state_dir(), 0o755)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }
    let parent = node.state_dir().parent().expect("a parent").to_owned();
    std::fs::set_permissions(parent, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    // perl-base is on every Debian, and readable for everybody, as this test's own binary may not be.
    let talk = "socket(S, AF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ARGV[0])) or die $!; print <S>";
    let output = Command::new("perl")
        .args(["-MSocket", "-e", talk])
        .arg(daemon.socket())
        .uid(65534)
        .gid(65534)
        .output()
        .expect("perl");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("only root may ask") && said.contains("user 65534"),
        "{output:?}"
    );
    let copy = node.state_dir().join("kbp-poller");
    std::fs::copy(binary(), &copy).expect("copy");
    let output = Command::new(&copy)
        .args(["serve", "--config"])
        .arg(node.config_file(""))
        .uid(65534)
        .output()
        .expect("run kbp-poller");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("needs root"), "{said}");
    // Somebody else's socket is not asked.
    let other = node.state_dir().join("other.sock");
    let mode = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(node.state_dir(), mode).expect("chmod");
    let listen = "$| = 1; socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un($ARGV[0])) or die $!; \
                  listen(S, 1); print \"listening\\n\"; sleep 60";
    let mut child = Command::new("perl")
        .args(["-MSocket", "-e", listen])
        .arg(&other)
        .uid(65534)
        .stdout(Stdio::piped())
        .spawn()
        .expect("perl");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("stdout");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    let error = Client::connect(&other, LIMIT).expect_err("somebody else's");
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(matches!(error, ClientError::Untrusted { .. }), "{error}");
    assert!(error.to_string().contains("user 65534"), "{error}");
}

#[test]
fn refusals_name_what_is_wrong_and_what_to_do() {
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    let mut client = daemon.client();
    let good = request("a", &node.pod);
    type Change = fn(&mut AttachRequest);
    let wrong: [(Change, Code, &[&str]); 10] = [
        (
            |r| r.id = "../x".to_owned(),
            Code::InvalidArgument,
            &["id", "letters"],
        ),
        (|r| r.id = String::new(), Code::InvalidArgument, &["id"]),
        (
            |r| r.namespace = "a/b".to_owned(),
            Code::InvalidArgument,
            &["namespace"],
        ),
        (
            |r| r.netns = "/dev/null".to_owned(),
            Code::InvalidArgument,
            &["/dev/null", "/run/netns"],
        ),
        (
            |r| r.netns = "/nowhere".to_owned(),
            Code::InvalidArgument,
            &["/nowhere"],
        ),
        (
            |r| r.worker = "fast".to_owned(),
            Code::InvalidArgument,
            &["fast", "dedicated"],
        ),
        (
            |r| r.profile = "x".to_owned(),
            Code::InvalidArgument,
            &["latency"],
        ),
        (
            |r| r.cpuset = "9-1".to_owned(),
            Code::InvalidArgument,
            &["cpuset"],
        ),
        (
            |r| r.cpu_latency_us = Some(10_001),
            Code::InvalidArgument,
            &["10000"],
        ),
        // No pool on this node.
        (
            |r| r.required = true,
            Code::FailedPrecondition,
            &["no CPU pool", "cpus"],
        ),
    ];
    for (change, code, parts) in wrong {
        let mut request = good.clone();
        change(&mut request);
        let (got, reason) = refused(&mut client, &request);
        assert_eq!(got, code, "{reason}");
        assert!(parts.iter().all(|p| reason.contains(p)), "{reason}");
    }
    // Without `required` the same is attached, and told.
    let pod = attached(&mut client, &good);
    assert!(pod.worker.is_none() && pod.degraded[0].reason.contains("no CPU pool"));
    // The same connection may ask again: what it asks for replaces what it had.
    let again = AttachRequest {
        profile: "throughput".to_owned(),
        ..good.clone()
    };
    assert_eq!(attached(&mut client, &again).profile, "throughput");
    assert_eq!(names(&mut client), ["a"]);
    // Somebody else's.
    let mut other = daemon.client();
    let (code, reason) = refused(&mut other, &good);
    assert_eq!(code, Code::AlreadyExists);
    assert!(reason.contains("another connection"), "{reason}");
    let error = other.detach("test", "a", false).expect_err("not its own");
    assert!(error.to_string().contains("belongs to another"), "{error}");
    let update = api::UpdateRequest {
        id: "a".to_owned(),
        namespace: "test".to_owned(),
        ..api::UpdateRequest::default()
    };
    let error = other.update(&update).expect_err("not its own");
    assert!(error.to_string().contains("attach it first"), "{error}");
    client.update(&update).expect("its own");

    let empty = Node::empty();
    let request = request("b", &empty.pod);
    assert_eq!(client.attach(&request).expect("ask"), Attached::NoInterface);
    let own = AttachRequest {
        netns: path_of(&node.host),
        ..good
    };
    assert_eq!(other_id(&mut client, own), Attached::HostNetwork);
}

fn other_id(client: &mut Client, request: AttachRequest) -> Attached {
    let request = AttachRequest {
        id: "other".to_owned(),
        ..request
    };
    client.attach(&request).expect("ask")
}

#[test]
fn what_the_node_lacks_is_refused_by_name() {
    let node = Node::new();
    let kubelet = node.state_dir().with_extension("kubelet");
    let given = format!(
        "{{\"policyName\":\"static\",\"entries\":{{\"uid-1\":{{\"db\":\"{}\"}}}}}}",
        any_cpu()
    );
    std::fs::write(&kubelet, given).expect("write");
    for (config, parts) in [
        (
            format!("disable = [\"sqpoll\", \"socket\"]\n{}", pool()),
            vec!["switched off", "sqpoll"],
        ),
        (
            "disable = [\"napi\"]".to_owned(),
            vec!["switched off", "napi"],
        ),
        (
            format!("kubelet-state = {kubelet:?}\n{}", pool()),
            vec!["db", "uid-1", "kubelet", "reservedSystemCPUs"],
        ),
    ] {
        let daemon = Daemon::start(&node, &config);
        let mut request = request("a", &node.pod);
        request.required = true;
        let (code, reason) = refused(&mut daemon.client(), &request);
        assert_eq!(code, Code::FailedPrecondition, "{reason}");
        assert!(
            parts.iter().all(|p| reason.contains(p)),
            "{config}: {reason}"
        );
        assert_eq!(node.state_files(), Vec::<String>::new());
    }
}

/// Frames that no client sends: each is answered or closes its connection, and the daemon goes on.
#[test]
fn malformed_and_oversized_messages_are_refused() {
    use prost::Message;
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    let frame = |kind: u8, payload: &[u8]| {
        let mut bytes = u32::try_from(payload.len())
            .expect("u32")
            .to_be_bytes()
            .to_vec();
        bytes.extend([0, 0, 0, 1, kind, 1]);
        bytes.extend(payload);
        bytes
    };
    let call = |service: &str, method: &str, payload: &[u8]| {
        let request = api::Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: payload.to_vec(),
            timeout_nano: 0,
        };
        frame(1, &request.encode_to_vec())
    };
    let mut oversized = u32::try_from(api::MAX_REQUEST + 1)
        .expect("u32")
        .to_be_bytes()
        .to_vec();
    oversized.extend([0, 0, 0, 1, 1, 0]);
    for (bytes, named) in [
        (oversized, "at most 65536"),
        (frame(9, b""), "unknown kind 9"),
        (frame(1, &[0xff; 20]), "not a ttrpc request"),
        (call("other.Service", "List", b""), "no service"),
        (call(api::SERVICE, "Destroy", b""), "no method"),
        (call(api::SERVICE, "Attach", &[0xff; 20]), "not the request"),
    ] {
        let mut stream = UnixStream::connect(daemon.socket()).expect("connect");
        stream.set_read_timeout(Some(LIMIT)).expect("limit");
        stream.write_all(&bytes).expect("write");
        let answer = read_answer(&mut stream);
        let status = answer.status.expect("a status");
        assert!(status.message.contains(named), "{status:?}");
    }
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
}

fn read_answer(stream: &mut UnixStream) -> api::Response {
    use prost::Message;
    let mut bytes = Vec::new();
    loop {
        if let Some((frame, _)) = api::next_frame(&bytes).expect("a frame") {
            return api::Response::decode(frame.payload.as_slice()).expect("a response");
        }
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("read");
        bytes.extend(byte);
    }
}

/// Random and randomly damaged messages, with a seed that is printed; the number is fixed.
#[test]
fn random_messages_do_not_end_the_daemon_nor_attach_anything() {
    use prost::Message;
    let node = Node::new();
    let mut daemon = Daemon::start(&node, "");
    let mut seed = u64::from(std::process::id()) ^ 0x9e37_79b9_7f4a_7c15;
    println!("seed {seed}");
    let mut random = move || {
        // xorshift64
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let attach = api::Request {
        service: api::SERVICE.to_owned(),
        method: "Attach".to_owned(),
        // A namespace that is never attached, so that whatever remains valid changes nothing.
        payload: request("fuzz", &node.host).encode_to_vec(),
        timeout_nano: 0,
    };
    let valid = api::Frame {
        stream: 1,
        kind: api::Kind::Request,
        flags: 1,
        payload: attach.encode_to_vec(),
    }
    .encode();
    for _ in 0..500 {
        let mut bytes = valid.clone();
        match random() % 3 {
            0 => {
                bytes = (0..random() % 200)
                    .map(|_| random().to_le_bytes()[0])
                    .collect()
            }
            1 => bytes.truncate(usize::try_from(random()).unwrap_or(0) % bytes.len()),
            _ => {
                for _ in 0..=random() % 4 {
                    let at = usize::try_from(random()).unwrap_or(0) % bytes.len();
                    bytes[at] = random().to_le_bytes()[0];
                }
            }
        }
        let mut stream = UnixStream::connect(daemon.socket()).expect("connect");
        stream.write_all(&bytes).expect("write");
        drop(stream);
    }
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
    assert!(daemon.child.try_wait().expect("wait").is_none());
}

#[test]
fn metrics_are_scraped() {
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    attached(&mut client, &request("a", &node.pod));
    let traffic = node.traffic();
    node.wait_polled(200);
    drop(traffic);
    let text = daemon.metrics();
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find(|l| {
                l.starts_with(name)
                    && l.as_bytes()
                        .get(name.len())
                        .is_some_and(|b| b" {".contains(b))
            })
            .unwrap_or_else(|| panic!("no {name} in\n{text}"));
        let value = line.rsplit(' ').next().expect("a value");
        value.parse().expect("a number")
    };
    assert!(value("kbp_pod_packets_total") > 200.0);
    assert!(value("kbp_node_polled_packets_total") >= 200.0);
    // Its sockets do not poll.
    assert!(value("kbp_pod_socket_polled_packets_total") == 0.0);
    assert!(value("kbp_worker_uplinks") == 0.0);
    assert!(value("kbp_worker_lease_renewals_total") >= 1.0);
    assert!(value("kbp_worker_busy_seconds_total") > 0.0);
    assert!(value("kbp_worker_idle_seconds_total") >= 0.0);
    assert!(value("kbp_worker_pods") == 1.0);
    assert!(value("kbp_poller_attachments") == 1.0);
    assert!(value("kbp_poller_attaches_total") == 1.0);
    // What a shim tells of its pod's sockets, each by its own name.
    let sockets = api::Sockets {
        calls_handled: 11,
        errors: 12,
        sockets_set: 13,
        epolls_given: 14,
        epolls_crowded: 15,
        ..api::Sockets::default()
    };
    let update = api::UpdateRequest {
        id: "a".to_owned(),
        namespace: "test".to_owned(),
        sockets: Some(sockets),
        ..api::UpdateRequest::default()
    };
    client.update(&update).expect("update");
    let counted = daemon.metrics();
    for line in [
        "kbp_pod_trapped_calls_total{namespace=\"test\",pod=\"a\"} 11",
        "kbp_pod_trapped_call_errors_total{namespace=\"test\",pod=\"a\"} 12",
        "kbp_pod_sockets_set_total{namespace=\"test\",pod=\"a\"} 13",
        "kbp_pod_epolls_given_total{namespace=\"test\",pod=\"a\"} 14",
        "kbp_pod_epolls_crowded_total{namespace=\"test\",pod=\"a\"} 15",
    ] {
        assert!(counted.contains(line), "no {line} in\n{counted}");
    }
    assert!(text.contains("kbp_pod_worker{namespace=\"test\",pod=\"a\",policy=\"shared\""));
    assert!(text.ends_with("# EOF\n"));
    ip(&node.host, "link set vhost0 down");
    wait_until("the missing part to be counted", || {
        daemon
            .metrics()
            .contains("part=\"pollable-veth\"} 1")
            .then_some(())
    });
    // What the dashboard draws is what there is.
    let dashboard = include_str!("../../../config/grafana/kbp.json");
    let dashboard: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
    let mut drawn = 0;
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().expect("targets") {
            let expr = target["expr"].as_str().expect("an expression");
            for name in expr
                .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                .filter(|word| word.starts_with("kbp_"))
            {
                assert!(
                    text.contains(name) || CONDITIONAL.contains(&name),
                    "{name} of the dashboard is not in\n{text}"
                );
                drawn += 1;
            }
        }
    }
    assert!(drawn > 5, "the dashboard draws {drawn} metrics");
}

#[test]
fn rounds_are_counted_where_they_are_the_daemons_own() {
    for (kind, disabled, counted) in [
        ("socket", "disable = [\"kthread\", \"sqpoll\"]\n", true),
        ("sqpoll", "", false),
    ] {
        let node = Node::new();
        let daemon = Daemon::start(&node, &format!("{}\n{disabled}", pool()));
        let mut client = daemon.client();
        attached(&mut client, &request("a", &node.pod));
        let traffic = node.traffic();
        node.wait_polled(50);
        drop(traffic);
        let text = daemon.metrics();
        let line = format!("kbp_worker_rounds_total{{kind=\"{kind}\"");
        let rounds = text.lines().find(|l| l.starts_with(&line));
        let rounds = rounds.and_then(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        assert_eq!(rounds.is_some_and(|n| n > 50), counted, "{kind}: {text}");
    }
}

#[test]
fn metrics_are_served_on_a_loopback_port_to_those_who_ask_properly() {
    let node = Node::new();
    ip(&node.host, "link set lo up");
    let mut command = command(&node, "");
    command.args(["--metrics", "127.0.0.1:0"]);
    let mut daemon = spawn(&node, &mut command);
    let mut line = String::new();
    let stderr = daemon.child.stderr.take().expect("stderr");
    let mut stderr = BufReader::new(stderr);
    stderr.read_line(&mut line).expect("a line");
    let (_, address) = line.trim().split_once("http://").expect("an address");
    let address = address.strip_suffix("/metrics").expect("a path").to_owned();
    daemon.wait_ready();
    let ask = |request: &[u8]| {
        let stream = node.host.run(|| std::net::TcpStream::connect(&address));
        let mut stream = stream.expect("enter").expect("connect");
        stream.set_read_timeout(Some(LIMIT)).expect("limit");
        stream.write_all(request).expect("write");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read");
        text
    };
    let text = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(text.contains("kbp_poller_attachments 0"), "{text}");
    let text = ask(b"GET /secrets HTTP/1.1\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 404"), "{text}");
    let text = ask(b"nonsense\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 400"), "{text}");
    // Who says nothing is let go in the end, and hinders nobody until then.
    let silent = node.host.run(|| std::net::TcpStream::connect(&address));
    let mut silent = silent.expect("enter").expect("connect");
    silent.set_read_timeout(Some(LIMIT)).expect("limit");
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
    let mut nothing = [0];
    assert_eq!(silent.read(&mut nothing).expect("the end"), 0);
}

/// Metrics that are there only while there is something to tell.
const CONDITIONAL: [&str; 2] = ["kbp_pod_degraded_parts", "kbp_poller_cpu_latency_seconds"];

#[test]
fn an_init_system_is_told_and_may_pass_the_socket() {
    let node = Node::new();
    let dir = tempfile::tempdir().expect("directory");
    let notify = dir.path().join("notify");
    let told = UnixDatagram::bind(&notify).expect("bind");
    told.set_read_timeout(Some(LIMIT)).expect("limit");
    std::fs::create_dir_all(node.state_dir()).expect("mkdir");
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(node.state_dir(), mode).expect("chmod");
    let listener = UnixListener::bind(node.state_dir().join(api::SOCKET)).expect("bind");
    let mut command = command(&node, "");
    command
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "200000");
    // LISTEN_PID is not known before the process is there: a shell says it and becomes the daemon.
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\""])
        .arg(command.get_program())
        .args(command.get_args())
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "200000")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    kbp_kernel::fd::pass(&mut shell, vec![listener.into()]);
    let mut daemon = spawn(&node, &mut shell);
    let next = || {
        let mut text = [0; 64];
        let length = told.recv(&mut text).expect("to be told");
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    assert_eq!(next(), "READY=1\n");
    daemon.wait_ready();
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
    assert_eq!([next(), next()], ["WATCHDOG=1\n", "WATCHDOG=1\n"]);
    daemon.signal(SIGTERM);
    let stopping = std::iter::repeat_with(next).find(|text| text != "WATCHDOG=1\n");
    assert_eq!(stopping.as_deref(), Some("STOPPING=1\n"));
    assert!(daemon.child.wait().expect("wait").success());
    assert!(daemon.socket().exists(), "the init system's own");
}

#[test]
fn only_the_listed_capabilities_are_left_and_the_unit_lists_them() {
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("status");
    let mask = |name: &str| {
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .expect("a line");
        u64::from_str_radix(line.trim(), 16).expect("a mask")
    };
    // NET_ADMIN 12, SYS_PTRACE 19, SYS_ADMIN 21, SYS_NICE 23 (linux/capability.h).
    let expected = 1 << 12 | 1 << 19 | 1 << 21 | 1 << 23;
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(mask(set), expected, "{set} {status}");
    }
    assert_eq!(mask("CapInh:"), 0);
    let unit = include_str!("../../../config/systemd/kbp-poller.service");
    let line = unit
        .lines()
        .find_map(|l| l.strip_prefix("CapabilityBoundingSet="))
        .expect("a bounding set");
    let mut listed: Vec<&str> = line.split(' ').collect();
    listed.sort_unstable();
    let mut needed = kbp_poller::daemon::NEEDED.to_vec();
    needed.sort_unstable();
    assert_eq!(listed, needed);
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let number = line.and_then(|l| l.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn a_hundred_pods_share_one_worker_and_little_memory() {
    const PODS: usize = 100;
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    // What is allocated once is not a pod's.
    let first = attached(&mut client, &request("first", &node.pod));
    let before = resident(daemon.pid());
    let mut pods = Vec::new();
    for n in 0..PODS {
        let pod = Netns::create().expect("namespace");
        let name = format!("v{n}");
        let path = path_of(&pod);
        // The kernel takes any process' namespace by number only; by path it takes /run/netns. So it is made in the pod
        // and one end sent out by the node's own descriptor.
        add_veth(&node.host, &pod, &name);
        pods.push((request(&format!("p{n}"), &pod), pod, path));
    }
    let began = Instant::now();
    let mut tids: Vec<u32> = pods
        .iter()
        .map(|(request, _, _)| {
            let pod = attached(&mut client, request);
            assert_eq!(pod.degraded, []);
            pod.worker.expect("a worker").tid
        })
        .collect();
    println!("{PODS} attaches took {:?}", began.elapsed());
    tids.dedup();
    assert_eq!(tids, [first.worker.expect("a worker").tid]);
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("tasks");
    assert_eq!(threads.count(), 3, "main, keeper and the one worker");
    let each = (resident(daemon.pid()) - before) / PODS as u64;
    println!("{each} KiB a pod");
    let threads = || -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("tasks");
        tasks
            .flatten()
            .filter_map(|t| t.file_name().to_str()?.parse().ok())
            .filter_map(|tid| process::cpu_time(daemon.pid(), tid).ok())
            .sum()
    };
    // Nobody talks but the kernel, about the new links' IPv6: the worker parks.
    wait_until("the worker to park", || {
        let metrics = daemon.metrics();
        let parked = |l: &str| l.starts_with("kbp_worker_parked{") && l.ends_with(" 1");
        metrics.lines().any(parked).then_some(())
    });
    let (used, since) = (threads(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let share = (threads() - used).as_secs_f64() / since.elapsed().as_secs_f64();
    // `kbp-bench-poller` holds it to its limit, with the binary that is installed and nothing beside it.
    println!("{:.2} % of a core for {PODS} silent pods", share * 100.0);
    assert!(each <= 64, "{each} KiB a pod");
    assert!(daemon.metrics().contains("kbp_worker_pods{kind=\"sqpoll\""));

    let began = Instant::now();
    for (request, _, _) in &pods {
        assert!(client.detach("test", &request.id, false).expect("detach"));
    }
    println!("{PODS} detaches took {:?}", began.elapsed());
    assert_eq!(names(&mut client), ["first"]);
}

fn add_veth(host: &Netns, pod: &Netns, name: &str) {
    use kbp_kernel::link::{Batch, VethPair};
    use kbp_kernel::{MacAddr, Mtu};
    let number: u8 = name[1..].parse().expect("a number");
    let mut batch = Batch::new();
    batch.create_veth(&VethPair {
        host_name: name,
        host_mac: MacAddr([2, 0, 0, 1, number, 1]),
        pod_name: "eth0",
        pod_mac: MacAddr([2, 0, 0, 1, number, 2]),
        pod_netns: pod,
        mtu: Mtu(1500),
        tx_queue_len: 0,
    });
    crate::node::execute(host, &batch);
    let mut batch = Batch::new();
    batch.set_up(link(pod, "eth0").expect("pod end").index);
    crate::node::execute(pod, &batch);
}

#[test]
fn cpus_are_kept_awake_while_a_pod_asks_for_it() {
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    let holds = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("fds");
        let device = Path::new("/dev/cpu_dma_latency");
        fds.flatten()
            .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == device))
            .count()
    };
    assert_eq!(holds(), 0);
    let mut client = daemon.client();
    let asking = AttachRequest {
        cpu_latency_us: Some(50),
        worker: "none".to_owned(),
        ..request("a", &node.pod)
    };
    let pod = attached(&mut client, &asking);
    assert_eq!(pod.degraded, []);
    assert_eq!(holds(), 1);
    let text = daemon.metrics();
    assert!(
        text.contains("kbp_poller_cpu_latency_seconds 0.00005") || text.contains("5e-5"),
        "{text}"
    );
    // What the kernel makes of all requests together is at most that.
    let mut value = [0; 4];
    let mut device = std::fs::File::open("/dev/cpu_dma_latency").expect("open");
    device.read_exact(&mut value).expect("read");
    assert!(i32::from_ne_bytes(value) <= 50, "{value:?}");
    drop(device);
    assert!(client.detach("test", "a", false).expect("detach"));
    assert_eq!(holds(), 0);
}

/// A log line is worth nothing if it stops the daemon: its output may be gone.
#[test]
fn a_daemon_whose_log_is_closed_goes_on() {
    let node = Node::new();
    let mut daemon = spawn(&node, &mut command(&node, ""));
    let mut stderr = BufReader::new(daemon.child.stderr.take().expect("stderr"));
    let mut line = String::new();
    stderr.read_line(&mut line).expect("a line");
    drop(stderr);
    daemon.wait_ready();
    let mut client = daemon.client();
    refused(&mut client, &AttachRequest::default());
    assert_eq!(names(&mut client), Vec::<String>::new());
}

/// Three pods on two cores: the two that share a hot one are parted, and all are polled on.
#[test]
fn a_pod_is_moved_whole_from_a_hot_core() {
    let cpus = kbp_kernel::cpu::usable().expect("cpus");
    assert!(cpus.len() > 1, "this test takes two CPUs");
    let (first, second) = (cpus.iter().next().expect("one"), any_cpu());
    let node = Node::new();
    // Whatever has traffic is hot.
    let config = format!("cpus = \"{first},{second}\"\nhot = 1");
    let daemon = Daemon::start(&node, &config);
    let mut client = daemon.client();
    let extra: Vec<Netns> = (0..2)
        .map(|_| Netns::create().expect("namespace"))
        .collect();
    for (n, pod) in extra.iter().enumerate() {
        add_veth(&node.host, pod, &format!("v{n}"));
    }
    attached(&mut client, &request("loud", &node.pod));
    attached(&mut client, &request("b", &extra[0]));
    attached(&mut client, &request("c", &extra[1]));
    let cpu_of = |client: &mut Client, id: &str| {
        let pods = client.list().expect("list");
        let pod = pods.into_iter().find(|p| p.id == id).expect("the pod");
        pod.worker.expect("a worker").cpu
    };
    let loud = cpu_of(&mut client, "loud");
    let neighbour = ["b", "c"]
        .into_iter()
        .find(|id| cpu_of(&mut client, id) == loud);
    let neighbour = neighbour.expect("three pods on two cores");
    let n = if neighbour == "b" { 0 } else { 1 };
    ip(&node.host, &format!("address add 10.201.0.1/30 dev v{n}"));
    ip(&node.host, &format!("link set v{n} up"));
    ip(&extra[n], "address add 10.201.0.2/30 dev eth0");
    let _traffic = node.traffic();
    let socket = extra[n].run(|| std::net::UdpSocket::bind("0.0.0.0:0"));
    let socket = socket.expect("enter").expect("bind");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // As the other sender: then the one of the two pods that is polled on the other CPU is seen to be.
            process::set_affinity(0, &[first].into_iter().collect()).expect("pin the sender");
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Nobody listens: some sends tell that of an earlier one.
                let _ = socket.send_to(&[0; 64], "10.201.0.1:9");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until("one of the two to be moved", || {
                client.renew(LIMIT);
                (cpu_of(&mut client, "loud") != cpu_of(&mut client, neighbour)).then_some(())
            });
            node.wait_polled(100);
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        moved.expect("moved");
    });
    client.renew(LIMIT);
    let moved = client.list().expect("list");
    let moved: Vec<&Pod> = moved
        .iter()
        .filter(|p| p.worker_reason.contains("moved to CPU"))
        .collect();
    assert!(!moved.is_empty(), "{moved:?}");
    assert!(moved.iter().all(|p| p.degraded.is_empty()), "{moved:?}");
}

/// The daemon speaks ttrpc, and not only what its own client takes for it.
#[tokio::test]
async fn another_ttrpc_client_is_understood() {
    use containerd_shim_protos::ttrpc;
    use prost::Message;
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let address = format!("unix://{}", daemon.socket().display());
    let client = ttrpc::r#async::Client::connect(&address)
        .await
        .expect("connect");
    let call = |method: &str, payload: Vec<u8>| ttrpc::Request {
        service: api::SERVICE.to_owned(),
        method: method.to_owned(),
        payload,
        ..ttrpc::Request::default()
    };
    let payload = request("a", &node.pod).encode_to_vec();
    let answer = client
        .request(call("Attach", payload))
        .await
        .expect("attach");
    let answer = api::AttachResponse::decode(answer.payload.as_slice()).expect("decode");
    assert_eq!(answer.outcome(), api::Outcome::Attached);

    let error = client.request(call("Fly", Vec::new())).await;
    match error.expect_err("no such method") {
        ttrpc::Error::RpcStatus(status) => {
            assert_eq!(status.code(), ttrpc::Code::UNIMPLEMENTED);
            assert!(status.message.contains("Attach, Detach"), "{status:?}");
        }
        other => panic!("{other}"),
    }
    let mut events = client
        .new_stream(call("Watch", Vec::new()), false, true)
        .await
        .expect("watch");

    let event = events.recv().await.expect("an event");
    let event = api::WatchEvent::decode(event.as_slice()).expect("decode");
    assert_eq!(event.kind(), EventKind::Attached);
    ip(&node.host, "link set vhost0 down");
    let event = events.recv().await.expect("an event");
    let event = api::WatchEvent::decode(event.as_slice()).expect("decode");
    assert_eq!(event.kind(), EventKind::Changed);
}
