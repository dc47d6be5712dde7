//! NAPI instances of veth ends.

use kbp_kernel::ethtool::{Features, set_features};
use kbp_kernel::napi::{NapiSettings, NetdevSocket, Threaded};
use kbp_kernel::netns::Netns;
use kbp_kernel::{Error, IfIndex, NapiId, probe};

use crate::pair::Pair;

const POLLABLE: Features = Features {
    gro: true,
    tso: false,
};

#[test]
fn an_instance_comes_and_goes_with_gro_and_the_link() {
    let mut pair = Pair::with_pod_down();
    let (host, pod) = (pair.host_link.index, pair.pod_link.index);
    let mut on_host = NetdevSocket::open_in(&pair.host).expect("host socket");
    let mut in_pod = NetdevSocket::open_in(&pair.pod).expect("pod socket");
    assert_eq!(on_host.napis(host).expect("list"), []);

    // Up, then GRO.
    set_features(&pair.host, "kbphost", POLLABLE).expect("GRO on");
    let first = on_host.napis(host).expect("list");
    assert_eq!(first.len(), 1, "one queue, one instance: {first:?}");
    assert_eq!(first[0].ifindex, host);
    assert!(first[0].id.0 > 0);
    assert_eq!(first[0].pid, None);

    // GRO, then up.
    set_features(&pair.pod, "eth0", POLLABLE).expect("GRO on");
    assert_eq!(in_pod.napis(pod).expect("list"), []);
    pair.in_pod(|batch| {
        batch.set_up(pod);
    })
    .expect("up");
    let other = in_pod.napis(pod).expect("list");
    assert_eq!(other.len(), 1);
    assert_ne!(other[0].id, first[0].id);

    // Down and up again is another instance.
    pair.on_host(|batch| {
        batch.set_down(host);
    })
    .expect("down");
    assert_eq!(on_host.napis(host).expect("list"), []);
    pair.on_host(|batch| {
        batch.set_up(host);
    })
    .expect("up");
    let again = on_host.napis(host).expect("list");
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].id, first[0].id);

    set_features(
        &pair.host,
        "kbphost",
        Features {
            gro: false,
            tso: true,
        },
    )
    .expect("GRO off");
    assert_eq!(on_host.napis(host).expect("list"), []);
}

#[test]
fn settings_are_read_back() {
    let pair = Pair::new();
    let host = pair.host_link.index;
    set_features(&pair.host, "kbphost", POLLABLE).expect("GRO on");
    let mut socket = NetdevSocket::open_in(&pair.host).expect("socket");
    let id = socket.napis(host).expect("list")[0].id;
    let settings = NapiSettings {
        gro_flush_timeout: Some(20_000),
        defer_hard_irqs: Some(7),
        irq_suspend_timeout: Some(5_000_000_000),
        threaded: None,
    };
    socket.set(id, settings).expect("set");
    let napi = socket.napis(host).expect("list").remove(0);
    assert_eq!(napi.id, id);
    assert_eq!(napi.gro_flush_timeout, Some(20_000));
    assert_eq!(napi.defer_hard_irqs, Some(7));
    assert_eq!(napi.irq_suspend_timeout, Some(5_000_000_000));

    // One at a time leaves the others.
    let one = NapiSettings {
        defer_hard_irqs: Some(0),
        ..NapiSettings::default()
    };
    socket.set(id, one).expect("set one");
    let napi = socket.napis(host).expect("list").remove(0);
    assert_eq!(napi.defer_hard_irqs, Some(0));
    assert_eq!(napi.gro_flush_timeout, Some(20_000));

    let error = socket
        .set(
            id,
            NapiSettings {
                defer_hard_irqs: Some(u32::MAX),
                ..NapiSettings::default()
            },
        )
        .expect_err("out of range");
    let text = error.to_string();
    assert!(text.contains(&format!(
        "set NAPI instance {id} to defer-hard-irqs=4294967295"
    )));
    assert!(text.contains("(kernel: integer out of range)"), "{text}");
}

