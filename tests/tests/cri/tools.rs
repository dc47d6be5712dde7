//! crictl, and the conformance tests of critest, on the handler kbp. Built by `tests/scripts/fetch-go-tools`. critest's images are made
//! here, under the names that it looks for before it would pull them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kbp_tests::binaries::go_tool;
use kbp_tests::{Output, command, not_tested};
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
    if let Err(error) = go_tool("crictl") {
        return not_tested(&format!("crictl: {error}"));
    }
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

/// A shell script, so that its name and its argument are those of a server whose process critest looks for.
const NGINX: &str = "#!/bin/sh\nmkdir -p /www /var/run; echo hello >/www/index.html; httpd -p 80 -h /www; echo $$ >/var/run/nginx.pid\n\
                     while sleep 1000; do :; done\n";

/// What critest asks a registry for, and what this machine has no module for.
const WITHOUT: &str = "Image Manager|AppArmor|SELinux";

/// Needs to see no filter at all, and a container whose sockets poll has one that allows everything (docs/sockets.md).
const WITHOUT_FILTER: [&str; 2] = [
    "should support nil profile, which is unconfined",
    "should support seccomp unconfined on the container",
];

/// containerd 2.0 to 2.3 asks only shims of the type `io.containerd.runc.v2` what they can do.
const FOR_RUNC_V2_ALONE: [&str; 4] = [
    "should support recursive readonly mounts",
    "should reject a recursive readonly mount with PROPAGATION_HOST_TO_CONTAINER",
    "should reject a recursive readonly mount with PROPAGATION_BIDIRECTIONAL",
    "should reject a recursive readonly mount with ReadOnly: false",
];

/// How critest's tests ended, by name; what was not asked for is not among them.
type Verdicts = BTreeMap<String, String>;

/// Those that did not end like that.
fn but<'v>(verdicts: &'v Verdicts, state: &str) -> BTreeSet<&'v str> {
    let others = verdicts.iter().filter(|(_, ended)| *ended != state);
    others.map(|(name, _)| name.as_str()).collect()
}

impl Node<'_> {
    /// The images that critest looks for before it would pull them.
    fn add_critest_s_images(&self) {
        let dir = self.sandbox.dir();
        let rootfs = Rootfs::busybox(&dir.join("critest")).expect("rootfs");
        let inside = |path: &str| rootfs.dir().join(path);
        let mode = std::os::unix::fs::PermissionsExt::from_mode;
        rootfs.file("usr/sbin/nginx", NGINX).expect("write");
        std::fs::set_permissions(inside("usr/sbin/nginx"), mode(0o755)).expect("chmod");
        let effective_uid = fixtures::effective_uid().expect("a fixture");
        rootfs.binary(&effective_uid, "/nnp").expect("copy");
        std::fs::set_permissions(inside("nnp"), mode(0o4755)).expect("chmod");
        for (file, line) in [
            ("etc/passwd", "default-user:x:1000:1000::/:/bin/sh\n"),
            (
                "etc/group",
                "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n",
            ),
        ] {
            let text = std::fs::read_to_string(inside(file)).expect("read");
            rootfs.file(file, &format!("{text}{line}")).expect("write");
        }
        let official = "registry.k8s.io/e2e-test-images";
        let staging = "gcr.io/k8s-staging-cri-tools";
        let host = format!(
            "hostnet-nginx-{}",
            match std::env::consts::ARCH {
                "aarch64" => "arm64",
                _ => "amd64",
            }
        );
        let images: [(String, &[&str]); 6] = [
            (format!("{official}/busybox:1.29-2"), &["sh"]),
            (
                format!("{official}/nginx:1.14-2"),
                &["/usr/sbin/nginx", "master process"],
            ),
            (
                format!("{official}/httpd:2.4.39-4"),
                &[
                    "sh",
                    "-c",
                    "echo httpd -D FOREGROUND; mkdir /www; echo hello >/www/index.html; exec httpd -f -p 80 -h /www",
                ],
            ),
            (format!("{official}/nonewprivs:1.3"), &["/nnp"]),
            (
                format!("{staging}/{host}:latest"),
                &[
                    "sh",
                    "-c",
                    "mkdir /www; echo hello >/www/index.html; exec httpd -f -p 12003 -h /www",
                ],
            ),
            (
                format!("{staging}/test-image-predefined-group:latest"),
                &["sh"],
            ),
        ];
        for (reference, command) in images {
            let archive = rootfs.archive(&reference, command, dir).expect("archive");
            let archive = archive.display().to_string();
            let import = ["--namespace", "k8s.io", "images", "import", &archive];
            let imported = self.containerd.ctr(import).expect("import");
            imported.success().expect("import");
        }
    }

    /// critest's tests of a handler, those that `focus` names or all.
    fn critest(&self, handler: &str, focus: &str) -> Verdicts {
        let file = self.sandbox.dir().join("report.json");
        let file = file.to_str().expect("text");
        let mut arguments = vec!["--ginkgo.skip", WITHOUT, "--ginkgo.json-report", file];
        arguments.extend(["--ginkgo.no-color", "--ginkgo.focus", focus]);
        if !handler.is_empty() {
            arguments.extend(["--runtime-handler", handler]);
        }
        // Its exit code says that something failed, which the report says better.
        let output = self.tool("critest", &arguments, Duration::from_secs(400));
        let report = std::fs::read(file).unwrap_or_else(|e| panic!("{e}: {output}"));
        let report: serde_json::Value = serde_json::from_slice(&report).expect("JSON");
        let specs = report[0]["SpecReports"].as_array().expect("a list");
        let mut verdicts = Verdicts::new();
        let mut slowest = Vec::new();
        for spec in specs {
            let state = spec["State"].as_str().expect("a state");
            // Left out from the beginning; or the preparations of the suite, which are no test.
            let began = spec["NumAttempts"].as_u64().is_some_and(|n| n > 0);
            if spec["LeafNodeType"] != "It" || !began {
                continue;
            }
            let name = spec["LeafNodeText"].as_str().expect("a name");
            slowest.push((spec["RunTime"].as_u64().expect("a time") / 1_000_000, name));
            let twin = verdicts.insert(name.to_owned(), state.to_owned());
            assert_eq!(twin, None, "two tests of the name {name}");
        }
        slowest.sort_unstable();
        slowest.reverse();
        slowest.truncate(8);
        println!(
            "{handler:?}: {} tests in {:.0} s; not passed {:?}; slowest, ms {slowest:?}",
            verdicts.len(),
            output.elapsed.as_secs_f64(),
            but(&verdicts, "passed"),
        );
        verdicts
    }
}

