//! Pods as the kubelet makes them, through containerd's CRI plugin with the handler of `config/containerd/`.

mod messages;
mod networks;
mod node;
mod tools;
mod users;

use kbp_poller::policy::WorkerPolicy;
use kbp_tests::binaries::bin_dir;
use kbp_tests::lab::LIMIT;
use kbp_tests::{Generation, Rootfs, fixtures, wait_until};
use messages::*;
use node::*;

/// A pod of two containers from its beginning to its end, with the settings of its annotations.
fn a_pod(generation: Generation) {
    on_node(
        generation,
        |handler| handler,
        |node| {
            let config = node.sandbox_config(
                "pod",
                &[
                    ("kbp.io/busy-poll", "61"),
                    ("kbp.io/worker", "idle"),
                    ("other.io/x", "y"),
                ],
            );
            let pod = node
                .run(&config)
                .unwrap_or_else(|e| panic!("{e}\n{}", node.containerd.log()));
            let state = node.state(&pod);
            assert!(state.degraded.is_empty(), "{state:#?}");
            assert_eq!(
                state.worker.as_ref().map(|w| w.policy),
                Some(WorkerPolicy::Idle)
            );
            assert_eq!(state.interfaces.len(), 1);

            let first = node.container(&pod, &config, "first", None);
            node.wait_for_window(&first, 61);
            node.ask(&node.ip(&pod));
            let exec = ExecSync {
                container: first.clone(),
                command: ["sh", "-c", "hostname; sleep 0.1; exit 4"]
                    .map(str::to_owned)
                    .to_vec(),
                timeout: 10,
            };
            let result: ExecResult = node.call("RuntimeService/ExecSync", &exec).expect("exec");
            assert_eq!(
                (
                    String::from_utf8_lossy(&result.stdout).as_ref(),
                    result.exit_code
                ),
                ("pod\n", 4)
            );

            // The application's container ends and another takes its place; the pod stays.
            node.call::<Empty>("RuntimeService/StopContainer", &Id { id: first.clone() })
                .expect("stop");
            node.call::<Empty>("RuntimeService/RemoveContainer", &Id { id: first })
                .expect("remove");
            assert_eq!(node.state(&pod).worker, state.worker);
            let second = node.container(&pod, &config, "second", None);
            node.wait_for_window(&second, 61);
            node.ask(&node.ip(&pod));
            node.remove(&pod);
            let states =
                kbp_poller::state::read_all(&node.sandbox.dir().join("run/kbp")).expect("states");
            assert_eq!(states, []);
        },
    );
}

#[test]
fn a_pod_on_the_machine() {
    a_pod(Generation::Machine);
}

#[test]
fn a_pod_on_v1_7() {
    a_pod(Generation::V1_7);
}

#[test]
fn a_pod_on_v2() {
    a_pod(Generation::V2);
}

/// What a pod may not have is refused with kbp's own words, and nothing of it stays.
fn a_refused_pod(generation: Generation) {
    on_node(
        generation,
        |handler| handler,
        |node| {
            let error = node
                .run(&node.sandbox_config("pod", &[("kbp.io/worker", "fast")]))
                .expect_err("refused");
            assert!(
                error.contains("kbp.io/worker") && error.contains("dedicated"),
                "{error}"
            );
            let pool = [("kbp.io/worker", "dedicated"), ("kbp.io/required", "true")];
            let error = node
                .run(&node.sandbox_config("pod", &pool))
                .expect_err("there is no pool");
            assert!(error.contains("kbp.io/required"), "{error}");
            let pod = node
                .run(&node.sandbox_config("pod", &[]))
                .expect("the name is free");
            node.remove(&pod);
        },
    );
}

#[test]
fn a_refused_pod_on_the_machine() {
    a_refused_pod(Generation::Machine);
}

#[test]
fn a_refused_pod_on_v2() {
    a_refused_pod(Generation::V2);
}

/// Settings of the handler hold for pods that say nothing, and annotations overrule them.
fn the_handlers_options(generation: Generation) {
    let edit = |handler: String| {
        let (family, old) = if generation == Generation::V2 {
            ("io.containerd.cri.v1.runtime", false)
        } else {
            (
                "io.containerd.grpc.v1.cri",
                generation == Generation::Machine,
            )
        };
        let table = format!("[plugins.{family:?}.containerd.runtimes.kbp.options");
        // As the file's own comment says: 1.6 takes a file, the others the table itself.
        let options = if old {
            format!("{table}]\nConfigPath = \"/run/handler-options.toml\"\n")
        } else {
            format!("{table}.kbp]\nworker = \"none\"\nbusy-poll = \"52\"\n")
        };
        format!("{handler}\n{options}")
    };
    on_node(generation, edit, |node| {
        let file = node.sandbox.dir().join("run/handler-options.toml");
        std::fs::write(file, "[kbp]\nworker = \"none\"\nbusy-poll = \"52\"\n").expect("write");
        for (annotations, worker, window) in [
            (vec![], false, 52),
            (
                vec![("kbp.io/worker", "idle"), ("kbp.io/busy-poll", "53")],
                true,
                53,
            ),
        ] {
            let config = node.sandbox_config("pod", &annotations);
            let pod = node
                .run(&config)
                .unwrap_or_else(|e| panic!("{e}\n{}", node.containerd.log()));
            assert_eq!(
                node.state(&pod).worker.is_some(),
                worker,
                "{:#?}",
                node.state(&pod)
            );
            let container = node.container(&pod, &config, "app", None);
            node.wait_for_window(&container, window);
            node.remove(&pod);
        }
    });
}

