//! A container: its init, its exec'd processes, and the order in which they begin and end.

mod checkpoint;
mod create;
mod end;
mod exec;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::Status;
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use tokio::sync::watch;

use self::create::Restore;
use self::end::{Flow, OomTask};
use self::exec::Exec;
use super::cgroup::Cgroup;
use super::error::{Error, Result};
use super::events::Publisher;
use super::io::DRAIN_LIMIT;
use super::mounts;
use super::options::Options;
use super::process::Process;
use super::reaper::Reaper;
use super::runtime::{Failure, Runtime};

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
    options: Options,
    /// Whether the end of the init leaves other processes alive: it shares its pid namespace.
    outlives_init: bool,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    flow: watch::Sender<Flow>,
    cgroup: Mutex<Option<Cgroup>>,
    oom: Mutex<Option<OomTask>>,
    restore: Mutex<Option<Restore>>,
    around: Surroundings,
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn cgroup(&self) -> Option<Cgroup> {
        self.cgroup
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Starts the init and publishes it.
    pub async fn start(self: &Arc<Self>) -> Result<u32> {
        let _operation = self.init.operation.lock().await;
        self.init.expect("start a", &[Status::CREATED])?;
        let restore = self
            .restore
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let restored = match restore {
            Some(restore) => {
                let adoption = self.around.reaper.adopt();
                self.run_restore(restore).await?;
                Some(adoption)
            }
            None => {
                let started = self.call(["start", &self.id]).await;
                started.map_err(|failure| failure.during("OCI runtime start failed"))?;
                None
            }
        };
        let pid = self.init.pid();
        self.init.set_status(Status::RUNNING);
        self.around.publisher.publish(&events::TaskStart {
            container_id: self.id.clone(),
            pid,
            ..Default::default()
        });
        if let Some(adoption) = restored {
            self.watch_init(&adoption);
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
        self.init.expect("pause a", &[Status::RUNNING])?;
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
        self.init.expect("resume a", &[Status::PAUSED])?;
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
            "update a",
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

    /// Statistics of its cgroup.
    pub async fn stats(&self) -> Result<Any> {
        let cgroup = self
            .cgroup()
            .ok_or_else(|| Error::NotFound("cgroup does not exist".to_owned()))?;
        // The kernel sums up for a while when there are many CPUs.
        let read = tokio::task::spawn_blocking(move || cgroup.stats()).await;
        read.map_err(|error| {
            Error::io("read the statistics of a cgroup")(std::io::Error::from(error))
        })?
    }

    /// Removes a container that does not run: what the OCI runtime knows of it, its streams and its mounts.
    pub async fn delete(&self) -> Result<()> {
        {
            let _operation = self.init.operation.lock().await;
            self.init
                .expect("delete a", &[Status::CREATED, Status::STOPPED])?;
            // One to be restored that was not is unknown to the runtime.
            let deleted = self.call(["delete", &self.id]).await;
            // A checkpoint may have ended it, and the runtime has forgotten it then.
            if let Err(failure) = deleted
                && !failure.message.contains("does not exist")
            {
                return Err(failure.during("failed to delete task"));
            }
        }
        // One that was never started has been killed just now.
        if self.init.pid() != 0
            && tokio::time::timeout(END_LIMIT, self.init.wait())
                .await
                .is_err()
        {
            tracing::warn!(
                "the init of {} has not ended within {END_LIMIT:?} of its deletion",
                self.id
            );
        }
        // Whoever tells of its exit holds this until it is told: the deletion is told after it.
        drop(self.init.operation.lock().await);
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

/// containerd checks ids and names before it sends them; they become file names here, so a path in one is refused again.
///
/// # Errors
/// `what` with its value and what is expected.
pub fn check_id(what: &str, id: &str) -> Result<()> {
    if id.is_empty() || id.starts_with('.') || id.starts_with('-') || id.contains('/') {
        return Err(Error::InvalidArgument(format!(
            "{what} {id:?} is not valid: expected letters, digits, - _ ."
        )));
    }
    Ok(())
}

fn read_pid(path: &Path) -> Result<u32> {
    let text =
        fs::read_to_string(path).map_err(Error::io(format!("read pid file {}", path.display())))?;
    text.trim().parse().map_err(|_| Error::Malformed {
        path: path.to_owned(),
        detail: format!("{:?} is not a pid", text.trim()),
    })
}
