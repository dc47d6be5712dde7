//! Every kind of worker, each forced by switching the others off: that it polls, follows its link, parks, and leaves no trace.

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::gro_list::GroList;
use kbp_kernel::napi::{NetdevSocket, Threaded};
use kbp_kernel::probe;
use kbp_poller::attach::{AttachRequest, Attachment};
use kbp_poller::policy::{Profile, WorkerPolicy};
use kbp_poller::state::{Part, PodState};

use crate::node::{Node, any_cpu, ip, thread_lives, wait_parked, wait_until};

/// Packets that have to be polled before it counts. One would do, since softirq handles none of them on the worker's CPU.
const SOME: u64 = 10;

const KINDS: [&str; 4] = ["kthread", "threaded", "sqpoll", "socket"];

/// The config under which a dedicated worker is of this kind.
fn only(kind: &str) -> String {
    let others = KINDS.iter().filter(|k| **k != kind);
    let others: Vec<String> = others.map(|k| format!("\"{k}\"")).collect();
    let others = others.join(", ");
    format!("cpus = \"{}\"\ndisable = [{others}]\n", any_cpu())
}

fn attached(node: &Node, policy: WorkerPolicy, config: &str) -> Attachment {
    node.attached(node.request("a", policy, config))
}

/// How the host end's NAPI runs, where the kernel tells.
fn threaded(node: &Node) -> Option<Threaded> {
    let link = node.host_link("vhost0").index;
    let napis = NetdevSocket::open_in(&node.host).and_then(|mut s| s.napis(link));
    napis.ok()?.first()?.threaded
}

/// What holds of a kind that this kernel has.
fn works(kind: &str) {
    let node = Node::new();
    let attachment = node.attached(request(&node, kind));
    let state = attachment.state();
    assert_eq!(state.degraded, [], "{kind}");
    let worker = state.worker.expect("a worker");
    assert_eq!(worker.kind, kind);
    let is_thread_of_ours = worker.tid != 0;
    if is_thread_of_ours {
        wait_parked(worker.tid);
    } else {
        assert_ne!(threaded(&node), Some(Threaded::BusyPoll));
    }

    let traffic = node.traffic();
    traffic.wait_taken(SOME);
    // A link that goes down and up has another NAPI.
    ip(&node.host, "link set vhost0 down");
    ip(&node.host, "link set vhost0 up");
    traffic.wait_taken(SOME);
    drop(traffic);
    if is_thread_of_ours {
        wait_parked(worker.tid);
    } else {
        wait_until("the NAPI to be softirq's", || {
            (threaded(&node) == Some(Threaded::Disabled)).then_some(())
        });
    }
    let traffic = node.traffic();
    traffic.wait_taken(SOME);

    attachment.detach().expect("detach");
    traffic.wait_left();
    assert_ne!(threaded(&node), Some(Threaded::BusyPoll));
    assert_eq!(node.state_files(), Vec::<String>::new());
    if is_thread_of_ours {
        wait_until("the thread to end", || {
            (!thread_lives(worker.tid)).then_some(())
        });
    }
}

fn request(node: &Node, kind: &str) -> AttachRequest {
    let mut request = node.request("a", WorkerPolicy::Dedicated, &only(kind));
    if kind == "threaded" {
        request.policy.profile = Profile::Throughput;
    }
    request
}

/// What holds of a kind that it has not: the pod goes on without a worker, for a reason that names the kind.
fn degrades(kind: &str) {
    let node = Node::new();
    let state = node.attached(request(&node, kind)).state();
    let [missing] = &state.degraded[..] else {
        panic!("{kind}: {state:#?}")
    };
    assert_eq!(missing.part, Part::Worker);
    for part in [format!("{kind}: "), "switched off by disable".to_owned()] {
        assert!(missing.reason.contains(&part), "{}", missing.reason);
    }
    assert_eq!(state.worker, None);
}

