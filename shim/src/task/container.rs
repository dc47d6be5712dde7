//! A container: its init, its exec'd processes, and the order in which they begin and end.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest, Status};
use containerd_shim_protos::events::task as events;
use tokio::sync::watch;

use super::error::{Error, Result};
use super::events::{Publisher, timestamp};
use super::io::{DRAIN_LIMIT, Prepared, Stdio};
use super::mounts;
use super::options::Options;
use super::process::Process;
use super::reaper::{Adoption, Exit, Reaper};
use super::runtime::{Failure, Runtime};
use super::spec::Spec;

/// File in the bundle with the pid of the init, for `delete` after a crash.
pub const PID_FILE: &str = "init.pid";

/// How long the init may take to end once the OCI runtime has deleted the container.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What all containers of a shim share.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// containerd namespace.
    pub namespace: String,
    /// OCI runtime where the options name none.
    pub default_runtime: String,
    /// Starts and reaps processes.
    pub reaper: Arc<Reaper>,
    /// Takes events.
    pub publisher: Arc<Publisher>,
}

/// A container that the OCI runtime has created.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: PathBuf,
    rootfs: Option<PathBuf>,
    runtime: Runtime,
    io_owner: (u32, u32),
    /// Whether the end of the init leaves other processes alive: it shares its pid namespace.
    outlives_init: bool,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    lifecycle: watch::Sender<Lifecycle>,
    around: Surroundings,
}

#[derive(Debug)]
struct Exec {
    process: Arc<Process>,
    spec: Vec<u8>,
}

#[derive(Debug, Default)]
struct Lifecycle {
    /// The init was reaped; no exec may start any more. Its end is published when no exec runs any more.
    init_ended: bool,
    /// Execs that start or run.
    execs: usize,
}

