//! Attach and detach on another kernel.

use kbp_kernel::ethtool::{self, Features};
use kbp_poller::attach::Attachment;
use kbp_poller::policy::{Policy, WorkerPolicy};
use kbp_poller::state::{Degraded, Part};

use crate::known::Known;
use crate::node::{Node, any_cpu, ip, thread_lives, wait_parked, wait_until};

/// Packets that have to be polled before it counts: enough for it to be no accident, few enough for a slow machine.
const SOME: u64 = 50;

fn attach(node: &Node, worker: WorkerPolicy, config: &str) -> Attachment {
    let config = format!("cpus = \"{}\"\n{config}", any_cpu());
    node.attached(node.request("a", worker, &config))
}

fn degraded(attachment: &Attachment) -> Vec<Degraded> {
    attachment.state().degraded
}

/// What is wrong with `degraded`, which should be about `part` and say one of `reasons`.
fn says(degraded: &[Degraded], part: Part, reasons: &[&str]) {
    let [Degraded { part: p, reason }] = degraded else {
        panic!("not one part: {degraded:?}")
    };
    assert_eq!(*p, part);
    assert!(reasons.iter().any(|r| reason.contains(r)), "{reason}");
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn the_worker_is_the_one_for_this_kernel_and_polls_in_a_guest() {
    let known = Known::here();
    for policy in [WorkerPolicy::Dedicated, WorkerPolicy::Shared] {
        let node = Node::new();
        let attachment = attach(&node, policy, "");
        let state = attachment.state();
        let kind = state.worker.as_ref().map(|w| w.kind.as_str());
        let expected = known.worker(policy);
        assert_eq!(kind, expected, "{policy}: {state:#?}");
        let features = ethtool::features(&node.host, "vhost0").expect("features");
        let pollable = Features {
            gro: true,
            tso: false,
        };
        assert_eq!(features, pollable, "the veth is pollable in any case");
        let Some(worker) = state.worker else {
            says(
                &state.degraded,
                Part::Worker,
                &["static NAPI tracking", "no netlink family netdev"],
            );
            continue;
        };
        assert_eq!(state.degraded, []);
        wait_parked(worker.tid);
        let traffic = node.traffic();
        node.wait_polled(SOME);
        // A link that goes down and up has another NAPI.
        ip(&node.host, "link set vhost0 down");
        ip(&node.host, "link set vhost0 up");
        node.wait_polled(SOME);
        drop(traffic);
        wait_parked(worker.tid);
        attachment.detach().expect("detach");
        wait_until("the thread to end", || {
            (!thread_lives(worker.tid)).then_some(())
        });
        assert_eq!(node.state_files(), Vec::<String>::new());
    }
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn what_is_switched_off_or_required_is_told_in_a_guest() {
    let known = Known::here();
    let node = Node::new();
    let attachment = attach(&node, WorkerPolicy::Shared, "disable = [\"napi\"]\n");
    says(
        &degraded(&attachment),
        Part::PollableVeth,
        &["switched off by disable = [\"napi\"]"],
    );
    drop(attachment);

    let mut request = node.request(
        "a",
        WorkerPolicy::Shared,
        &format!("cpus = \"{}\"", any_cpu()),
    );
    request.policy = Policy {
        required: true,
        ..request.policy
    };
    let outcome = node.attach(request);
    match known.worker(WorkerPolicy::Shared) {
        Some(_) => drop(outcome.expect("everything that is required is there")),
        None => {
            let error = outcome.expect_err("no worker").to_string();
            assert!(error.contains("worker"), "{error}");
        }
    }
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn a_pod_that_lives_on_gets_its_offloads_back_in_a_guest() {
    let node = Node::new();
    let ends = [(&node.host, "vhost0"), (&node.pod, "eth0")];
    let before = ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    let attachment = attach(&node, WorkerPolicy::Shared, "");
    let during = ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    assert_ne!(before, during);
    attachment.detach_and_restore().expect("detach");
    let after = ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    assert_eq!(after, before);
}
