//! What an attach sets up, what it says, and what it leaves.

use std::time::Duration;

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::{CpuId, cpu};
use kbp_poller::Error;
use kbp_poller::attach::Outcome;
use kbp_poller::policy::{Policy, Profile, WorkerPolicy};
use kbp_poller::state::{self, Degraded, Part, WorkerState};

use crate::node::{Node, any_cpu, thread_lives, wait_parked, wait_until};

const POLLABLE: Features = Features {
    gro: true,
    tso: false,
};

/// What the worker of `state` is, read from the kernel's side.
fn assert_runs_as(worker: &WorkerState, class: Scheduling) {
    let name = std::fs::read_to_string(format!("/proc/self/task/{}/comm", worker.tid));
    assert!(name.expect("a thread").starts_with("iou-sqp-"));
    assert_eq!(process::scheduling(worker.tid).expect("class"), class);
    assert_eq!(
        process::affinity(worker.tid).expect("affinity").to_string(),
        worker.cpu.to_string()
    );
}

fn cpu_time(worker: &WorkerState) -> Duration {
    process::cpu_time(worker.tid, worker.tid).expect("cpu time")
}

#[test]
fn a_worker_polls_while_packets_flow_and_parks_when_they_stop() {
    let node = Node::new();
    let attachment = node.attached(node.dedicated("a"));
    let state = attachment.state();
    assert_eq!(state.degraded, []);
    let worker = state.worker.expect("a worker");
    assert_eq!(worker.policy, WorkerPolicy::Dedicated);
    assert_eq!(worker.cpu, any_cpu().0);
    assert!(!worker.idle_class);
    assert_runs_as(&worker, Scheduling::Other(0));

    wait_parked(worker.tid);
    let traffic = node.traffic();
    node.wait_kept_polling();
    let ran_on = process::last_cpu(worker.tid, worker.tid).expect("cpu");
    assert_eq!(ran_on, CpuId(worker.cpu));
    drop(traffic);
    wait_parked(worker.tid);
}

#[test]
fn an_idle_worker_is_in_the_idle_class_and_wakes_with_traffic() {
    let node = Node::new();
    let attachment = node.attached(node.request("a", WorkerPolicy::Idle, ""));
    let state = attachment.state();
    assert_eq!(state.degraded, []);
    let worker = state.worker.expect("a worker");
    assert_eq!(worker.policy, WorkerPolicy::Idle);
    assert!(worker.idle_class);
    assert_runs_as(&worker, Scheduling::Idle);

    wait_parked(worker.tid);
    let parked = cpu_time(&worker);
    let _traffic = node.traffic();
    wait_until("the worker to run", || {
        (cpu_time(&worker) > parked).then_some(())
    });
}

#[test]
fn without_a_worker_only_the_pod_end_is_made_pollable() {
    let node = Node::new();
    let ends = [(&node.host, "vhost0"), (&node.pod, "eth0")];
    let features = || ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    let before = features();
    let attachment = node.attached(node.request("a", WorkerPolicy::None, ""));
    assert_eq!(
        features(),
        [
            Features {
                tso: false,
                ..before[0]
            },
            Features {
                gro: true,
                ..before[1]
            }
        ]
    );
    assert_eq!(node.host_link("vhost0").qdisc.as_deref(), Some("pfifo"));
    assert_eq!(node.pod_link("eth0").qdisc.as_deref(), Some("noqueue"));
    let state = attachment.state();
    assert_eq!(state.degraded, []);
    let [interface] = &state.interfaces[..] else {
        panic!("{state:?}")
    };
    assert!(interface.host_napi.is_none() && interface.pod_napi.is_some());
    attachment.detach_and_restore().expect("detach");
    assert_eq!(features(), before);
}

#[test]
fn both_ends_are_made_pollable_and_the_state_says_so() {
    let node = Node::new();
    assert_eq!(node.host_link("vhost0").qdisc.as_deref(), Some("noqueue"));
    let attachment = node.attached(node.request("a", WorkerPolicy::Idle, ""));

    for (netns, name) in [(&node.host, "vhost0"), (&node.pod, "eth0")] {
        assert_eq!(ethtool::features(netns, name).expect("features"), POLLABLE);
    }
    assert_eq!(node.host_link("vhost0").qdisc.as_deref(), Some("pfifo"));
    assert_eq!(node.pod_link("eth0").qdisc.as_deref(), Some("pfifo"));

    let state = attachment.state();
    assert_eq!(state.degraded, []);
    assert!(state.worker.is_some());
    let [interface] = &state.interfaces[..] else {
        panic!("{state:?}")
    };
    assert_eq!(interface.host_interface, "vhost0");
    assert_eq!(interface.pod_interface, "eth0");
    assert_eq!(interface.host_ifindex, node.host_link("vhost0").index.0);
    assert!(interface.host_napi.is_some() && interface.pod_napi.is_some());
    assert_ne!(interface.host_napi, interface.pod_napi);
    assert_eq!(state::read_all(&node.state_dir()).expect("read"), [state]);
}

