//! A connection to a shim's server, with its calls.

use std::path::Path;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::context::Context;

use super::{process, until, within};

/// A connection to a server.
pub(crate) struct Shim {
    pub(crate) client: Client,
    pub(crate) task: TaskClient,
    pub(crate) pid: u32,
    pub(crate) address: String,
}

macro_rules! calls {
    ($($method:ident($request:ty) -> $answer:ty;)*) => {
        impl Shim {
            $(pub(crate) async fn $method(&self, request: &$request) -> ttrpc::Result<$answer> {
                within(self.task.$method(Context::default(), request)).await
            })*
        }
    };
}

calls! {
    create(api::CreateTaskRequest) -> api::CreateTaskResponse;
    start(api::StartRequest) -> api::StartResponse;
    state(api::StateRequest) -> api::StateResponse;
    delete(api::DeleteRequest) -> api::DeleteResponse;
    kill(api::KillRequest) -> Empty;
    exec(api::ExecProcessRequest) -> Empty;
    wait(api::WaitRequest) -> api::WaitResponse;
    pids(api::PidsRequest) -> api::PidsResponse;
    stats(api::StatsRequest) -> api::StatsResponse;
    pause(api::PauseRequest) -> Empty;
    resume(api::ResumeRequest) -> Empty;
    update(api::UpdateTaskRequest) -> Empty;
    checkpoint(api::CheckpointTaskRequest) -> Empty;
    resize_pty(api::ResizePtyRequest) -> Empty;
    close_io(api::CloseIORequest) -> Empty;
    shutdown(api::ShutdownRequest) -> Empty;
}

impl Shim {
    pub(crate) async fn start_init(&self, id: &str) -> u32 {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.start(&request).await.expect("start").pid
    }

    pub(crate) async fn start_exec(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        Ok(self.start(&request).await?.pid)
    }

    pub(crate) async fn add_exec(
        &self,
        id: &str,
        exec_id: &str,
        args: &[&str],
    ) -> ttrpc::Result<Empty> {
        self.exec(&exec_request(id, exec_id, args)).await
    }

    pub(crate) async fn status(&self, id: &str, exec_id: &str) -> api::Status {
        let request = api::StateRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.state(&request).await.expect("state").status()
    }

    pub(crate) async fn exit_status(&self, id: &str, exec_id: &str) -> u32 {
        let request = api::WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.wait(&request).await.expect("wait").exit_status
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
    ) -> ttrpc::Result<Empty> {
        let request = api::KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            ..Default::default()
        };
        self.kill(&request).await
    }

    pub(crate) async fn remove(
        &self,
        id: &str,
        exec_id: &str,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.delete(&request).await
    }

    /// Asks for the shutdown and waits for the server's end; it may hang up before it answers.
    pub(crate) async fn end(self) {
        let _ = self.shutdown(&api::ShutdownRequest::new()).await;
        until("the server's end", || {
            !Path::new(&format!("/proc/{}/exe", self.pid)).exists()
        })
        .await;
    }
}

pub(crate) fn exec_request(id: &str, exec_id: &str, args: &[&str]) -> api::ExecProcessRequest {
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
        value: process(args).to_string().into_bytes(),
        ..Default::default()
    };
    api::ExecProcessRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        spec: MessageField::some(spec),
        ..Default::default()
    }
}
