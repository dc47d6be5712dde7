//! containerd's Tasks service (containerd.services.tasks.v1), as far as tests and benches speak it: fields that they leave out are
//! left out here. It costs no client that would have to be started.

use std::path::PathBuf;

use prost::Message;

use crate::{Containerd, Error, Result, grpc};

#[derive(Clone, PartialEq, Message)]
struct Process {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Kill {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(uint32, tag = "3")]
    signal: u32,
    #[prost(bool, tag = "4")]
    all: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Exec {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "6")]
    spec: Option<Any>,
    #[prost(string, tag = "7")]
    exec_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Created {
    #[prost(uint32, tag = "2")]
    pid: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Exit {
    #[prost(uint32, tag = "1")]
    status: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct Update {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "2")]
    resources: Option<Any>,
}

/// The tasks of one containerd. Their containers are made with [`crate::Run::create_arguments`].
#[derive(Debug)]
pub struct Tasks {
    socket: PathBuf,
    namespace: String,
}

impl Tasks {
    /// Those of the sandbox's namespace.
    pub fn of(containerd: &Containerd<'_>) -> Self {
        let sandbox = containerd.sandbox();
        Self {
            socket: sandbox.inside("/run/containerd/containerd.sock"),
            namespace: sandbox.name().to_owned(),
        }
    }

    fn call<A: Message + Default>(
        &self,
        method: &str,
        request: &(impl Message + std::fmt::Debug),
    ) -> Result<A> {
        let name = format!("containerd.services.tasks.v1.Tasks/{method}");
        let metadata = [("containerd-namespace", self.namespace.as_str())];
        grpc::call(&self.socket, &name, &metadata, request).map_err(|reason| Error::Command {
            command: format!("{method} {request:?}"),
            reason,
        })
    }

    fn process(id: &str, exec_id: &str) -> Process {
        Process {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        }
    }

    /// Creates the task of a container; the id of its process.
    pub fn create(&self, id: &str) -> Result<u32> {
        let created: Created = self.call("Create", &Self::process(id, ""))?;
        Ok(created.pid)
    }

    /// Starts a task that is created.
    pub fn start(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("Start", &Self::process(id, ""))
            .map(drop)
    }

    /// Waits for the end of a task; its exit code.
    pub fn wait(&self, id: &str) -> Result<u32> {
        let exit: Exit = self.call("Wait", &Self::process(id, ""))?;
        Ok(exit.status)
    }

    /// Changes the limits of a task: `resources` of the runtime specification.
    pub fn update(&self, id: &str, resources: &serde_json::Value) -> Result<()> {
        let update = Update {
            id: id.to_owned(),
            resources: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
                    .to_owned(),
                value: resources.to_string().into_bytes(),
            }),
        };
        self.call::<Nothing>("Update", &update).map(drop)
    }

    /// Kills everything of a task and waits for its end.
    pub fn kill(&self, id: &str) -> Result<()> {
        let kill = Kill {
            id: id.to_owned(),
            signal: 9,
            all: true,
        };
        self.call::<Nothing>("Kill", &kill)?;
        self.wait(id).map(drop)
    }

    /// Deletes a task that has ended.
    pub fn delete(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("Delete", &Self::process(id, ""))
            .map(drop)
    }

    /// Runs a command in a task, from its announcement to its deletion; its exit code.
    pub fn exec(&self, id: &str, exec_id: &str, command: &[&str]) -> Result<u32> {
        let spec =
            serde_json::json!({ "args": command, "cwd": "/", "env": ["PATH=/usr/bin:/bin"] });
        let exec = Exec {
            id: id.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: spec.to_string().into_bytes(),
            }),
            exec_id: exec_id.to_owned(),
        };
        let process = Self::process(id, exec_id);
        self.call::<Nothing>("Exec", &exec)?;
        self.call::<Nothing>("Start", &process)?;
        let exit: Exit = self.call("Wait", &process)?;
        self.call::<Nothing>("DeleteProcess", &process)?;
        Ok(exit.status)
    }
}
