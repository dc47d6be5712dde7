//! The binary `kbp-poller`, as a person runs it.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, ExitStatus, Stdio};

use kbp_kernel::ethtool;
use kbp_kernel::netns::Netns;
use kbp_kernel::process;
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::state;

use crate::node::{Node, any_cpu, wait_until};

const SIGTERM: i32 = 15;

/// A running tool; killed when it is dropped.
struct Tool {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

/// The path by which another process reaches a namespace of this one.
fn path_of(netns: &Netns) -> String {
    let fd = netns.as_fd().as_raw_fd();
    format!("/proc/{}/fd/{fd}", std::process::id())
}

fn command(node: &Node, netns: &Netns, config: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kbp-poller"));
    command
        .args(["attach", "--netns", &path_of(netns), "--config"])
        .arg(node.config_file(config))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

impl Tool {
    /// Starts the tool on the node's host and reads what it says of the attachment.
    fn start(node: &Node, config: &str, args: &[&str]) -> (Self, String) {
        let mut command = command(node, &node.pod, config, args);
        process::end_with_parent(&mut command);
        let child = node.host.run(|| command.spawn()).expect("enter");
        let mut child = child.expect("start kbp-poller");
        let mut output = BufReader::new(child.stdout.take().expect("stdout"));
        let mut text = String::new();
        while !text.contains("running until") {
            let read = output.read_line(&mut text).expect("read");
            assert_ne!(read, 0, "kbp-poller ended: {text}");
        }
        (Self { child, output }, text)
    }

    fn signal(&self, signal: i32) {
        assert!(process::kill(self.child.id(), signal).expect("signal"));
    }

    /// The rest of what it says, and how it ended.
    fn end(mut self) -> (String, ExitStatus) {
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("read");
        (text, self.child.wait().expect("wait"))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the tool to its end and returns what it complains about.
fn complaint(node: &Node, netns: &Netns, config: &str, args: &[&str]) -> String {
    let mut command = command(node, netns, config, args);
    let output = node.host.run(|| command.output()).expect("enter");
    let output = output.expect("run kbp-poller");
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn it_attaches_says_what_it_did_and_puts_everything_back() {
    let node = Node::new();
    let before = ethtool::features(&node.pod, "eth0").expect("features");
    let (tool, said) = Tool::start(&node, "", &["--worker", "idle", "--id", "by-hand"]);
    for part in [
        "attached by-hand",
        "vhost0 (NAPI",
        "eth0 in the pod (NAPI",
        "sqpoll thread",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let pods = state::read_all(&node.state_dir()).expect("read");
    assert_eq!(pods[0].id, "by-hand");
    assert_eq!(pods[0].owner_pid, tool.child.id());

    let text = complaint(&node, &node.pod, "", &["--id", "by-hand"]);
    let owner = format!("attached already, by process {}", tool.child.id());
    assert!(text.contains(&owner), "{text}");

    tool.signal(SIGTERM);
    let (said, status) = tool.end();
    assert!(status.success(), "{status}");
    assert_eq!(said, "SIGTERM: detached by-hand\n");
    let after = ethtool::features(&node.pod, "eth0").expect("features");
    assert_eq!(after, before);
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
fn a_killed_owner_leaves_no_claim_and_the_next_attach_clears_its_files() {
    let node = Node::new();
    let cpu = any_cpu();
    let pool = format!("cpus = \"{cpu}\"");
    let args = ["--worker", "dedicated", "--id", "doomed"];
    let (mut tool, _) = Tool::start(&node, &pool, &args);

    let other = Node::new();
    let request = || {
        let mut request = other.request("next", WorkerPolicy::Dedicated, &pool);
        request.config.state_dir = node.state_dir();
        request
    };
    let degraded = other.attached(request()).state().degraded;
    assert!(
        degraded[0].reason.contains("held by -/doomed"),
        "{degraded:?}"
    );

    tool.child.kill().expect("kill -9");
    tool.child.wait().expect("wait");
    let stale = state::stale(&node.state_dir()).expect("read");
    assert_eq!(stale.len(), 1, "{stale:?}");
    // The kernel drops the lock when the last of the process is gone, which is a moment after its exit status.
    let attachment = wait_until("the claim", || {
        let attachment = other.attached(request());
        attachment.state().degraded.is_empty().then_some(attachment)
    });
    assert_eq!(attachment.state().worker.expect("a worker").cpu, cpu.0);
    assert_eq!(
        node.state_files(),
        ["pods/next@test.json", &format!("cpu/{cpu}")]
    );
}

#[test]
fn what_a_killed_one_changed_is_put_back_by_the_next() {
    let node = Node::new();
    let ends = [(&node.host, "vhost0"), (&node.pod, "eth0")];
    let features = || ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    let before = features();
    let (mut tool, _) = Tool::start(&node, "", &["--id", "first"]);
    let changed = features();
    assert_ne!(before, changed);
    tool.child.kill().expect("kill -9");
    tool.child.wait().expect("wait");
    let (tool, _) = Tool::start(&node, "", &["--id", "second"]);
    tool.signal(SIGTERM);
    let (_, status) = tool.end();
    assert!(status.success(), "{status}");
    assert_eq!(features(), before);
    let records = || {
        let dir = std::fs::read_dir(node.state_dir().join("offloads")).expect("records");
        dir.count()
    };
    assert_eq!(records(), 0);

    // A record of a veth that is gone goes with the next attach, and is not taken for that of another.
    let (mut tool, _) = Tool::start(&node, "", &["--id", "third"]);
    tool.child.kill().expect("kill -9");
    tool.child.wait().expect("wait");
    assert_eq!(records(), 1);
    crate::node::ip(&node.host, "link del vhost0");
    node.add_veth("vhost0", "eth0", 7);
    let (tool, _) = Tool::start(&node, "", &["--id", "fourth"]);
    assert_eq!(records(), 1);
    tool.signal(SIGTERM);
    assert!(tool.end().1.success());
    assert_eq!((features(), records()), (before, 0));
}

#[test]
fn it_ends_when_the_pod_does() {
    let node = Node::new();
    let (tool, _) = Tool::start(&node, "", &["--id", "gone"]);
    crate::node::ip(&node.host, "link del vhost0");
    let (said, status) = tool.end();
    assert!(status.success(), "{status}");
    assert_eq!(said, "the pod's interfaces are gone: detached gone\n");
}

#[test]
fn it_says_why_it_cannot() {
    let node = Node::new();
    let text = complaint(&node, &node.host, "", &[]);
    assert!(text.contains("the host's own network namespace"), "{text}");
    let empty = Node::empty();
    let text = complaint(&empty, &empty.pod, "", &[]);
    assert!(text.contains("no interface but its loopback"), "{text}");
    let text = complaint(&node, &node.pod, "disable = [\"sqpoll\", \"socket\"]", &[]);
    assert!(
        text.contains("no worker") && text.contains("switched off by"),
        "{text}"
    );
    let text = complaint(&node, &node.pod, "worker = \"none\"", &[]);
    assert!(text.contains("name another with --worker"), "{text}");
    let text = complaint(&node, &node.pod, "worker = \"fast\"", &[]);
    assert!(text.contains("auto, dedicated, shared"), "{text}");
    let bridge = Node::empty();
    crate::node::ip(&bridge.pod, "link add br0 type bridge");
    crate::node::ip(&bridge.pod, "link set br0 up");
    let text = complaint(&bridge, &bridge.pod, "", &[]);
    assert!(text.contains("br0 is a bridge"), "{text}");
    // Nothing is said twice.
    assert_eq!(text.matches("br0 is a bridge").count(), 1, "{text}");
}
