//! The life of one task, in its parts.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kbp_tests::Tasks;

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
    /// Runs the task of a container that ends by itself.
    pub(crate) fn of(tasks: &Tasks, id: &str) -> Result<Self> {
        let mut last = Instant::now();
        let mut lap = || {
            let now = Instant::now();
            now - std::mem::replace(&mut last, now)
        };
        tasks.create(id)?;
        let create = lap();
        tasks.start(id)?;
        let start = lap();
        let status = tasks.wait(id)?;
        let exit = lap();
        tasks.delete(id)?;
        let delete = lap();
        ensure!(status == 0, "{id} ended with {status}");
        Ok(Self {
            create,
            start,
            exit,
            delete,
        })
    }

    /// From the call that creates the task to the answer that tells its end.
    pub(crate) fn start_to_exit(&self) -> Duration {
        self.create + self.start + self.exit
    }

    /// From the call that creates it to the answer to its deletion.
    pub(crate) fn whole(&self) -> Duration {
        self.start_to_exit() + self.delete
    }
}