#[test]
fn detaching_leaves_nothing_but_the_offloads() {
    let node = Node::new();
    let cpu = any_cpu();
    let attachment = node.attached(node.dedicated("a"));
    let worker = attachment.state().worker.expect("a worker");
    assert_eq!(
        process::scheduling(worker.tid).expect("class"),
        Scheduling::Other(0)
    );
    assert_eq!(
        node.state_files(),
        ["pods/a@test.json", &format!("cpu/{cpu}")]
    );

    attachment.detach().expect("detach");
    assert_eq!(node.state_files(), Vec::<String>::new());
    wait_until("the thread to end", || {
        (!thread_lives(worker.tid)).then_some(())
    });
    let features = ethtool::features(&node.host, "vhost0").expect("features");
    assert_eq!(features, POLLABLE);
}

#[test]
fn a_pod_that_lives_on_gets_its_offloads_back() {
    let node = Node::new();
    let ends = [(&node.host, "vhost0"), (&node.pod, "eth0")];
    let before = ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    assert_ne!(before[0], POLLABLE, "a veth is not pollable by itself");
    let attachment = node.attached(node.request("a", WorkerPolicy::Idle, ""));
    attachment.detach_and_restore().expect("detach");
    let after = ends.map(|(n, name)| ethtool::features(n, name).expect("features"));
    assert_eq!(after, before);
}

#[test]
fn the_throughput_profile_leaves_tso() {
    let node = Node::new();
    let mut request = node.request("a", WorkerPolicy::Idle, "");
    request.policy.profile = Profile::Throughput;
    let attachment = node.attached(request);
    for (netns, name) in [(&node.host, "vhost0"), (&node.pod, "eth0")] {
        let features = ethtool::features(netns, name).expect("features");
        assert_eq!(
            features,
            Features {
                gro: true,
                tso: true
            }
        );
    }
    assert_eq!(attachment.state().degraded, []);
}

#[test]
fn the_auto_worker_uses_the_pool_when_there_is_one() {
    let node = Node::new();
    let cpu = any_cpu();
    let pool = format!("cpus = \"{cpu}\"");
    let first = node.attached(node.request("a", WorkerPolicy::Auto, &pool));
    let worker = first.state().worker.expect("a worker");
    assert_eq!(
        (worker.policy, worker.cpu, worker.idle_class),
        (WorkerPolicy::Shared, cpu.0, false)
    );

    // Another one on the same core, and one that wants it alone.
    let other = Node::new();
    let mut request = other.request("b", WorkerPolicy::Shared, &pool);
    request.config.state_dir = node.state_dir();
    let second = other.attached(request);
    assert_eq!(second.state().worker.expect("a worker").cpu, cpu.0);
    drop(first);
    assert!(node.state_files().contains(&format!("cpu/{cpu}")));
    drop(second);
    assert_eq!(node.state_files(), Vec::<String>::new());

    let without = node.attached(node.request("a", WorkerPolicy::Auto, ""));
    let state = without.state();
    assert!(state.worker.is_none(), "{state:?}");
    assert_eq!(state.degraded, []);
}

#[test]
fn idle_workers_spread_over_the_cpus() {
    let cpus = cpu::usable().expect("cpus");
    let node = Node::new();
    let others: Vec<Node> = cpus.iter().skip(1).map(|_| Node::new()).collect();
    let mut attachments = vec![node.attached(node.request("first", WorkerPolicy::Idle, ""))];
    for (number, other) in others.iter().enumerate() {
        let mut request = other.request(&format!("other{number}"), WorkerPolicy::Idle, "");
        request.config.state_dir = node.state_dir();
        attachments.push(other.attached(request));
    }
    let used = attachments
        .iter()
        .map(|a| CpuId(a.state().worker.expect("a worker").cpu))
        .collect::<kbp_kernel::CpuSet>();
    assert_eq!(used, cpus);
}

