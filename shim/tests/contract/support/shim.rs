//! A connection to a shim's server, with its calls.

use std::path::Path;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::ttrpc;

use super::{process, until, within};

/// A connection to a server.
pub(crate) struct Shim {
    pub(crate) client: Client,
    pub(crate) service: &'static str,
    pub(crate) pid: u32,
    pub(crate) address: String,
}

macro_rules! calls {
    ($($method:ident($name:literal, $request:ty) -> $answer:ty;)*) => {
        impl Shim {
            $(pub(crate) async fn $method(&self, request: &$request) -> ttrpc::Result<$answer> {
                self.call(self.service, $name, request).await
            })*
        }
    };
}

calls! {
    connect("Connect", api::ConnectRequest) -> api::ConnectResponse;
    create("Create", api::CreateTaskRequest) -> api::CreateTaskResponse;
    start("Start", api::StartRequest) -> api::StartResponse;
    state("State", api::StateRequest) -> api::StateResponse;
    delete("Delete", api::DeleteRequest) -> api::DeleteResponse;
    kill("Kill", api::KillRequest) -> Empty;
    exec("Exec", api::ExecProcessRequest) -> Empty;
    wait("Wait", api::WaitRequest) -> api::WaitResponse;
    pids("Pids", api::PidsRequest) -> api::PidsResponse;
    stats("Stats", api::StatsRequest) -> api::StatsResponse;
    pause("Pause", api::PauseRequest) -> Empty;
    resume("Resume", api::ResumeRequest) -> Empty;
    update("Update", api::UpdateTaskRequest) -> Empty;
    checkpoint("Checkpoint", api::CheckpointTaskRequest) -> Empty;
    resize_pty("ResizePty", api::ResizePtyRequest) -> Empty;
    close_io("CloseIO", api::CloseIORequest) -> Empty;
    shutdown("Shutdown", api::ShutdownRequest) -> Empty;
}

impl Shim {
    /// A call of either version of the service, which differ in nothing but the name.
    pub(crate) async fn call<T: Message>(
        &self,
        service: &str,
        method: &str,
        message: &impl Message,
    ) -> ttrpc::Result<T> {
        let mut request = ttrpc::Request::new();
        request.service = service.to_owned();
        request.method = method.to_owned();
        request.payload = message.write_to_bytes().expect("encode");
        let answer = within(self.client.request(request)).await?;
        Ok(T::parse_from_bytes(&answer.payload).expect("an answer"))
    }

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
