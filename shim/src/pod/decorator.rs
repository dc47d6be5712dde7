//! The task service that decorates another.

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::{self, Code, r#async::TtrpcContext};
use kbp_poller::config::Config;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::life::{LoadConfig, Pod, restore};
use super::{Context, Refusal};
use crate::sockets::Event;
use crate::spec::CpuLimits;

/// Most that our own work may add to a create or start. What takes longer goes on by itself.
const WORK_LIMIT: Duration = Duration::from_secs(10);
/// Most that each step of taking a container back may take.
const UNDO_LIMIT: Duration = Duration::from_secs(10);
/// How long counters may be older than what they count.
const COUNT_DELAY: Duration = Duration::from_secs(1);
const SIGKILL: u32 = 9;

/// Wraps `next` so that its containers get what their pod's policy asks for. Call it inside a tokio runtime.
pub fn decorate(
    next: Arc<dyn Task + Send + Sync>,
    context: Context,
) -> Arc<dyn Task + Send + Sync> {
    Arc::new(decorate_with(next, context, Box::new(Config::load)))
}

pub(super) fn decorate_with(
    next: Arc<dyn Task + Send + Sync>,
    context: Context,
    config: LoadConfig,
) -> Decorator {
    let (sender, receiver) = mpsc::unbounded_channel();
    let pod = Arc::new(Pod::new(context, config, sender));
    let woken = Arc::new(Notify::new());
    tokio::spawn(watch(receiver, Arc::downgrade(&pod), Arc::clone(&woken)));
    tokio::spawn(adapt(Arc::downgrade(&pod), woken));
    Decorator { next, pod }
}

/// Logs what the notifier tells, and keeps the state file up to date.
async fn watch(mut events: mpsc::UnboundedReceiver<Event>, pod: Weak<Pod>, woken: Arc<Notify>) {
    while let Some(event) = events.recv().await {
        if matches!(event, Event::Listening { .. } | Event::Active) {
            woken.notify_one();
        }
        let pod = Weak::clone(&pod);
        match event {
            Event::Listening { container, pid } => {
                tracing::debug!(
                    "container {container}: the sockets of process {pid} are looked after"
                );
            }
            Event::Refused(reason) => tracing::warn!("the notifier refused {reason}"),
            Event::Degraded(degraded) => {
                tracing::warn!("{} is not active: {}", degraded.part, degraded.reason);
                if let Some(pod) = pod.upgrade() {
                    tokio::task::spawn_blocking(move || pod.degrade(degraded));
                }
            }
            Event::Active => {
                tokio::spawn(async move {
                    tokio::time::sleep(COUNT_DELAY).await;
                    if let Some(pod) = pod.upgrade() {
                        tokio::task::spawn_blocking(move || pod.count());
                    }
                });
            }
        }
    }
}

/// Looks from time to time whether windows hurt: while something happens, and as long as the pod does anything.
async fn adapt(pod: Weak<Pod>, woken: Arc<Notify>) {
    let mut pause = None;
    loop {
        let by_event = match pause {
            None => {
                woken.notified().await;
                true
            }
            Some(pause) => timeout(pause, woken.notified()).await.is_ok(),
        };
        let Some(pod) = pod.upgrade() else {
            return;
        };
        let adapted = tokio::task::spawn_blocking(move || pod.adapt(by_event)).await;
        // One that panicked has said so; the next event tries again.
        pause = adapted.ok().flatten();
    }
}

pub(super) struct Decorator {
    next: Arc<dyn Task + Send + Sync>,
    pub(super) pod: Arc<Pod>,
}

impl Decorator {
    /// Runs work that may block on a thread for that; None when it takes too long.
    async fn blocking<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Pod) -> T + Send + 'static,
    ) -> Option<T> {
        let pod = Arc::clone(&self.pod);
        let done = timeout(WORK_LIMIT, tokio::task::spawn_blocking(move || work(&pod))).await;
        match done {
            Ok(Ok(result)) => Some(result),
            Ok(Err(error)) => {
                tracing::error!("{what}: {error}");
                None
            }
            Err(_) => {
                tracing::error!("{what}: not done within {} s", WORK_LIMIT.as_secs());
                None
            }
        }
    }

    async fn attach(&self, id: &str, pid: u32, last: bool) -> Result<(), Refusal> {
        let owned = id.to_owned();
        let attached = self
            .blocking("attach the pod", move |pod| pod.attach(&owned, pid, last))
            .await;
        // Late is not never, and a `required` pod that is not known to work does not start.
        attached.unwrap_or_else(|| match self.pod.is_required() {
            false => Ok(()),
            true => Err(Refusal::Failed(format!(
                "kbp: the pod could not be attached within {} s",
                WORK_LIMIT.as_secs()
            ))),
        })
    }

    /// Ends the processes of a container that is refused, as far as the plain service can.
    async fn kill(&self, ctx: &TtrpcContext, id: &str) {
        let kill = api::KillRequest {
            id: id.to_owned(),
            signal: SIGKILL,
            all: true,
            ..Default::default()
        };
        let wait = api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let ended = async {
            self.next.kill(ctx, kill).await?;
            self.next.wait(ctx, wait).await
        };
        log_undo(
            id,
            "kill",
            timeout(UNDO_LIMIT, ended).await.map(|done| done.map(drop)),
        );
    }

    async fn delete_refused(&self, ctx: &TtrpcContext, id: &str) {
        self.kill(ctx, id).await;
        let delete = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let deleted = timeout(UNDO_LIMIT, self.next.delete(ctx, delete)).await;
        log_undo(id, "delete", deleted.map(|done| done.map(drop)));
    }

    async fn forget(&self, ctx: &TtrpcContext, id: &str) {
        let id = id.to_owned();
        let heir = self
            .blocking("take the pod apart", move |pod| pod.forget(&id))
            .await
            .flatten();
        if let Some(heir) = heir {
            self.attach_heir(ctx, &heir).await;
        }
    }

    /// Attaches the pod by the container that stands in for its first one. One that is still being created does so itself.
    async fn attach_heir(&self, ctx: &TtrpcContext, id: &str) {
        let state = api::StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let Ok(state) = self.next.state(ctx, state).await else {
            return;
        };
        let runs = state.status() != api::Status::CREATED;
        if state.pid == 0 {
            return;
        }
        if let Err(refusal) = self.attach(id, state.pid, runs).await {
            tracing::warn!("container {id}: {refusal}");
            self.pod.attach_later();
        }
    }
}

