//! A node whose containers have the machine's programs.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::binaries::{kbp_binary, program};
use crate::command::{self, Output, Running, wait_until};
use crate::error::IoContext;
use crate::{
    Containerd, Error, Generation, Network, PodNetns, Result, Run, Runtime, Sandbox, Settings,
    fixtures,
};

/// Where the programs and files of the tests are in a container.
const FILES: &str = "/kbp";
/// Directories that are links into `/usr` on most machines, and directories on others.
const MERGED: [&str; 6] = ["bin", "sbin", "lib", "lib64", "lib32", "libx32"];
/// Longest that a server may take to listen; a JVM on a busy machine takes some seconds.
const START: Duration = Duration::from_secs(40);
const PATH: &str =
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin";

/// A containerd whose containers have the machine's `/usr`.
#[derive(Debug)]
pub struct AppNode<'s> {
    containerd: Containerd<'s>,
    /// The spec that containerd gives a container with its default seccomp profile.
    spec: Value,
    files: PathBuf,
}

/// What a container is to be.
#[derive(Debug, Clone, Default)]
pub struct Guest {
    /// Its id, and the name of its network namespace.
    pub id: String,
    /// Its command line.
    pub command: Vec<String>,
    /// User and group.
    pub user: u32,
    /// Its cpuset; None: every CPU.
    pub cpus: Option<String>,
    /// Its CPU quota in CPUs; None: none.
    pub quota: Option<f64>,
    /// Annotations.
    pub annotations: Vec<(String, String)>,
}

impl Guest {
    /// A container of that command.
    pub fn new<S: Into<String>>(id: &str, command: impl IntoIterator<Item = S>) -> Self {
        Self {
            id: id.to_owned(),
            command: command.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// One that only waits.
    pub fn idle(id: &str) -> Self {
        Self::new(id, ["sleep", "infinity"])
    }

    /// With an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }
}

impl<'s> AppNode<'s> {
    /// Starts the machine's containerd in `sandbox` and collects the programs of the tests.
    pub fn start(sandbox: &'s Sandbox, settings: Settings) -> Result<Self> {
        let containerd = Containerd::start_with(sandbox, Generation::Machine, settings)?;
        let files = sandbox.dir().join("files");
        std::fs::create_dir_all(&files).context(|| format!("create {}", files.display()))?;
        let copy = |from: &Path, name: &str| {
            std::fs::copy(from, files.join(name))
                .map(drop)
                .context(|| format!("copy {}", from.display()))
        };
        for name in ["app-load", "ticks", "tokio-echo", "udp-echo", "udp-rr"] {
            copy(&kbp_binary(name)?, name)?;
        }
        copy(&fixtures::echo()?, "echo")?;
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/apps");
        for name in [
            "server.js",
            "echo.py",
            "nginx.conf",
            "haproxy.cfg",
            "haproxy-threads.cfg",
        ] {
            copy(&fixtures.join(name), name)?;
        }
        let spec = default_spec(&containerd)?;
        Ok(Self {
            containerd,
            spec,
            files,
        })
    }

    /// Its containerd.
    pub fn containerd(&self) -> &Containerd<'s> {
        &self.containerd
    }

    /// The directory that is [`FILES`] in every container.
    pub fn files(&self) -> &Path {
        &self.files
    }

    /// Starts a container in a network namespace of its own. `prepare` fills its root, which it gets as the path outside.
    pub fn pod(
        &self,
        runtime: Runtime,
        guest: &Guest,
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<AppPod<'_, 's>> {
        let sandbox = self.containerd.sandbox();
        let id = &guest.id;
        let root = sandbox.dir().join(format!("{id}.root"));
        make_root(&root)?;
        prepare(&root)?;
        let netns = PodNetns::new(sandbox, id)?;
        let network = match runtime {
            Runtime::Kbp => Network::kbp(sandbox),
            Runtime::Stock => Network::ptp(sandbox),
        };
        let attached = network.add(id, &netns, "eth0")?;
        let pod = AppPod {
            node: self,
            id: id.clone(),
            address: attached.ipv4()?,
            root,
            network,
            netns,
        };
        let config = sandbox.dir().join(format!("{id}.json"));
        let spec = self.spec_of(guest, &pod.root, &pod.netns.path());
        std::fs::write(&config, spec.to_string())
            .context(|| format!("write {}", config.display()))?;
        self.containerd.start_container(
            Run::spec(id, &config)
                .runtime(runtime)
                .flag("--log-uri", format!("file://{}", pod.log_path().display())),
        )?;
        Ok(pod)
    }

    fn spec_of(&self, guest: &Guest, root: &Path, netns: &Path) -> Value {
        let mut spec = self.spec.clone();
        let process = &mut spec["process"];
        process["args"] = json!(guest.command);
        process["env"] = json!([PATH, "HOME=/tmp"]);
        process["cwd"] = json!("/tmp");
        process["user"] = json!({ "uid": guest.user, "gid": guest.user });
        spec["root"] = json!({ "path": root, "readonly": false });
        spec["hostname"] = json!(guest.id);
        let group = format!("/{}/{}", self.containerd.sandbox().name(), guest.id);
        spec["linux"]["cgroupsPath"] = json!(group);
        let mut cpu = json!({});
        if let Some(cpus) = &guest.cpus {
            cpu["cpus"] = json!(cpus);
        }
        if let Some(quota) = guest.quota {
            cpu["period"] = json!(100_000);
            cpu["quota"] = json!((quota * 100_000.0) as i64);
        }
        spec["linux"]["resources"]["cpu"] = cpu;
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|n| n["type"] != "network");
            namespaces.push(json!({ "type": "network", "path": netns }));
        }
        let bind = |source: &Path, target: &str| {
            json!({
                "type": "bind", "source": source, "destination": target,
                "options": ["rbind", "ro"],
            })
        };
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            for name in ["usr", "etc"].iter().chain(&MERGED) {
                let path = format!("/{name}");
                let is_dir = Path::new(&path)
                    .symlink_metadata()
                    .is_ok_and(|m| m.is_dir());
                if is_dir {
                    mounts.push(bind(Path::new(&path), &path));
                }
            }
            mounts.push(bind(&self.files, FILES));
        }
        for (key, value) in &guest.annotations {
            spec["annotations"][key] = json!(value);
        }
        spec
    }
}

