//! One daemon a node, and whom it trusts.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kbp_poller::api;
use kbp_poller::client::{Client, ClientError};

use super::{Daemon, LIMIT, SIGTERM, binary, command, complaint};
use crate::node::Node;

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

/// What would fail at each attach is told at the start.
#[test]
fn a_state_directory_that_cannot_be_used_is_refused_at_once() {
    let node = Node::new();
    let dir = node.state_dir();
    std::fs::create_dir_all(&dir).expect("mkdir");
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(&dir, mode).expect("chmod");
    std::fs::write(dir.join("pods"), "mine").expect("write");
    let said = complaint(&node, command(&node, ""));
    assert!(said.contains("run/pods: File exists"), "{said}");
    std::fs::remove_file(dir.join("pods")).expect("remove");

    let long = dir.join("x".repeat(100));
    let config = node.config_file("");
    std::fs::write(&config, format!("state-dir = {long:?}\n")).expect("write");
    let mut serve = Command::new(binary());
    serve.args(["serve", "--config"]).arg(&config);
    let said = complaint(&node, serve);
    assert!(
        said.contains("107 bytes") && said.contains("shorter state-dir"),
        "{said}"
    );
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
                  listen(S, 1); print \"listening\\n\"; sleep 600";
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
