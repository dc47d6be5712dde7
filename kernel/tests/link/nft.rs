//! The masquerading table, checked with nft(8) and with packets.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use ipnet::IpNet;
use kbp_kernel::Error;
use kbp_kernel::link::{Batch, Route, RouteSocket};
use kbp_kernel::netns::Netns;
use kbp_kernel::nft::{MasqueradeTable, Masqueraded};

use crate::pair::veth;

const TABLE: &str = "kbptest";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn masqueraded(address: &str, owner: &str) -> Masqueraded {
    Masqueraded {
        address: ip(address),
        owner: owner.to_owned(),
    }
}

/// A namespace and the table in it.
fn table() -> (Netns, MasqueradeTable) {
    let netns = Netns::create().expect("namespace");
    let table = MasqueradeTable::open(&netns, TABLE).expect("open");
    (netns, table)
}

fn nft(netns: &Netns, arguments: &str) -> String {
    let run = || {
        Command::new("nft")
            .args(arguments.split_whitespace())
            .output()
    };
    let output = netns.run(run).expect("enter").expect("run nft");
    assert!(output.status.success(), "nft {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn nft_shows_what_was_meant() {
    let (netns, mut table) = table();
    assert_eq!(nft(&netns, "list ruleset"), "", "opening creates nothing");
    table
        .add(
            "net/pod-a/eth0",
            &[ip("10.88.0.2"), ip("fd00:88::2")],
            &[net("10.88.0.0/16"), net("fd00:88::/64")],
        )
        .expect("add");
    assert_eq!(
        nft(&netns, "list ruleset"),
        "table inet kbptest {
	set pods4 {
		type ipv4_addr
		elements = { 10.88.0.2 comment \"net/pod-a/eth0\" }
	}

	set local4 {
		type ipv4_addr
		flags interval
		elements = { 10.88.0.0/16 }
	}

	set pods6 {
		type ipv6_addr
		elements = { fd00:88::2 comment \"net/pod-a/eth0\" }
	}

	set local6 {
		type ipv6_addr
		flags interval
		elements = { fd00:88::/64 }
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @pods4 ip daddr != @local4 ip daddr != 224.0.0.0/4 masquerade
		ip6 saddr @pods6 ip6 daddr != @local6 ip6 daddr != ff00::/8 masquerade
	}
}
"
    );
}

#[test]
fn elements_are_added_listed_and_removed() {
    let (_netns, mut table) = table();
    assert_eq!(table.list().expect("list"), []);
    assert_eq!(table.local().expect("list"), []);
    assert!(!table.is_active().expect("ask"));

    table
        .add(
            "a",
            &[ip("10.88.0.2"), ip("fd00::2")],
            &[net("10.88.0.0/16")],
        )
        .expect("add");
    table
        .add(
            "b",
            &[ip("10.88.0.3")],
            &[net("10.88.0.0/16"), net("fd00::/64")],
        )
        .expect("add");
    assert!(table.is_active().expect("ask"));
    let mut listed = table.list().expect("list");
    listed.sort_by_key(|m| m.address);
    let expected = [
        masqueraded("10.88.0.2", "a"),
        masqueraded("10.88.0.3", "b"),
        masqueraded("fd00::2", "a"),
    ];
    assert_eq!(listed, expected);
    assert_eq!(
        table.local().expect("list"),
        [net("10.88.0.0/16"), net("fd00::/64")]
    );

    table
        .remove(&[ip("10.88.0.2"), ip("fd00::2"), ip("10.88.0.99")])
        .expect("remove");
    assert_eq!(table.list().expect("list"), [masqueraded("10.88.0.3", "b")]);
    table.remove(&[ip("10.88.0.2")]).expect("again");
}

#[test]
fn what_a_gone_owner_left_is_removed() {
    let (_netns, mut table) = table();
    assert_eq!(table.remove_owned(|_| true).expect("no table"), 0);
    table
        .add("net/a", &[ip("10.88.0.2"), ip("fd00::2")], &[])
        .expect("add");
    table.add("net/b", &[ip("10.88.0.3")], &[]).expect("add");
    assert_eq!(
        table
            .remove_owned(|owner| owner == "net/a")
            .expect("remove"),
        2
    );
    assert_eq!(
        table.list().expect("list"),
        [masqueraded("10.88.0.3", "net/b")]
    );
    assert_eq!(
        table.remove_owned(|owner| owner == "net/a").expect("again"),
        0
    );
}

#[test]
fn adding_again_changes_the_owner_and_nothing_else() {
    let (netns, mut table) = table();
    table
        .add("a", &[ip("10.88.0.2")], &[net("10.88.0.0/16")])
        .expect("add");
    let before = nft(&netns, "list ruleset");
    table
        .add("a", &[ip("10.88.0.2")], &[net("10.88.0.0/16")])
        .expect("again");
    assert_eq!(nft(&netns, "list ruleset"), before);
    table
        .add("b", &[ip("10.88.0.2")], &[])
        .expect("another owner");
    assert_eq!(table.list().expect("list"), [masqueraded("10.88.0.2", "b")]);
    assert_eq!(table.local().expect("list"), [net("10.88.0.0/16")]);
}

#[test]
fn another_address_leaves_what_is_complete_as_it_is() {
    let (netns, mut table) = table();
    let ranges = [net("10.88.0.0/16")];
    table.add("a", &[ip("10.88.0.2")], &ranges).expect("add");
    // A rule that is written anew has another handle.
    let handles = || nft(&netns, "--handle list chain inet kbptest postrouting");
    let before = handles();
    table
        .add("b", &[ip("10.88.0.3")], &[net("10.88.1.0/24")])
        .expect("another");
    assert_eq!(handles(), before);
    let mut listed = table.list().expect("list");
    listed.sort_by_key(|entry| entry.address);
    let expected = [masqueraded("10.88.0.2", "a"), masqueraded("10.88.0.3", "b")];
    assert_eq!(listed, expected);
    assert_eq!(table.local().expect("list"), ranges);
    // Something is missing, or in the way: everything is written.
    table
        .add("c", &[ip("10.88.0.4")], &[net("10.89.0.0/16")])
        .expect("another range");
    assert_ne!(handles(), before);
    let before = handles();
    table
        .add("c", &[ip("10.88.0.2")], &ranges)
        .expect("another owner");
    assert_ne!(handles(), before);
}

#[test]
fn what_somebody_deleted_is_mended() {
    let (netns, mut table) = table();
    table.add("a", &[ip("10.88.0.2")], &[]).expect("add");
    nft(&netns, "flush chain inet kbptest postrouting");
    assert!(!table.is_active().expect("ask"));
    table.add("b", &[ip("10.88.0.3")], &[]).expect("add");
    assert!(table.is_active().expect("ask"));
    assert_eq!(table.list().expect("list").len(), 2);
}

#[test]
fn nested_ranges_leave_the_outer_one() {
    let (_netns, mut table) = table();
    table
        .add(
            "a",
            &[],
            &[
                net("10.88.4.0/24"),
                net("10.88.5.0/24"),
                net("10.99.0.0/16"),
            ],
        )
        .expect("add");
    // Inside one that is there, beside one, and around two.
    table.add("b", &[], &[net("10.99.7.0/24")]).expect("inside");
    assert_eq!(table.local().expect("list").len(), 3);
    table
        .add(
            "c",
            &[ip("10.88.1.1")],
            &[net("10.88.0.0/16"), net("10.88.9.0/24")],
        )
        .expect("around");
    assert_eq!(
        table.local().expect("list"),
        [net("10.88.0.0/16"), net("10.99.0.0/16")]
    );
    assert_eq!(table.list().expect("list"), [masqueraded("10.88.1.1", "c")]);
    table
        .add("d", &[], &[net("10.0.0.0/8"), net("fc00::/7")])
        .expect("around all");
    table
        .add("e", &[], &[net("10.88.0.0/16"), net("fd00::/64")])
        .expect("inside all");
    assert_eq!(
        table.local().expect("list"),
        [net("10.0.0.0/8"), net("fc00::/7")]
    );
    // Neighbours touch and do not overlap.
    table
        .add("f", &[], &[net("9.0.0.0/8"), net("11.0.0.0/8")])
        .expect("beside");
    assert_eq!(table.local().expect("list").len(), 4);
}

#[test]
fn the_table_goes_when_it_is_unused_or_when_asked() {
    let (netns, mut table) = table();
    assert!(!table.delete_if_unused().expect("nothing there"));
    table.delete().expect("nothing there");

    table
        .add("a", &[ip("10.88.0.2")], &[net("10.88.0.0/16")])
        .expect("add");
    assert!(!table.delete_if_unused().expect("in use"));
    table.remove(&[ip("10.88.0.2")]).expect("remove");
    assert!(table.delete_if_unused().expect("unused"));
    assert_eq!(nft(&netns, "list ruleset"), "");

    table.add("a", &[ip("10.88.0.2")], &[]).expect("add");
    table.delete().expect("delete");
    assert_eq!(nft(&netns, "list ruleset"), "");
    table.remove(&[ip("10.88.0.2")]).expect("no table");
}

#[test]
fn other_tables_are_left_alone() {
    let (netns, mut table) = table();
    nft(&netns, "add table inet other");
    table.add("a", &[ip("10.88.0.2")], &[]).expect("add");
    table.delete().expect("delete");
    assert_eq!(nft(&netns, "list tables").trim(), "table inet other");
}

#[test]
fn refusals_name_the_table_and_the_value() {
    let (netns, mut table) = table();
    for owner in [String::new(), "x".repeat(128), "a\0b".to_owned()] {
        let error = table
            .add(&owner, &[ip("10.88.0.2")], &[])
            .expect_err("bad owner");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    table
        .add(&"x".repeat(127), &[ip("10.88.0.2")], &[])
        .expect("the longest owner");
    assert_eq!(table.list().expect("list")[0].owner.len(), 127);

    for range in ["0.0.0.0/0", "255.255.0.0/16", "::/0"] {
        let error = table
            .add("a", &[ip("10.88.0.2")], &[net(range)])
            .expect_err("no pod range");
        assert!(
            error
                .to_string()
                .starts_with(&format!("local range \"{range}\"")),
            "{error}"
        );
    }

    // Somebody else's set of the same name but another type.
    nft(&netns, "add table inet taken");
    nft(&netns, "add set inet taken pods4 { type inet_service; }");
    let mut taken = MasqueradeTable::open(&netns, "taken").expect("open");
    let error = taken
        .add("a", &[ip("10.88.0.2")], &[])
        .expect_err("not ours");
    let text = error.to_string();
    assert!(
        text.starts_with("nftables table inet taken: add set pods4: "),
        "{text}"
    );
    assert!(
        nft(&netns, "list table inet taken").lines().count() < 8,
        "nothing half done"
    );
}

#[test]
fn the_probe_agrees() {
    kbp_kernel::probe::masquerade().expect("this kernel masquerades: see the other tests");
}

#[test]
fn many_processes_at_once_lose_nothing() {
    let (netns, mut table) = table();
    let address = |thread: u8, pod: u8| IpAddr::from([10, 88, thread, pod]);
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let netns = &netns;
            scope.spawn(move || {
                let mut table = MasqueradeTable::open(netns, TABLE).expect("open");
                for pod in 1..=25 {
                    let range = IpNet::new(address(thread, 0), 24).expect("prefix");
                    table
                        .add("a", &[address(thread, pod)], &[range])
                        .expect("add");
                    // Never succeeds in taking somebody's address away.
                    table.delete_if_unused().expect("clean up");
                    if pod % 2 == 0 {
                        table.remove(&[address(thread, pod)]).expect("remove");
                    }
                }
            });
        }
    });
    assert!(table.is_active().expect("ask"));
    let mut left: Vec<_> = table
        .list()
        .expect("list")
        .into_iter()
        .map(|m| m.address)
        .collect();
    left.sort();
    let expected: Vec<_> = (0..8)
        .flat_map(|t| (1..=25).step_by(2).map(move |p| address(t, p)))
        .collect();
    assert_eq!(left, expected);
}

