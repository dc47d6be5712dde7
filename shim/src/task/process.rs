//! One process of a container, its init or an exec'd one: its state, its streams, its end.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{StateResponse, Status};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use tokio::sync::watch;

use super::error::{Error, Result};
use super::events::timestamp;
use super::io::{ProcessIo, Stdio};
use super::reaper::Exit;

/// A process that containerd knows.
#[derive(Debug)]
pub struct Process {
    /// Id of the exec, or of the container for its init.
    pub id: String,
    /// Where its streams go.
    pub stdio: Stdio,
    /// Held by whoever changes the process through the OCI runtime (start, delete, pause, …), across the runtime's
    /// run. Nothing that only looks takes it. The end of the process is published under it: never before a start that is
    /// under way has been.
    pub operation: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    io: Mutex<Io>,
}

#[derive(Debug, Default)]
struct Io {
    streams: Option<ProcessIo>,
    /// Whether the client has closed its standard input, which it may have done before there were streams.
    stdin_closed: bool,
}

/// Never held across anything that waits.
#[derive(Debug)]
struct State {
    status: Status,
    pid: u32,
}

impl Process {
    /// A process that is created, but not started.
    pub fn new(id: &str, stdio: Stdio) -> Self {
        Self {
            id: id.to_owned(),
            stdio,
            operation: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                status: Status::CREATED,
                pid: 0,
            }),
            exit: watch::Sender::new(None),
            io: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self) -> MutexGuard<'_, Io> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its pid; 0 before there is one.
    pub fn pid(&self) -> u32 {
        self.state().pid
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.state().status
    }

    /// Its end, once it is published.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// The OCI runtime has made the process.
    pub fn set_created(&self, pid: u32, io: ProcessIo) {
        self.state().pid = pid;
        let mut own = self.io();
        let closed = own.stdin_closed;
        let streams = own.streams.insert(io);
        if closed {
            streams.close_stdin();
        }
    }

    /// Moves on, unless the process has ended.
    pub fn set_status(&self, status: Status) {
        let mut state = self.state();
        if state.status != Status::STOPPED {
            state.status = status;
        }
    }

    /// The process has ended: whoever waits is told.
    pub fn set_exited(&self, exit: Exit) {
        self.state().status = Status::STOPPED;
        self.exit.send_replace(Some(exit));
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Result<Exit> {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        ended
            .ok()
            .and_then(|exit| *exit)
            .ok_or_else(|| Error::NotFound(format!("process {} is gone", self.id)))
    }

    /// Fails unless the process is in one of `allowed`; `tried` names what was, with its article, e.g. `pause a`.
    pub fn expect(&self, tried: &str, allowed: &[Status]) -> Result<()> {
        let status = self.status();
        if allowed.contains(&status) {
            return Ok(());
        }
        let name = match status {
            Status::CREATED => "created",
            Status::RUNNING => "running",
            Status::STOPPED => "stopped",
            Status::PAUSED => "paused",
            Status::PAUSING => "pausing",
            Status::UNKNOWN => "unknown",
        };
        Err(Error::FailedPrecondition(format!(
            "cannot {tried} {name} process"
        )))
    }

    /// Lets its standard input end.
    pub fn close_stdin(&self) {
        let mut io = self.io();
        io.stdin_closed = true;
        if let Some(streams) = &mut io.streams {
            streams.close_stdin();
        }
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        match &self.io().streams {
            Some(io) => io.resize(columns, rows),
            None => Ok(()),
        }
    }

    /// Copies the rest of its output, within `limit`, and closes its streams.
    pub async fn finish_io(&self, limit: Duration) {
        let io = self.io().streams.take();
        if let Some(io) = io {
            io.finish(limit).await;
        }
    }

    /// Answer to `State`; `exec_id` is empty for an init.
    pub fn describe(&self, bundle: &str, exec_id: &str) -> StateResponse {
        let (status, pid) = {
            let state = self.state();
            (state.status, state.pid)
        };
        let exit = self.exit();
        StateResponse {
            id: self.id.clone(),
            bundle: bundle.to_owned(),
            pid,
            status: EnumOrUnknown::new(status),
            stdin: self.stdio.stdin.clone(),
            stdout: self.stdio.stdout.clone(),
            stderr: self.stdio.stderr.clone(),
            terminal: self.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).unwrap_or_default(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        }
    }
}
