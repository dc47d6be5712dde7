//! A node whose containerd serves CRI, and the calls that the kubelet would make.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kbp_tests::binaries::{bin_dir, reference_cni_dir};
use kbp_tests::lab::LIMIT;
use kbp_tests::{
    Containerd, Generation, Leftovers, Rootfs, Sandbox, Settings, Sockets, fixtures, grpc,
    wait_until,
};
use prost::Message;

use super::messages::*;

pub(super) const PAUSE: &str = "docker.io/library/pause:test";
pub(super) const ECHO: &str = "docker.io/library/echo:test";

/// A node whose containerd serves CRI.
pub(super) struct Node<'s> {
    pub(super) sandbox: &'s Sandbox,
    pub(super) containerd: Containerd<'s>,
    /// Where containerd reads its network config.
    pub(super) networks: PathBuf,
    pub(super) socket: PathBuf,
}

/// Runs `test` on a node with the handler's config of that generation, after `edit` has changed it.
pub(super) fn on_node(
    generation: Generation,
    edit: impl FnOnce(String) -> String,
    test: impl FnOnce(&Node<'_>),
) {
    on_network("10-kbp.conflist", generation, edit, test);
}

/// As [`on_node`], with that example of `config/cni/` as the network.
pub(super) fn on_network(
    network: &str,
    generation: Generation,
    edit: impl FnOnce(String) -> String,
    test: impl FnOnce(&Node<'_>),
) {
    if generation.is_wanting() {
        return;
    }
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
    pub(super) fn call<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, String> {
        grpc::call(&self.socket, &format!("runtime.v1.{method}"), &[], request)
    }

    pub(super) fn sandbox_config(&self, name: &str, annotations: &[(&str, &str)]) -> SandboxConfig {
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

    pub(super) fn run(&self, config: &SandboxConfig) -> Result<String, String> {
        self.run_under("kbp", config)
    }

    /// An empty handler is the stock one.
    pub(super) fn run_under(
        &self,
        handler: &str,
        config: &SandboxConfig,
    ) -> Result<String, String> {
        let request = RunSandbox {
            config: Some(config.clone()),
            handler: handler.to_owned(),
        };
        self.call::<Id>("RuntimeService/RunPodSandbox", &request)
            .map(|answer| answer.id)
    }

    /// A started container of the echo server in a pod.
    pub(super) fn container(
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
    pub(super) fn try_container(
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

    pub(super) fn remove(&self, sandbox: &str) {
        let id = Id {
            id: sandbox.to_owned(),
        };
        self.call::<Empty>("RuntimeService/StopPodSandbox", &id)
            .expect("stop");
        self.call::<Empty>("RuntimeService/RemovePodSandbox", &id)
            .expect("remove");
    }

    pub(super) fn ip(&self, sandbox: &str) -> String {
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

    pub(super) fn state(&self, sandbox: &str) -> kbp_poller::state::PodState {
        let states =
            kbp_poller::state::read_all(&self.sandbox.dir().join("run/kbp")).expect("states");
        let found = states
            .iter()
            .find(|s| s.id == sandbox && s.namespace == "k8s.io")
            .cloned();
        found
            .unwrap_or_else(|| panic!("{sandbox} is not in {states:#?}\n{}", self.containerd.log()))
    }

    pub(super) fn pid(&self, container: &str) -> u32 {
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

    pub(super) fn wait_for_window(&self, container: &str, window: u32) {
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

    pub(super) fn ask(&self, ip: &str) {
        let echo = fixtures::echo().expect("echo client").display().to_string();
        let answered = self
            .sandbox
            .run(&echo, &["client", ip, "7000", "20"])
            .expect("the pod answers")
            .stdout;
        assert!(answered.contains("answered 20"), "{answered}");
    }
}
