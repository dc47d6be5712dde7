//! The thread that polls through a socket: what primes it, where it runs, how long, and when it ends.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use kbp_kernel::poll_socket::{Ends, PollSockets, PollSocketsOptions, Primed, prime};
use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::{CpuSet, Error, NapiId};

use crate::traffic::Road;
use crate::{eventually, some_cpu};

fn address(text: &str) -> IpAddr {
    text.parse().expect("address")
}

fn primed(road: &Road, addresses: &[IpAddr], wanted: Option<NapiId>) -> Result<Primed, Error> {
    let ends = Ends {
        polled: &road.pair.host,
        other: &road.pair.pod,
        other_name: "eth0",
        addresses,
    };
    prime(&ends, wanted)
}

fn polling(road: &Road, lease_ms: u64, scheduling: Scheduling) -> PollSockets {
    let primed = primed(road, &[address("10.0.0.1")], None).expect("a packet");
    let options = PollSocketsOptions {
        cpu: some_cpu(),
        scheduling,
        lease: Duration::from_millis(lease_ms),
    };
    let mut sockets = PollSockets::new(&options).expect("thread");
    sockets.add(primed);
    sockets
}

fn cpu_time(socket: &PollSockets) -> Duration {
    process::cpu_time(std::process::id(), socket.thread_id()).expect("CPU time")
}

#[test]
fn one_packet_tells_the_id_of_the_instance() {
    let road = Road::new();
    let here = [address("192.0.2.77"), address("10.0.0.1")];
    let found = primed(&road, &here, None).expect("the second address works");
    assert_eq!(found.napi(), road.host_napi());
    primed(&road, &here, Some(road.host_napi())).expect("it is the one that was wanted");

    let other = NapiId(road.host_napi().0 + 1000);
    for (addresses, wanted, said) in [
        (&here[..1], None, "192.0.2.77"),
        (&here[1..], Some(other), "not"),
        (&[], None, "no address"),
    ] {
        let error = primed(&road, addresses, wanted).expect_err("nothing comes that way");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("eth0") && text.contains(said), "{text}");
    }
}

#[test]
fn packets_go_through_the_thread_while_it_is_awake_and_through_softirq_otherwise() {
    let road = Road::new();
    assert_eq!(road.polled_from_pod(200), 0, "nobody polls yet");
    let mut socket = polling(&road, 300, Scheduling::Other(0));
    assert!(socket.is_asleep());
    assert_eq!(road.polled_from_pod(200), 0, "it still sleeps");
    for _ in 0..2 {
        eventually("the thread takes packets", || {
            socket.wake();
            road.polled_from_pod(100) > 0
        });
        eventually("asleep", || socket.is_asleep());
        assert_eq!(road.polled_from_pod(200), 0, "asleep, and no packet lost");
    }
    socket.remove(road.host_napi());
    socket.wake();
    assert_eq!(
        road.polled_from_pod(200),
        0,
        "it was told to leave this one"
    );
    assert!(socket.is_asleep(), "there is nothing to poll");
}

#[test]
fn it_has_the_cpu_and_the_class_it_was_asked_for_and_ends_with_its_handle() {
    let road = Road::new();
    for class in [Scheduling::Idle, Scheduling::Other(0)] {
        let socket = polling(&road, 60_000, class);
        let tid = socket.thread_id();
        let task = format!("/proc/self/task/{tid}");
        let name = fs::read_to_string(format!("{task}/comm")).expect("name");
        assert_eq!(name.trim(), "kbp-poll");
        assert_eq!(process::scheduling(tid).expect("class"), class);
        let cpus = process::affinity(tid).expect("CPUs");
        assert_eq!(cpus, CpuSet::from_iter([some_cpu()]));
        socket.wake();
        eventually("awake", || !socket.is_asleep());
        drop(socket);
        eventually("the end of the thread", || !Path::new(&task).exists());
    }
}

#[test]
fn one_thread_polls_two_pods_and_goes_on_when_one_of_them_goes() {
    let (first, second) = (Road::new(), Road::new());
    let mut sockets = polling(&first, 60_000, Scheduling::Other(0));
    sockets.wake();
    eventually("it takes packets of the first", || {
        first.polled_from_pod(50) > 0
    });
    sockets.add(primed(&second, &[address("10.0.0.1")], None).expect("a packet"));
    eventually("it takes packets of both", || {
        first.polled_from_pod(50) > 0 && second.polled_from_pod(50) > 0
    });
    let gone = first.host_napi();
    drop(first);
    eventually("the other is polled", || second.polled_from_pod(50) > 0);
    sockets.remove(gone);
    assert!(!sockets.is_asleep());
    let busy = cpu_time(&sockets);
    eventually("it polls on", || cpu_time(&sockets) > busy);
}