fn works_or_degrades(kind: &str, has: kbp_kernel::Result<()>) {
    match has {
        Ok(()) => works(kind),
        Err(reason) => {
            println!("this kernel has no {kind}: {reason}");
            degrades(kind);
        }
    }
}

#[test]
fn kthread() {
    works_or_degrades("kthread", probe::threaded_busy_poll());
}

#[test]
fn threaded_for_throughput() {
    works_or_degrades("threaded", probe::threaded());
}

/// TSO is left on, and datagrams come to the worker all the same; what was chained before is put back.
#[test]
fn in_the_throughput_profile_datagrams_are_chained_and_tcp_is_left_alone() {
    let node = Node::new();
    let link = node.host_link("vhost0").index;
    let chained = || {
        let mut lists = GroList::open_in(&node.host).expect("open");
        lists.is_on(link).expect("read")
    };
    let pool = format!("cpus = \"{}\"", any_cpu());
    for policy in [WorkerPolicy::Shared, WorkerPolicy::Dedicated] {
        let mut request = node.request("a", policy, &pool);
        request.policy.profile = Profile::Throughput;
        let attachment = node.attached(request);
        let state = attachment.state();
        assert_eq!(state.degraded, []);
        let sqpoll = if probe::sqpoll_napi().is_ok() {
            "sqpoll"
        } else {
            "socket"
        };
        let expected = if probe::threaded().is_ok() {
            "threaded"
        } else {
            sqpoll
        };
        assert_eq!(state.worker.expect("a worker").kind, expected);
        assert!(chained());
        assert!(ethtool::features(&node.pod, "eth0").expect("features").tso);
        let traffic = node.traffic();
        traffic.wait_taken(SOME);
        drop(traffic);
        attachment.detach_and_restore().expect("detach");
        assert!(!chained());
        assert_ne!(threaded(&node), Some(Threaded::Enabled));
    }
    // A veth without TSO brings all packets to the NAPI: TCP must not be chained there.
    let off = Features {
        gro: true,
        tso: false,
    };
    ethtool::set_features(&node.pod, "eth0", off).expect("features");
    let mut request = node.request("a", WorkerPolicy::None, "");
    request.policy.profile = Profile::Throughput;
    let attachment = node.attached(request);
    assert_eq!(attachment.state().degraded, []);
    assert!(!chained());
}

#[test]
fn sqpoll() {
    works_or_degrades("sqpoll", probe::sqpoll_napi());
}

#[test]
fn socket() {
    works_or_degrades("socket", probe::socket_busy_poll());
}

/// The first kind that works, in the order of the policy.
#[test]
fn the_best_kind_of_this_kernel_is_chosen() {
    let kthread = probe::threaded_busy_poll().is_ok();
    let sqpoll = probe::sqpoll_napi().is_ok();
    let shared = if sqpoll { "sqpoll" } else { "socket" };
    let dedicated = if kthread { "kthread" } else { shared };
    for (policy, expected) in [
        (WorkerPolicy::Dedicated, dedicated),
        (WorkerPolicy::Shared, shared),
        (WorkerPolicy::Auto, shared),
        (WorkerPolicy::Idle, shared),
    ] {
        let node = Node::new();
        let config = format!("cpus = \"{}\"", any_cpu());
        let state = attached(&node, policy, &config).state();
        let kind = state.worker.as_ref().map(|w| w.kind.as_str());
        assert_eq!(kind, Some(expected), "{policy}: {state:#?}");
        assert_eq!(state.degraded, []);
    }
}

/// A firewall between pod and host keeps the packet off that tells the NAPI to a socket.
#[test]
fn a_socket_that_no_packet_reaches_is_told() {
    let node = Node::new();
    ip(&node.host, "address flush dev vhost0");
    let state: PodState = attached(&node, WorkerPolicy::Dedicated, &only("socket")).state();
    assert!(
        state
            .degraded
            .iter()
            .any(|d| d.part == Part::Worker && d.reason.contains("eth0")),
        "{state:#?}"
    );
}
