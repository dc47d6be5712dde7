//! The load generator of `kbpctl bench` against a server that stalls: an open loop sees what every user would have seen.

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

const STALL: Duration = Duration::from_millis(300);

/// Echoes, and once, some time after the first request, does nothing for [`STALL`].
fn stalling_server() -> std::net::SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let address = socket.local_addr().expect("address");
    std::thread::spawn(move || {
        let mut datagram = [0; 2048];
        let mut first = None;
        let mut stalled = false;
        // The test's process ends it.
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let begin = *first.get_or_insert_with(Instant::now);
            if !stalled && begin.elapsed() > Duration::from_millis(500) {
                stalled = true;
                std::thread::sleep(STALL);
            }
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
    address
}

fn client(rate: &[&str]) -> Value {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("out");
    let to = stalling_server().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_kbpctl"))
        .args(["load", "client", "--talk", "udp-echo", "--to", &to])
        .args([
            "--seconds",
            "1",
            "--warm-up",
            "0.1",
            "--size",
            "64",
            "--out",
        ])
        .arg(&out)
        .args(rate)
        .output()
        .expect("client");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&std::fs::read(&out).expect("result")).expect("JSON")
}

/// How many requests took longer than a tenth of the stall.
fn slow(measured: &Value) -> u64 {
    let histogram = measured["histogram"].as_array().expect("histogram");
    let slow = histogram
        .iter()
        .filter(|pair| u128::from(pair[0].as_u64().expect("ns")) > STALL.as_nanos() / 10);
    slow.map(|pair| pair[1].as_u64().expect("count")).sum()
}

#[test]
fn an_open_loop_counts_every_request_that_a_stall_delays() {
    // Those due in the first nine tenths of the stall wait for longer than one tenth: 108 of 120, which fit the server's queue.
    let open = client(&["--rate", "400"]);
    assert_eq!(open["offered"], 400);
    assert_eq!(open["lost"], 0, "{open}");
    assert!(slow(&open) >= 100, "{} of 108", slow(&open));
    // A closed loop does not ask while it waits: that is what an open loop is for. A busy machine may add some.
    let closed = client(&[]);
    assert!(slow(&closed) >= 1, "{}", slow(&closed));
    assert!(slow(&closed) < slow(&open) / 2, "{}", slow(&closed));
}
