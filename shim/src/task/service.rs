//! containerd's Task service over this shim's containers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Error as TtrpcError};
use tokio::sync::watch;

use super::container::{Container, Surroundings};
use super::error::{Error, Result};
use super::events::{pack, timestamp};

/// The plain task service of one shim.
#[derive(Debug)]
pub struct TaskService {
    around: Surroundings,
    /// By id; None while the container is being created.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    shutdown: watch::Sender<bool>,
    at_shutdown: Last,
    /// Whether memory is about to be given back.
    tidying: Arc<AtomicBool>,
}

/// How long after a deletion memory is given back: many may come at once.
const TIDY_DELAY: Duration = Duration::from_secs(1);

/// What is done before the shutdown is answered.
struct Last(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Last {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Last")
    }
}

/// An id that is taken while its container is being created.
struct Reservation<'a> {
    service: &'a TaskService,
    id: &'a str,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut containers = self.service.containers();
        if let Some(None) = containers.get(self.id) {
            containers.remove(self.id);
        }
    }
}

impl TaskService {
    /// A service without containers.
    pub fn new(around: Surroundings) -> Self {
        Self {
            around,
            containers: Mutex::default(),
            shutdown: watch::Sender::new(false),
            at_shutdown: Last(Box::new(|| {})),
            tidying: Arc::default(),
        }
    }

    /// Runs `last` before the shutdown is answered: containerd may start the next shim of the name as soon as it is.
    pub fn at_shutdown(mut self, last: impl Fn() + Send + Sync + 'static) -> Self {
        self.at_shutdown = Last(Box::new(last));
        self
    }

    /// Becomes true when containerd asks for the shutdown and no container is left.
    pub fn shutdown(&self) -> watch::Receiver<bool> {
        self.shutdown.subscribe()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers()
            .get(id)
            .and_then(Clone::clone)
            .ok_or_else(|| Error::NotFound("container not created".to_owned()))
    }

    fn reserve<'a>(&'a self, id: &'a str) -> Result<Reservation<'a>> {
        let mut containers = self.containers();
        // A container that came now would lose its shim.
        if *self.shutdown.borrow() {
            return Err(Error::FailedPrecondition(format!(
                "container {id}: its pod's shim is shutting down, as its last container was deleted; create it again"
            )));
        }
        if containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!("container {id}")));
        }
        containers.insert(id.to_owned(), None);
        Ok(Reservation { service: self, id })
    }

    async fn create_container(&self, request: &api::CreateTaskRequest) -> Result<u32> {
        let _reservation = self.reserve(&request.id)?;
        let (container, adoption) = Container::create(request, self.around.clone()).await?;
        let pid = container.init().pid();
        self.containers()
            .insert(request.id.clone(), Some(Arc::clone(&container)));
        self.around.publisher.publish(&events::TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(events::TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..Default::default()
            }),
            checkpoint: request.checkpoint.clone(),
            pid,
            ..Default::default()
        });
        container.watch_init(&adoption);
        Ok(pid)
    }

    /// The creation of many containers at a time leaves holes in the heap, which would count as long as the shim lives.
    fn tidy_later(&self) {
        if self.containers().is_empty() || self.tidying.swap(true, Ordering::AcqRel) {
            return;
        }
        let tidying = Arc::clone(&self.tidying);
        tokio::spawn(async move {
            tokio::time::sleep(TIDY_DELAY).await;
            tidying.store(false, Ordering::Release);
            let _ = tokio::task::spawn_blocking(kbp_kernel::process::return_free_memory).await;
        });
    }

    async fn delete_container(&self, id: &str) -> Result<api::DeleteResponse> {
        let container = self.container(id)?;
        container.delete().await?;
        let response = delete_response(container.init());
        // Of two deletions at a time, one has removed it.
        if self.containers().remove(id).is_none() {
            return Err(Error::NotFound("container not created".to_owned()));
        }
        self.tidy_later();
        self.around.publisher.publish(&events::TaskDelete {
            container_id: id.to_owned(),
            pid: response.pid,
            exit_status: response.exit_status,
            exited_at: response.exited_at.clone(),
            ..Default::default()
        });
        Ok(response)
    }
}

fn delete_response(process: &super::process::Process) -> api::DeleteResponse {
    let exit = process.exit();
    api::DeleteResponse {
        pid: process.pid(),
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| timestamp(exit.at)).unwrap_or_default(),
        ..Default::default()
    }
}

fn encoding(error: containerd_shim_protos::protobuf::Error) -> TtrpcError {
    TtrpcError::Others(format!("encode an answer: {error}"))
}

#[async_trait]
impl Task for TaskService {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut answer = process.describe(&container.bundle().to_string_lossy(), &request.exec_id);
        // A frozen container freezes its execs with it.
        let paused = [api::Status::PAUSED, api::Status::PAUSING];
        if paused.contains(&container.init().status()) && !request.exec_id.is_empty() {
            answer.status = container.init().status().into();
        }
        Ok(answer)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let pid = self.create_container(&request).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let container = self.container(&request.id)?;
        let pid = match request.exec_id.as_str() {
            "" => container.start().await?,
            id => container.start_exec(id).await?,
        };
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        if request.exec_id.is_empty() {
            return Ok(self.delete_container(&request.id).await?);
        }
        let process = self
            .container(&request.id)?
            .delete_exec(&request.exec_id)
            .await?;
        Ok(delete_response(&process))
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let pids = self.container(&request.id)?.pids().await?;
        let describe = |(pid, exec): (u32, Option<String>)| {
            let details = exec.map(|exec_id| ProcessDetails {
                exec_id,
                ..Default::default()
            });
            let info = details
                .map(|details| pack("containerd.runc.v1.ProcessDetails", &details))
                .transpose();
            Ok(api::ProcessInfo {
                pid,
                info: info.map_err(encoding)?.into(),
                ..Default::default()
            })
        };
        let processes = pids
            .into_iter()
            .map(describe)
            .collect::<ttrpc::Result<_>>()?;
        Ok(api::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.checkpoint(&request).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?
            .kill(&request.exec_id, request.signal, request.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.add_exec(&request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let characters = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        process.resize(characters(request.width), characters(request.height))?;
        Ok(Empty::new())
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.container(&request.id)?
            .update(&request.resources.value)
            .await?;
        Ok(Empty::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.container(&request.id)?.stats().await?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let task_pid = self
            .container(&request.id)
            .map_or(0, |container| container.init().pid());
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        // containerd asks after every deletion; the pod's last one ends the shim.
        let containers = self.containers();
        if containers.is_empty() {
            (self.at_shutdown.0)();
            self.shutdown.send_replace(true);
        }
        Ok(Empty::new())
    }
}
