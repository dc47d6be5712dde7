//! `delete`: cleans up what a container's shim left behind, whether or not there ever was one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;

use super::address;
use super::flags::Flags;
use crate::pod;
use crate::task::container::PID_FILE;
use crate::task::events::timestamp;
use crate::task::mounts;
use crate::task::options::Options;
use crate::task::runtime::Runtime;
use crate::task::spec::Spec;

/// 128 and SIGKILL: what the container's init is said to have ended with.
const KILLED: u32 = 137;

/// Kills and removes the container as far as it is there, unmounts its root file system, and removes the socket of a shim
/// that is gone. What is not there is no error: containerd calls this after every kind of end.
pub fn delete(flags: &Flags) -> anyhow::Result<DeleteResponse> {
    anyhow::ensure!(
        !flags.id.is_empty(),
        "flag -id is missing: containerd always gives it"
    );
    let bundle = bundle(flags)?;
    let options = Options::load(&bundle).unwrap_or_default();
    let systemd_cgroup = Spec::read(&bundle).is_ok_and(|spec| spec.wants_systemd_cgroup());
    let default_runtime = super::server::default_runtime();
    let runtime = Runtime::new(
        &options,
        &default_runtime,
        &flags.namespace,
        &bundle,
        systemd_cgroup,
    );
    let pid = fs::read_to_string(bundle.join(PID_FILE))
        .ok()
        .and_then(|text| text.trim().parse().ok());

    let mut command = match bundle.is_dir() {
        true => runtime.command(),
        false => return Ok(answer(None)),
    };
    command.args(["delete", "--force", &flags.id]);
    // It fails for a container that it does not know, which is what is wanted.
    let _ = run(&mut command);
    // The mounts are the next call's again when they cannot be undone now.
    let rootfs = bundle.join("rootfs");
    let _ = mounts::unmount_below(&rootfs);
    let _ = mounts::unmount_layers(&rootfs);
    let socket = address::of_bundle(&bundle);
    // containerd calls this for each container that it deleted. A shim that still serves has others, whose sockets need the
    // notifier, and clears up after its pod itself.
    if !socket.as_deref().is_some_and(address::is_served) {
        pod::cleanup(&flags.namespace, &flags.id, &bundle);
        if let Some(socket) = socket {
            address::remove(&socket);
        }
    }
    Ok(answer(pid))
}

fn answer(pid: Option<u32>) -> DeleteResponse {
    DeleteResponse {
        pid: pid.unwrap_or(0),
        exit_status: KILLED,
        exited_at: timestamp(SystemTime::now()),
        ..Default::default()
    }
}

fn run(command: &mut Command) -> std::io::Result<()> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map(drop)
}

/// containerd names the bundle of the container, and works in it; before 1.5 it was another container's of the same shim.
fn bundle(flags: &Flags) -> anyhow::Result<PathBuf> {
    if !flags.bundle.is_empty() {
        return Ok(PathBuf::from(&flags.bundle));
    }
    let here =
        std::env::current_dir().context("find the working directory, which is the bundle")?;
    Ok(here.parent().unwrap_or(Path::new("/")).join(&flags.id))
}
