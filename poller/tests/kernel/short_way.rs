//! The way past the pod end's NAPI: taken while it is asked for, looked after like everything else, and gone with whoever took it.

use kbp_kernel::ethtool::{self, Features};
use kbp_poller::attach::{AttachRequest, clear_leftovers};
use kbp_poller::client::Client;
use kbp_poller::policy::{Profile, WorkerPolicy};
use kbp_poller::polled::{self, PolledOutcome};
use kbp_poller::state;

use crate::daemon::Daemon;
use crate::node::{Node, ip, wait_until};

const WHY: &str = "many packets, in this test";

fn request(node: &Node) -> AttachRequest {
    node.request("a", WorkerPolicy::None, "")
}

fn host_end(node: &Node) -> Features {
    ethtool::features(&node.host, "vhost0").expect("features")
}

fn wait_for_tso(node: &Node, on: bool) {
    wait_until("the host end's TSO", || {
        (host_end(node).tso == on).then_some(())
    });
}

#[test]
fn it_is_taken_and_left_as_asked_and_the_napi_stays() {
    let node = Node::new();
    let attachment = node.attached(request(&node));
    let napi = attachment.state().interfaces[0].pod_napi;
    for _ in 0..2 {
        attachment.set_short_way(Some(WHY));
        assert_eq!(attachment.state().short_way.as_deref(), Some(WHY));
        wait_for_tso(&node, true);
        assert!(state::takes_short_way(
            &node.state_dir(),
            node.host_link("vhost0").index
        ));
        // It is ours, and what somebody else does to it is mended as on the long way.
        let off = Features {
            tso: false,
            ..host_end(&node)
        };
        ethtool::set_features(&node.host, "vhost0", off).expect("switch");
        wait_for_tso(&node, true);
        attachment.set_short_way(None);
        assert!(!host_end(&node).tso);
        assert_eq!(attachment.state().short_way, None);
        let on = Features {
            tso: true,
            ..host_end(&node)
        };
        // Read back by this test it might be mended already.
        let _ = ethtool::set_features(&node.host, "vhost0", on);
        wait_for_tso(&node, false);
    }
    assert_eq!(attachment.state().interfaces[0].pod_napi, napi);
    assert_eq!(attachment.state().degraded, []);
    attachment.set_short_way(Some(WHY));
    wait_for_tso(&node, true);
    attachment.detach().expect("detach");
    assert!(!host_end(&node).tso, "undone at the detach");
}

#[test]
fn it_is_not_taken_where_somebody_waits_for_packets() {
    let off = "disable = [\"short-way\"]";
    fn preferring(request: &mut AttachRequest) {
        request.policy.prefer_busy_poll = true;
        request.window.micros = Some(kbp_kernel::Micros(20));
    }
    let bulk = |request: &mut AttachRequest| request.policy.profile = Profile::Throughput;
    type Change = fn(&mut AttachRequest);
    let cases: [(WorkerPolicy, &str, Change); 4] = [
        (WorkerPolicy::Idle, "", |_| {}),
        (WorkerPolicy::None, off, |_| {}),
        (WorkerPolicy::None, "", preferring),
        (WorkerPolicy::None, "", bulk),
    ];
    for (worker, config, change) in cases {
        let node = Node::new();
        let mut request = node.request("a", worker, config);
        change(&mut request);
        let throughput = request.policy.profile == Profile::Throughput;
        let attachment = node.attached(request);
        attachment.set_short_way(Some(WHY));
        assert_eq!(attachment.state().short_way, None, "{worker} {config}");
        // A look at the links later.
        ip(&node.pod, "link set eth0 down");
        ip(&node.pod, "link set eth0 up");
        wait_until("the link", || {
            attachment.state().interfaces[0].pod_napi.map(|_| ())
        });
        assert_eq!(host_end(&node).tso, throughput, "{worker} {config}");
    }
}

#[test]
fn what_a_killed_owner_left_is_undone_by_who_clears_up() {
    let node = Node::new();
    let attachment = node.attached(request(&node));
    attachment.set_short_way(Some(WHY));
    wait_for_tso(&node, true);
    let mut left = attachment.state();
    attachment.detach().expect("detach");
    left.owner_start += 1;
    let clear = |left: &state::PodState| {
        let on = Features {
            tso: true,
            ..host_end(&node)
        };
        ethtool::set_features(&node.host, "vhost0", on).expect("as it was left");
        state::write(&node.state_dir(), left).expect("write");
        let clear = || clear_leftovers(&node.state_dir());
        node.host.run(clear).expect("enter").expect("clear");
        assert!(node.state_files().is_empty(), "{:?}", node.state_files());
        host_end(&node).tso
    };
    assert!(!clear(&left));
    left.short_way = None;
    assert!(clear(&left), "somebody else's");
}

#[test]
fn the_daemon_takes_it_too_and_whoever_has_the_pod_after_it() {
    let node = Node::new();
    let attach = || polled::attach(request(&node));
    let PolledOutcome::Attached(polled) = node.host.run(attach).expect("enter").expect("attach")
    else {
        panic!("not attached");
    };
    polled.set_short_way(Some(WHY));
    wait_for_tso(&node, true);
    let told = || {
        let states = state::read_all(&node.state_dir()).expect("states");
        states.first().and_then(|s| s.short_way.clone())
    };
    let daemon = Daemon::start(&node, "");
    let _: Client = daemon.client();
    for at_daemon in [true, false] {
        wait_until("the other owner", || {
            let there = polled.is_at_daemon() == at_daemon;
            (there && told().as_deref() == Some(WHY) && host_end(&node).tso).then_some(())
        });
        if at_daemon {
            polled.set_short_way(None);
            assert_eq!((told(), host_end(&node).tso), (None, false));
            polled.set_short_way(Some(WHY));
            wait_for_tso(&node, true);
            daemon.signal(9);
        }
    }
    drop(polled);
    assert!(!host_end(&node).tso);
}
