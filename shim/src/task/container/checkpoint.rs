//! Checkpoint and restore, which the OCI runtime leaves to criu.

use std::fs;
use std::path::Path;

use containerd_shim_protos::api::{CheckpointTaskRequest, Status};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::CheckpointOptions;

use super::create::Restore;
use super::{Container, PID_FILE, read_pid};
use crate::task::error::{Error, Result};

impl Container {
    /// Writes a checkpoint, and ends the container if the options say so.
    pub async fn checkpoint(&self, request: &CheckpointTaskRequest) -> Result<()> {
        let options =
            CheckpointOptions::parse_from_bytes(&request.options.value).map_err(|error| {
                Error::InvalidArgument(format!(
                    "checkpoint options of type {:?}: {error}",
                    request.options.type_url
                ))
            })?;
        let _operation = self.init.operation.lock().await;
        self.init
            .expect("checkpoint a", &[Status::RUNNING, Status::PAUSED])?;
        require_criu()?;

        let own_work = self.bundle.join("criu-work");
        let work = if options.work_path.is_empty() {
            own_work.as_path()
        } else {
            Path::new(&options.work_path)
        };
        let mut command = self.runtime.command();
        command
            .arg("checkpoint")
            .arg("--image-path")
            .arg(&request.path)
            .arg("--work-path")
            .arg(work);
        let switches = [
            (!options.exit, "--leave-running"),
            (options.open_tcp, "--tcp-established"),
            (options.external_unix_sockets, "--ext-unix-sk"),
            (options.terminal, "--shell-job"),
            (options.file_locks, "--file-locks"),
        ];
        command.args(
            switches
                .into_iter()
                .filter(|(on, _)| *on)
                .map(|(_, switch)| switch),
        );
        for namespace in &options.empty_namespaces {
            command.args(["--empty-ns", namespace]);
        }
        if !options.cgroups_mode.is_empty() {
            command.args(["--manage-cgroups-mode", &options.cgroups_mode]);
        }
        command.arg(&self.id);
        let written = self.runtime.run(&self.around.reaper, command, None).await;
        let dump_log = self.bundle.join("criu-dump.log");
        if written.is_err() {
            // The reason is in there, and containerd's message points to it.
            let _ = fs::copy(work.join("dump.log"), &dump_log);
        }
        let _ = fs::remove_dir_all(&own_work);
        written.map(drop).map_err(|mut failure| {
            failure.message = format!("{} path= {}", failure.message, dump_log.display());
            failure.during("OCI runtime checkpoint failed")
        })
    }

    /// Starts from a checkpoint; returns the init's pid.
    pub(super) async fn run_restore(&self, restore: Restore) -> Result<u32> {
        require_criu()?;
        let Restore {
            image,
            mut prepared,
        } = restore;
        let own_work = self.bundle.join("criu-work");
        let work = if self.options.criu_work_path.is_empty() {
            own_work.as_path()
        } else {
            Path::new(&self.options.criu_work_path)
        };
        let mut command = self.runtime.command();
        command
            .args([
                "restore",
                "--detach",
                "--no-subreaper",
                "--image-path",
                &image,
            ])
            .arg("--work-path")
            .arg(work);
        self.run_for_init(command, None, &mut prepared, "OCI runtime restore failed")
            .await?;
        let pid = read_pid(&self.bundle.join(PID_FILE))?;
        self.init_is(pid, prepared.start().await?);
        Ok(pid)
    }
}

/// runc and crun both run the program.
fn require_criu() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|directory| directory.join("criu").is_file()) {
        return Ok(());
    }
    Err(Error::Unimplemented(
        "checkpoint and restore need criu, which is not in containerd's PATH: install criu"
            .to_owned(),
    ))
}
