//! Pods on other networks than the usual one, whose config an operator changes under them.

use super::*;

/// A network, and how its config is changed while pods are on it.
struct Network {
    config: &'static str,
    /// How ip(8) describes the host ends of its pods.
    host_end: &'static str,
    before: &'static str,
    after: &'static str,
}

const BRIDGE: Network = Network {
    config: "10-kbp-bridge.conflist",
    host_end: "master kbp0",
    before: "\"mode\": \"bridge\"",
    after: "\"mode\": \"routed\"",
};

const TUNE: Network = Network {
    config: "10-kbp-behind-ptp.conflist",
    host_end: "alias kbp-tuned:",
    before: "\"mode\": \"tune\"",
    after: "\"mode\": \"tune\", \"profile\": \"throughput\", \"mtu\": 1400",
};

impl Network {
    /// Two pods come; the config changes; one more comes; all go.
    fn outlives_a_change(&self, generation: Generation) {
        on_network(
            self.config,
            generation,
            |handler| handler,
            |node| {
                let mut pods = ["one", "two"].map(|name| start(node, name)).to_vec();
                let links = node
                    .sandbox
                    .ip("-details link show type veth")
                    .expect("links");
                assert_eq!(links.matches(self.host_end).count(), 2, "{links}");
                for pod in &pods {
                    let held = node.held(pod);
                    // libcni's copy of the result, and a lease or two.
                    let of = |dir: &str| held.iter().filter(|path| path.starts_with(dir)).count();
                    assert_eq!(of("results/kbp-"), 1, "{held:?}");
                    assert!(of("networks/kbp") >= 1, "{held:?}");
                }

                self.change(node);
                for pod in &pods {
                    node.ask(&node.ip(pod));
                }
                pods.push(start(node, "three"));
                for pod in &pods {
                    node.remove(pod);
                    assert_eq!(node.held(pod), Vec::<String>::new());
                }
                // The bridge is there for the next pod; nothing else is, which is looked for at the end of every test.
                if node.sandbox.ip("link show kbp0").is_ok() {
                    node.sandbox.ip("link delete kbp0").expect("delete it");
                }
            },
        );
    }

    fn change(&self, node: &Node<'_>) {
        let file = node.networks.join(self.config);
        let old = std::fs::read_to_string(&file).expect("config");
        assert_eq!(old.matches(self.before).count(), 1, "{old}");
        let new = file.with_extension("new");
        std::fs::write(&new, old.replace(self.before, self.after)).expect("write");
        std::fs::rename(&new, &file).expect("rename");
        // containerd says which config it has; the text of the file is a string in it.
        let marker = self.after.replace('"', "\\\"");
        wait_until("the changed config", LIMIT, || {
            let request = StatusRequest { verbose: true };
            let status: RuntimeStatus = node.call("RuntimeService/Status", &request)?;
            match status.info.get("cniconfig") {
                Some(config) if config.contains(&marker) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .expect("containerd reads it");
    }
}

fn start(node: &Node<'_>, name: &str) -> String {
    let config = node.sandbox_config(name, &[]);
    let pod = node
        .run(&config)
        .unwrap_or_else(|e| panic!("{e}\n{}", node.containerd.log()));
    node.container(&pod, &config, name, None);
    let state = node.state(&pod);
    assert!(state.degraded.is_empty(), "{state:#?}");
    let ip = node.ip(&pod);
    let echo = fixtures::echo().expect("echo client").display().to_string();
    wait_until("the server", LIMIT, || {
        let once = node.sandbox.run(&echo, &["client", &ip, "7000", "1"]);
        match once.map_err(|e| e.to_string())?.stdout {
            answered if answered.contains("answered 1 ") => Ok(()),
            other => Err(other),
        }
    })
    .expect("the pod answers");
    pod
}

impl Node<'_> {
    /// What `/var/lib/cni` holds of a pod: files named after it, and host-local's leases, which name it inside.
    fn held(&self, pod: &str) -> Vec<String> {
        let script = "cd /var/lib/cni && { find results/kbp-* networks -name \"*$0*\"; grep --recursive --files-with-matches -- \"$0\" networks; }; true";
        let found = self
            .sandbox
            .run("sh", &["-c", script, pod])
            .expect("look")
            .stdout;
        found.lines().map(str::to_owned).collect()
    }
}

#[test]
fn a_bridge_of_kbp_on_the_machine() {
    BRIDGE.outlives_a_change(Generation::Machine);
}

#[test]
fn a_bridge_of_kbp_on_v1_7() {
    BRIDGE.outlives_a_change(Generation::V1_7);
}

#[test]
fn a_bridge_of_kbp_on_v2() {
    BRIDGE.outlives_a_change(Generation::V2);
}

#[test]
fn tuned_veths_of_ptp_on_the_machine() {
    TUNE.outlives_a_change(Generation::Machine);
}

#[test]
fn tuned_veths_of_ptp_on_v1_7() {
    TUNE.outlives_a_change(Generation::V1_7);
}

#[test]
fn tuned_veths_of_ptp_on_v2() {
    TUNE.outlives_a_change(Generation::V2);
}
