//! Questions that the kernel answers about one link or one route, however many there are.

use std::net::IpAddr;

use kbp_kernel::link::Route;
use kbp_kernel::{IfIndex, Mtu};

use crate::pair::Pair;

#[test]
fn a_link_is_found_by_its_name_and_its_mtu_by_its_index() {
    let pair = Pair::new();
    let socket = &pair.host_socket;
    let index = socket.index_of("kbphost").expect("ask");
    assert_eq!(index, Some(pair.host_link.index));
    assert_eq!(
        socket.mtu_of(pair.host_link.index).expect("ask"),
        Some(Mtu(9000))
    );
    assert_eq!(socket.index_of("eth0").expect("ask"), None, "the pod's");
    assert_eq!(socket.mtu_of(IfIndex(4711)).expect("ask"), None);
    for wrong in ["", "a-name-of-16-byte"] {
        let error = socket.index_of(wrong).expect_err(wrong);
        assert!(error.to_string().contains("15 bytes"), "{error}");
    }
}

#[test]
fn a_route_is_looked_up_as_it_stands_in_its_table() {
    let mut pair = Pair::new();
    let device = pair.host_link.index;
    let range = |text: &str| text.parse().expect("a range");
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
    for anywhere in ["203.0.113.1", "2001:db8:ffff::1"] {
        assert_eq!(pair.host_socket.route_to(ip(anywhere)).expect("ask"), None);
    }
    let default = |everything: &str, mtu, priority| Route {
        mtu: Some(Mtu(mtu)),
        priority: Some(priority),
        ..Route::new(range(everything), device)
    };
    let own = Route::new(range("203.0.113.0/24"), device);
    pair.on_host(|batch| {
        batch
            .add_address(device, range("10.88.0.1/24"), false)
            .add_route(&default("0.0.0.0/0", 1400, 10))
            .add_route(&default("0.0.0.0/0", 1300, 5))
            .add_route(&default("::/0", 1350, 7));
    })
    .expect("add routes");
    let mut found = |address: &str| {
        let route = pair.host_socket.route_to(ip(address)).expect("ask");
        let route = route.unwrap_or_else(|| panic!("no route to {address}"));
        (
            route.destination.prefix_len(),
            route.mtu.map(|mtu| mtu.0),
            route.device,
        )
    };
    // The one of the lowest metric.
    assert_eq!(found("203.0.113.1"), (0, Some(1300), device));
    assert_eq!(found("2001:db8:ffff::1"), (0, Some(1350), device));
    assert_eq!(found("10.88.0.9"), (24, None, device));
    pair.on_host(|batch| {
        batch.add_route(&own);
    })
    .expect("add another");
    let route = pair.host_socket.route_to(ip("203.0.113.1")).expect("ask");
    assert_eq!(route.map(|route| route.destination), Some(own.destination));
}