#[test]
fn what_is_switched_off_degrades_with_the_name_of_the_file() {
    for (features, part, keeps_veth) in [
        (&["sqpoll", "socket"][..], Part::Worker, true),
        (&["napi"], Part::PollableVeth, false),
    ] {
        let node = Node::new();
        let config = format!("disable = {features:?}");
        let request = node.request("a", WorkerPolicy::Idle, &config);
        let reasons: Vec<String> = features
            .iter()
            .map(|feature| {
                let which = match part {
                    Part::Worker => format!("{feature}: "),
                    _ => String::new(),
                };
                let file = request.config.path.display();
                format!("{which}switched off by disable = [\"{feature}\"] in {file}")
            })
            .collect();
        let reason = reasons.join("; ");
        let state = node.attached(request).state();
        assert_eq!(
            state.degraded,
            [Degraded {
                part,
                reason: reason.clone()
            }]
        );
        assert_eq!(state.worker, None);
        let found = ethtool::features(&node.host, "vhost0").expect("features");
        assert_eq!(found == POLLABLE, keeps_veth, "{features:?}");

        let mut request = node.request("a", WorkerPolicy::Idle, &config);
        request.policy.required = true;
        let error = node.attach(request).expect_err("required");
        assert!(
            matches!(&error, Error::Required { part: p, .. } if *p == part),
            "{error}"
        );
        assert!(error.to_string().contains(&reason), "{error}");
        assert_eq!(node.state_files(), Vec::<String>::new());
    }
}

#[test]
fn a_worker_that_nobody_wants_is_not_missing() {
    let node = Node::new();
    for config in ["", "disable = [\"sqpoll\", \"socket\"]"] {
        let mut request = node.request("a", WorkerPolicy::Auto, config);
        request.policy.required = true;
        let state = node.attached(request).state();
        assert_eq!(state.degraded, [], "{config}");
        assert!(state.worker.is_none(), "{state:?}");
        assert!(
            state
                .worker_reason
                .starts_with("auto: the node has no CPU pool"),
            "{}",
            state.worker_reason
        );
    }
    // A pool says that workers are wanted.
    let config = format!(
        "disable = [\"sqpoll\", \"socket\"]\ncpus = \"{}\"",
        any_cpu()
    );
    let state = node
        .attached(node.request("a", WorkerPolicy::Auto, &config))
        .state();
    assert_eq!(state.degraded.len(), 1, "{state:?}");
    assert_eq!(state.degraded[0].part, Part::Worker);
}

#[test]
fn claims_that_cannot_be_cleared_cost_nothing_but_their_cpus() {
    let node = Node::new();
    let state_dir = node.state_dir();
    std::fs::create_dir_all(&state_dir).expect("mkdir");
    std::fs::write(state_dir.join("cpu"), "").expect("occupy the directory of claims");
    let state = node
        .attached(node.request("a", WorkerPolicy::Auto, ""))
        .state();
    assert_eq!(state.degraded, []);
    std::fs::remove_file(state_dir.join("cpu")).expect("remove");
}

#[test]
fn what_the_caller_lacks_counts_too_and_can_be_told_later() {
    let node = Node::new();
    let missing = Degraded {
        part: Part::EpollBusyPoll,
        reason: "the kernel is too old".to_owned(),
    };
    let mut request = node.request("a", WorkerPolicy::None, "");
    request.degraded = vec![missing.clone()];
    let attachment = node.attached(request);
    let later = Degraded {
        part: Part::SocketBusyPoll,
        reason: "somebody else listens".to_owned(),
    };
    attachment.degrade(later.clone());
    let states = state::read_all(&node.state_dir()).expect("read");
    assert_eq!(states[0].degraded, [missing.clone(), later]);
    drop(attachment);

    let mut request = node.request("a", WorkerPolicy::None, "");
    request.degraded = vec![missing];
    request.policy = Policy {
        required: true,
        ..request.policy
    };
    let error = node.attach(request).expect_err("required").to_string();
    assert_eq!(
        error,
        "kbp.io/required is true, but epoll-busy-poll is not active: the kernel is too old"
    );
}

#[test]
fn a_pod_without_an_interface_and_the_host_itself_are_told_apart() {
    let node = Node::empty();
    let outcome = node.attach(node.request("a", WorkerPolicy::Idle, ""));
    assert!(matches!(outcome, Ok(Outcome::NoInterface)), "{outcome:?}");
    let node = Node::new();
    let mut request = node.request("a", WorkerPolicy::Idle, "");
    request.netns = node.host.try_clone().expect("handle");
    let before = ethtool::features(&node.host, "vhost0").expect("features");
    let outcome = node.attach(request);
    assert!(matches!(outcome, Ok(Outcome::HostNetwork)), "{outcome:?}");
    let after = ethtool::features(&node.host, "vhost0").expect("features");
    assert_eq!(after, before, "nothing is tuned on the host");
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
fn an_id_that_is_no_file_name_is_refused() {
    let node = Node::new();
    let error = node
        .attach(node.request("../a", WorkerPolicy::Idle, ""))
        .expect_err("refused");
    assert!(error.to_string().contains("\"../a\""), "{error}");
}