/// The spec that containerd makes for a container with its default seccomp profile.
fn default_spec(containerd: &Containerd<'_>) -> Result<Value> {
    let root = containerd.sandbox().dir().join("empty");
    std::fs::create_dir_all(&root).context(|| format!("create {}", root.display()))?;
    let root = root.display().to_string();
    containerd
        .ctr([
            "containers",
            "create",
            "--seccomp",
            "--rootfs",
            &root,
            "spec",
            "true",
        ])?
        .success()?;
    let text = containerd
        .ctr(["containers", "info", "spec"])?
        .success()?
        .stdout;
    containerd
        .ctr(["containers", "delete", "spec"])?
        .success()?;
    let info: Value = serde_json::from_str(&text).map_err(|e| Error::Command {
        command: "ctr containers info".to_owned(),
        reason: e.to_string(),
    })?;
    let spec = info["Spec"].clone();
    if spec["linux"]["seccomp"].is_object() {
        return Ok(spec);
    }
    Err(Error::Command {
        command: "ctr containers create --seccomp".to_owned(),
        reason: "the spec has no seccomp profile".to_owned(),
    })
}

fn make_root(root: &Path) -> Result<()> {
    for sub in [
        "proc", "sys", "dev", "run", "etc", "usr", "tmp", "var/tmp", "kbp",
    ] {
        let path = root.join(sub);
        std::fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
    }
    for name in MERGED {
        let (machine, own) = (Path::new("/").join(name), root.join(name));
        match machine.symlink_metadata() {
            Ok(meta) if meta.is_symlink() => {
                let target = std::fs::read_link(&machine).context(|| format!("read /{name}"))?;
                match symlink(&target, &own) {
                    Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                        return Err(e).context(|| format!("link {}", own.display()));
                    }
                    _ => {}
                }
            }
            Ok(_) => {
                std::fs::create_dir_all(&own).context(|| format!("create {}", own.display()))?;
            }
            Err(_) => {}
        }
    }
    // Programs of other users write here, too.
    let mut chmod = Command::new("chmod");
    chmod.arg("1777").arg(root.join("tmp"));
    command::run(chmod, Duration::from_secs(10))?
        .success()
        .map(drop)
}

/// A running container with its network; all of it goes with [`AppPod::remove`], else with the sandbox.
#[derive(Debug)]
pub struct AppPod<'n, 's> {
    node: &'n AppNode<'s>,
    id: String,
    address: String,
    root: PathBuf,
    network: Network<'s>,
    netns: PodNetns<'s>,
}

