//! Processes that are started in a running container.

use std::fs;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::{ExecProcessRequest, Status};
use containerd_shim_protos::events::task as events;
use tokio::sync::oneshot;

use super::{Container, check_id, read_pid};
use crate::task::error::{Error, Result};
use crate::task::io::{DRAIN_LIMIT, Prepared, Stdio};
use crate::task::process::Process;
use crate::task::reaper::Exit;

/// A process that was announced, and may have been started.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) process: Arc<Process>,
    /// The OCI specification's `process`, as JSON.
    spec: Vec<u8>,
}

/// What an exec that could not be started is said to have ended with.
const NOT_STARTED: u32 = 255;

impl Container {
    fn exec_of(&self, id: &str) -> Result<Arc<Exec>> {
        self.execs()
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("process does not exist {id}")))
    }

    /// The init, or an exec'd process by its id.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        match exec_id {
            "" => Ok(Arc::clone(&self.init)),
            id => Ok(Arc::clone(&self.exec_of(id)?.process)),
        }
    }

    /// Notes a process to be started by [`Self::start_exec`].
    pub fn add_exec(&self, request: &ExecProcessRequest) -> Result<()> {
        check_id("exec id", &request.exec_id)?;
        self.init
            .expect("exec beside a", &[Status::CREATED, Status::RUNNING])?;
        let spec = exec_spec(&request.spec.value, request.terminal)?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let process = Arc::new(Process::new(&request.exec_id, stdio));
        {
            let mut execs = self.execs();
            if execs.contains_key(&request.exec_id) {
                return Err(Error::AlreadyExists(format!("id {}", request.exec_id)));
            }
            execs.insert(request.exec_id.clone(), Arc::new(Exec { process, spec }));
        }
        self.around.publisher.publish(&events::TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Starts an exec'd process and publishes it.
    pub async fn start_exec(self: &Arc<Self>, id: &str) -> Result<u32> {
        let exec = self.exec_of(id)?;
        let process = &exec.process;
        let _operation = process.operation.lock().await;
        process.expect("start a", &[Status::CREATED])?;
        if !self.exec_begins() {
            return Err(Error::FailedPrecondition(format!(
                "container {} init process is not running",
                self.id
            )));
        }
        match self.run_exec(&exec).await {
            Ok(ended) => {
                let pid = process.pid();
                process.set_status(Status::RUNNING);
                self.around.publisher.publish(&events::TaskExecStarted {
                    container_id: self.id.clone(),
                    exec_id: id.to_owned(),
                    pid,
                    ..Default::default()
                });
                self.watch_exec(Arc::clone(process), ended);
                Ok(pid)
            }
            Err(error) => {
                // It will never run: whoever waits for it is told so.
                process.set_exited(Exit {
                    pid: 0,
                    status: NOT_STARTED,
                    at: SystemTime::now(),
                });
                self.exec_ended();
                Err(error)
            }
        }
    }

    /// Returns what resolves when the process has ended.
    async fn run_exec(&self, exec: &Exec) -> Result<oneshot::Receiver<Exit>> {
        let process = &exec.process;
        let mut prepared = Prepared::new(&process.stdio, self.origin(&process.id)).await?;
        let spec_file = format!("{}-process.json", process.id);
        let pid_file = format!("{}.pid", process.id);
        let spec_path = self.bundle.join(&spec_file);
        fs::write(&spec_path, &exec.spec)
            .map_err(Error::io(format!("write {}", spec_path.display())))?;

        let mut command = self.runtime.command();
        command.args([
            "exec",
            "--detach",
            "--process",
            &spec_file,
            "--pid-file",
            &pid_file,
        ]);
        if let Some(socket) = prepared.console_socket() {
            command.args(["--console-socket", socket]);
        }
        command.arg(&self.id);
        let adoption = self.around.reaper.adopt();
        let stdio = prepared.take_child();
        let ran = self.runtime.run(&self.around.reaper, command, stdio).await;
        let _ = fs::remove_file(&spec_path);
        ran.map_err(|failure| failure.during("OCI runtime exec failed"))?;

        let pid_path = self.bundle.join(&pid_file);
        let pid = read_pid(&pid_path);
        let _ = fs::remove_file(&pid_path);
        let pid = pid?;
        let ended = adoption.watch(pid);
        match prepared.start().await {
            Ok(io) => process.set_created(pid, io),
            Err(error) => {
                // Without its streams nobody can use it.
                let _ = self.around.reaper.signal(pid, 9);
                return Err(error);
            }
        }
        Ok(ended)
    }

    /// Removes an exec'd process that does not run.
    pub async fn delete_exec(&self, id: &str) -> Result<Arc<Process>> {
        let process = self.process(id)?;
        {
            let _operation = process.operation.lock().await;
            process.expect("delete a", &[Status::CREATED, Status::STOPPED])?;
            process.finish_io(DRAIN_LIMIT).await;
        }
        self.execs().remove(id);
        Ok(process)
    }
}

fn exec_spec(json: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let invalid =
        |error: serde_json::Error| Error::InvalidArgument(format!("process of an exec: {error}"));
    let mut spec: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(invalid)?;
    spec.insert("terminal".to_owned(), terminal.into());
    serde_json::to_vec(&spec).map_err(invalid)
}
