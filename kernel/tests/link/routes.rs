//! Routes.

use std::process::Command;

use ipnet::IpNet;
use kbp_kernel::Mtu;
use kbp_kernel::link::Route;

use crate::pair::Pair;

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

/// What `ip` says in the pod, the reader that is not ours.
fn ip(pair: &Pair, arguments: &str) -> String {
    let run = || {
        Command::new("ip")
            .args(arguments.split_whitespace())
            .output()
    };
    let output = pair.pod.run(run).expect("enter").expect("run ip");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_routes_of_a_routed_pod() {
    let mut pair = Pair::new();
    let device = pair.pod_link.index;
    let gateway = Route::new(net("169.254.1.1/32"), device);
    let default = Route {
        gateway: Some("169.254.1.1".parse().expect("address")),
        source: Some("10.88.0.2".parse().expect("address")),
        mtu: Some(Mtu(1500)),
        onlink: true,
        ..Route::new(net("0.0.0.0/0"), device)
    };
    let range = Route {
        mtu: None,
        ..Route {
            destination: net("10.88.0.0/16"),
            ..default.clone()
        }
    };
    let default6 = Route {
        gateway: Some("fe80::1".parse().expect("address")),
        source: Some("fd00:88::2".parse().expect("address")),
        mtu: Some(Mtu(1400)),
        advmss: Some(1300),
        ..Route::new(net("::/0"), device)
    };
    pair.in_pod(|batch| {
        batch
            .add_address(device, net("10.88.0.2/32"), true)
            .add_address(device, net("fd00:88::2/128"), true)
            .add_route(&gateway)
            .add_route(&default)
            .add_route(&range)
            .add_route(&default6);
    })
    .expect("add");

    let v4 = ip(&pair, "-4 route show");
    assert!(
        v4.contains("169.254.1.1 dev eth0 proto static scope link"),
        "{v4}"
    );
    assert!(
        v4.contains("default via 169.254.1.1 dev eth0 proto static src 10.88.0.2 onlink mtu 1500"),
        "{v4}"
    );
    let v6 = ip(&pair, "-6 route show default");
    assert!(
        v6.contains("default via fe80::1 dev eth0 proto static src fd00:88::2"),
        "{v6}"
    );
    assert!(v6.contains("mtu 1400"), "{v6}");
    assert!(v6.contains("advmss 1300"), "{v6}");

    let routes = pair.pod_socket.routes().expect("list");
    let read = |destination: &str| {
        routes
            .iter()
            .find(|r| r.destination == net(destination))
            .expect(destination)
            .clone()
    };
    // What the kernel fills in.
    const UNIVERSE: Option<u8> = Some(0);
    const LINK: Option<u8> = Some(253);
    assert_eq!(
        read("169.254.1.1/32"),
        Route {
            scope: LINK,
            ..gateway
        }
    );
    assert_eq!(
        read("0.0.0.0/0"),
        Route {
            scope: UNIVERSE,
            ..default
        }
    );
    assert_eq!(
        read("10.88.0.0/16"),
        Route {
            scope: UNIVERSE,
            ..range
        }
    );
    assert_eq!(
        read("::/0"),
        Route {
            priority: Some(1024),
            ..default6
        }
    );
}

#[test]
fn routes_are_added_once_replaced_and_deleted() {
    let mut pair = Pair::new();
    let device = pair.pod_link.index;
    let route = Route {
        mtu: Some(Mtu(1500)),
        ..Route::new(net("10.1.0.0/24"), device)
    };
    pair.in_pod(|batch| {
        batch.add_route(&route);
    })
    .expect("add");
    let error = pair
        .in_pod(|batch| {
            batch.add_route(&route);
        })
        .expect_err("twice");
    assert_eq!(error.errno(), Some(libc::EEXIST));
    let text = error.to_string();
    assert!(
        text.contains(&format!("add route 10.1.0.0/24 on link {device} mtu 1500")),
        "{text}"
    );

    let larger = Route {
        mtu: Some(Mtu(9000)),
        ..route.clone()
    };
    pair.in_pod(|batch| {
        batch.replace_route(&larger);
    })
    .expect("replace");
    let routes = pair.pod_socket.routes().expect("list");
    let found: Vec<_> = routes
        .iter()
        .filter(|r| r.destination == route.destination)
        .collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].mtu, Some(Mtu(9000)));

    pair.in_pod(|batch| {
        batch.delete_route(&larger);
    })
    .expect("delete");
    let routes = pair.pod_socket.routes().expect("list");
    assert!(
        routes.iter().all(|r| r.destination != route.destination),
        "{routes:?}"
    );
    let error = pair
        .in_pod(|batch| {
            batch.delete_route(&larger);
        })
        .expect_err("gone");
    assert_eq!(error.errno(), Some(libc::ESRCH), "{error}");
}

