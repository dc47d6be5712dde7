//! Many pods at one daemon: bounds, shared workers and what they cost, and pods that are moved between CPUs.

use std::time::{Duration, Instant};

use kbp_kernel::netns::Netns;
use kbp_kernel::process;
use kbp_poller::api::{AttachRequest, Code, Pod};
use kbp_poller::client::{Attached, Client};

use super::{Daemon, LIMIT, Named, attached, names, path_of, pool, refused, request};
use crate::node::{Node, any_cpu, ip, link, wait_until};

#[test]
fn there_are_bounds_on_how_many_pods_a_daemon_takes() {
    let node = Node::new();
    let named = Named::new(&node.pod);
    let daemon = Daemon::start(&node, "");
    let mut holder = daemon.client();
    attached(&mut holder, &request("first", &node.pod));
    // They wait for the first, and so cost nothing but their place.
    let waiting = |n: usize| AttachRequest {
        id: format!("waits-{n}"),
        netns: named.path.display().to_string(),
        bound: false,
        ..request("", &node.pod)
    };
    let mut client = daemon.client();
    for n in 1..1000 {
        client.renew(LIMIT);
        assert_eq!(
            client.attach(&waiting(n)).expect("a place"),
            Attached::Waiting
        );
    }
    let (code, reason) = refused(&mut client, &waiting(1000));
    assert_eq!(code, Code::ResourceExhausted, "{reason}");
    assert!(
        reason.contains("1000") && reason.contains("detach"),
        "{reason}"
    );
    assert!(client.detach("test", "waits-1", false).expect("detach"));
    client.attach(&waiting(1000)).expect("its place");
    assert_eq!(names(&mut client), ["first"]);
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let number = line.and_then(|l| l.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn a_hundred_pods_share_one_worker_and_little_memory() {
    const PODS: usize = 100;
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    // What is allocated once is not a pod's.
    let first = attached(&mut client, &request("first", &node.pod));
    let before = resident(daemon.pid());
    let mut pods = Vec::new();
    for n in 0..PODS {
        let pod = Netns::create().expect("namespace");
        let name = format!("v{n}");
        let path = path_of(&pod);
        // The kernel takes any process' namespace by number only; by path it takes /run/netns. So it is made in the pod
        // and one end sent out by the node's own descriptor.
        add_veth(&node.host, &pod, &name);
        pods.push((request(&format!("p{n}"), &pod), pod, path));
    }
    let began = Instant::now();
    let mut tids: Vec<u32> = pods
        .iter()
        .map(|(request, _, _)| {
            let pod = attached(&mut client, request);
            assert_eq!(pod.degraded, []);
            pod.worker.expect("a worker").tid
        })
        .collect();
    println!("{PODS} attaches took {:?}", began.elapsed());
    tids.dedup();
    assert_eq!(tids, [first.worker.expect("a worker").tid]);
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("tasks");
    assert_eq!(threads.count(), 3, "main, keeper and the one worker");
    let each = resident(daemon.pid()).saturating_sub(before) / PODS as u64;
    println!("{each} KiB a pod");
    let threads = || -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("tasks");
        tasks
            .flatten()
            .filter_map(|t| t.file_name().to_str()?.parse().ok())
            .filter_map(|tid| process::cpu_time(daemon.pid(), tid).ok())
            .sum()
    };
    // Nobody talks but the kernel, about the new links' IPv6: the worker parks.
    wait_until("the worker to park", || {
        let metrics = daemon.metrics();
        let parked = |l: &str| l.starts_with("kbp_worker_parked{") && l.ends_with(" 1");
        metrics.lines().any(parked).then_some(())
    });
    let (used, since) = (threads(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let share = (threads() - used).as_secs_f64() / since.elapsed().as_secs_f64();
    // `kbp-bench-poller` holds it to its limit, with the binary that is installed and nothing beside it.
    println!("{:.2} % of a core for {PODS} silent pods", share * 100.0);
    assert!(each <= 64, "{each} KiB a pod");
    assert!(daemon.metrics().contains("kbp_worker_pods{kind=\"sqpoll\""));

    let began = Instant::now();
    for (request, _, _) in &pods {
        assert!(client.detach("test", &request.id, false).expect("detach"));
    }
    println!("{PODS} detaches took {:?}", began.elapsed());
    assert_eq!(names(&mut client), ["first"]);
}

pub(super) fn add_veth(host: &Netns, pod: &Netns, name: &str) {
    use kbp_kernel::link::{Batch, VethPair};
    use kbp_kernel::{MacAddr, Mtu};
    let number: u8 = name[1..].parse().expect("a number");
    let mut batch = Batch::new();
    batch.create_veth(&VethPair {
        host_name: name,
        host_mac: MacAddr([2, 0, 0, 1, number, 1]),
        pod_name: "eth0",
        pod_mac: MacAddr([2, 0, 0, 1, number, 2]),
        pod_netns: pod,
        mtu: Mtu(1500),
        tx_queue_len: 0,
    });
    crate::node::execute(host, &batch);
    let mut batch = Batch::new();
    batch.set_up(link(pod, "eth0").expect("pod end").index);
    crate::node::execute(pod, &batch);
}

/// Three pods on two cores: the two that share a hot one are parted, and all are polled on.
#[test]
fn a_pod_is_moved_whole_from_a_hot_core() {
    let cpus = kbp_kernel::cpu::usable().expect("cpus");
    assert!(cpus.len() > 1, "this test takes two CPUs");
    let (first, second) = (cpus.iter().next().expect("one"), any_cpu());
    let node = Node::new();
    // Whatever has traffic is hot.
    let config = format!("cpus = \"{first},{second}\"\nhot = 1");
    let daemon = Daemon::start(&node, &config);
    let mut client = daemon.client();
    let extra: Vec<Netns> = (0..2)
        .map(|_| Netns::create().expect("namespace"))
        .collect();
    for (n, pod) in extra.iter().enumerate() {
        add_veth(&node.host, pod, &format!("v{n}"));
    }
    attached(&mut client, &request("loud", &node.pod));
    attached(&mut client, &request("b", &extra[0]));
    attached(&mut client, &request("c", &extra[1]));
    let cpu_of = |client: &mut Client, id: &str| {
        let pods = client.list().expect("list");
        let pod = pods.into_iter().find(|p| p.id == id).expect("the pod");
        pod.worker.expect("a worker").cpu
    };
    let loud = cpu_of(&mut client, "loud");
    let neighbour = ["b", "c"]
        .into_iter()
        .find(|id| cpu_of(&mut client, id) == loud);
    let neighbour = neighbour.expect("three pods on two cores");
    let n = if neighbour == "b" { 0 } else { 1 };
    ip(&node.host, &format!("address add 10.201.0.1/30 dev v{n}"));
    ip(&node.host, &format!("link set v{n} up"));
    ip(&extra[n], "address add 10.201.0.2/30 dev eth0");
    let _traffic = node.traffic();
    let socket = extra[n].run(|| std::net::UdpSocket::bind("0.0.0.0:0"));
    let socket = socket.expect("enter").expect("bind");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // As the other sender: then the one of the two pods that is polled on the other CPU is seen to be.
            process::set_affinity(0, &[first].into_iter().collect()).expect("pin the sender");
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Nobody listens: some sends tell that of an earlier one.
                let _ = socket.send_to(&[0; 64], "10.201.0.1:9");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until("one of the two to be moved", || {
                client.renew(LIMIT);
                (cpu_of(&mut client, "loud") != cpu_of(&mut client, neighbour)).then_some(())
            });
            node.wait_polled(100);
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        moved.expect("moved");
    });
    client.renew(LIMIT);
    let moved = client.list().expect("list");
    let moved: Vec<&Pod> = moved
        .iter()
        .filter(|p| p.worker_reason.contains("moved to CPU"))
        .collect();
    assert!(!moved.is_empty(), "{moved:?}");
    assert!(moved.iter().all(|p| p.degraded.is_empty()), "{moved:?}");
}
