//! Veth pairs: birth in two namespaces, properties, failures.

use kbp_kernel::link::{Batch, LinkKind, RouteSocket, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::{IfIndex, Mtu};

use crate::pair::{HOST_MAC, POD_MAC, Pair, veth};

#[test]
fn a_pair_is_born_with_each_end_in_its_namespace() {
    let pair = Pair::with_pod_down();
    let host = &pair.host_link;
    assert_eq!(host.name, "kbphost");
    assert_eq!(host.kind, LinkKind::Veth);
    assert_eq!(host.mac, Some(HOST_MAC));
    assert_eq!(host.mtu, Mtu(9000));
    assert!(host.up, "the host end is born up");
    assert!(!host.loopback);
    assert_eq!(host.rx_queues, 1);
    assert_eq!(host.alias, None);
    assert_eq!(host.master, None);

    let pod = &pair.pod_link;
    assert_eq!(pod.name, "eth0");
    assert_eq!(pod.kind, LinkKind::Veth);
    assert_eq!(pod.mac, Some(POD_MAC));
    assert_eq!(pod.mtu, Mtu(9000));
    assert!(!pod.up, "the pod end is born down");
    assert_eq!(pod.rx_queues, 1);
}

#[test]
fn both_ends_name_their_peer_and_its_namespace() {
    let mut pair = Pair::new();
    assert_eq!(pair.host_link.peer_index, Some(pair.pod_link.index));
    assert_eq!(pair.pod_link.peer_index, Some(pair.host_link.index));
    let pod_id = pair.host_socket.nsid_of(&pair.pod).expect("ask");
    assert!(pod_id.is_some());
    assert_eq!(pair.host_link.peer_nsid, pod_id);
    let host_id = pair.pod_socket.nsid_of(&pair.host).expect("ask");
    assert!(host_id.is_some());
    assert_eq!(pair.pod_link.peer_nsid, host_id);
}

#[test]
fn a_namespace_gets_an_id_once() {
    let ours = Netns::create().expect("ours");
    let other = Netns::create().expect("other");
    let mut socket = RouteSocket::open_in(&ours).expect("socket");
    assert_eq!(socket.nsid_of(&other).expect("ask"), None);
    let id = socket.ensure_nsid(&other).expect("give");
    assert!(id >= 0);
    assert_eq!(socket.nsid_of(&other).expect("ask"), Some(id));
    assert_eq!(socket.ensure_nsid(&other).expect("give again"), id);
}

#[test]
fn a_taken_name_is_refused_by_name_and_with_the_kernels_words() {
    let mut pair = Pair::new();
    let other = Netns::create().expect("other pod");
    let error = pair
        .on_host(|batch| {
            batch.create_veth(&veth("kbphost", &other));
        })
        .expect_err("the name is taken");
    assert_eq!(error.errno(), Some(libc::EEXIST));
    let text = error.to_string();
    assert!(
        text.contains("create veth pair kbphost with eth0 in the pod"),
        "{text}"
    );
    assert!(text.contains("File exists"), "{text}");

    // The name in the pod is taken, the one on the host is not: nothing may remain.
    let pod = pair.pod.try_clone().expect("clone");
    let error = pair
        .on_host(|batch| {
            batch.create_veth(&veth("kbpother", &pod));
        })
        .expect_err("the name is taken in the pod");
    assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
    assert!(
        pair.host_socket
            .link_by_name("kbpother")
            .expect("ask")
            .is_none()
    );
}

#[test]
fn bad_values_are_refused_by_value() {
    let host = Netns::create().expect("host");
    let pod = Netns::create().expect("pod");
    let mut socket = RouteSocket::open_in(&host).expect("socket");
    let mut create = |pair: &VethPair<'_>| {
        let mut batch = Batch::new();
        batch.create_veth(pair);
        socket.execute(&batch).expect_err("refused")
    };
    let error = create(&VethPair {
        mtu: Mtu(65536),
        ..veth("kbphost", &pod)
    });
    assert_eq!(error.errno(), Some(libc::EINVAL), "{error}");
    assert!(error.to_string().contains("MTU 65536"), "{error}");

    let error = create(&veth("a-name-of-16-byt", &pod));
    assert!(
        matches!(error.errno(), Some(libc::ERANGE | libc::EINVAL)),
        "{error}"
    );
    assert!(error.to_string().contains("a-name-of-16-byt"), "{error}");
    assert!(
        socket
            .links()
            .expect("list")
            .iter()
            .all(|link| link.kind != LinkKind::Veth)
    );
}

