//! Attach and detach on another kernel.

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::gro_list::GroList;
use kbp_kernel::napi::{NapiSettings, NetdevSocket, Threaded};
use kbp_poller::attach::{Attachment, clear_leftovers};
use kbp_poller::policy::{BusyPollMode, Profile, WorkerPolicy};
use kbp_poller::state::{self, Degraded, Part};

use crate::changes;
use crate::gives_way;
use crate::known::Known;
use crate::node::{Node, any_cpu, ip, thread_lives, wait_parked, wait_until};

/// Packets that have to be polled before it counts. One would do, since softirq handles none of them on the worker's CPU; a
/// machine whose CPUs take turns gives the worker few.
const SOME: u64 = 3;

fn attach(node: &Node, worker: WorkerPolicy, config: &str) -> Attachment {
    attach_as(node, worker, Profile::Latency, config)
}

fn attach_as(node: &Node, worker: WorkerPolicy, profile: Profile, config: &str) -> Attachment {
    let config = format!("cpus = \"{}\"\n{config}", any_cpu());
    let mut request = node.request("a", worker, &config);
    request.policy.profile = profile;
    node.attached(request)
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

/// A worker of `kind`, and no other.
fn only(kind: &str) -> String {
    let others = ["kthread", "threaded", "sqpoll", "socket"].into_iter();
    let others: Vec<&str> = others.filter(|k| *k != kind).collect();
    format!("disable = {others:?}\n")
}

/// Attaches, and expects a worker of this kind that polls, follows its link, parks and leaves no trace.
fn works(policy: WorkerPolicy, profile: Profile, config: &str, kind: &str) {
    let node = Node::new();
    let attachment = attach_as(&node, policy, profile, config);
    let state = attachment.state();
    assert_eq!(state.degraded, [], "{kind}");
    let worker = state.worker.expect("a worker");
    assert_eq!(worker.kind, kind, "{policy}");
    // Datagrams of a sender that has TSO on come to the NAPI where that chains them.
    let tso = profile == Profile::Throughput;
    for (netns, name) in [(&node.host, "vhost0"), (&node.pod, "eth0")] {
        let features = ethtool::features(netns, name).expect("features");
        assert_eq!(features, Features { gro: true, tso }, "{name}");
    }
    let link = node.host_link("vhost0").index;
    let mut lists = GroList::open_in(&node.host).expect("ethtool family");
    assert_eq!(lists.is_on(link).expect("rx-gro-list"), tso);
    let traffic = node.traffic();
    traffic.wait_taken(SOME);
    // A link that goes down and up has another NAPI.
    ip(&node.host, "link set vhost0 down");
    ip(&node.host, "link set vhost0 up");
    traffic.wait_taken(SOME);
    drop(traffic);
    if worker.tid != 0 {
        wait_parked(worker.tid);
    }
    let traffic = node.traffic();
    traffic.wait_taken(SOME);
    attachment.detach().expect("detach");
    traffic.wait_left();
    wait_until("the thread to end", || {
        (worker.tid == 0 || !thread_lives(worker.tid)).then_some(())
    });
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn the_worker_is_the_best_of_this_kernel_and_polls_in_a_guest() {
    let known = Known::here();
    for policy in [WorkerPolicy::Dedicated, WorkerPolicy::Shared] {
        for profile in [Profile::Latency, Profile::Throughput] {
            works(policy, profile, "", known.worker(policy, profile));
        }
    }
}

/// The others work too, or are missing for the right reason.
#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn every_kind_works_or_tells_what_it_lacks_in_a_guest() {
    let known = Known::here();
    let (latency, throughput) = (Profile::Latency, Profile::Throughput);
    for (kind, profile, there, reason) in [
        ("kthread", latency, known.kthread, "netdev nap"),
        ("threaded", throughput, known.threaded, "netdev nap"),
        ("sqpoll", latency, known.sqpoll, "static NAPI tracking"),
        ("sqpoll", throughput, known.sqpoll, "static NAPI tracking"),
        ("socket", latency, true, ""),
        ("socket", throughput, true, ""),
    ] {
        if there {
            works(WorkerPolicy::Dedicated, profile, &only(kind), kind);
            continue;
        }
        let node = Node::new();
        let attachment = attach_as(&node, WorkerPolicy::Dedicated, profile, &only(kind));
        says(&degraded(&attachment), Part::Worker, &[reason]);
        assert_eq!(attachment.state().worker, None);
        drop(attachment);

        let config = format!("cpus = \"{}\"\n{}", any_cpu(), only(kind));
        let mut request = node.request("a", WorkerPolicy::Dedicated, &config);
        request.policy.profile = profile;
        request.policy.required = true;
        let error = node.attach(request).expect_err("required").to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(node.state_files(), Vec::<String>::new());
    }
}

/// Packets wait for whoever polls where the kernel has settings of single NAPIs (6.13), and else for the right reason not.
#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn packets_wait_for_who_polls_or_it_is_told_why_not_in_a_guest() {
    let there = Known::here().sqpoll;
    let node = Node::new();
    let asked = || {
        let mut request = node.request("a", WorkerPolicy::None, "");
        request.policy.busy_poll_mode = BusyPollMode::Suspend;
        request.window.micros = Some(kbp_kernel::Micros(20));
        request
    };
    let attachment = node.attached(asked());
    let mut required = asked();
    if !there {
        says(
            &degraded(&attachment),
            Part::PreferBusyPoll,
            &["netdev nap"],
        );
        drop(attachment);
        required.policy.required = true;
        let error = node.attach(required).expect_err("required").to_string();
        assert!(error.contains("prefer-busy-poll"), "{error}");
        return;
    }
    assert_eq!(degraded(&attachment), []);
    let link = node.pod_link("eth0").index;
    let mut netdev = NetdevSocket::open_in(&node.pod).expect("netdev");
    let mut suspended = || netdev.napis(link).expect("list")[0].irq_suspend_timeout;
    assert_eq!(suspended(), Some(200_000));
    drop(attachment);
    assert_eq!(suspended(), Some(0));
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn what_is_switched_off_is_told_in_a_guest() {
    let node = Node::new();
    let attachment = attach(&node, WorkerPolicy::Shared, "disable = [\"napi\"]\n");
    says(
        &degraded(&attachment),
        Part::PollableVeth,
        &["switched off by disable = [\"napi\"]"],
    );
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

/// A change of features is a link event on each kernel, as the others are; see [`changes`].
#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn every_change_of_a_link_is_noticed_by_an_event_in_a_guest() {
    for change in changes::visible(Known::here().napi_ids) {
        changes::times_to_notice(&change, 1);
    }
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn an_idle_worker_gives_way_to_other_cgroups_or_says_that_it_does_not_in_a_guest() {
    gives_way::gives_way_or_says_that_it_does_not();
}

/// The kernel lets the thread run on another CPU then: a pod that is polled there would be polled where nobody wants it.
#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn a_worker_leaves_a_cpu_that_goes_offline_and_comes_back_with_it_in_a_guest() {
    let node = Node::new();
    let cpu = any_cpu();
    let attachment = attach(&node, WorkerPolicy::Shared, "");
    let first = attachment.state().worker.expect("a worker");
    assert_eq!(first.cpu, cpu.0);
    let traffic = node.traffic();
    traffic.wait_taken(SOME);
    let set = |online: &str| {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        std::fs::write(file, online).expect("switch the CPU");
    };
    set("0");
    wait_until("the lack to be told", || {
        let state = attachment.state();
        let told = |d: &Degraded| {
            d.part == Part::Worker && d.reason.contains(&format!("CPU {cpu} is offline"))
        };
        (state.worker.is_none() && state.degraded.iter().any(told)).then_some(())
    });
    wait_until("the thread to end", || {
        (first.tid == 0 || !thread_lives(first.tid)).then_some(())
    });
    set("1");
    wait_until("a worker", || {
        let state = attachment.state();
        (state.worker.is_some() && state.degraded.is_empty()).then_some(())
    });
    traffic.wait_taken(SOME);
}

/// A NAPI's own thread is the only worker that outlives its owner: who comes next ends it.
#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn a_thread_of_a_killed_owner_is_ended_by_the_next_in_a_guest() {
    if !Known::here().kthread {
        return;
    }
    let node = Node::new();
    let attachment = attach(&node, WorkerPolicy::Dedicated, "");
    let mut state = attachment.state();
    assert_eq!(
        state.worker.as_ref().map(|w| w.kind.as_str()),
        Some("kthread")
    );
    attachment.detach().expect("detach");

    let link = node.host_link("vhost0").index;
    let mut netdev = NetdevSocket::open_in(&node.host).expect("netdev");
    let napi = netdev.napis(link).expect("list")[0].id;
    let spins = NapiSettings {
        threaded: Some(Threaded::BusyPoll),
        ..NapiSettings::default()
    };
    netdev.set(napi, spins).expect("as its owner left it");
    // A process with this id lives, but it started at another time.
    state.owner_start += 1;
    state::write(&node.state_dir(), &state).expect("its state file");

    let cleared = node.host.run(|| clear_leftovers(&node.state_dir()));
    cleared.expect("enter").expect("clear");
    let now = netdev.napis(link).expect("list")[0].threaded;
    assert_eq!(now, Some(Threaded::Disabled));
    assert_eq!(node.state_files(), Vec::<String>::new());
}
