//! The bytes of the API: what no client sends, and what clients other than ours do.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use kbp_poller::api::{self, EventKind};

use super::{Daemon, LIMIT, names, pool, request};
use crate::node::{Node, ip};

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