#[test]
fn the_kernels_words_are_part_of_the_error() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    let error = pair
        .on_host(|batch| {
            batch.set_mtu(index, Mtu(65536));
        })
        .expect_err("too large");
    assert_eq!(
        error.to_string(),
        format!(
            "set the MTU of link {index} to 65536: Invalid argument (os error 22) \
             (kernel: mtu greater than device maximum)"
        )
    );
}

#[test]
fn links_change_and_vanish() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    pair.on_host(|batch| {
        batch
            .set_down(index)
            .set_mtu(index, Mtu(65535))
            .set_alias(index, "pod a/eth0");
    })
    .expect("change");
    pair.refresh();
    assert!(!pair.host_link.up);
    assert_eq!(pair.host_link.mtu, Mtu(65535));
    assert_eq!(pair.host_link.alias.as_deref(), Some("pod a/eth0"));

    pair.on_host(|batch| {
        batch.set_up(index).set_alias(index, "");
    })
    .expect("change back");
    pair.refresh();
    assert!(pair.host_link.up);
    assert_eq!(pair.host_link.alias, None);

    pair.on_host(|batch| {
        batch.delete_link(index);
    })
    .expect("delete");
    assert!(
        pair.host_socket
            .link_by_index(index)
            .expect("ask")
            .is_none()
    );
    assert!(
        pair.pod_socket.link_by_name("eth0").expect("ask").is_none(),
        "both ends go"
    );
}

#[test]
fn the_qdisc_becomes_a_pfifo_and_can_be_set_again() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    assert_eq!(pair.host_link.qdisc.as_deref(), Some("noqueue"));
    for limit in [500, 1000] {
        pair.on_host(|batch| {
            batch.set_pfifo(index, limit);
        })
        .expect("set the qdisc");
        pair.refresh();
        assert_eq!(pair.host_link.qdisc.as_deref(), Some("pfifo"));
    }
}

#[test]
fn counters_count() {
    let mut pair = Pair::new();
    let before = pair.host_link.tx_packets;
    let link = pair.host_link.index;
    let address = "10.9.0.2".parse().expect("address");
    pair.on_host(|batch| {
        batch
            .add_address(link, "10.9.0.1/24".parse().expect("prefix"), false)
            .add_neighbour(link, address, POD_MAC);
    })
    .expect("configure");
    pair.host
        .run(|| {
            let socket = std::net::UdpSocket::bind("10.9.0.1:0").expect("bind");
            for _ in 0..5 {
                socket.send_to(b"x", (address, 9)).expect("send");
            }
        })
        .expect("enter");
    pair.refresh();
    assert!(
        pair.host_link.tx_packets >= before + 5,
        "{:?}",
        pair.host_link
    );
    assert!(
        pair.pod_link.rx_packets >= before + 5,
        "{:?}",
        pair.pod_link
    );
}

#[test]
fn a_batch_goes_on_after_a_failure_and_reports_the_first() {
    let mut pair = Pair::new();
    let (index, missing) = (pair.host_link.index, IfIndex(4_000_000));
    let error = pair
        .on_host(|batch| {
            batch
                .set_mtu(index, Mtu(1400))
                .set_up(missing)
                .delete_link(missing);
            batch.set_alias(index, "after the failure");
            assert_eq!(batch.len(), 4);
        })
        .expect_err("a link is missing");
    assert_eq!(error.errno(), Some(libc::ENODEV));
    assert!(error.to_string().contains("set link 4000000 up"), "{error}");
    pair.refresh();
    assert_eq!(pair.host_link.mtu, Mtu(1400));
    assert_eq!(pair.host_link.alias.as_deref(), Some("after the failure"));
}

