//! The daemon's metrics.

use std::io::{BufRead, BufReader, Read, Write};

use kbp_kernel::netns::Netns;
use kbp_poller::api;

use super::many::add_veth;
use super::{Daemon, LIMIT, attached, command, names, pool, request, spawn};
use crate::node::{Node, ip, wait_until};

#[test]
fn metrics_are_scraped() {
    let node = Node::new();
    let daemon = Daemon::start(&node, &pool());
    let mut client = daemon.client();
    attached(&mut client, &request("a", &node.pod));
    let traffic = node.traffic();
    node.wait_polled(50);
    drop(traffic);
    let text = daemon.metrics();
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find(|l| {
                l.starts_with(name)
                    && l.as_bytes()
                        .get(name.len())
                        .is_some_and(|b| b" {".contains(b))
            })
            .unwrap_or_else(|| panic!("no {name} in\n{text}"));
        let value = line.rsplit(' ').next().expect("a value");
        value.parse().expect("a number")
    };
    assert!(value("kbp_pod_packets_total") > 50.0);
    assert!(value("kbp_node_polled_packets_total") >= 50.0);
    // Its sockets do not poll.
    assert!(value("kbp_pod_socket_polled_packets_total") == 0.0);
    assert!(value("kbp_worker_uplinks") == 0.0);
    assert!(value("kbp_worker_lease_renewals_total") >= 1.0);
    assert!(value("kbp_worker_busy_seconds_total") > 0.0);
    assert!(value("kbp_worker_idle_seconds_total") >= 0.0);
    assert!(value("kbp_worker_pods") == 1.0);
    assert!(value("kbp_poller_attachments") == 1.0);
    assert!(value("kbp_poller_attaches_total") == 1.0);
    // What a shim tells of its pod's sockets, each by its own name.
    let sockets = api::Sockets {
        calls_handled: 11,
        errors: 12,
        sockets_set: 13,
        epolls_given: 14,
        epolls_crowded: 15,
        ..api::Sockets::default()
    };
    let update = api::UpdateRequest {
        id: "a".to_owned(),
        namespace: "test".to_owned(),
        sockets: Some(sockets),
        ..api::UpdateRequest::default()
    };
    client.update(&update).expect("update");
    let counted = daemon.metrics();
    for line in [
        "kbp_pod_trapped_calls_total{namespace=\"test\",pod=\"a\"} 11",
        "kbp_pod_trapped_call_errors_total{namespace=\"test\",pod=\"a\"} 12",
        "kbp_pod_sockets_set_total{namespace=\"test\",pod=\"a\"} 13",
        "kbp_pod_epolls_given_total{namespace=\"test\",pod=\"a\"} 14",
        "kbp_pod_epolls_crowded_total{namespace=\"test\",pod=\"a\"} 15",
    ] {
        assert!(counted.contains(line), "no {line} in\n{counted}");
    }
    assert!(text.contains("kbp_pod_worker{namespace=\"test\",pod=\"a\",policy=\"shared\""));
    assert!(text.ends_with("# EOF\n"));
    ip(&node.host, "link set vhost0 down");
    wait_until("the missing part to be counted", || {
        daemon
            .metrics()
            .contains("part=\"pollable-veth\"} 1")
            .then_some(())
    });
    // What the dashboard draws is what there is.
    let dashboard = include_str!("../../../../config/grafana/kbp.json");
    let dashboard: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
    let mut drawn = 0;
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().expect("targets") {
            let expr = target["expr"].as_str().expect("an expression");
            for name in expr
                .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                .filter(|word| word.starts_with("kbp_"))
            {
                assert!(
                    text.contains(name) || CONDITIONAL.contains(&name),
                    "{name} of the dashboard is not in\n{text}"
                );
                drawn += 1;
            }
        }
    }
    assert!(drawn > 5, "the dashboard draws {drawn} metrics");
}