#[test]
fn the_handlers_options_on_the_machine() {
    the_handlers_options(Generation::Machine);
}

#[test]
fn the_handlers_options_on_v1_7() {
    the_handlers_options(Generation::V1_7);
}

#[test]
fn the_handlers_options_on_v2() {
    the_handlers_options(Generation::V2);
}

/// kbp's shim in the place of the stock one: the handler keeps the stock runtime's type and options, and names the binary.
fn a_drop_in(generation: Generation) {
    let shim = bin_dir().expect("binaries").join("containerd-shim-kbp-v1");
    let edit = |handler: String| {
        assert!(handler.contains("\"io.containerd.kbp.v1\"") && handler.contains("runtimes.kbp]"));
        let family = match generation {
            Generation::V2 => "io.containerd.cri.v1.runtime",
            _ => "io.containerd.grpc.v1.cri",
        };
        let path = format!("\"io.containerd.runc.v2\"\n  runtime_path = {shim:?}");
        format!(
            "{}\n[plugins.{family:?}.containerd.runtimes.kbp.options]\n  BinaryName = \"runc\"\n  NoNewKeyring = true\n",
            handler.replace("\"io.containerd.kbp.v1\"", &path)
        )
    };
    on_node(generation, edit, |node| {
        let config = node.sandbox_config("pod", &[("kbp.io/busy-poll", "61")]);
        let pod = node
            .run(&config)
            .unwrap_or_else(|e| panic!("{e}\n{}", node.containerd.log()));
        let container = node.container(&pod, &config, "app", None);
        node.wait_for_window(&container, 61);
        node.ask(&node.ip(&pod));
        assert!(node.state(&pod).degraded.is_empty());
        node.remove(&pod);
    });
}

#[test]
fn a_drop_in_on_v1_7() {
    a_drop_in(Generation::V1_7);
}

#[test]
fn a_drop_in_on_v2() {
    a_drop_in(Generation::V2);
}

/// The kubelet gives a container CPUs of its own, and takes them back while it runs.
#[test]
fn cpus_come_and_go() {
    on_node(
        Generation::V2,
        |handler| handler,
        |node| {
            let config = node.sandbox_config("pod", &[]);
            let pod = node.run(&config).expect("pod");
            let own = Resources {
                cpuset_cpus: "1".to_owned(),
                ..Resources::default()
            };
            let container = node.container(&pod, &config, "app", Some(own));
            node.wait_for_window(&container, 100);
            let shared = Resources {
                cpuset_cpus: "0-1".to_owned(),
                ..Resources::default()
            };
            let update = UpdateContainer {
                container: container.clone(),
                linux: Some(shared),
            };
            node.call::<Empty>("RuntimeService/UpdateContainerResources", &update)
                .expect("update");
            // Sockets that were tuned keep their window; new ones get the new one.
            let exec = ["/usr/bin/server", "semantics"].map(str::to_owned).to_vec();
            let exec = ExecSync {
                container,
                command: exec,
                timeout: 20,
            };
            let result: ExecResult = node.call("RuntimeService/ExecSync", &exec).expect("exec");
            assert_eq!(
                result.exit_code,
                0,
                "{}",
                String::from_utf8_lossy(&result.stderr)
            );
            assert!(node.state(&pod).busy_poll_us.is_some());
            node.remove(&pod);
        },
    );
}

/// A pod in the node's own network: it runs, and nothing on the node is tuned.
#[test]
fn a_host_network_pod() {
    for generation in [Generation::Machine, Generation::V2] {
        on_node(
            generation,
            |handler| handler,
            |node| {
                let mut config = node.sandbox_config("pod", &[]);
                let namespaces = Namespaces {
                    network: 2,
                    users: None,
                };
                let linux = config.linux.as_mut().expect("linux");
                linux.security_context = Some(SecurityContext {
                    namespaces: Some(namespaces),
                });
                config.hostname = String::new();
                let pod = node.run(&config).expect("pod");
                let states = kbp_poller::state::read_all(&node.sandbox.dir().join("run/kbp"))
                    .expect("states");
                assert!(
                    states
                        .iter()
                        .all(|s| s.worker.is_none() && s.interfaces.is_empty()),
                    "{states:#?}"
                );
                node.remove(&pod);
            },
        );
    }
}
