//! Packets that wait for whoever polls: the settings of the pod end's NAPI, there while they are wanted and gone after.

use kbp_kernel::Micros;
use kbp_kernel::napi::{NapiSettings, NetdevSocket};
use kbp_kernel::probe;
use kbp_poller::attach::{AttachRequest, Attachment};
use kbp_poller::policy::{BusyPollMode, WorkerPolicy};
use kbp_poller::state::{Degraded, Part, SocketCounters};
use kbp_poller::window::Window;

use crate::node::{Node, ip, wait_until};

/// (defer-hard-irqs, gro-flush-timeout, irq-suspend-timeout) of an end's NAPI.
type Settings = (u32, u64, u64);

const NONE: Settings = (0, 0, 0);
const PREFER: Settings = (1, 20_000, 0);
const SUSPEND: Settings = (1, 20_000, 200_000);

fn window(micros: Option<u32>) -> Window {
    Window {
        micros: micros.map(Micros),
        reason: "of this test".to_owned(),
    }
}

fn request(node: &Node, mode: BusyPollMode, prefer: bool) -> AttachRequest {
    let mut request = node.request("a", WorkerPolicy::None, "");
    request.policy.busy_poll_mode = mode;
    request.policy.prefer_busy_poll = prefer;
    request.window = window(Some(20));
    request
}

fn settings(netns: &kbp_kernel::netns::Netns, link: kbp_kernel::IfIndex) -> Settings {
    let mut socket = NetdevSocket::open_in(netns).expect("netdev");
    let napis = socket.napis(link).expect("list");
    let napi = napis.first().expect("a NAPI");
    (
        napi.defer_hard_irqs.expect("told"),
        napi.gro_flush_timeout.expect("told"),
        napi.irq_suspend_timeout.expect("told"),
    )
}

fn of_pod(node: &Node) -> Settings {
    settings(&node.pod, node.pod_link("eth0").index)
}

fn set_window(attachment: &Attachment, micros: Option<u32>) {
    attachment.set_sockets(&window(micros), None, SocketCounters::default());
}

#[test]
fn the_policy_decides_and_the_end_takes_it_back() {
    for (mode, prefer, expected) in [
        (BusyPollMode::Spin, false, NONE),
        (BusyPollMode::Spin, true, PREFER),
        (BusyPollMode::Suspend, false, SUSPEND),
        (BusyPollMode::Suspend, true, SUSPEND),
    ] {
        let node = Node::new();
        let attachment = node.attached(request(&node, mode, prefer));
        let state = attachment.state();
        assert_eq!(state.degraded, [], "{mode} {prefer}");
        assert_eq!(
            (state.busy_poll_mode, state.prefer_busy_poll),
            (mode, prefer)
        );
        assert_eq!(of_pod(&node), expected, "{mode} {prefer}");
        // What the pod sends is nobody's to wait for.
        assert_eq!(state.interfaces[0].host_napi, None, "{mode} {prefer}");
        attachment.detach().expect("detach");
        assert_eq!(of_pod(&node), NONE, "{mode} {prefer}");
    }
}

#[test]
fn a_new_napi_gets_them_too() {
    let node = Node::new();
    let attachment = node.attached(request(&node, BusyPollMode::Suspend, false));
    for (off, on) in [
        ("link set eth0 down", "link set eth0 up"),
        ("link set eth0 down", "link set eth0 name eth1 up"),
    ] {
        ip(&node.pod, off);
        ip(&node.pod, on);
        let name = if on.contains("eth1") { "eth1" } else { "eth0" };
        wait_until("the settings of the new NAPI", || {
            (settings(&node.pod, node.pod_link(name).index) == SUSPEND).then_some(())
        });
    }
    drop(attachment);
    assert_eq!(settings(&node.pod, node.pod_link("eth1").index), NONE);
}

#[test]
fn packets_wait_for_nobody_while_no_socket_polls() {
    let node = Node::new();
    let mut without = request(&node, BusyPollMode::Suspend, true);
    without.window = window(None);
    let attachment = node.attached(without);
    assert_eq!(of_pod(&node), NONE);
    for (micros, expected) in [(Some(20), SUSPEND), (None, NONE), (Some(100), SUSPEND)] {
        set_window(&attachment, micros);
        wait_until("the NAPI to follow the window", || {
            (of_pod(&node) == expected).then_some(())
        });
    }
    drop(attachment);

    let mut unable = request(&node, BusyPollMode::Suspend, true);
    unable.degraded = vec![Degraded {
        part: Part::SocketBusyPoll,
        reason: "no listener".to_owned(),
    }];
    let _attachment = node.attached(unable);
    assert_eq!(of_pod(&node), NONE);
}

/// A killed owner takes nothing back; whoever attaches the pod next does. What an operator has set stays.
#[test]
fn what_a_killed_owner_left_goes_with_the_next_attach() {
    let node = Node::new();
    let link = node.pod_link("eth0").index;
    drop(node.attached(request(&node, BusyPollMode::Spin, false)));
    let mut netdev = NetdevSocket::open_in(&node.pod).expect("netdev");
    let id = netdev.napis(link).expect("list")[0].id;
    for (left, expected) in [
        (PREFER, NONE),
        (SUSPEND, NONE),
        ((1, 30_000, 0), (1, 30_000, 0)),
    ] {
        let settings = NapiSettings {
            threaded: None,
            defer_hard_irqs: Some(left.0),
            gro_flush_timeout: Some(left.1),
            irq_suspend_timeout: Some(left.2),
        };
        netdev.set(id, settings).expect("set");
        let attachment = node.attached(request(&node, BusyPollMode::Spin, false));
        assert_eq!(of_pod(&node), expected);
        drop(attachment);
        assert_eq!(of_pod(&node), expected);
    }
}

#[test]
fn what_is_switched_off_is_told_and_refused_where_it_is_required() {
    const OFF: &str = "disable = [\"napi-settings\"]";
    let node = Node::new();
    let mut asked = request(&node, BusyPollMode::Suspend, false);
    asked.config = node.config(OFF);
    let attachment = node.attached(asked);
    let degraded = attachment.state().degraded;
    assert!(
        matches!(&degraded[..], [d] if d.part == Part::PreferBusyPoll && d.reason.contains(OFF)),
        "{degraded:?}"
    );
    assert_eq!(of_pod(&node), NONE);
    drop(attachment);

    let mut required = request(&node, BusyPollMode::Suspend, false);
    required.config = node.config(OFF);
    required.policy.required = true;
    let error = node.attach(required).expect_err("required").to_string();
    assert!(
        error.contains("prefer-busy-poll") && error.contains(OFF),
        "{error}"
    );

    // Of a pod that is refused for something else, nothing stays either.
    let mut refused = request(&node, BusyPollMode::Suspend, false);
    refused.policy.required = true;
    refused.degraded = vec![Degraded {
        part: Part::EpollBusyPoll,
        reason: "no listener".to_owned(),
    }];
    node.attach(refused).expect_err("required");
    assert_eq!(of_pod(&node), NONE);

    let mut spin = request(&node, BusyPollMode::Spin, false);
    spin.config = node.config(OFF);
    spin.policy.required = true;
    assert_eq!(node.attached(spin).state().degraded, []);
}

#[test]
fn the_probe_finds_them_here() {
    probe::napi_settings().expect("napi-set");
}
