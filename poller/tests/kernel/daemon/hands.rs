//! Pods that go to the daemon and back.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use kbp_poller::api::{self, Code};
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::polled::{self, Polled, PolledOutcome};
use kbp_poller::state;

use super::{Daemon, LIMIT, SIGTERM, names, pool};
use crate::node::{Node, wait_until};

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
    let polled = self::polled(&node, "b", WorkerPolicy::Shared, &pool());
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
