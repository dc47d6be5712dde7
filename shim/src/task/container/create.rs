//! How a container comes to be: made by the OCI runtime, or prepared to be restored from a checkpoint.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::CreateTaskRequest;
use tokio::sync::watch;

use super::{Container, Flow, PID_FILE, Surroundings, check_id, read_pid};
use crate::task::cgroup::Cgroup;
use crate::task::error::Result;
use crate::task::io::{Origin, Prepared, ProcessIo, Stdio};
use crate::task::mounts;
use crate::task::options::Options;
use crate::task::process::Process;
use crate::task::reaper::Adoption;
use crate::task::runtime::Runtime;
use crate::task::spec::Spec;

/// A container that starts from a checkpoint; nothing of it runs yet.
#[derive(Debug)]
pub(super) struct Restore {
    /// Directory of the checkpoint.
    pub(super) image: String,
    pub(super) prepared: Prepared,
}

impl Container {
    /// Mounts the root file system and has the OCI runtime create the container. Call [`Self::watch_init`] once the
    /// creation is published.
    pub async fn create(
        request: &CreateTaskRequest,
        around: Surroundings,
    ) -> Result<(Arc<Self>, Adoption)> {
        check_id("container id", &request.id)?;
        let bundle = PathBuf::from(&request.bundle);
        let options = Options::decode(request.options.as_ref().unwrap_or_default())?;
        let spec = Spec::read(&bundle)?;
        options.store(&bundle)?;

        let rootfs = (!request.rootfs.is_empty()).then(|| bundle.join("rootfs"));
        let mounted = match &rootfs {
            Some(target) => Some(mounts::mount_all(request.rootfs.clone(), target.clone()).await?),
            None => None,
        };
        let runtime = Runtime::new(
            &options,
            &around.default_runtime,
            &around.namespace,
            &bundle,
            spec.wants_systemd_cgroup(),
        );
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let init = Arc::new(Process::new(&request.id, stdio));
        let mut container = Self {
            id: request.id.clone(),
            bundle,
            rootfs,
            runtime,
            outlives_init: !spec.has_own_pid_namespace(),
            options,
            init,
            execs: Mutex::default(),
            flow: watch::Sender::new(Flow::default()),
            cgroup: Mutex::default(),
            oom: Mutex::default(),
            restore: Mutex::default(),
            around,
        };
        let prepared =
            Prepared::new(&container.init.stdio, container.origin(&container.id)).await?;
        let adoption = container.around.reaper.adopt();
        if request.checkpoint.is_empty() {
            container.create_init(prepared).await?;
        } else {
            let restore = Restore {
                image: request.checkpoint.clone(),
                prepared,
            };
            container.restore = Mutex::new(Some(restore));
        }
        if let Some(mounted) = mounted {
            mounted.keep();
        }
        Ok((Arc::new(container), adoption))
    }

    /// Whose streams those of process `id` are.
    pub(super) fn origin<'a>(&'a self, id: &'a str) -> Origin<'a> {
        Origin {
            namespace: &self.around.namespace,
            id,
            owner: (self.options.io_uid, self.options.io_gid),
            bundle: &self.bundle,
            reaper: &self.around.reaper,
        }
    }

    async fn create_init(&self, mut prepared: Prepared) -> Result<()> {
        let mut command = self.runtime.command();
        command.arg("create");
        let keyring = self.options.no_new_keyring.then_some("--no-new-keyring");
        self.run_for_init(command, keyring, &mut prepared, "OCI runtime create failed")
            .await?;
        let created = async {
            Ok((
                read_pid(&self.bundle.join(PID_FILE))?,
                prepared.start().await?,
            ))
        };
        match created.await {
            Ok((pid, io)) => {
                self.init_is(pid, io);
                Ok(())
            }
            Err(error) => {
                if let Err(failure) = self.call(["delete", "--force", &self.id]).await {
                    tracing::warn!("container {} is left behind: {}", self.id, failure.message);
                }
                Err(error)
            }
        }
    }

    /// Runs the OCI runtime's `command` that makes the init, create or restore, with what both are told.
    pub(super) async fn run_for_init(
        &self,
        mut command: Command,
        own_flag: Option<&str>,
        prepared: &mut Prepared,
        failed: &'static str,
    ) -> Result<()> {
        command
            .arg("--bundle")
            .arg(&self.bundle)
            .args(["--pid-file", PID_FILE]);
        if self.options.no_pivot_root {
            command.arg("--no-pivot");
        }
        command.args(own_flag);
        if let Some(socket) = prepared.console_socket() {
            command.args(["--console-socket", socket]);
        }
        command.arg(&self.id);
        let stdio = prepared.take_child();
        self.runtime
            .run(&self.around.reaper, command, stdio)
            .await
            .map_err(|failure| failure.during(failed))?;
        Ok(())
    }

    /// The OCI runtime has made the init.
    pub(super) fn init_is(&self, pid: u32, io: ProcessIo) {
        self.init.set_created(pid, io);
        // Looked up now: what runs in the container may move itself further down later.
        match Cgroup::of_process(pid) {
            Ok(cgroup) => {
                *self
                    .cgroup
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(cgroup)
            }
            Err(error) => tracing::warn!("no statistics for {}: {error}", self.id),
        }
    }
}
