//! Links that change under an attachment.

use std::os::fd::{AsFd, AsRawFd};

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::link::Batch;
use kbp_kernel::netns::Netns;
use kbp_poller::attach::Attachment;
use kbp_poller::state::{self, InterfaceState, Part};

use crate::changes;
use crate::node::{Node, execute, ip, wait_until};

/// Nothing of these attachments happens by the clock: see [`changes`].
#[test]
fn every_change_is_noticed_by_an_event() {
    for change in changes::visible(true) {
        changes::times_to_notice(&change, 2);
    }
}

/// The figures of docs/poller.md, of a machine that does nothing else.
#[test]
#[ignore = "a measurement; run it alone, with --nocapture"]
fn how_long_changes_go_unnoticed() {
    println!("20 times each, ms: median, longest");
    for change in changes::visible(true) {
        let mut times = changes::times_to_notice(&change, 20);
        times.sort_unstable();
        let ms = |n: usize| times[n].as_secs_f64() * 1e3;
        println!("{:40} {:6.0} {:6.0}", change.name, ms(10), ms(19));
    }
}

fn interface(attachment: &Attachment) -> InterfaceState {
    attachment.state().interfaces.remove(0)
}

fn flap(node: &Node, host_side: bool) {
    let (netns, index) = if host_side {
        (&node.host, node.host_link("vhost0").index)
    } else {
        (&node.pod, node.pod_link("eth0").index)
    };
    let mut batch = Batch::new();
    batch.set_down(index).set_up(index);
    execute(netns, &batch);
}

#[test]
fn polling_goes_on_after_a_link_went_down_and_up() {
    for host_side in [true, false] {
        let node = Node::new();
        let attachment = node.attached(node.dedicated("a"));
        let before = interface(&attachment);
        flap(&node, host_side);
        let changed = |now: &InterfaceState| {
            if host_side {
                now.host_napi.is_some() && now.host_napi != before.host_napi
            } else {
                now.pod_napi.is_some() && now.pod_napi != before.pod_napi
            }
        };
        wait_until("new NAPI ids in the state file", || {
            let pods = state::read_all(&node.state_dir()).expect("read");
            changed(&pods[0].interfaces[0]).then_some(())
        });
        assert_eq!(attachment.state().degraded, []);
        let _traffic = node.traffic();
        node.wait_kept_polling();
    }
}

#[test]
fn a_link_that_is_down_is_reported_until_it_is_up_again() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let index = node.host_link("vhost0").index;
    let mut batch = Batch::new();
    batch.set_down(index);
    execute(&node.host, &batch);
    let reason = wait_until("the degraded part", || {
        let degraded = attachment.state().degraded;
        let found = degraded.into_iter().find(|d| d.part == Part::PollableVeth);
        found.map(|d| d.reason)
    });
    assert!(reason.contains("vhost0 is down"), "{reason}");
    assert_eq!(interface(&attachment).host_napi, None);

    let mut batch = Batch::new();
    batch.set_up(index);
    execute(&node.host, &batch);
    wait_until("the end of it", || {
        attachment.state().degraded.is_empty().then_some(())
    });
    let _traffic = node.traffic();
    node.wait_kept_polling();
}

#[test]
fn offloads_that_somebody_else_changes_are_set_again() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let wanted = Features {
        gro: true,
        tso: false,
    };
    for (netns, name) in [(&node.host, "vhost0"), (&node.pod, "eth0")] {
        let other = Features {
            gro: false,
            tso: true,
        };
        ethtool::set_features(netns, name, other).expect("change");
        wait_until("the offloads", || {
            let now = ethtool::features(netns, name).expect("features");
            (now == wanted).then_some(())
        });
    }
    wait_until("NAPI ids", || {
        let now = interface(&attachment);
        (now.host_napi.is_some() && now.pod_napi.is_some()).then_some(())
    });
    let _traffic = node.traffic();
    node.wait_kept_polling();
}

