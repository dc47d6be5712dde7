//! Logging binaries: `binary://` and `binary-v2://` (containerd's pkg/runtime/v2/logging).
//!
//! The program gets the process' output as descriptor 3, its errors as 4, and closes 5 when it is ready; the second
//! version writes a byte there before, so that a crash is told from readiness.

use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use tokio::time::timeout;

use super::Origin;
use super::fd::Stream;
use super::uri::Uri;
use crate::task::error::{Error, Result};
use crate::task::reaper::{Child, ChildStdio, Reaper};

/// How long it may take to get ready.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// How long it may take to write the rest after SIGTERM.
const TERM_LIMIT: Duration = Duration::from_secs(12);

const SIGKILL: i32 = Signal::SIGKILL as i32;
const SIGTERM: i32 = Signal::SIGTERM as i32;

/// A running logging binary; told to end when dropped.
#[derive(Debug)]
pub(super) struct Logger {
    child: Child,
    reaper: Arc<Reaper>,
}

/// A logging binary, and the pipes to write to.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) logger: Logger,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl Logger {
    /// Whether the URI names a logging binary.
    pub(super) fn is_named_by(uri: &Uri) -> bool {
        matches!(uri.scheme.as_str(), "binary" | "binary-v2")
    }

    /// Starts it and waits until it is ready.
    pub(super) async fn start(uri: &Uri, origin: &Origin<'_>) -> Result<Started> {
        let what = || format!("start logging binary {}", uri.path);
        let pipe =
            || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| Error::io(what())(errno));
        let (out, stdout) = pipe()?;
        let (err, stderr) = pipe()?;
        let (ready, its_ready) = Stream::pipe_to_us().map_err(Error::io(what()))?;

        let mut command = Command::new(&uri.path);
        for (key, value) in &uri.query {
            command.arg(key);
            if !value.is_empty() {
                command.arg(value);
            }
        }
        command
            .env_clear()
            .env("CONTAINER_ID", origin.id)
            .env("CONTAINER_NAMESPACE", origin.namespace);
        ChildStdio::default().apply(&mut command);
        kbp_kernel::fd::pass(&mut command, vec![out, err, its_ready]);
        let child = origin
            .reaper
            .spawn(command)
            .await
            .map_err(Error::io(what()))?;
        let logger = Self {
            child,
            reaper: Arc::clone(origin.reaper),
        };

        let mut byte = Vec::new();
        let read = timeout(READY_LIMIT, ready.read_with(&mut byte, 1)).await;
        let failed = match read {
            Err(_) => Some(format!("it is not ready after {READY_LIMIT:?}")),
            Ok(Err(error)) => Some(error.to_string()),
            Ok(Ok(0)) if uri.scheme == "binary-v2" => {
                Some("it did not call ready; it may have crashed or exited prematurely".to_owned())
            }
            Ok(Ok(_)) => None,
        };
        if let Some(reason) = failed {
            let _ = origin.reaper.signal(logger.child.pid, SIGKILL);
            return Err(Error::io(what())(std::io::Error::other(reason)));
        }
        Ok(Started {
            logger,
            stdout,
            stderr,
        })
    }

    /// After the pipes are closed: lets it end by itself within `limit`, then asks, then kills.
    pub(super) async fn finish(mut self, limit: Duration) {
        for (limit, signal) in [(limit, SIGTERM), (TERM_LIMIT, SIGKILL)] {
            if timeout(limit, &mut self.child.exit).await.is_ok() {
                return;
            }
            let _ = self.reaper.signal(self.child.pid, signal);
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        let _ = self.reaper.signal(self.child.pid, SIGTERM);
    }
}
