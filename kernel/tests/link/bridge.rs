//! Bridges, their ports, and announcements over them.

use std::io::Read as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kbp_kernel::link::{
    Batch, Bridge, DEFAULT_VLAN, Link, LinkKind, PortVlan, RouteSocket, VlanId, announce,
};
use kbp_kernel::netns::Netns;
use kbp_kernel::{MacAddr, Mtu};

use crate::pair::{Pair, veth};

const BRIDGE_MAC: MacAddr = MacAddr([2, 0, 0, 0, 9, 9]);

fn link(socket: &mut RouteSocket, name: &str) -> Link {
    socket.link_by_name(name).expect("ask").expect(name)
}

fn bridge(socket: &mut RouteSocket, vlan_filtering: bool) -> Link {
    let bridge = Bridge {
        name: "br0",
        mac: BRIDGE_MAC,
        mtu: Mtu(9000),
        vlan_filtering,
    };
    let created = socket.execute(Batch::new().create_bridge(&bridge));
    created.expect("create the bridge");
    link(socket, "br0")
}

#[test]
fn a_bridge_has_what_was_asked_for_and_its_name_only_once() {
    let netns = Netns::create().expect("namespace");
    let mut socket = RouteSocket::open_in(&netns).expect("socket");
    let link = bridge(&mut socket, false);
    assert_eq!(link.kind, LinkKind::Other("bridge".into()));
    assert_eq!((link.mac, link.mtu), (Some(BRIDGE_MAC), Mtu(9000)));
    assert!(link.up);
    let again = Bridge {
        name: "br0",
        mac: BRIDGE_MAC,
        mtu: Mtu(1500),
        vlan_filtering: false,
    };
    let error = socket
        .execute(Batch::new().create_bridge(&again))
        .expect_err("the name is taken");
    assert_eq!(error.errno(), Some(nix::errno::Errno::EEXIST as i32));
    assert!(error.to_string().contains("br0"), "{error}");
}

#[test]
fn a_veth_is_born_as_a_port_with_its_queues() {
    let mut pair = Pair::new();
    let br0 = bridge(&mut pair.host_socket, false);
    assert!(pair.host_socket.ports(br0.index).expect("list").is_empty());
    let mut born = veth("born", &pair.pod);
    born.pod_name = "eth1";
    pair.host_socket
        .execute(Batch::new().create_veth_with(&born, 3, Some(br0.index)))
        .expect("create a port");
    let ports = pair.host_socket.ports(br0.index).expect("list");
    let names: Vec<_> = ports.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["born"]);
    assert_eq!((ports[0].master, ports[0].rx_queues), (Some(br0.index), 3));
    assert_eq!(link(&mut pair.pod_socket, "eth1").rx_queues, 3);

    let host = pair.host_link.index;
    pair.on_host(|batch| {
        batch.set_master(host, br0.index).set_hairpin(host, true);
    })
    .expect("add a port");
    pair.refresh();
    assert!(pair.host_link.hairpin);
    assert_eq!(pair.host_link.master, Some(br0.index));
    pair.on_host(|batch| {
        batch.set_hairpin(host, false);
    })
    .expect("switch it off");
    pair.refresh();
    assert!(!pair.host_link.hairpin);
    assert_eq!(pair.host_socket.ports(br0.index).expect("list").len(), 2);
}

