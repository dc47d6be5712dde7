//! What the daemon refuses, and what it says then.

use kbp_poller::api::{self, AttachRequest, Code};
use kbp_poller::client::{Attached, Client};

use super::{Daemon, attached, names, path_of, pool, refused, request};
use crate::node::{Node, any_cpu};

#[test]
fn refusals_name_what_is_wrong_and_what_to_do() {
    let node = Node::new();
    let daemon = Daemon::start(&node, "");
    let mut client = daemon.client();
    let good = request("a", &node.pod);
    type Change = fn(&mut AttachRequest);
    let wrong: [(Change, Code, &[&str]); 10] = [
        (
            |r| r.id = "../x".to_owned(),
            Code::InvalidArgument,
            &["id", "letters"],
        ),
        (|r| r.id = String::new(), Code::InvalidArgument, &["id"]),
        (
            |r| r.namespace = "a/b".to_owned(),
            Code::InvalidArgument,
            &["namespace"],
        ),
        (
            |r| r.netns = "/dev/null".to_owned(),
            Code::InvalidArgument,
            &["/dev/null", "/run/netns"],
        ),
        (
            |r| r.netns = "/nowhere".to_owned(),
            Code::InvalidArgument,
            &["/nowhere"],
        ),
        (
            |r| r.worker = "fast".to_owned(),
            Code::InvalidArgument,
            &["fast", "dedicated"],
        ),
        (
            |r| r.profile = "x".to_owned(),
            Code::InvalidArgument,
            &["latency"],
        ),
        (
            |r| r.cpuset = "9-1".to_owned(),
            Code::InvalidArgument,
            &["cpuset"],
        ),
        (
            |r| r.cpu_latency_us = Some(10_001),
            Code::InvalidArgument,
            &["10000"],
        ),
        // No pool on this node.
        (
            |r| r.required = true,
            Code::FailedPrecondition,
            &["no CPU pool", "cpus"],
        ),
    ];
    for (change, code, parts) in wrong {
        let mut request = good.clone();
        change(&mut request);
        let (got, reason) = refused(&mut client, &request);
        assert_eq!(got, code, "{reason}");
        assert!(parts.iter().all(|p| reason.contains(p)), "{reason}");
    }
    // Without `required` the same is attached, and told.
    let pod = attached(&mut client, &good);
    assert!(pod.worker.is_none() && pod.degraded[0].reason.contains("no CPU pool"));
    // The same connection may ask again: what it asks for replaces what it had.
    let again = AttachRequest {
        profile: "throughput".to_owned(),
        ..good.clone()
    };
    assert_eq!(attached(&mut client, &again).profile, "throughput");
    assert_eq!(names(&mut client), ["a"]);
    // Somebody else's.
    let mut other = daemon.client();
    let (code, reason) = refused(&mut other, &good);
    assert_eq!(code, Code::AlreadyExists);
    assert!(reason.contains("another connection"), "{reason}");
    let error = other.detach("test", "a", false).expect_err("not its own");
    assert!(error.to_string().contains("belongs to another"), "{error}");
    let update = api::UpdateRequest {
        id: "a".to_owned(),
        namespace: "test".to_owned(),
        ..api::UpdateRequest::default()
    };
    let error = other.update(&update).expect_err("not its own");
    assert!(error.to_string().contains("attach it first"), "{error}");
    client.update(&update).expect("its own");

    let empty = Node::empty();
    let request = request("b", &empty.pod);
    assert_eq!(client.attach(&request).expect("ask"), Attached::NoInterface);
    let own = AttachRequest {
        netns: path_of(&node.host),
        ..good
    };
    assert_eq!(other_id(&mut client, own), Attached::HostNetwork);
}

fn other_id(client: &mut Client, request: AttachRequest) -> Attached {
    let request = AttachRequest {
        id: "other".to_owned(),
        ..request
    };
    client.attach(&request).expect("ask")
}

#[test]
fn what_the_node_lacks_is_refused_by_name() {
    let node = Node::new();
    let kubelet = node.state_dir().with_extension("kubelet");
    let given = format!(
        "{{\"policyName\":\"static\",\"entries\":{{\"uid-1\":{{\"db\":\"{}\"}}}}}}",
        any_cpu()
    );
    std::fs::write(&kubelet, given).expect("write");
    for (config, parts) in [
        (
            format!("disable = [\"sqpoll\", \"socket\"]\n{}", pool()),
            vec!["switched off", "sqpoll"],
        ),
        (
            "disable = [\"napi\"]".to_owned(),
            vec!["switched off", "napi"],
        ),
        (
            format!("kubelet-state = {kubelet:?}\n{}", pool()),
            vec!["db", "uid-1", "kubelet", "reservedSystemCPUs"],
        ),
    ] {
        let daemon = Daemon::start(&node, &config);
        let mut request = request("a", &node.pod);
        request.required = true;
        let (code, reason) = refused(&mut daemon.client(), &request);
        assert_eq!(code, Code::FailedPrecondition, "{reason}");
        assert!(
            parts.iter().all(|p| reason.contains(p)),
            "{config}: {reason}"
        );
        assert_eq!(node.state_files(), Vec::<String>::new());
    }
}