#[test]
fn a_missing_link_or_instance_is_named() {
    let netns = Netns::create().expect("namespace");
    let mut socket = NetdevSocket::open_in(&netns).expect("socket");
    let error = socket.napis(IfIndex(4_000_000)).expect_err("no such link");
    assert_eq!(error.to_string(), "link 4000000 not found");
    let settings = NapiSettings {
        gro_flush_timeout: Some(0),
        ..NapiSettings::default()
    };
    let error = socket
        .set(NapiId(4_000_000_000), settings)
        .expect_err("no such instance");
    assert_eq!(error.to_string(), "NAPI instance 4000000000 not found");
}

#[test]
fn an_instance_is_set_only_from_its_own_namespace() {
    let pair = Pair::new();
    set_features(&pair.host, "kbphost", POLLABLE).expect("GRO on");
    let mut here = NetdevSocket::open_in(&pair.host).expect("socket");
    let id = here.napis(pair.host_link.index).expect("list")[0].id;
    let mut elsewhere = NetdevSocket::open_in(&pair.pod).expect("socket");
    let settings = NapiSettings {
        defer_hard_irqs: Some(1),
        ..NapiSettings::default()
    };
    let error = elsewhere.set(id, settings).expect_err("not ours");
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[test]
fn an_instance_runs_in_a_thread_and_back_in_softirq() {
    let pair = Pair::new();
    let host = pair.host_link.index;
    set_features(&pair.host, "kbphost", POLLABLE).expect("GRO on");
    let mut socket = NetdevSocket::open_in(&pair.host).expect("socket");
    let id = socket.napis(host).expect("list")[0].id;
    let mut set = |threaded| {
        let settings = NapiSettings {
            threaded: Some(threaded),
            ..NapiSettings::default()
        };
        socket.set(id, settings).expect("set");
        socket.napis(host).expect("list").remove(0)
    };
    let napi = set(Threaded::Enabled);
    assert_eq!(napi.threaded, Some(Threaded::Enabled));
    let pid = napi.pid.expect("a thread");
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("its name");
    assert!(name.starts_with("napi/kbphost"), "{name}");

    let napi = set(Threaded::Disabled);
    assert_eq!(napi.threaded, Some(Threaded::Disabled));
    assert_eq!(napi.pid, None);
}

#[test]
fn probes_agree_with_what_can_be_done() {
    probe::netdev_family().expect("the netdev family");
    probe::veth_napi().expect("a NAPI instance for veth");

    let pair = Pair::new();
    let host = pair.host_link.index;
    set_features(&pair.host, "kbphost", POLLABLE).expect("GRO on");
    let mut socket = NetdevSocket::open_in(&pair.host).expect("socket");
    let id = socket.napis(host).expect("list")[0].id;
    let settings = NapiSettings {
        threaded: Some(Threaded::BusyPoll),
        ..NapiSettings::default()
    };
    let tried = socket.set(id, settings);
    match (probe::threaded_busy_poll(), tried) {
        (Ok(()), Ok(())) => {
            let napi = socket.napis(host).expect("list").remove(0);
            assert_eq!(napi.threaded, Some(Threaded::BusyPoll));
            let off = NapiSettings {
                threaded: Some(Threaded::Disabled),
                ..settings
            };
            socket.set(id, off).expect("stop the thread");
        }
        (Err(probed), Err(tried)) => {
            for error in [probed, tried] {
                assert!(matches!(error, Error::Unsupported { .. }), "{error}");
                let text = error.to_string();
                assert!(
                    text.starts_with("netdev napi-set threaded=busy-poll is not available: set"),
                    "{text}"
                );
            }
        }
        other => panic!("the probe and the trial differ: {other:?}"),
    }
}

#[test]
fn a_packet_tells_of_a_veths_napi_as_the_kernel_does() {
    kbp_kernel::probe::veth_napi().expect("an instance is listed");
    kbp_kernel::probe::veth_packet().expect("a packet passes one");
}
