//! Pods as the kubelet makes them, through containerd's CRI plugin with the handler of `config/containerd/`.

mod messages;
mod networks;
mod tools;
mod users;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kbp_poller::policy::WorkerPolicy;
use kbp_tests::binaries::{bin_dir, reference_cni_dir};
use kbp_tests::lab::LIMIT;
use kbp_tests::{
    Containerd, Generation, Leftovers, Rootfs, Sandbox, Settings, Sockets, fixtures, grpc,
    wait_until,
};
use messages::*;
use prost::Message;

const PAUSE: &str = "docker.io/library/pause:test";
const ECHO: &str = "docker.io/library/echo:test";

/// A node whose containerd serves CRI.
struct Node<'s> {
    sandbox: &'s Sandbox,
    containerd: Containerd<'s>,
    /// Where containerd reads its network config.
    networks: PathBuf,
    socket: PathBuf,
}

/// Runs `test` on a node with the handler's config of that generation, after `edit` has changed it.
fn on_node(
    generation: Generation,
    edit: impl FnOnce(String) -> String,
    test: impl FnOnce(&Node<'_>),
) {
    on_network("10-kbp.conflist", generation, edit, test);
}

/// As [`on_node`], with that example of `config/cni/` as the network.
fn on_network(
    network: &str,
    generation: Generation,
    edit: impl FnOnce(String) -> String,
    test: impl FnOnce(&Node<'_>),
) {
    let sandbox = Sandbox::new().expect("node");
    // host-local's leases, and the kubelet's directories.
    sandbox.overlay("/var/lib").expect("overlay");
    let dir = sandbox.dir();
    let (plugins, networks) = (dir.join("cni/bin"), dir.join("cni/net.d"));
    std::fs::create_dir_all(&plugins).expect("directory");
    std::fs::create_dir_all(&networks).expect("directory");
    let link = |from: &Path, name: &str| {
        std::os::unix::fs::symlink(from.join(name), plugins.join(name)).expect("link");
    };
    link(&bin_dir().expect("binaries"), "kbp");
    for name in ["host-local", "portmap", "loopback", "ptp", "bridge"] {
        link(&reference_cni_dir().expect("plugins"), name);
    }
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config");
    std::fs::copy(config.join("cni").join(network), networks.join(network))
        .expect("network config");

    // As each file says of itself: the tables of the one are copied into the main config, the other may be imported.
    let version_3 = generation == Generation::V2;
    let handler = format!("containerd/version-{}.toml", if version_3 { 3 } else { 2 });
    let handler = edit(std::fs::read_to_string(config.join(handler)).expect("handler"));
    let settings = if version_3 {
        let file = dir.join("handler.toml");
        std::fs::write(&file, handler).expect("write");
        Settings {
            version_3,
            imports: vec![file],
            config: format!(
                "[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = {PAUSE:?}\n\
                 [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
                 [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = [{plugins:?}]\nconf_dir = {networks:?}\n"
            ),
            cri: true,
            ..Settings::default()
        }
    } else {
        Settings {
            config: format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {PAUSE:?}\n\
                 restrict_oom_score_adj = true\ndisable_apparmor = true\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {plugins:?}\nconf_dir = {networks:?}\n{}",
                handler.replace("version = 2\n", "")
            ),
            cri: true,
            ..Settings::default()
        }
    };
    let rootfs = Rootfs::busybox(&dir.join("rootfs")).expect("rootfs");
    rootfs
        .binary(&fixtures::echo().expect("echo server"), "/usr/bin/server")
        .expect("copy");
    let containerd = Containerd::start_with(&sandbox, generation, settings).expect("containerd");
    let node = Node {
        sandbox: &sandbox,
        containerd,
        networks,
        socket: sandbox.inside("/run/containerd/containerd.sock"),
    };
    let pause = Rootfs::empty(&dir.join("pause")).expect("rootfs");
    pause
        .binary(&fixtures::pause().expect("pause"), "/pause")
        .expect("copy");
    for (rootfs, reference, command) in [
        (&pause, PAUSE, ["/pause"].as_slice()),
        (
            &rootfs,
            ECHO,
            ["/usr/bin/server", "epoll", "7000"].as_slice(),
        ),
    ] {
        let archive = rootfs
            .archive(reference, command, dir)
            .expect("archive")
            .display()
            .to_string();
        node.containerd
            .ctr(["--namespace", "k8s.io", "images", "import", &archive])
            .expect("import")
            .success()
            .expect("import");
        let image = ImageRequest {
            image: Some(Image {
                image: reference.to_owned(),
            }),
        };
        wait_until(reference, LIMIT, || {
            let status: ImageStatus = node.call("ImageService/ImageStatus", &image)?;
            status
                .image
                .map(drop)
                .ok_or_else(|| "CRI does not know it".to_owned())
        })
        .expect("image");
    }
    let before = Leftovers::of(&sandbox).expect("before");
    test(&node);
    Leftovers::wait_until_clean(&sandbox, &before).expect("nothing left after the test");
}

impl Node<'_> {
    fn call<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, String> {
        grpc::call(&self.socket, &format!("runtime.v1.{method}"), &[], request)
    }

    fn sandbox_config(&self, name: &str, annotations: &[(&str, &str)]) -> SandboxConfig {
        let metadata = Metadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
        };
        SandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: self.sandbox.dir().join("logs").display().to_string(),
            annotations: annotations
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect::<HashMap<_, _>>(),
            linux: Some(LinuxSandbox {
                cgroup_parent: format!("/{}", self.sandbox.name()),
                security_context: None,
            }),
        }
    }

    fn run(&self, config: &SandboxConfig) -> Result<String, String> {
        self.run_under("kbp", config)
    }

    /// An empty handler is the stock one.
    fn run_under(&self, handler: &str, config: &SandboxConfig) -> Result<String, String> {
        let request = RunSandbox {
            config: Some(config.clone()),
            handler: handler.to_owned(),
        };
        self.call::<Id>("RuntimeService/RunPodSandbox", &request)
            .map(|answer| answer.id)
    }

    /// A started container of the echo server in a pod.
    fn container(
        &self,
        sandbox: &str,
        config: &SandboxConfig,
        name: &str,
        resources: Option<Resources>,
    ) -> String {
        self.try_container(sandbox, config, name, resources)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.containerd.log()))
    }

    /// That container, or why it is refused.
    fn try_container(
        &self,
        sandbox: &str,
        config: &SandboxConfig,
        name: &str,
        resources: Option<Resources>,
    ) -> Result<String, String> {
        let container = ContainerConfig {
            metadata: Some(Id {
                id: name.to_owned(),
            }),
            image: Some(Image {
                image: ECHO.to_owned(),
            }),
            command: Vec::new(),
            log_path: format!("{name}.log"),
            // In the namespaces of its pod.
            linux: Some(LinuxContainer {
                resources,
                security_context: config
                    .linux
                    .as_ref()
                    .and_then(|linux| linux.security_context.clone())
                    .map(|context| ContainerSecurity {
                        namespaces: context.namespaces,
                    }),
            }),
        };
        let request = CreateContainer {
            sandbox: sandbox.to_owned(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let id = self
            .call::<Id>("RuntimeService/CreateContainer", &request)?
            .id;
        self.call::<Empty>("RuntimeService/StartContainer", &Id { id: id.clone() })?;
        Ok(id)
    }

    fn remove(&self, sandbox: &str) {
        let id = Id {
            id: sandbox.to_owned(),
        };
        self.call::<Empty>("RuntimeService/StopPodSandbox", &id)
            .expect("stop");
        self.call::<Empty>("RuntimeService/RemovePodSandbox", &id)
            .expect("remove");
    }

    fn ip(&self, sandbox: &str) -> String {
        let status: SandboxStatus = self
            .call(
                "RuntimeService/PodSandboxStatus",
                &Id {
                    id: sandbox.to_owned(),
                },
            )
            .expect("status");
        status.status.and_then(|s| s.network).expect("network").ip
    }

    fn state(&self, sandbox: &str) -> kbp_poller::state::PodState {
        let states =
            kbp_poller::state::read_all(&self.sandbox.dir().join("run/kbp")).expect("states");
        let found = states
            .iter()
            .find(|s| s.id == sandbox && s.namespace == "k8s.io")
            .cloned();
        found
            .unwrap_or_else(|| panic!("{sandbox} is not in {states:#?}\n{}", self.containerd.log()))
    }

    fn pid(&self, container: &str) -> u32 {
        let list = self
            .containerd
            .ctr(["--namespace", "k8s.io", "tasks", "ls"])
            .expect("tasks")
            .success()
            .expect("tasks")
            .stdout;
        let line = list
            .lines()
            .find(|l| l.starts_with(container))
            .unwrap_or_else(|| panic!("{container} is not in\n{list}"));
        line.split_whitespace()
            .nth(1)
            .and_then(|p| p.parse().ok())
            .expect("pid")
    }

    fn wait_for_window(&self, container: &str, window: u32) {
        let pid = self.pid(container);
        wait_until("polling sockets", LIMIT, || {
            let sockets = Sockets::of(pid).map_err(|e| e.to_string())?;
            let complete = sockets.inet.len() >= 2
                && !sockets.epoll.is_empty()
                && sockets.all_poll_for(window);
            if complete {
                Ok(())
            } else {
                Err(format!("{sockets:?}"))
            }
        })
        .expect("window");
    }

    fn ask(&self, ip: &str) {
        let echo = fixtures::echo().expect("echo client").display().to_string();
        let answered = self
            .sandbox
            .run(&echo, &["client", ip, "7000", "20"])
            .expect("the pod answers")
            .stdout;
        assert!(answered.contains("answered 20"), "{answered}");
    }
}

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
