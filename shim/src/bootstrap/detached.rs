//! Calls that are finished even when the caller goes away.
//!
//! The ttrpc server drops a call's future when the connection breaks or the call's deadline passes. A container whose
//! creation stopped half way would be neither there nor gone, so every call that changes something runs as a task of its
//! own, and the caller only waits for it.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;

/// A task service around another one.
pub struct Detached(pub Arc<dyn Task + Send + Sync>);

fn copy(context: &TtrpcContext) -> TtrpcContext {
    TtrpcContext {
        mh: context.mh,
        metadata: context.metadata.clone(),
        timeout_nano: context.timeout_nano,
        connection_data: Arc::clone(&context.connection_data),
    }
}

macro_rules! service {
    (
        detached { $($change:ident($change_request:ident) -> $change_answer:ty;)* }
        direct { $($look:ident($look_request:ident) -> $look_answer:ty;)* }
    ) => {
        #[async_trait]
        impl Task for Detached {
            $(
                async fn $change(
                    &self,
                    context: &TtrpcContext,
                    request: api::$change_request,
                ) -> ttrpc::Result<$change_answer> {
                    let (next, context) = (Arc::clone(&self.0), copy(context));
                    let call = tokio::spawn(async move { next.$change(&context, request).await });
                    call.await.unwrap_or_else(|error| Err(ttrpc::Error::Others(error.to_string())))
                }
            )*
            $(
                async fn $look(
                    &self,
                    context: &TtrpcContext,
                    request: api::$look_request,
                ) -> ttrpc::Result<$look_answer> {
                    self.0.$look(context, request).await
                }
            )*
        }
    };
}

service! {
    detached {
        create(CreateTaskRequest) -> api::CreateTaskResponse;
        start(StartRequest) -> api::StartResponse;
        delete(DeleteRequest) -> api::DeleteResponse;
        pause(PauseRequest) -> Empty;
        resume(ResumeRequest) -> Empty;
        checkpoint(CheckpointTaskRequest) -> Empty;
        kill(KillRequest) -> Empty;
        exec(ExecProcessRequest) -> Empty;
        update(UpdateTaskRequest) -> Empty;
        resize_pty(ResizePtyRequest) -> Empty;
        close_io(CloseIORequest) -> Empty;
        shutdown(ShutdownRequest) -> Empty;
    }
    direct {
        state(StateRequest) -> api::StateResponse;
        pids(PidsRequest) -> api::PidsResponse;
        wait(WaitRequest) -> api::WaitResponse;
        stats(StatsRequest) -> api::StatsResponse;
        connect(ConnectRequest) -> api::ConnectResponse;
    }
}
