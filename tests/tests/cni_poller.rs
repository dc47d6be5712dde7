//! Pods of runtimes other than kbp's: the CNI plugin registers them with the node's daemon.

use std::process::{Child, Stdio};
use std::time::Duration;

use kbp_poller::policy::WorkerPolicy;
use kbp_poller::state::{self, PodState};
use kbp_tests::network::{Network, PodNetns, host_local};
use kbp_tests::{Sandbox, binaries, wait_until};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

/// `kbp-poller serve` on a node of its own; killed when it is dropped.
struct Daemon<'s> {
    sandbox: &'s Sandbox,
    child: Child,
}

impl<'s> Daemon<'s> {
    fn start(sandbox: &'s Sandbox) -> Self {
        let child = sandbox
            .command(binaries::kbp_binary("kbp-poller").expect("the daemon"))
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the daemon");
        let daemon = Self { sandbox, child };
        let ready = sandbox.inside("/run/kbp/poller.pid");
        wait_until("the daemon to serve", LIMIT, || match ready.is_file() {
            true => Ok(()),
            false => Err(format!("{} is not there", ready.display())),
        })
        .expect("it serves");
        daemon
    }

    fn pods(&self) -> Vec<PodState> {
        state::read_all(&self.sandbox.inside("/run/kbp")).expect("states")
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill it");
        self.child.wait().expect("wait for it");
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn polled(more: &Value) -> Value {
    let mut config = json!({
        "type": "kbp", "poller": true, "onUnavailable": "fail",
        "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { "kbp.io/worker": "idle" } },
    });
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn the_daemon_polls_what_the_plugin_registers_until_del() {
    let sandbox = Sandbox::new().expect("node");
    let mut daemon = Daemon::start(&sandbox);
    let own = polled(&json!({ "ipam": host_local(&sandbox, "10.88.0.0/16") }));
    let ptp = json!({ "type": "ptp", "ipam": host_local(&sandbox, "10.89.0.0/16") });
    let networks = [
        Network::new(&sandbox, "routed", "1.0.0", [own]),
        Network::new(
            &sandbox,
            "tuned",
            "1.0.0",
            [ptp, polled(&json!({ "mode": "tune" }))],
        ),
    ];
    for network in &networks {
        let netns = PodNetns::new(&sandbox, network.name()).expect("namespace");
        let attached = network.add("c1", &netns, "eth0").expect("ADD");
        let pods = daemon.pods();
        let [pod] = &pods[..] else {
            panic!("one pod is attached: {pods:#?}");
        };
        assert_eq!(
            (pod.namespace.as_str(), pod.id.as_str()),
            (format!("cni.{}", network.name()).as_str(), "c1.eth0")
        );
        assert_eq!(
            pod.worker.as_ref().map(|worker| worker.policy),
            Some(WorkerPolicy::Idle)
        );
        assert_eq!(pod.interfaces.len(), 1);
        network
            .check("c1", &netns, "eth0", &attached)
            .expect("CHECK");
        network.del("c1", Some(&netns), "eth0").expect("DEL");
        wait_until(
            "the registration to go",
            LIMIT,
            || match &daemon.pods()[..] {
                [] => Ok(()),
                pods => Err(format!("{pods:#?}")),
            },
        )
        .expect("it is gone");
    }

    // DEL does not need it, ADD says so.
    let netns = PodNetns::new(&sandbox, "last").expect("namespace");
    networks[0].add("c2", &netns, "eth0").expect("ADD");
    daemon.kill();
    networks[0].del("c2", Some(&netns), "eth0").expect("DEL");
    let error = networks[0]
        .add("c2", &netns, "eth0")
        .expect_err("nobody polls");
    assert!(
        error.to_string().contains("no kbp-poller serves"),
        "{error}"
    );
    assert!(networks[0].leases().is_empty());
}
