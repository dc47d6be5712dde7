//! The API's messages against `proto/poller.proto`, read by the reference compiler, and the client against daemons that misbehave.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kbp_poller::api::{
    self, AttachRequest, AttachResponse, Degraded, DetachRequest, EventKind, Frame, Interface,
    Kind, Outcome, Pod, Response, Sockets, Status, UpdateRequest, WatchEvent, Worker,
};
use kbp_poller::client::{Attached, Client, ClientError};
use prost::Message;

const LIMIT: Duration = Duration::from_secs(60);

/// What protoc reads in a message, on one line.
fn read_by_protoc(kind: &str, message: &impl Message) -> String {
    let mut protoc = Command::new("protoc")
        .arg(format!("--decode=kbp.poller.v1.{kind}"))
        .arg("poller.proto")
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/proto"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("protoc (package protobuf-compiler)");
    let mut input = protoc.stdin.take().expect("piped");
    input.write_all(&message.encode_to_vec()).expect("write");
    drop(input);
    let output = protoc.wait_with_output().expect("protoc");
    assert!(output.status.success(), "{kind}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sockets() -> Sockets {
    Sockets {
        busy_poll_us: Some(1),
        busy_poll_reason: "b".to_owned(),
        calls_handled: 2,
        sockets_set: 3,
        epolls_given: 4,
        errors: 5,
        epolls_crowded: 6,
        short_way: "y".to_owned(),
    }
}

const SOCKETS: &str = "busy_poll_us: 1 busy_poll_reason: \"b\" calls_handled: 2 sockets_set: 3 epolls_given: 4 errors: 5 epolls_crowded: 6 short_way: \"y\"";

fn degraded() -> Vec<Degraded> {
    vec![Degraded {
        part: "p".to_owned(),
        reason: "r".to_owned(),
    }]
}

const DEGRADED: &str = "degraded { part: \"p\" reason: \"r\" }";

fn worker() -> Worker {
    Worker {
        kind: "sqpoll".to_owned(),
        policy: "shared".to_owned(),
        tid: 4,
        cpu: 5,
        idle_class: true,
        lease_ms: 6,
    }
}

const WORKER: &str =
    "kind: \"sqpoll\" policy: \"shared\" tid: 4 cpu: 5 idle_class: true lease_ms: 6";

fn pod() -> Pod {
    Pod {
        id: "i".to_owned(),
        namespace: "n".to_owned(),
        worker_policy: "shared".to_owned(),
        profile: "latency".to_owned(),
        interfaces: vec![Interface {
            pod_interface: "eth0".to_owned(),
            host_interface: "veth0".to_owned(),
            host_ifindex: 1,
            host_napi: Some(2),
            pod_napi: Some(3),
        }],
        worker: Some(worker()),
        worker_reason: "w".to_owned(),
        degraded: degraded(),
        bound: true,
        packets: 7,
        owner_pid: 8,
        rests: true,
    }
}

const POD: &str = "id: \"i\" namespace: \"n\" worker_policy: \"shared\" profile: \"latency\" \
    interfaces { pod_interface: \"eth0\" host_interface: \"veth0\" host_ifindex: 1 host_napi: 2 pod_napi: 3 } \
    worker { kind: \"sqpoll\" policy: \"shared\" tid: 4 cpu: 5 idle_class: true lease_ms: 6 } \
    worker_reason: \"w\" degraded { part: \"p\" reason: \"r\" } bound: true packets: 7 owner_pid: 8 rests: true";

/// Every field of every message set: a wrong tag or type would show as a number, or not at all.
#[test]
fn the_messages_are_those_of_the_proto_file() {
    let attach = AttachRequest {
        id: "i".to_owned(),
        namespace: "n".to_owned(),
        netns: "/run/netns/x".to_owned(),
        worker: "shared".to_owned(),
        profile: "latency".to_owned(),
        required: true,
        cpuset: "0-1".to_owned(),
        sockets: Some(sockets()),
        degraded: degraded(),
        bound: true,
        cpu_latency_us: Some(9),
        prefer_busy_poll: true,
        busy_poll_mode: "suspend".to_owned(),
    };
    assert_eq!(
        read_by_protoc("AttachRequest", &attach),
        format!(
            "id: \"i\" namespace: \"n\" netns: \"/run/netns/x\" worker: \"shared\" profile: \"latency\" required: true \
             cpuset: \"0-1\" sockets {{ {SOCKETS} }} {DEGRADED} bound: true cpu_latency_us: 9 \
             prefer_busy_poll: true busy_poll_mode: \"suspend\""
        )
    );
    let attached = AttachResponse {
        outcome: Outcome::HostNetwork.into(),
        pod: Some(pod()),
    };
    assert_eq!(
        read_by_protoc("AttachResponse", &attached),
        format!("outcome: HOST_NETWORK pod {{ {POD} }}")
    );
    let detach = DetachRequest {
        id: "i".to_owned(),
        namespace: "n".to_owned(),
        restore: true,
    };
    assert_eq!(
        read_by_protoc("DetachRequest", &detach),
        "id: \"i\" namespace: \"n\" restore: true"
    );
    assert_eq!(
        read_by_protoc(
            "DetachResponse",
            &api::DetachResponse { was_attached: true }
        ),
        "was_attached: true"
    );
    let update = UpdateRequest {
        id: "i".to_owned(),
        namespace: "n".to_owned(),
        sockets: Some(sockets()),
        cpuset: "2".to_owned(),
        degraded: degraded(),
    };
    assert_eq!(
        read_by_protoc("UpdateRequest", &update),
        format!("id: \"i\" namespace: \"n\" sockets {{ {SOCKETS} }} cpuset: \"2\" {DEGRADED}")
    );
    let uplink = api::Uplink {
        interface: "eth0".to_owned(),
        napis: vec![9, 10],
        worker: Some(worker()),
        degraded: "d".to_owned(),
        packets: 11,
    };
    let list = api::ListResponse {
        pods: vec![pod()],
        uplinks: vec![uplink],
    };
    assert_eq!(
        read_by_protoc("ListResponse", &list),
        format!(
            "pods {{ {POD} }} uplinks {{ interface: \"eth0\" napis: 9 napis: 10 worker {{ {WORKER} }} degraded: \"d\" packets: 11 }}"
        )
    );
    let event = WatchEvent {
        kind: EventKind::Detached.into(),
        pod: Some(pod()),
    };
    assert_eq!(
        read_by_protoc("WatchEvent", &event),
        format!("kind: DETACHED pod {{ {POD} }}")
    );
}

/// A socket whose first connection is served by `serve`; the client's side of it.
fn served(serve: impl FnOnce(UnixStream) + Send + 'static) -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join(api::SOCKET);
    let listener = UnixListener::bind(&path).expect("bind");
    std::thread::spawn(move || serve(listener.accept().expect("accept").0));
    let client = Client::connect(&path, LIMIT).expect("connect");
    (dir, client)
}

/// Reads one whole frame.
fn read_frame(stream: &mut UnixStream) -> Frame {
    let mut bytes = Vec::new();
    loop {
        if let Some((frame, _)) = api::next_frame(&bytes).expect("a frame") {
            return frame;
        }
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("read");
        bytes.extend(byte);
    }
}

fn answer(stream: u32, status: Option<Status>, message: &impl Message) -> Vec<u8> {
    let response = Response {
        status,
        payload: message.encode_to_vec(),
    };
    Frame {
        stream,
        kind: Kind::Response,
        flags: 0,
        payload: response.encode_to_vec(),
    }
    .encode()
}

#[test]
fn an_answer_in_small_pieces_and_behind_a_stale_one_is_understood() {
    let (_dir, mut client) = served(|mut stream| {
        let request = read_frame(&mut stream);
        let attached = AttachResponse {
            outcome: Outcome::Attached.into(),
            pod: Some(pod()),
        };
        let mut bytes = answer(request.stream + 2, None, &attached);
        bytes.extend(answer(request.stream, None, &attached));
        for byte in bytes {
            stream.write_all(&[byte]).expect("write");
        }
    });
    let attached = client.attach(&AttachRequest::default()).expect("attach");
    assert_eq!(attached, Attached::Pod(Box::new(pod())));
}

#[test]
fn a_refusal_keeps_its_code_and_its_words() {
    let (_dir, mut client) = served(|mut stream| {
        let request = read_frame(&mut stream);
        let status = Status {
            code: api::Code::FailedPrecondition as i32,
            message: "no; do this".to_owned(),
        };
        let bytes = answer(request.stream, Some(status), &api::ListResponse::default());
        stream.write_all(&bytes).expect("write");
    });
    match client.list() {
        Err(ClientError::Refused {
            code: Some(api::Code::FailedPrecondition),
            message,
        }) => assert_eq!(message, "no; do this"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_daemon_that_is_silent_or_slow_or_full_costs_no_more_than_the_limit() {
    const SHORT: Duration = Duration::from_millis(100);
    let in_time = |began: Instant| {
        // The upper bound allows for a busy machine.
        let took = began.elapsed();
        assert!(took >= SHORT && took < LIMIT, "{took:?}");
    };
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join(api::SOCKET);
    let listener = UnixListener::bind(&path).expect("bind");
    let mut waiting = Vec::new();
    // Connected, but nobody reads; then a queue that is full.
    loop {
        let began = Instant::now();
        match Client::connect(&path, SHORT) {
            Ok(mut client) => {
                if waiting.is_empty() {
                    let error = client.list().expect_err("nobody answers");
                    in_time(began);
                    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
                    assert!(error.to_string().contains("restart it"), "{error}");
                }
                waiting.push(client);
                assert!(waiting.len() < 10_000, "the queue never fills");
            }
            Err(error) => {
                in_time(began);
                assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
                break;
            }
        }
    }
    drop(listener);
    // One byte every now and then must not prolong it.
    let (_dir, mut client) = served(|mut stream| {
        while stream.write_all(&[0]).is_ok() {
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    let began = Instant::now();
    client.renew(SHORT);
    let error = client.list().expect_err("never whole");
    in_time(began);
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}

#[test]
fn nobody_there_and_nonsense_have_their_own_errors() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join(api::SOCKET);
    let error = Client::connect(&path, LIMIT).expect_err("no socket");
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    assert!(error.to_string().contains("systemctl start"), "{error}");
    // The socket of a daemon that was killed.
    drop(UnixListener::bind(&path).expect("bind"));
    let error = Client::connect(&path, LIMIT).expect_err("nobody listens");
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");

    for (bytes, named) in [
        (b"HTTP/1.1 400 Bad Request\r\n".as_slice(), "unknown kind"),
        (&[255, 255, 255, 255, 0, 0, 0, 1, 2, 0], "at most"),
        (&[0, 0, 0, 2, 0, 0, 0, 1, 2, 0, 255, 255], "varint"),
    ] {
        let (_dir, mut client) = served(move |mut stream| {
            read_frame(&mut stream);
            stream.write_all(bytes).expect("write");
        });
        let error = client.list().expect_err("nonsense");
        assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    let (_dir, mut client) = served(drop);
    let error = client.list().expect_err("closed");
    assert!(matches!(error, ClientError::Closed { .. }), "{error}");
}

#[test]
fn a_request_that_the_daemon_would_refuse_is_not_sent() {
    let (_dir, mut client) = served(drop);
    let request = AttachRequest {
        netns: "x".repeat(api::MAX_REQUEST),
        ..AttachRequest::default()
    };
    let error = client.attach(&request).expect_err("too long");
    assert!(matches!(error, ClientError::TooLong { .. }), "{error}");
}