/// A pod, a node that forwards, and a world that tells whom it sees.
struct Node {
    node: Netns,
    pod: Netns,
    world: Netns,
}

impl Node {
    fn new() -> Self {
        let names = ["node", "pod", "world"];
        let [node, pod, world] = names.map(|name| Netns::create().expect(name));
        let mut on_node = RouteSocket::open_in(&node).expect("socket");
        let mut batch = Batch::new();
        batch
            .create_veth(&veth("topod", &pod))
            .create_veth(&veth("toworld", &world));
        on_node.execute(&batch).expect("create");
        let mut batch = Batch::new();
        for (link, v4, v6) in [
            ("topod", "10.88.0.1/24", "fd00:88::1/64"),
            ("toworld", "192.0.2.1/24", "2001:db8::1/64"),
        ] {
            let index = on_node.link_by_name(link).expect("ask").expect(link).index;
            batch
                .add_address(index, net(v4), false)
                .add_address(index, net(v6), false);
        }
        on_node.execute(&batch).expect("node addresses");
        let forward = || {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        };
        node.run(forward).expect("enter").expect("forward");
        let node = Self { node, pod, world };
        Self::end(
            &node.pod,
            &["10.88.0.2/24", "fd00:88::2/64"],
            &["10.88.0.1", "fd00:88::1"],
        );
        // The world has an address that counts as another pod's.
        let world = [
            "192.0.2.2/24",
            "2001:db8::2/64",
            "10.99.0.2/32",
            "fd00:99::2/128",
        ];
        Self::end(&node.world, &world, &["192.0.2.1", "2001:db8::1"]);
        let mut batch = Batch::new();
        let index = on_node
            .link_by_name("toworld")
            .expect("ask")
            .expect("toworld")
            .index;
        for (range, gateway) in [
            ("10.99.0.0/24", "192.0.2.2"),
            ("fd00:99::/64", "2001:db8::2"),
        ] {
            batch.add_route(&Route {
                gateway: Some(ip(gateway)),
                ..Route::new(net(range), index)
            });
        }
        on_node.execute(&batch).expect("node routes");
        node
    }

