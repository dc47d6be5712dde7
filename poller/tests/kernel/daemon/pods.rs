//! Pods that are attached through the API: bound to a connection, or registered.

use kbp_poller::api::{AttachRequest, Code, EventKind};
use kbp_poller::state;

use super::{Daemon, LIMIT, Named, attached, names, pool, refused, request};
use crate::node::{Node, any_cpu, ip, wait_until};

#[test]
fn a_pod_is_attached_polled_listed_and_ends_with_its_connection() {
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut watch = daemon.client().watch().expect("watch");
    let mut client = daemon.client();
    let pod = attached(&mut client, &request("a", &node.pod));
    assert_eq!(pod.owner_pid, daemon.pid());
    assert_eq!(pod.degraded, []);
    let worker = pod.worker.clone().expect("a worker");
    assert_eq!(
        (worker.cpu, worker.policy.as_str()),
        (any_cpu().0, "shared")
    );
    assert_eq!(pod.interfaces[0].host_interface, "vhost0");

    let states = state::read_all(&node.state_dir()).expect("state");
    assert_eq!(states.len(), 1);
    assert_eq!(states[0].owner_pid, daemon.pid());
    let traffic = node.traffic();
    node.wait_polled(50);
    drop(traffic);
    let listed = client.list().expect("list");
    assert_eq!(listed.len(), 1);
    assert!(listed[0].packets > 50, "{listed:?}");
    assert!(listed[0].bound);

    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Attached);
    // A change of the pod is told: its interface goes down.
    ip(&node.host, "link set vhost0 down");
    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Changed);
    let told = event.pod.expect("a pod");
    assert!(told.degraded[0].reason.contains("down"), "{told:?}");
    drop(client);
    let gone = loop {
        let event = watch.next_event(LIMIT).expect("an event");
        if event.kind() == EventKind::Detached {
            break event;
        }
    };
    assert_eq!(gone.pod.expect("a pod").id, "a");
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
    assert_eq!(node.state_files(), Vec::<String>::new());
}

#[test]
fn a_watch_begins_with_what_is_there() {
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    attached(&mut client, &request("a", &node.pod));
    let mut watch = daemon.client().watch().expect("watch");
    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Attached);
    assert_eq!(event.pod.expect("a pod").id, "a");
    assert!(client.detach("test", "a", false).expect("detach"));
    let event = watch.next_event(LIMIT).expect("an event");
    assert_eq!(event.kind(), EventKind::Detached);
    assert!(!client.detach("test", "a", false).expect("again"), "none");
}

#[test]
fn a_registered_pod_outlives_its_client_and_the_daemon_but_not_its_namespace() {
    let node = Node::new();
    let named = Named::new(&node.pod);
    let registered = AttachRequest {
        netns: named.path.display().to_string(),
        bound: false,
        ..request("cni", &node.pod)
    };
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    let (code, reason) = refused(
        &mut client,
        &AttachRequest {
            bound: false,
            ..request("cni", &node.pod)
        },
    );
    assert_eq!(code, Code::InvalidArgument);
    assert!(reason.contains("/run/netns/NAME"), "{reason}");
    attached(&mut client, &registered);
    drop(client);
    assert_eq!(names(&mut daemon.client()), ["cni"]);

    daemon.kill();
    let daemon = Daemon::start(&node, &pool());
    let pods = daemon.client().list().expect("list");
    assert_eq!((pods[0].id.as_str(), pods[0].bound), ("cni", false));
    let traffic = node.traffic();
    node.wait_polled(100);
    drop(traffic);

    named.unmount();
    wait_until("the pod to be let go", || {
        names(&mut daemon.client()).is_empty().then_some(())
    });
    daemon.kill();
    let daemon = Daemon::start(&node, &pool());
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
}

/// Two owners of one namespace never poll at the same time: what is bound comes first.
#[test]
fn a_registered_pod_waits_while_another_holds_its_namespace() {
    let node = Node::new();
    let named = Named::new(&node.pod);
    let registered = AttachRequest {
        netns: named.path.display().to_string(),
        bound: false,
        ..request("cni", &node.pod)
    };
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    attached(&mut client, &registered);
    let mut shim = daemon.client();
    attached(&mut shim, &request("shim", &node.pod));
    assert_eq!(names(&mut client), ["shim"]);
    drop(shim);
    wait_until("the registered one to go on", || {
        (names(&mut client) == ["cni"]).then_some(())
    });
    assert!(client.detach("test", "cni", false).expect("detach"));
    assert_eq!(names(&mut client), Vec::<String>::new());
}