#[test]
fn a_batch_of_hundreds_is_answered_completely() {
    let mut pair = Pair::new();
    let index = pair.host_link.index;
    let address = |n: u32| std::net::Ipv4Addr::from(0x0a00_0000 + n);
    pair.on_host(|batch| {
        for n in 1..=500 {
            batch.add_neighbour(index, address(n).into(), POD_MAC);
        }
    })
    .expect("500 neighbours");
    let neighbours = pair.host_socket.permanent_neighbours(index).expect("list");
    assert_eq!(neighbours.len(), 500);
    assert!(neighbours.iter().all(|(_, mac)| *mac == POD_MAC));
}

#[test]
fn an_empty_batch_does_nothing() {
    let netns = Netns::create().expect("namespace");
    let mut socket = RouteSocket::open_in(&netns).expect("socket");
    assert!(Batch::new().is_empty());
    socket.execute(&Batch::new()).expect("nothing to do");
}

#[test]
fn a_fresh_namespace_has_a_loopback_and_nothing_else() {
    let netns = Netns::create().expect("namespace");
    let mut socket = RouteSocket::open_in(&netns).expect("socket");
    let links = socket.links().expect("list");
    let loopback = links.iter().find(|link| link.name == "lo").expect("lo");
    assert!(loopback.loopback);
    assert!(!loopback.up);
    assert_eq!(loopback.kind, LinkKind::None);
    assert_eq!(loopback.peer_index, None);
    assert!(socket.link_by_name("eth0").expect("ask").is_none());
    assert!(
        socket
            .link_by_index(IfIndex(4_000_000))
            .expect("ask")
            .is_none()
    );
}

#[test]
fn thirty_pairs_can_be_born_at_once() {
    let host = Netns::create().expect("host");
    std::thread::scope(|scope| {
        for n in 0..30 {
            let host = &host;
            scope.spawn(move || {
                let pod = Netns::create().expect("pod");
                let mut socket = RouteSocket::open_in(host).expect("socket");
                let mut batch = Batch::new();
                let name = format!("kbp{n}");
                batch.create_veth(&veth(&name, &pod));
                socket.execute(&batch).expect("create");
                let link = socket.link_by_name(&name).expect("ask").expect("created");
                assert_eq!(link.kind, LinkKind::Veth);
            });
        }
    });
}

#[test]
fn a_listing_is_complete_while_links_come() {
    let host = Netns::create().expect("host");
    let pod = Netns::create().expect("pod");
    let create = |socket: &mut RouteSocket, name: String| {
        let mut batch = Batch::new();
        batch.create_veth(&VethPair {
            pod_name: &name,
            ..veth(&name, &pod)
        });
        socket.execute(&batch).expect("create");
    };
    let mut socket = RouteSocket::open_in(&host).expect("socket");
    // More than fit into one answer, so that the kernel lists them in several steps.
    for n in 0..60 {
        create(&mut socket, format!("old{n}"));
    }
    std::thread::scope(|scope| {
        let newcomers = scope.spawn(|| {
            let mut socket = RouteSocket::open_in(&host).expect("socket");
            for n in 0..100 {
                create(&mut socket, format!("new{n}"));
            }
        });
        while !newcomers.is_finished() {
            let mut names: Vec<_> = socket
                .links()
                .expect("list")
                .into_iter()
                .map(|link| link.name)
                .collect();
            let listed = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), listed, "one was listed twice");
            assert_eq!(
                names.iter().filter(|name| name.starts_with("old")).count(),
                60
            );
        }
    });
}