fn log_undo(id: &str, what: &str, done: Result<ttrpc::Result<()>, tokio::time::error::Elapsed>) {
    match done {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("{what} refused container {id}: {error}"),
        Err(_) => tracing::warn!(
            "{what} refused container {id}: not done within {} s",
            UNDO_LIMIT.as_secs()
        ),
    }
}

fn is_not_found(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == Code::NOT_FOUND)
}

#[async_trait]
impl Task for Decorator {
    async fn create(
        &self,
        ctx: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let (id, own) = (request.id.clone(), request.clone());
        let prepared = self
            .blocking("prepare the container", move |pod| pod.prepare(&own))
            .await;
        let prepared = prepared.unwrap_or_else(|| {
            Err(Refusal::Failed(
                "kbp: the container could not be prepared; see the shim's log".to_owned(),
            ))
        })?;
        let created = self.next.create(ctx, request).await;
        if !prepared.kept {
            return created;
        }
        let refusal: ttrpc::Error = match created {
            Ok(response) => match self.attach(&id, response.pid, false).await {
                Ok(()) => return Ok(response),
                Err(refusal) => {
                    self.delete_refused(ctx, &id).await;
                    refusal.into()
                }
            },
            Err(error) => error,
        };
        self.forget(ctx, &id).await;
        self.blocking("restore the bundle", move |_| {
            restore(prepared.edited.as_ref())
        })
        .await;
        Err(refusal)
    }

    async fn start(
        &self,
        ctx: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        if request.exec_id.is_empty() && self.pod.awaits_interface() {
            let state = api::StateRequest {
                id: request.id.clone(),
                ..Default::default()
            };
            let pid = self.next.state(ctx, state).await?.pid;
            if let Err(refusal) = self.attach(&request.id, pid, true).await {
                // As after any start that failed, the stopped container is the caller's to delete.
                self.kill(ctx, &request.id).await;
                return Err(refusal.into());
            }
        }
        self.next.start(ctx, request).await
    }

    async fn update(
        &self,
        ctx: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        let resources = request
            .resources
            .as_ref()
            .and_then(|any| serde_json::from_slice(&any.value).ok());
        let done = self.next.update(ctx, request).await?;
        if let Some(resources) = resources {
            let change = CpuLimits::from_resources(&resources);
            self.blocking("update the container", move |pod| pod.update(&id, &change))
                .await;
        }
        Ok(done)
    }

    async fn delete(
        &self,
        ctx: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let container = request.exec_id.is_empty().then(|| request.id.clone());
        let deleted = self.next.delete(ctx, request).await;
        let gone = match &deleted {
            Ok(_) => true,
            // Its creation was broken off, or it went another way.
            Err(error) => is_not_found(error),
        };
        if let Some(id) = container.filter(|_| gone) {
            self.forget(ctx, &id).await;
        }
        deleted
    }

    async fn shutdown(
        &self,
        ctx: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        let now = request.now;
        // The process may end as soon as the plain service has answered.
        self.blocking("take the pod apart", move |pod| {
            if now || pod.is_empty() {
                pod.end();
            }
        })
        .await;
        self.next.shutdown(ctx, request).await
    }

    async fn state(
        &self,
        ctx: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.next.state(ctx, request).await
    }

    async fn pids(
        &self,
        ctx: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        self.next.pids(ctx, request).await
    }

    async fn pause(&self, ctx: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.next.pause(ctx, request).await
    }

    async fn resume(
        &self,
        ctx: &TtrpcContext,
        request: api::ResumeRequest,
    ) -> ttrpc::Result<Empty> {
        self.next.resume(ctx, request).await
    }

    async fn checkpoint(
        &self,
        ctx: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.next.checkpoint(ctx, request).await
    }

    async fn kill(&self, ctx: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        self.next.kill(ctx, request).await
    }

    async fn exec(
        &self,
        ctx: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.next.exec(ctx, request).await
    }

    async fn resize_pty(
        &self,
        ctx: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.next.resize_pty(ctx, request).await
    }

    async fn close_io(
        &self,
        ctx: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        self.next.close_io(ctx, request).await
    }

    async fn wait(
        &self,
        ctx: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        self.next.wait(ctx, request).await
    }

    async fn stats(
        &self,
        ctx: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        self.next.stats(ctx, request).await
    }

    async fn connect(
        &self,
        ctx: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        self.next.connect(ctx, request).await
    }
}
