//! Offload features, checked with ethtool(8), the reader that is not ours.

use std::collections::BTreeMap;
use std::process::Command;

use kbp_kernel::ethtool::{Features, features, set_features};
use kbp_kernel::gro_list::GroList;
use kbp_kernel::link::RouteSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::{Error, IfIndex};

use crate::pair::Pair;

const POLLABLE: Features = Features {
    gro: true,
    tso: false,
};
const STOCK: Features = Features {
    gro: false,
    tso: true,
};

fn ethtool(netns: &Netns, arguments: &str) -> String {
    let run = || {
        Command::new("ethtool")
            .args(arguments.split_whitespace())
            .output()
    };
    let output = netns.run(run).expect("enter").expect("run ethtool");
    assert!(output.status.success(), "ethtool {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// What `ethtool -k` says.
fn shown(netns: &Netns, link: &str) -> BTreeMap<String, bool> {
    ethtool(netns, &format!("-k {link}"))
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, state)| (name.trim().to_owned(), state.trim().starts_with("on")))
        .collect()
}

/// NETIF_F_ALL_TSO. Newer kernels have tx-tcp-accecn-segmentation beside it, which does not keep
/// a packet from the NAPI instance.
const ALL_TSO: [&str; 4] = [
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
];

#[test]
fn a_veth_is_made_pollable_and_stock_again() {
    let pair = Pair::new();
    for (netns, link) in [(&pair.host, "kbphost"), (&pair.pod, "eth0")] {
        assert_eq!(features(netns, link).expect("read"), STOCK);

        set_features(netns, link, POLLABLE).expect("make pollable");
        assert_eq!(features(netns, link).expect("read"), POLLABLE);
        let state = shown(netns, link);
        assert!(state["generic-receive-offload"]);
        assert!(ALL_TSO.iter().all(|name| !state[*name]), "{state:?}");
        // Others are left alone.
        assert!(state["tx-udp-segmentation"], "{state:?}");

        set_features(netns, link, STOCK).expect("undo");
        assert_eq!(features(netns, link).expect("read"), STOCK);
        let state = shown(netns, link);
        assert!(!state["generic-receive-offload"]);
        assert!(ALL_TSO.iter().all(|name| state[*name]), "{state:?}");
    }
}

#[test]
fn one_tso_of_many_counts_as_on() {
    let pair = Pair::new();
    set_features(&pair.pod, "eth0", POLLABLE).expect("make pollable");
    ethtool(&pair.pod, "-K eth0 tx-tcp6-segmentation on");
    assert!(features(&pair.pod, "eth0").expect("read").tso);
    set_features(&pair.pod, "eth0", POLLABLE).expect("again");
    assert!(!features(&pair.pod, "eth0").expect("read").tso);
}

#[test]
fn a_missing_link_and_a_bad_name_are_named() {
    let netns = Netns::create().expect("namespace");
    let error = set_features(&netns, "eth0", POLLABLE).expect_err("no such link");
    assert_eq!(error.to_string(), "link eth0 not found");
    for name in ["", "a-name-of-16-byt"] {
        let error = features(&netns, name).expect_err("bad name");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
}

#[test]
fn a_device_that_does_not_follow_is_named_with_the_feature() {
    let pair = Pair::new();
    set_features(&pair.pod, "eth0", POLLABLE).expect("make pollable");
    // The kernel takes the wish for TSO but does not fulfil it without scatter-gather.
    ethtool(&pair.pod, "-K eth0 sg off");
    let error = set_features(&pair.pod, "eth0", STOCK).expect_err("impossible");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "TCP segmentation offload (TSO) on is not available: link eth0 does not take it over"
    );
}

#[test]
fn datagrams_are_chained_where_that_is_switched_on() {
    let pair = Pair::new();
    set_features(&pair.host, "kbphost", POLLABLE).expect("make pollable");
    let index = |netns: &Netns, name: &str| {
        let mut links = RouteSocket::open_in(netns).expect("open");
        let link = links.link_by_name(name).expect("read");
        link.expect("it is there").index
    };
    let link = index(&pair.host, "kbphost");
    let mut lists = GroList::open_in(&pair.host).expect("open");
    assert!(!lists.is_on(link).expect("read"));
    for on in [true, true, false] {
        lists.set(link, on).expect("switch");
        assert_eq!(lists.is_on(link).expect("read"), on);
        let state = shown(&pair.host, "kbphost");
        assert_eq!(state["rx-gro-list"], on, "{state:?}");
        assert!(state["generic-receive-offload"], "{state:?}");
    }
    for error in [
        lists.is_on(IfIndex(9999)).expect_err("no such link"),
        lists.set(IfIndex(9999), true).expect_err("no such link"),
    ] {
        assert_eq!(error.to_string(), "link 9999 not found");
    }
}