#[test]
fn a_gateway_that_cannot_be_reached_is_refused_with_the_kernels_words() {
    let mut pair = Pair::new();
    let route = Route {
        gateway: Some("192.0.2.1".parse().expect("address")),
        ..Route::new(net("0.0.0.0/0"), pair.pod_link.index)
    };
    let error = pair
        .in_pod(|batch| {
            batch.add_route(&route);
        })
        .expect_err("unreachable");
    assert_eq!(error.errno(), Some(libc::ENETUNREACH));
    let text = error.to_string();
    assert!(text.contains("add route default via 192.0.2.1"), "{text}");
    assert!(
        text.contains("(kernel: Nexthop has invalid gateway)"),
        "{text}"
    );
}

#[test]
fn an_ipv4_route_may_go_through_an_ipv6_gateway() {
    let mut pair = Pair::new();
    let route = Route {
        gateway: Some("fe80::1".parse().expect("address")),
        scope: Some(0),
        ..Route::new(net("0.0.0.0/0"), pair.pod_link.index)
    };
    pair.in_pod(|batch| {
        batch.add_route(&route);
    })
    .expect("add");
    let shown = ip(&pair, "-4 route show");
    assert!(
        shown.contains("default via inet6 fe80::1 dev eth0"),
        "{shown}"
    );
    assert!(pair.pod_socket.routes().expect("list").contains(&route));
}

#[test]
fn a_multipath_route_is_one_route_for_each_next_hop() {
    let mut pair = Pair::new();
    let device = pair.pod_link.index;
    pair.in_pod(|batch| {
        batch.add_address(device, net("10.2.0.1/24"), false);
    })
    .expect("address");
    ip(
        &pair,
        "route add 10.3.0.0/24 nexthop via 10.2.0.2 nexthop via 10.2.0.3 dev eth0 onlink",
    );
    let routes = pair.pod_socket.routes().expect("list");
    let mut hops: Vec<_> = routes
        .iter()
        .filter(|r| r.destination == net("10.3.0.0/24"))
        .collect();
    hops.sort_by_key(|r| r.gateway);
    assert_eq!(hops.len(), 2, "{routes:?}");
    assert_eq!(hops[0].gateway, Some("10.2.0.2".parse().expect("address")));
    assert!(!hops[0].onlink);
    assert_eq!(hops[1].gateway, Some("10.2.0.3".parse().expect("address")));
    assert!(hops[1].onlink);
    assert!(hops.iter().all(|r| r.device == device));
}

#[test]
fn other_tables_and_metrics() {
    let mut pair = Pair::new();
    let device = pair.pod_link.index;
    let elsewhere = Route {
        table: Some(1000),
        ..Route::new(net("10.4.0.0/24"), device)
    };
    let cheap = Route {
        priority: Some(10),
        ..Route::new(net("10.5.0.0/24"), device)
    };
    let dear = Route {
        priority: Some(20),
        ..cheap.clone()
    };
    pair.in_pod(|batch| {
        batch
            .add_route(&elsewhere)
            .add_route(&cheap)
            .add_route(&dear);
    })
    .expect("add");
    assert!(ip(&pair, "route show table 1000").contains("10.4.0.0/24 dev eth0"));
    let routes = pair.pod_socket.routes().expect("list");
    assert!(
        routes
            .iter()
            .all(|r| r.destination != elsewhere.destination),
        "{routes:?}"
    );
    let mut priorities: Vec<_> = routes
        .iter()
        .filter(|r| r.destination == cheap.destination)
        .map(|r| r.priority)
        .collect();
    priorities.sort();
    assert_eq!(priorities, [Some(10), Some(20)]);
}

#[test]
fn a_namespace_without_routes_has_none() {
    let mut pair = Pair::with_pod_down();
    assert_eq!(pair.pod_socket.routes().expect("list"), []);
}
