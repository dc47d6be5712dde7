//! crictl, and the conformance tests of critest, on the handler kbp. Built by `tests/scripts/fetch-go-tools`. critest's images are made
//! here, under the names that it looks for before it would pull them.

use std::time::Duration;

use kbp_tests::binaries::go_tool;
use kbp_tests::{Output, command};
use serde_json::json;

use super::*;

/// Where containerd is inside the node.
const ENDPOINT: &str = "unix:///run/containerd/containerd.sock";

impl Node<'_> {
    fn tool(&self, name: &str, arguments: &[&str], limit: Duration) -> Output {
        let tool = go_tool(name).expect("a tool");
        let mut command = self.containerd.command(tool);
        command.args(["--runtime-endpoint", ENDPOINT, "--image-endpoint", ENDPOINT]);
        command.args(arguments);
        command::run(command, limit).expect("a tool")
    }

    fn crictl(&self, arguments: &[&str]) -> String {
        let output = self.tool("crictl", arguments, Duration::from_secs(30));
        output.success().expect("code").stdout
    }
}

fn crictl(generation: Generation) {
    on_node(
        generation,
        |handler| handler,
        |node| {
            let file = |name: &str, value: serde_json::Value| {
                let path = node.sandbox.dir().join(name);
                std::fs::write(&path, value.to_string()).expect("write");
                path.display().to_string()
            };
            let logs = node.sandbox.dir().join("logs");
            let pod = file(
                "pod.json",
                json!({
                    "metadata": { "name": "pod", "namespace": "default", "uid": "1" },
                    "log_directory": logs,
                    "annotations": { "kbp.io/busy-poll": "61" },
                    "linux": { "cgroup_parent": format!("/{}", node.sandbox.name()) },
                }),
            );
            let container = file(
                "container.json",
                json!({
                    "metadata": { "name": "echo" },
                    "image": { "image": ECHO },
                    "command": ["sh", "-c", "echo begun; exec /usr/bin/server epoll 7000"],
                    "log_path": "echo.log",
                }),
            );
            let id = |text: String| text.trim().to_owned();
            let pod_id = id(node.crictl(&["runp", "--runtime", "kbp", &pod]));
            let container_id = id(node.crictl(&["create", &pod_id, &container, &pod]));
            node.crictl(&["start", &container_id]);
            assert_eq!(
                id(node.crictl(&["pods", "--quiet", "--no-trunc", "--state", "ready"])),
                pod_id
            );
            assert_eq!(
                id(node.crictl(&["ps", "--quiet", "--no-trunc"])),
                container_id
            );
            node.wait_for_window(&container_id, 61);
            node.ask(&node.ip(&pod_id));
            let command = ["sh", "-c", "echo said; sleep 0.1"];
            for sync in [&["exec"][..], &["exec", "--sync"]] {
                let all = [sync, &[&container_id], &command].concat();
                // Of a call without streams it shows the empty standard error too.
                assert_eq!(node.crictl(&all).trim_end(), "said");
            }
            let failed = ["exec", &container_id, "sh", "-c", "exit 4"];
            let failed = node.tool("crictl", &failed, Duration::from_secs(30));
            assert!(failed.text().contains("exit code 4"), "{failed}");
            assert_eq!(node.crictl(&["logs", &container_id]), "begun\nready\n");
            let stats = node.crictl(&["stats", "--output", "json", &container_id]);
            let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
            let memory = &stats["stats"][0]["memory"]["workingSetBytes"]["value"];
            let bytes = memory.as_str().and_then(|m| m.parse::<u64>().ok());
            assert!(bytes.is_some_and(|b| b > 0), "{stats}");
            let inspected = node.crictl(&["inspectp", &pod_id]);
            assert!(
                inspected.contains("\"runtimeHandler\": \"kbp\""),
                "{inspected}"
            );
            node.crictl(&["stop", &container_id]);
            node.crictl(&["rm", &container_id]);
            node.crictl(&["stopp", &pod_id]);
            node.crictl(&["rmp", &pod_id]);
            assert_eq!(node.crictl(&["pods", "--quiet"]), "");
        },
    );
}

#[test]
fn crictl_on_the_machine() {
    crictl(Generation::Machine);
}

#[test]
fn crictl_on_v2() {
    crictl(Generation::V2);
}

/// What critest can do without a registry and in under a minute. Not among it, because the stock runtime cannot do it either with these
/// images on such a machine: groups of a user that the images would have to name, masked paths, the node's IPC namespace, process
/// namespaces and port forwarding in the node's network; nor AppArmor and SELinux. "seccomp unconfined" wants to see no filter at all,
/// and a container whose sockets poll has one that allows everything (docs/sockets.md).
const FOCUS: &str = "basic operations on container|streaming interfaces|pod sandbox|PodSandbox|support log|container mount|seccomp|OOMKilled";
const SKIP: &str = "execSync with timeout|seccomp unconfined|portforward in host network|AppArmor|SELinux|NoNewPrivs|propagation|recursive|stats";

/// critest's own tests of the handler.
fn critest(generation: Generation) {
    on_node(
        generation,
        |handler| handler,
        |node| {
            let dir = node.sandbox.dir();
            let rootfs = Rootfs::busybox(&dir.join("critest")).expect("rootfs");
            let serve = "mkdir -p /www; echo hello >/www/index.html; exec httpd -f -p 80 -h /www";
            for name in ["busybox:1.29-2", "nginx:1.14-2"] {
                let reference = format!("registry.k8s.io/e2e-test-images/{name}");
                let archive = rootfs.archive(&reference, &["sh", "-c", serve], dir);
                let archive = archive.expect("archive").display().to_string();
                let import = ["--namespace", "k8s.io", "images", "import", &archive];
                let imported = node.containerd.ctr(import).expect("import");
                imported.success().expect("import");
            }
            let arguments = [
                "--runtime-handler",
                "kbp",
                "--ginkgo.focus",
                FOCUS,
                "--ginkgo.skip",
                SKIP,
                "--ginkgo.no-color",
            ];
            let output = node.tool("critest", &arguments, Duration::from_secs(180));
            let output = output.success().expect("every test passes");
            let passed = output.stdout.lines().rev().find_map(|line| {
                let (before, _) = line.split_once(" Passed")?;
                before.split_whitespace().last()?.parse::<u32>().ok()
            });
            println!("critest: {passed:?} passed");
            assert!(passed.is_some_and(|passed| passed >= 20), "{output}");
        },
    );
}

#[test]
fn critest_on_v2() {
    critest(Generation::V2);
}
