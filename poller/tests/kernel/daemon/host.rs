//! The daemon and its machine: the init system, capabilities, the CPUs' sleep, a log that is gone.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};

use kbp_poller::api::{self, AttachRequest};

use super::{Daemon, LIMIT, SIGTERM, attached, command, names, refused, request, spawn};
use crate::node::Node;

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
    let unit = include_str!("../../../../config/systemd/kbp-poller.service");
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
