//! What kbp adds to a container: a decorator around the plain task service.
//!
//! [`decorate`] returns a task service that forwards every call to the one it is given and does its own work around
//! `create`, `start` and `delete`. The plain service knows nothing of this module, and this module nothing of ttrpc framing.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::{self, r#async::TtrpcContext};

/// What the shim knows about its pod before the first request.
#[derive(Debug, Clone)]
pub struct Context {
    /// containerd namespace.
    pub namespace: String,
    /// Id that the shim was started with: the sandbox's, or the container's where there is no sandbox.
    pub pod_id: String,
}

/// Wraps `next` so that its containers get what their pod's policy asks for.
pub fn decorate(
    next: Arc<dyn Task + Send + Sync>,
    context: Context,
) -> Arc<dyn Task + Send + Sync> {
    Arc::new(Decorator {
        next,
        _context: context,
    })
}

/// Removes what a pod of this id may have left behind when its shim was killed: state file, notifier socket.
/// Never fails; what cannot be removed is logged.
pub fn cleanup(_namespace: &str, _id: &str, _bundle: &Path) {}

struct Decorator {
    next: Arc<dyn Task + Send + Sync>,
    _context: Context,
}

#[async_trait]
impl Task for Decorator {
    async fn state(
        &self,
        ctx: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.next.state(ctx, request).await
    }

    async fn create(
        &self,
        ctx: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        self.next.create(ctx, request).await
    }

    async fn start(
        &self,
        ctx: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        self.next.start(ctx, request).await
    }

    async fn delete(
        &self,
        ctx: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.next.delete(ctx, request).await
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

    async fn update(
        &self,
        ctx: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.next.update(ctx, request).await
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

    async fn shutdown(
        &self,
        ctx: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        self.next.shutdown(ctx, request).await
    }
}
