//! Pods with users of their own.

use super::*;

/// The first user and group of [`Node::other_users`], seen from outside.
const OUTSIDE: u32 = 300_000;

impl Node<'_> {
    /// A pod with user ids of its own, as the kubelet asks for it (`hostUsers: false`).
    fn other_users(&self) -> SandboxConfig {
        let mut config = self.sandbox_config("pod", &[("kbp.io/busy-poll", "61")]);
        let range = IdRange {
            outside: OUTSIDE,
            inside: 0,
            count: 65_536,
        };
        let users = Users {
            mode: 0,
            uids: vec![range.clone()],
            gids: vec![range],
        };
        let linux = config.linux.as_mut().expect("linux");
        linux.security_context = Some(SecurityContext {
            namespaces: Some(Namespaces {
                network: 0,
                users: Some(users),
            }),
        });
        config
    }
}

/// Its root is nobody outside, and its sockets poll.
fn a_pod_of_other_users(generation: Generation) {
    on_node(
        generation,
        |handler| handler,
        |node| {
            // The stock handler shows that the machine can do it.
            for handler in ["", "kbp"] {
                let config = node.other_users();
                let pod = node
                    .run_under(handler, &config)
                    .unwrap_or_else(|e| panic!("{handler:?}: {e}\n{}", node.containerd.log()));
                let container = node.container(&pod, &config, "app", None);
                let pid = node.pid(&container);
                let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map")).expect("map");
                let map: Vec<&str> = map.split_whitespace().collect();
                assert_eq!(map, ["0", &OUTSIDE.to_string(), "65536"]);
                if handler == "kbp" {
                    let state = node.state(&pod);
                    assert!(state.degraded.is_empty(), "{state:#?}");
                    node.wait_for_window(&container, 61);
                }
                node.ask(&node.ip(&pod));
                // The image's files are its root's, and it may write beside them.
                let script =
                    "stat -c %u:%g /bin/busybox; echo x >/new; stat -c %u:%g /new; sleep 0.1";
                let exec = ExecSync {
                    container,
                    command: ["sh", "-c", script].map(str::to_owned).to_vec(),
                    timeout: 20,
                };
                let result: ExecResult = node.call("RuntimeService/ExecSync", &exec).expect("exec");
                assert_eq!(
                    String::from_utf8_lossy(&result.stdout),
                    "0:0\n0:0\n",
                    "{handler:?}: {}",
                    String::from_utf8_lossy(&result.stderr)
                );
                node.remove(&pod);
            }
        },
    );
}

#[test]
fn a_pod_of_other_users_on_v1_7() {
    a_pod_of_other_users(Generation::V1_7);
}

/// containerd 2 itself refuses such a pod's containers for an OCI runtime that does not know idmapped mounts, whichever shim it asks for
/// the runtime's features.
#[test]
fn a_pod_of_other_users_is_refused_by_containerd_2() {
    on_node(
        Generation::V2,
        |handler| handler,
        |node| {
            let refusals = ["kbp", ""].map(|handler| {
                let config = node.other_users();
                let pod = node
                    .run_under(handler, &config)
                    .unwrap_or_else(|e| panic!("{handler:?}: {e}\n{}", node.containerd.log()));
                let refusal = node
                    .try_container(&pod, &config, "app", None)
                    .expect_err("a container");
                node.remove(&pod);
                println!("{handler:?}: {refusal}");
                refusal
            });
            for refusal in refusals {
                assert!(refusal.contains("mountExtensions.idmap"), "{refusal}");
            }
        },
    );
}