#[test]
fn a_port_is_in_the_vlan_it_was_put_into() {
    let mut pair = Pair::new();
    let br0 = bridge(&mut pair.host_socket, false);
    let host = pair.host_link.index;
    pair.on_host(|batch| {
        batch.set_master(host, br0.index);
    })
    .expect("add a port");
    let filters = pair.on_host(|batch| {
        batch.set_vlan_filtering(br0.index, true);
    });
    let joined = pair.on_host(|batch| {
        batch
            .set_port_vlan(host, VlanId(42))
            .delete_port_vlan(host, DEFAULT_VLAN);
    });
    let vlans = pair.host_socket.port_vlans(host).expect("list");
    let on = link(&mut pair.host_socket, "br0").vlan_filtering;
    // A kernel without CONFIG_BRIDGE_VLAN_FILTERING refuses all of it.
    if let Err(error) = filters {
        for error in [error, joined.expect_err("nothing filters")] {
            assert_eq!(error.errno(), Some(nix::errno::Errno::EOPNOTSUPP as i32));
        }
        assert!(!on && vlans.is_empty(), "{vlans:?}");
        return;
    }
    joined.expect("set the VLAN");
    let only = PortVlan {
        vlan: VlanId(42),
        pvid: true,
        untagged: true,
    };
    assert_eq!((on, vlans), (true, vec![only]));
    pair.on_host(|batch| {
        batch.set_vlan_filtering(br0.index, false);
    })
    .expect("switch it off");
    assert!(!link(&mut pair.host_socket, "br0").vlan_filtering);
    pair.on_host(|batch| {
        batch.delete_link(br0.index);
    })
    .expect("delete it");
    assert!(bridge(&mut pair.host_socket, true).vlan_filtering);
}

#[test]
fn addresses_and_qdiscs_go_again() {
    let mut pair = Pair::new();
    let host = pair.host_link.index;
    let addresses = ["10.88.0.1/24", "fd00:88::1/64"].map(|a| a.parse().expect("a prefix"));
    pair.on_host(|batch| {
        for address in addresses {
            batch.add_address(host, address, false);
        }
        batch.set_pfifo(host, 100);
    })
    .expect("add");
    pair.refresh();
    assert_eq!(pair.host_link.qdisc.as_deref(), Some("pfifo"));
    pair.on_host(|batch| {
        for address in addresses {
            batch.delete_address(host, address);
        }
        batch.delete_qdisc(host);
    })
    .expect("delete");
    pair.refresh();
    assert_eq!(pair.host_link.qdisc.as_deref(), Some("noqueue"));
    let left = pair.host_socket.addresses(host).expect("list");
    assert!(
        !addresses.iter().any(|address| left.contains(address)),
        "{left:?}"
    );
}

#[test]
fn announcements_correct_what_a_neighbour_remembers() {
    let mut pair = Pair::new();
    let (host, pod) = (pair.host_link.index, pair.pod_link.index);
    pair.on_host(|batch| {
        batch.add_address(host, "10.88.0.1/24".parse().expect("a prefix"), false);
        batch.add_address(host, "fd00:88::1/64".parse().expect("a prefix"), false);
    })
    .expect("add");
    let own: [IpAddr; 2] = ["10.88.0.2", "fd00:88::2"].map(|a| a.parse().expect("an address"));
    let deadline = Instant::now() + Duration::from_secs(60);
    let v6 = "fd00:88::1".parse().expect("an address");
    while !pair.host_socket.is_local(v6).expect("ask") {
        assert!(Instant::now() < deadline, "the address does not come");
        std::thread::yield_now();
    }
    // What the host remembers of an earlier owner.
    for address in own {
        let arguments =
            format!("neigh replace {address} lladdr 02:00:00:00:00:77 dev kbphost nud stale");
        let status = pair
            .host
            .run(|| Command::new("ip").args(arguments.split(' ')).status())
            .expect("enter");
        assert!(status.expect("run ip").success());
    }
    announce(&pair.pod, pod, pair.pod_link.mac.expect("a MAC"), &own).expect("announce");
    let mac = pair.pod_link.mac.expect("a MAC").to_string();
    let mut known = String::new();
    while own
        .iter()
        .any(|address| !known.contains(&format!("{address} lladdr {mac}")))
    {
        assert!(Instant::now() < deadline, "{known}");
        known.clear();
        let mut child = pair
            .host
            .run(|| {
                Command::new("ip")
                    .args(["neigh", "show", "dev", "kbphost"])
                    .stdout(Stdio::piped())
                    .spawn()
            })
            .expect("enter")
            .expect("run ip");
        let mut stdout = child.stdout.take().expect("piped");
        stdout.read_to_string(&mut known).expect("read");
        child.wait().expect("wait");
    }
    let error =
        announce(&pair.pod, kbp_kernel::IfIndex(4711), BRIDGE_MAC, &own).expect_err("no such link");
    assert!(error.to_string().contains("10.88.0.2"), "{error}");
}