    fn end(netns: &Netns, addresses: &[&str], gateways: &[&str]) {
        let mut socket = RouteSocket::open_in(netns).expect("socket");
        let index = socket
            .link_by_name("eth0")
            .expect("ask")
            .expect("eth0")
            .index;
        let mut batch = Batch::new();
        batch.set_up(index);
        for address in addresses {
            batch.add_address(index, net(address), false);
        }
        for gateway in gateways {
            let all = if ip(gateway).is_ipv4() {
                "0.0.0.0/0"
            } else {
                "::/0"
            };
            batch.add_route(&Route {
                gateway: Some(ip(gateway)),
                ..Route::new(net(all), index)
            });
        }
        socket.execute(&batch).expect("configure");
    }

    /// Whom the world sees when the pod sends to `destination`.
    fn seen(&self, destination: &str) -> IpAddr {
        let bind = |netns: &Netns, address: IpAddr| {
            let socket = netns.run(|| UdpSocket::bind(SocketAddr::new(address, 0)));
            socket.expect("enter").expect("bind")
        };
        let to = bind(&self.world, ip(destination));
        to.set_read_timeout(Some(Duration::from_secs(60)))
            .expect("timeout");
        let source = if ip(destination).is_ipv4() {
            "10.88.0.2"
        } else {
            "fd00:88::2"
        };
        let from = bind(&self.pod, ip(source));
        from.send_to(b"who am I", to.local_addr().expect("address"))
            .expect("send");
        loop {
            // A receive with a timeout is not restarted after an interruption (signal(7)).
            match to.recv_from(&mut [0; 16]) {
                Ok((_, peer)) => return peer.ip(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("receive: {error}"),
            }
        }
    }
}

#[test]
fn packets_are_masqueraded_to_the_world_and_not_to_pods() {
    let node = Node::new();
    let mut table = MasqueradeTable::open(&node.node, TABLE).expect("open");
    let pod = [ip("10.88.0.2"), ip("fd00:88::2")];
    let local = [net("10.99.0.0/24"), net("fd00:99::/64")];
    assert_eq!(node.seen("192.0.2.2"), pod[0]);
    assert_eq!(node.seen("2001:db8::2"), pod[1]);

    table.add("a", &pod, &local).expect("add");
    assert_eq!(node.seen("192.0.2.2"), ip("192.0.2.1"));
    assert_eq!(node.seen("2001:db8::2"), ip("2001:db8::1"));
    assert_eq!(node.seen("10.99.0.2"), pod[0]);
    assert_eq!(node.seen("fd00:99::2"), pod[1]);

    table.remove(&pod).expect("remove");
    assert_eq!(node.seen("192.0.2.2"), pod[0]);
    assert_eq!(node.seen("2001:db8::2"), pod[1]);
}

#[test]
fn nft_can_restore_what_it_saved() {
    let (netns, mut table) = table();
    table
        .add("net/pod-a/eth0", &[ip("10.88.0.2")], &[net("10.88.0.0/16")])
        .expect("add");
    let saved = nft(&netns, "list ruleset");
    let elsewhere = Netns::create().expect("namespace");
    let restore = || {
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()?;
        if let Some(mut input) = nft.stdin.take() {
            std::io::Write::write_all(&mut input, saved.as_bytes())?;
        }
        nft.wait()
    };
    assert!(
        elsewhere
            .run(restore)
            .expect("enter")
            .expect("run nft")
            .success()
    );
    let mut restored = MasqueradeTable::open(&elsewhere, TABLE).expect("open");
    assert_eq!(
        restored.list().expect("list"),
        [masqueraded("10.88.0.2", "net/pod-a/eth0")]
    );
    assert_eq!(restored.local().expect("list"), [net("10.88.0.0/16")]);
    restored
        .add("b", &[ip("10.88.0.3")], &[net("10.88.0.0/16")])
        .expect("add to it");
}
