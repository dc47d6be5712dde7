//! `start`: finds the pod's server or leaves a new one behind, and tells containerd its address.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Enum, Message};

use super::address::{self, Socket};
use super::caller;
use super::flags::Flags;
use crate::task::options::Options;
use crate::task::spec::Spec;

/// Annotations that put containers into one shim, the first that is there counts.
const GROUPS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// Environment variable with the newest protocol that the caller knows.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";

/// How the caller wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    /// The address alone: Task v2.
    Plain,
    /// JSON with the version: Task v3.
    Json,
    /// A BootstrapResult message: Task v3.
    Message,
}

/// What the caller says, in whichever of the three ways.
#[derive(Debug)]
struct Call {
    reply: Reply,
    containerd: String,
    ttrpc: Option<String>,
    debug: bool,
    socket_directory: PathBuf,
    options: Options,
}

/// Starts the server of this container's group unless there is one, and returns what belongs on standard output.
/// `input` is what containerd sent on standard input. The working directory is the bundle.
pub fn start(flags: &Flags, input: &[u8]) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(
        !flags.id.is_empty(),
        "flag -id is missing: containerd always gives it"
    );
    let call = Call::understand(flags, input, std::env::var(MAX_VERSION).ok().as_deref())?;
    let bundle =
        std::env::current_dir().context("find the working directory, which is the bundle")?;
    let spec = Spec::read(&bundle)?;
    let group = GROUPS
        .iter()
        .find_map(|name| spec.annotations.get(*name))
        .unwrap_or(&flags.id);

    let path = address::path(
        &call.socket_directory,
        &call.containerd,
        &flags.namespace,
        group,
    );
    let address = address::address(&path);
    if let Socket::Bound(listener) = address::bind(&path)? {
        let started =
            write_address(&bundle, &address).and_then(|()| launch(flags, &call, listener.into()));
        if let Err(error) = started {
            address::remove(&path);
            return Err(error);
        }
    } else {
        write_address(&bundle, &address)?;
    }
    call.reply.encode(address)
}

fn write_address(bundle: &Path, address: &str) -> anyhow::Result<()> {
    let path = bundle.join(address::FILE);
    // Renamed into place: containerd may look for it at any moment.
    let draft = bundle.join(".address");
    fs::write(&draft, address)
        .and_then(|()| fs::rename(&draft, &path))
        .with_context(|| format!("write {}", path.display()))
}

impl Call {
    fn understand(flags: &Flags, input: &[u8], max_version: Option<&str>) -> anyhow::Result<Self> {
        let default_directory = PathBuf::from(address::DIRECTORY);
        // An Any and a BootstrapParams cannot be told apart by their form: both begin with two strings.
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == flags.id
            && params.namespace == flags.namespace
        {
            let options = params
                .extensions
                .iter()
                .filter_map(|extension| extension.value.as_ref())
                .find_map(|any| Options::decode(any).ok())
                .unwrap_or_default();
            let directory = params
                .socket_dir
                .as_deref()
                .filter(|directory| !directory.is_empty());
            return Ok(Self {
                reply: Reply::Message,
                containerd: params.containerd_grpc_address,
                ttrpc: Some(params.containerd_ttrpc_address),
                debug: params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
                socket_directory: directory.map_or(default_directory, PathBuf::from),
                options,
            });
        }
        let any = Any::parse_from_bytes(input)
            .context("read the options that containerd sent on standard input")?;
        // 1.6 does not set it, and 1.7 and 2.x say 2, although the latter know 3.
        let max_version: Option<u32> = max_version.and_then(|version| version.parse().ok());
        let knows_json = match max_version {
            Some(3..) => true,
            Some(_) => caller::knows_version_3(Path::new(&flags.publish_binary)),
            None => false,
        };
        Ok(Self {
            reply: if knows_json {
                Reply::Json
            } else {
                Reply::Plain
            },
            containerd: flags.address.clone(),
            ttrpc: None,
            debug: flags.debug,
            socket_directory: default_directory,
            // The server refuses what it does not understand when it creates the container, with a better message.
            options: Options::decode(&any).unwrap_or_default(),
        })
    }
}

impl Reply {
    fn encode(self, address: String) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(address.into_bytes()),
            Self::Json => {
                let json =
                    serde_json::json!({ "version": 3, "address": address, "protocol": "ttrpc" });
                serde_json::to_vec(&json).context("encode the answer")
            }
            Self::Message => {
                let result = BootstrapResult {
                    version: 3,
                    address,
                    protocol: "ttrpc".to_owned(),
                    ..Default::default()
                };
                result.write_to_bytes().context("encode the answer")
            }
        }
    }
}

/// Starts this binary again as the server, with the listening socket as its standard input.
fn launch(flags: &Flags, call: &Call, listener: OwnedFd) -> anyhow::Result<()> {
    let binary = std::env::current_exe().context("find the shim's own binary")?;
    let mut command = Command::new(&binary);
    command.args([
        "-namespace",
        &flags.namespace,
        "-id",
        &flags.id,
        "-address",
        &call.containerd,
    ]);
    if call.debug {
        command.arg("-debug");
    }
    if let Some(ttrpc) = &call.ttrpc {
        command.env("TTRPC_ADDRESS", ttrpc);
    }
    // One heap, and freed memory goes back at once: there is one server for every pod of the node. What each thread would keep of it
    // for itself, freed pieces and the stacks of threads that have ended, would hold the pages of a burst for ever.
    command
        .env(
            "GLIBC_TUNABLES",
            "glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0",
        )
        .env("MALLOC_ARENA_MAX", "1")
        .env("MALLOC_TRIM_THRESHOLD_", "65536");
    command.process_group(0);
    command
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        kbp_kernel::process::create_core_cookie().context("containerd's option sched_core")?;
    }
    let mut server = command
        .spawn()
        .with_context(|| format!("start {} as the server", binary.display()))?;

    let settled = settle(server.id(), &call.options.shim_cgroup);
    if settled.is_err() {
        let _ = server.kill();
        let _ = server.wait();
    }
    settled
}

/// Puts the server into its cgroup, and makes it a little likelier to be killed than containerd when memory runs out.
fn settle(pid: u32, cgroup: &str) -> anyhow::Result<()> {
    if !cgroup.is_empty() {
        join_cgroup(pid, cgroup).with_context(|| format!("move the shim into cgroup {cgroup}"))?;
    }
    let parent = std::os::unix::process::parent_id();
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        // May be refused without CAP_SYS_RESOURCE; the pod runs all the same.
        let _ = fs::write(
            format!("/proc/{pid}/oom_score_adj"),
            (score + 1).min(1000).to_string(),
        );
    }
    Ok(())
}

fn join_cgroup(pid: u32, cgroup: &str) -> std::io::Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let relative = cgroup.trim_start_matches('/');
    let pid = pid.to_string();
    if root.join("cgroup.controllers").exists() {
        return fs::write(root.join(relative).join("cgroup.procs"), pid);
    }
    // Version 1: in every hierarchy that has it, and in one at least.
    let mut joined = Err(std::io::ErrorKind::NotFound.into());
    for hierarchy in fs::read_dir(root)?.flatten() {
        let procs = hierarchy.path().join(relative).join("cgroup.procs");
        if hierarchy.file_type()?.is_dir() && procs.exists() {
            fs::write(procs, &pid)?;
            joined = Ok(());
        }
    }
    joined
}
