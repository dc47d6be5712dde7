//! containerd's Tasks service (containerd.services.tasks.v1), as far as the bench speaks it: fields that it leaves out are left out here.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use kbp_tests::{Containerd, grpc};
use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "1")]
    id: String,
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

/// The tasks of one containerd.
#[derive(Debug)]
pub(crate) struct Tasks {
    socket: PathBuf,
    namespace: String,
}

/// A task from its creation to its deletion.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Phases {
    /// The start of the shim, and the OCI runtime's `create`.
    pub(crate) create: Duration,
    /// The OCI runtime's `start`.
    pub(crate) start: Duration,
    /// From then until the end of the process is told.
    pub(crate) exit: Duration,
    /// The OCI runtime's `delete`, and the end of the shim.
    pub(crate) delete: Duration,
}

impl Phases {
    /// From the call that creates the task to the answer that tells its end.
    pub(crate) fn start_to_exit(&self) -> Duration {
        self.create + self.start + self.exit
    }

    /// From the call that creates it to the answer to its deletion.
    pub(crate) fn whole(&self) -> Duration {
        self.start_to_exit() + self.delete
    }
}

impl Tasks {
    pub(crate) fn of(containerd: &Containerd<'_>) -> Self {
        let sandbox = containerd.sandbox();
        Self {
            socket: sandbox.inside("/run/containerd/containerd.sock"),
            namespace: sandbox.name().to_owned(),
        }
    }

    fn call<A: Message + Default>(&self, method: &str, request: &impl Message) -> Result<A> {
        let method = format!("containerd.services.tasks.v1.Tasks/{method}");
        let metadata = [("containerd-namespace", self.namespace.as_str())];
        grpc::call(&self.socket, &method, &metadata, request).map_err(|error| anyhow!(error))
    }

    /// Creates and starts the task of a container; the id of its process.
    pub(crate) fn start(&self, id: &str) -> Result<u32> {
        let container = Container { id: id.to_owned() };
        let created: Created = self.call("Create", &container)?;
        self.call::<Nothing>("Start", &container)?;
        Ok(created.pid)
    }

    /// Kills a task and waits for its end.
    pub(crate) fn kill(&self, id: &str) -> Result<()> {
        let kill = Kill {
            id: id.to_owned(),
            signal: 9,
            all: true,
        };
        self.call::<Nothing>("Kill", &kill)?;
        self.call::<Exit>("Wait", &Container { id: id.to_owned() })
            .map(drop)
    }

    /// Deletes a task that has ended.
    pub(crate) fn delete(&self, id: &str) -> Result<()> {
        self.call::<Nothing>("Delete", &Container { id: id.to_owned() })
            .map(drop)
    }

    /// Runs the task of a container that ends by itself.
    pub(crate) fn life(&self, id: &str) -> Result<Phases> {
        let container = Container { id: id.to_owned() };
        let mut last = Instant::now();
        let mut lap = || {
            let now = Instant::now();
            now - std::mem::replace(&mut last, now)
        };
        self.call::<Created>("Create", &container)?;
        let create = lap();
        self.call::<Nothing>("Start", &container)?;
        let start = lap();
        let ended: Exit = self.call("Wait", &container)?;
        let exit = lap();
        self.delete(id)?;
        let delete = lap();
        ensure!(ended.status == 0, "{id} ended with {}", ended.status);
        Ok(Phases {
            create,
            start,
            exit,
            delete,
        })
    }
}