impl Container {
    /// Mounts the root file system and has the OCI runtime create the container. Call [`Self::watch_init`] once the
    /// creation is published.
    pub async fn create(
        request: &CreateTaskRequest,
        around: Surroundings,
    ) -> Result<(Arc<Self>, Adoption)> {
        check_id("container", &request.id)?;
        let bundle = PathBuf::from(&request.bundle);
        let options = Options::decode(request.options.as_ref().unwrap_or_default())?;
        let spec = Spec::read(&bundle)?;
        options.store(&bundle)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented(
                "restoring a container from a checkpoint is not supported".to_owned(),
            ));
        }

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
            spec.has_systemd_cgroup(),
        );
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let io_owner = (options.io_uid, options.io_gid);
        let mut prepared = Prepared::new(&stdio, io_owner, &bundle)?;
        let init = Arc::new(Process::new(&request.id, stdio));

        let mut command = runtime.command();
        command
            .arg("create")
            .arg("--bundle")
            .arg(&bundle)
            .args(["--pid-file", PID_FILE]);
        if options.no_pivot_root {
            command.arg("--no-pivot");
        }
        if options.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        if let Some(socket) = prepared.console_socket() {
            command.args(["--console-socket", socket]);
        }
        command.arg(&request.id);

        let adoption = around.reaper.adopt();
        let stdio = prepared.take_child();
        runtime
            .run(&around.reaper, command, stdio)
            .await
            .map_err(|failure| failure.during("OCI runtime create failed"))?;
        let created = async {
            let pid = read_pid(&bundle.join(PID_FILE))?;
            Ok((pid, prepared.start().await?))
        };
        match created.await {
            Ok((pid, io)) => init.set_created(pid, io),
            Err(error) => {
                let arguments = ["delete", "--force", &request.id];
                if let Err(failure) = runtime.call(&around.reaper, arguments).await {
                    tracing::warn!(
                        "container {} is left behind: {}",
                        request.id,
                        failure.message
                    );
                }
                return Err(error);
            }
        }
        if let Some(mounted) = mounted {
            mounted.keep();
        }
        let container = Arc::new(Self {
            id: request.id.clone(),
            bundle,
            rootfs,
            runtime,
            io_owner,
            outlives_init: !spec.has_own_pid_namespace(),
            init,
            execs: Mutex::default(),
            lifecycle: watch::Sender::default(),
            around,
        });
        Ok((container, adoption))
    }

    /// Publishes the end of the init when it comes, after the ends of all its execs.
    pub fn watch_init(self: &Arc<Self>, adoption: &Adoption) {
        let ended = adoption.watch(self.init.pid());
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let Ok(exit) = ended.await else { return };
            this.lifecycle
                .send_modify(|lifecycle| lifecycle.init_ended = true);
            if this.outlives_init {
                let arguments = ["kill", "--all", &this.id, "9"];
                if let Err(failure) = this.runtime.call(&this.around.reaper, arguments).await {
                    tracing::debug!(
                        "nothing killed after the init of {} ended: {}",
                        this.id,
                        failure.message
                    );
                }
            }
            let mut lifecycle = this.lifecycle.subscribe();
            // An error would mean that the sender is gone, and it is in `this`.
            let _ = lifecycle.wait_for(|lifecycle| lifecycle.execs == 0).await;
            this.publish_exit(&this.init, exit).await;
        });
    }

    fn watch_exec(self: &Arc<Self>, process: Arc<Process>, adoption: &Adoption) {
        let ended = adoption.watch(process.pid());
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(exit) = ended.await {
                this.publish_exit(&process, exit).await;
            }
            this.exec_ended();
        });
    }

    /// Waits for whatever is being done to the process, so that its end comes after the start that is under way.
    async fn publish_exit(&self, process: &Process, exit: Exit) {
        let _operation = process.operation.lock().await;
        process.set_exited(exit);
        self.around.publisher.publish(&events::TaskExit {
            container_id: self.id.clone(),
            id: process.id.clone(),
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        });
    }

    fn exec_ended(&self) {
        self.lifecycle.send_modify(|lifecycle| lifecycle.execs -= 1);
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

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

    /// The init.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    async fn call<'a>(
        &self,
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<u8>, Failure> {
        self.runtime.call(&self.around.reaper, arguments).await
    }

    /// Starts the init and publishes it.
    pub async fn start(&self) -> Result<u32> {
        let _operation = self.init.operation.lock().await;
        self.init.expect("start", &[Status::CREATED])?;
        self.call(["start", &self.id])
            .await
            .map_err(|failure| failure.during("OCI runtime start failed"))?;
        let pid = self.init.pid();
        self.init.set_status(Status::RUNNING);
        self.around.publisher.publish(&events::TaskStart {
            container_id: self.id.clone(),
            pid,
            ..Default::default()
        });
        Ok(pid)
    }

    /// Notes a process to be started by [`Self::start_exec`].
    pub fn add_exec(&self, request: &ExecProcessRequest) -> Result<()> {
        check_id("exec", &request.exec_id)?;
        self.init
            .expect("exec in", &[Status::CREATED, Status::RUNNING])?;
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
        process.expect("start", &[Status::CREATED])?;
        let counted = self.lifecycle.send_if_modified(|lifecycle| {
            if !lifecycle.init_ended {
                lifecycle.execs += 1;
            }
            !lifecycle.init_ended
        });
        if !counted {
            return Err(Error::FailedPrecondition(format!(
                "container {} init process is not running",
                self.id
            )));
        }
        let adoption = self.around.reaper.adopt();
        match self.run_exec(&exec).await {
            Ok(pid) => {
                process.set_status(Status::RUNNING);
                self.around.publisher.publish(&events::TaskExecStarted {
                    container_id: self.id.clone(),
                    exec_id: id.to_owned(),
                    pid,
                    ..Default::default()
                });
                self.watch_exec(Arc::clone(process), &adoption);
                Ok(pid)
            }
            Err(error) => {
                // It will never run: whoever waits for it is told so.
                process.set_exited(Exit {
                    pid: 0,
                    status: 255,
                    at: std::time::SystemTime::now(),
                });
                self.exec_ended();
                Err(error)
            }
        }
    }

    async fn run_exec(&self, exec: &Exec) -> Result<u32> {
        let process = &exec.process;
        let mut prepared = Prepared::new(&process.stdio, self.io_owner, &self.bundle)?;
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
        let stdio = prepared.take_child();
        let ran = self.runtime.run(&self.around.reaper, command, stdio).await;
        let _ = fs::remove_file(&spec_path);
        ran.map_err(|failure| failure.during("OCI runtime exec failed"))?;

        let pid_path = self.bundle.join(&pid_file);
        let pid = read_pid(&pid_path);
        let _ = fs::remove_file(&pid_path);
        let pid = pid?;
        match prepared.start().await {
            Ok(io) => process.set_created(pid, io),
            Err(error) => {
                // Without its streams nobody can use it; it is not watched yet, and not reaped while it is adopted.
                let _ = kbp_kernel::process::kill(pid, 9);
                return Err(error);
            }
        }
        Ok(pid)
    }

    /// Sends a signal to the init, to all processes, or to one exec'd process.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let finished = || Error::NotFound("process already finished".to_owned());
        let process = self.process(exec_id)?;
        if !exec_id.is_empty() {
            if process.pid() == 0 && process.exit().is_none() {
                return Err(Error::FailedPrecondition("process not created".to_owned()));
            }
            let sent = self
                .around
                .reaper
                .signal(process.pid(), signal.cast_signed())?;
            return if sent { Ok(()) } else { Err(finished()) };
        }
        if process.status() == Status::STOPPED && !all {
            return Err(finished());
        }
        let signal = signal.to_string();
        let all = if all { Some("--all") } else { None };
        let arguments = ["kill"]
            .into_iter()
            .chain(all)
            .chain([self.id.as_str(), &signal]);
        self.call(arguments).await.map(drop).map_err(|failure| {
            let message = failure.message.to_lowercase();
            if ["process already finished", "not running", "no such process"]
                .iter()
                .any(|text| message.contains(text))
            {
                finished()
            } else if message.contains("does not exist") {
                Error::NotFound("no such container".to_owned())
            } else {
                failure.during("unknown error after kill")
            }
        })
    }

    /// Freezes all processes.
    pub async fn pause(&self) -> Result<()> {
        let _operation = self.init.operation.lock().await;
        self.init.expect("pause", &[Status::RUNNING])?;
        self.init.set_status(Status::PAUSING);
        let paused = self.call(["pause", &self.id]).await;
        self.init.set_status(if paused.is_ok() {
            Status::PAUSED
        } else {
            Status::RUNNING
        });
        paused.map_err(|failure| failure.during("OCI runtime pause failed"))?;
        self.around.publisher.publish(&events::TaskPaused {
            container_id: self.id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Lets all processes run on.
    pub async fn resume(&self) -> Result<()> {
        let _operation = self.init.operation.lock().await;
        self.init.expect("resume", &[Status::PAUSED])?;
        self.call(["resume", &self.id])
            .await
            .map_err(|failure| failure.during("OCI runtime resume failed"))?;
        self.init.set_status(Status::RUNNING);
        self.around.publisher.publish(&events::TaskResumed {
            container_id: self.id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Changes resource limits; `resources` is the OCI specification's `linux.resources` as JSON.
    pub async fn update(&self, resources: &[u8]) -> Result<()> {
        const FILE: &str = "resources.json";
        let _operation = self.init.operation.lock().await;
        self.init.expect(
            "update",
            &[Status::CREATED, Status::RUNNING, Status::PAUSED],
        )?;
        let path = self.bundle.join(FILE);
        fs::write(&path, resources).map_err(Error::io(format!("write {}", path.display())))?;
        let updated = self.call(["update", "--resources", FILE, &self.id]).await;
        let _ = fs::remove_file(&path);
        updated
            .map(drop)
            .map_err(|failure| failure.during("OCI runtime update failed"))
    }

    /// Pids of all processes, each with its exec id where it is an exec's first.
    pub async fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        let what = "OCI runtime ps failed";
        let output = self
            .call(["ps", "--format", "json", &self.id])
            .await
            .map_err(|failure| failure.during(what))?;
        let pids: Option<Vec<u32>> =
            serde_json::from_slice(&output).map_err(|error| Error::Runtime {
                what,
                message: format!("output is not a list of pids: {error}"),
            })?;
        let execs: HashMap<u32, String> = self
            .execs()
            .iter()
            .map(|(id, exec)| (exec.process.pid(), id.clone()))
            .collect();
        Ok(pids
            .unwrap_or_default()
            .into_iter()
            .map(|pid| (pid, execs.get(&pid).cloned()))
            .collect())
    }

    /// Removes an exec'd process that does not run.
    pub async fn delete_exec(&self, id: &str) -> Result<Arc<Process>> {
        let process = self.process(id)?;
        let _operation = process.operation.lock().await;
        process.expect("delete", &[Status::CREATED, Status::STOPPED])?;
        process.finish_io(DRAIN_LIMIT).await;
        self.execs().remove(id);
        Ok(Arc::clone(&process))
    }

    /// Removes a container that does not run: what the OCI runtime knows of it, its streams and its mounts.
    pub async fn delete(&self) -> Result<()> {
        {
            let _operation = self.init.operation.lock().await;
            self.init
                .expect("delete", &[Status::CREATED, Status::STOPPED])?;
            let deleted = self.call(["delete", &self.id]).await;
            // A checkpoint may have ended it, and the runtime has forgotten it then.
            if let Err(failure) = deleted
                && !failure.message.contains("does not exist")
            {
                return Err(failure.during("failed to delete task"));
            }
        }
        // One that was never started has been killed just now.
        if tokio::time::timeout(END_LIMIT, self.init.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                "the init of {} has not ended within {END_LIMIT:?} of its deletion",
                self.id
            );
        }
        self.init.finish_io(DRAIN_LIMIT).await;
        let execs: Vec<_> = self.execs().drain().collect();
        for (_, exec) in execs {
            exec.process.finish_io(Duration::ZERO).await;
        }
        if let Some(rootfs) = &self.rootfs {
            mounts::unmount_all(rootfs.clone()).await?;
        }
        Ok(())
    }
}

/// containerd checks ids before it sends them; they become file names here, so a path in one is refused again.
fn check_id(what: &str, id: &str) -> Result<()> {
    if id.is_empty() || id.starts_with('.') || id.starts_with('-') || id.contains('/') {
        return Err(Error::InvalidArgument(format!(
            "{what} id {id:?} is not valid: expected letters, digits, - _ ."
        )));
    }
    Ok(())
}

fn exec_spec(json: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let invalid =
        |error: serde_json::Error| Error::InvalidArgument(format!("process of an exec: {error}"));
    let mut spec: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(invalid)?;
    spec.insert("terminal".to_owned(), terminal.into());
    serde_json::to_vec(&spec).map_err(invalid)
}

fn read_pid(path: &Path) -> Result<u32> {
    let text =
        fs::read_to_string(path).map_err(Error::io(format!("read pid file {}", path.display())))?;
    text.trim().parse().map_err(|_| Error::Malformed {
        path: path.to_owned(),
        detail: format!("{:?} is not a pid", text.trim()),
    })
}