#[test]
fn an_interface_that_comes_later_is_polled_too() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    node.add_veth("vhost1", "eth1", 2);
    wait_until("the second interface", || {
        let interfaces = attachment.state().interfaces;
        (interfaces.len() == 2 && interfaces.iter().all(|i| i.host_napi.is_some())).then_some(())
    });
    let features = ethtool::features(&node.pod, "eth1").expect("features");
    assert_eq!(
        features,
        Features {
            gro: true,
            tso: false
        }
    );
}

#[test]
fn when_the_veth_is_gone_the_worker_ends() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let tid = attachment.state().worker.expect("a worker").tid;
    let mut batch = Batch::new();
    batch.delete_link(node.host_link("vhost0").index);
    execute(&node.host, &batch);
    wait_until("the state", || {
        let state = attachment.state();
        (state.worker.is_none() && state.interfaces.is_empty()).then_some(())
    });
    wait_until("the thread to end", || {
        (!crate::node::thread_lives(tid)).then_some(())
    });
    let missing = attachment.state().degraded;
    assert!(
        missing.len() == 1
            && missing[0].part == Part::PollableVeth
            && missing[0].reason.contains("gone"),
        "{missing:?}"
    );
    attachment.detach().expect("detach");
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
fn an_interface_that_comes_after_all_were_gone_is_polled_again() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let mut batch = Batch::new();
    batch.delete_link(node.host_link("vhost0").index);
    execute(&node.host, &batch);
    wait_until("the end of the worker", || {
        attachment.state().worker.is_none().then_some(())
    });
    // The CPU is free for others in between.
    assert_eq!(node.state_files(), ["pods/a@test.json"]);
    node.add_veth("vhost0", "eth0", 3);
    node.address("vhost0", "eth0");
    wait_until("another worker", || {
        let state = attachment.state();
        (state.worker.is_some() && state.degraded.is_empty()).then_some(())
    });
    let _traffic = node.traffic();
    node.wait_kept_polling();
}

#[test]
fn renamed_ends_are_followed_by_their_new_names() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let before = interface(&attachment);
    ip(&node.host, "link set vhost0 name renamed0");
    ip(&node.pod, "link set eth0 name net1");
    let now = wait_until("the new names", || {
        let now = interface(&attachment);
        (now.host_interface == "renamed0" && now.pod_interface == "net1").then_some(now)
    });
    assert_eq!(now.host_napi, before.host_napi);
    assert_eq!(attachment.state().degraded, []);
    let _traffic = node.traffic();
    node.wait_kept_polling();
}

#[test]
fn an_end_that_is_moved_away_is_reported_and_polled_again_when_it_is_back() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let elsewhere = Node::empty();
    let move_to = |from: &Netns, to: &Netns| {
        let fd = to.as_fd().as_raw_fd();
        // `ip` takes the number of a process or a name; its own descriptor has the form of a process' namespace.
        let path = format!("/proc/{}/fd/{fd}", std::process::id());
        ip(from, &format!("link set vhost0 netns {path}"));
    };
    move_to(&node.host, &elsewhere.host);
    let reason = wait_until("the report", || {
        let degraded = attachment.state().degraded;
        let found = degraded.into_iter().find(|d| d.part == Part::PollableVeth);
        found.map(|d| d.reason)
    });
    assert!(
        reason.contains("not in the host's network namespace"),
        "{reason}"
    );
    move_to(&elsewhere.host, &node.host);
    ip(&node.host, "link set vhost0 up");
    ip(&node.host, "address add 10.200.0.1/30 dev vhost0");
    // The host's events were asked for by the index that it had; the pod's end sees its peer's carrier.
    wait_until("the veth to be whole again", || {
        let state = attachment.state();
        (state.degraded.is_empty() && state.interfaces.len() == 1).then_some(())
    });
    let _traffic = node.traffic();
    node.wait_kept_polling();
}