#[test]
fn rounds_are_counted_where_they_are_the_daemons_own() {
    for (kind, disabled, counted) in [
        ("socket", "disable = [\"kthread\", \"sqpoll\"]\n", true),
        ("sqpoll", "", false),
    ] {
        let node = Node::new();
        let daemon = Daemon::start(&node, &format!("{}\n{disabled}", pool()));
        let mut client = daemon.client();
        attached(&mut client, &request("a", &node.pod));
        let traffic = node.traffic();
        node.wait_polled(50);
        drop(traffic);
        let text = daemon.metrics();
        let line = format!("kbp_worker_rounds_total{{kind=\"{kind}\"");
        let rounds = text.lines().find(|l| l.starts_with(&line));
        let rounds = rounds.and_then(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
        assert_eq!(rounds.is_some_and(|n| n > 50), counted, "{kind}: {text}");
    }
}

/// The value of the line of `text` that begins so.
fn value_of(text: &str, begins: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.starts_with(begins))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn what_a_worker_does_is_divided_among_its_pods() {
    for (kind, disabled) in [
        ("socket", "disable = [\"kthread\", \"sqpoll\"]\n"),
        ("sqpoll", ""),
    ] {
        let node = Node::new();
        let silent = Netns::create().expect("namespace");
        add_veth(&node.host, &silent, "v0");
        // A socket is primed by a packet.
        ip(&node.host, "address add 10.201.0.1/30 dev v0");
        ip(&silent, "address add 10.201.0.2/30 dev eth0");
        let daemon = Daemon::start(&node, &format!("{}\n{disabled}", pool()));
        let mut client = daemon.client();
        for (id, netns) in [("loud", &node.pod), ("silent", &silent)] {
            let pod = attached(&mut client, &request(id, netns));
            assert_eq!(pod.degraded, [], "{kind}");
        }
        let traffic = node.traffic();
        node.wait_polled(50);
        let text = daemon.metrics();
        let of_worker = |metric: &str| {
            let value = value_of(&text, &format!("kbp_worker_{metric}{{kind=\"{kind}\""));
            value.unwrap_or_else(|| panic!("no {metric} of the worker in\n{text}"))
        };
        let of_pod = |metric: &str, pod: &str| {
            let begins = format!("kbp_pod_worker_{metric}{{namespace=\"test\",pod=\"{pod}\"");
            value_of(&text, &begins)
        };
        let both = |metric: &str| {
            ["loud", "silent"].map(|pod| of_pod(metric, pod).unwrap_or_else(|| panic!("{text}")))
        };
        assert_eq!(of_worker("pods"), 2.0);
        let [loud, silent] = both("busy_seconds_total");
        let whole = of_worker("busy_seconds_total");
        assert!(
            (loud + silent - whole).abs() < 1e-6,
            "{loud} {silent} {text}"
        );
        assert!(loud > silent && whole > 0.0, "{loud} {silent}");
        let [loud, silent] = both("idle_seconds_total");
        let most = of_worker("idle_seconds_total");
        assert!(0.0 < silent && silent < loud, "{silent} {loud}");
        assert!(loud <= most + 1e-6, "{loud} {most}");
        let rounds = ["loud", "silent"].map(|pod| of_pod("rounds_total", pod));
        if kind == "socket" {
            // Each round is one over both, and the silent one came later.
            let [loud, silent] = rounds.map(Option::unwrap_or_default);
            let all = of_worker("rounds_total");
            assert!(50.0 < silent && silent <= loud && loud <= all, "{text}");
        } else {
            assert_eq!(rounds, [None, None]);
            // Not while the daemon is on the worker's CPU, or somebody else.
            let round = wait_until("a round to be timed", || {
                value_of(
                    &daemon.metrics(),
                    "kbp_worker_round_seconds{kind=\"sqpoll\"",
                )
            });
            assert!(0.0 < round && round < 1e-3, "{round}");
        }
        drop(traffic);
    }
}

#[test]
fn metrics_are_served_on_a_loopback_port_to_those_who_ask_properly() {
    let node = Node::new();
    ip(&node.host, "link set lo up");
    let mut command = command(&node, "");
    command.args(["--metrics", "127.0.0.1:0"]);
    let mut daemon = spawn(&node, &mut command);
    let mut line = String::new();
    let stderr = daemon.child.stderr.take().expect("stderr");
    let mut stderr = BufReader::new(stderr);
    stderr.read_line(&mut line).expect("a line");
    let (_, address) = line.trim().split_once("http://").expect("an address");
    let address = address.strip_suffix("/metrics").expect("a path").to_owned();
    daemon.wait_ready();
    let ask = |request: &[u8]| {
        let stream = node.host.run(|| std::net::TcpStream::connect(&address));
        let mut stream = stream.expect("enter").expect("connect");
        stream.set_read_timeout(Some(LIMIT)).expect("limit");
        stream.write_all(request).expect("write");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read");
        text
    };
    let text = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(text.contains("kbp_poller_attachments 0"), "{text}");
    let text = ask(b"GET /secrets HTTP/1.1\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 404"), "{text}");
    let text = ask(b"nonsense\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 400"), "{text}");
    // Who says nothing is let go in the end, and hinders nobody until then.
    let silent = node.host.run(|| std::net::TcpStream::connect(&address));
    let mut silent = silent.expect("enter").expect("connect");
    silent.set_read_timeout(Some(LIMIT)).expect("limit");
    assert_eq!(names(&mut daemon.client()), Vec::<String>::new());
    let mut nothing = [0];
    assert_eq!(silent.read(&mut nothing).expect("the end"), 0);
}

/// Metrics that are there only while there is something to tell.
const CONDITIONAL: [&str; 3] = [
    "kbp_pod_degraded_parts",
    "kbp_poller_cpu_latency_seconds",
    "kbp_worker_round_seconds",
];