impl AppPod<'_, '_> {
    /// Its IPv4 address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its root, seen from outside.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its network namespace.
    pub fn netns(&self) -> &PodNetns<'_> {
        &self.netns
    }

    /// Process id of its first process.
    pub fn pid(&self) -> Result<u32> {
        self.node.containerd.pid(&self.id)
    }

    fn log_path(&self) -> PathBuf {
        self.node
            .containerd
            .sandbox()
            .dir()
            .join(format!("{}.log", self.id))
    }

    /// What its first process wrote.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// All its processes.
    pub fn processes(&self) -> Vec<u32> {
        processes(&format!(
            "/{}/{}",
            self.node.containerd.sandbox().name(),
            self.id
        ))
    }

    /// Runs a command in the container to its end, as its own user.
    pub fn exec(&self, command: &[String]) -> Result<Output> {
        self.node
            .containerd
            .exec(&self.id, lingering(command))?
            .success()
    }

    /// What a command prints that runs in the container to its end. Unlike [`AppPod::exec`] it does not linger, since it prints to a file.
    pub fn exec_and_read(&self, command: &[String]) -> Result<String> {
        const PRINTED: &str = "tmp/printed";
        let script = format!("exec \"$@\" >/{PRINTED}");
        let shell = ["sh", "-c", &script, "sh"].map(str::to_owned);
        let words = shell.into_iter().chain(command.iter().cloned());
        self.node.containerd.exec(&self.id, words)?.success()?;
        let path = self.root.join(PRINTED);
        std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))
    }

    /// Starts a command in the container, beside the test.
    pub fn exec_start(&self, exec_id: &str, command: &[String]) -> Result<Running> {
        let mut words: Vec<String> = ["tasks", "exec", "--exec-id", exec_id, &self.id]
            .map(str::to_owned)
            .to_vec();
        words.extend(lingering(command));
        self.node.containerd.ctr_start(words)
    }

    /// Waits until something in its network namespace is bound to `port`, TCP or UDP.
    pub fn wait_for_port(&self, port: u16) -> Result<()> {
        let pid = self.pid()?;
        let suffix = format!(":{port:04X}");
        wait_until(&format!("port {port} of {}", self.id), START, || {
            let bound = ["tcp", "udp", "tcp6", "udp6"].iter().any(|table| {
                let text =
                    std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
                text.lines()
                    .filter_map(|line| line.split_whitespace().nth(1))
                    .any(|local| local.ends_with(&suffix))
            });
            if bound {
                Ok(Ok(()))
            } else {
                let stopped = !crate::running(pid);
                let what = format!("nothing is bound to it; it wrote:\n{}", self.log());
                // One that ended will not bind any more.
                if stopped { Ok(Err(what)) } else { Err(what) }
            }
        })?
        .map_err(|reason| Error::Command {
            command: format!("the server in {}", self.id),
            reason,
        })
    }

    /// Ends the container and removes it, its address and its namespace.
    pub fn remove(self) -> Result<()> {
        let log = self.log_path();
        self.node.containerd.remove(&self.id)?;
        self.network.del(&self.id, Some(&self.netns), "eth0")?;
        self.netns.remove()?;
        std::fs::remove_file(&log).context(|| format!("remove {}", log.display()))?;
        std::fs::remove_dir_all(&self.root).context(|| format!("remove {}", self.root.display()))
    }
}

/// A command whose output nobody cuts off: who reads it may stop reading as soon as it hears of the end.
fn lingering(command: &[String]) -> Vec<String> {
    let script = "\"$@\"; code=$?; sleep 0.1; exit $code";
    let shell = ["sh", "-c", script, "sh"].map(str::to_owned);
    shell.into_iter().chain(command.iter().cloned()).collect()
}

/// The processes whose cgroup ends in `group`.
pub fn processes(group: &str) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let groups = std::fs::read_to_string(entry.path().join("cgroup")).ok()?;
            groups.lines().any(|l| l.ends_with(group)).then_some(pid)
        })
        .collect()
}

/// A program of the machine that has to be below `/usr`, where containers see it.
pub(super) fn below_usr(name: &str, package: &str) -> Result<String> {
    let path = program(name, package)?;
    // A link into somebody's home directory does not lead anywhere in a container; the name matters to some programs.
    let real = path.canonicalize().unwrap_or_else(|_| path.clone());
    if path.starts_with("/usr") && real.starts_with("/usr") {
        return Ok(path.display().to_string());
    }
    let usual = Path::new("/usr/bin").join(name);
    if usual.is_file() {
        return Ok(usual.display().to_string());
    }
    Err(Error::Missing {
        what: format!("{name} below /usr (there is {})", path.display()),
        remedy: format!("apt-get install {package}"),
    })
}