fn critest_is_missing() -> bool {
    let missing = go_tool("critest").is_err();
    if missing {
        not_tested("critest beside the stock runtime: run tests/scripts/fetch-go-tools");
    }
    missing
}

/// All of critest for kbp's handler and for the stock one, at the same time on a node each: kbp fails nothing that stock does not
/// fail, but for what is named here.
fn the_whole_critest(generation: Generation) {
    if critest_is_missing() || generation.is_wanting() {
        return;
    }
    let ask = |handler: &'static str| {
        let mut verdicts = Verdicts::new();
        on_node(
            generation,
            |text| text,
            |node| {
                node.add_critest_s_images();
                verdicts = node.critest(handler, "");
            },
        );
        verdicts
    };
    let (kbp, stock) = std::thread::scope(|scope| {
        let stock = scope.spawn(|| ask(""));
        (ask("kbp"), stock.join().expect("the stock runtime's node"))
    });
    let names = |all: &Verdicts| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&kbp), names(&stock));
    let passed = stock.len() - but(&stock, "passed").len();
    assert!(
        passed >= 60,
        "{passed} passed under the stock runtime, which is too few to compare with"
    );
    let worse: BTreeSet<&str> = but(&kbp, "passed")
        .difference(&but(&stock, "passed"))
        .copied()
        .collect();
    let mut expected = BTreeSet::from(WITHOUT_FILTER);
    if generation == Generation::V2 {
        expected.extend(FOR_RUNC_V2_ALONE);
    }
    assert_eq!(worse, expected);
    for name in FOR_RUNC_V2_ALONE {
        assert_ne!(kbp[name], "failed", "{name}: not offered, so not asked for");
    }
}

#[test]
fn the_whole_critest_on_v2() {
    the_whole_critest(Generation::V2);
}

/// What the handler `kbp` cannot be asked for on containerd 2.1 works with the same shim in the place of the stock one, and with sockets
/// left alone.
#[test]
fn critest_of_the_drop_in_on_v2() {
    if critest_is_missing() {
        return;
    }
    on_node(
        Generation::V2,
        |handler| {
            let shim = bin_dir().expect("binaries").join("containerd-shim-kbp-v1");
            let path = format!("\n  runtime_path = {:?}", shim.display());
            let kbp = "runtime_type = \"io.containerd.kbp.v1\"";
            assert!(handler.contains(kbp), "{handler}");
            handler.replace(
                kbp,
                &format!("runtime_type = \"io.containerd.runc.v2\"{path}"),
            )
        },
        |node| {
            let config = "busy-poll = \"off\"\n";
            node.containerd.set_kbp_config(config).expect("config");
            node.add_critest_s_images();
            let asked = [&WITHOUT_FILTER[..], &FOR_RUNC_V2_ALONE].concat();
            let verdicts = node.critest("kbp", &asked.join("|"));
            let all = verdicts
                .iter()
                .map(|(name, state)| (name.as_str(), state.as_str()));
            let mut expected: Vec<_> = asked.into_iter().map(|name| (name, "passed")).collect();
            expected.sort_unstable();
            assert_eq!(all.collect::<Vec<_>>(), expected);
        },
    );
}
