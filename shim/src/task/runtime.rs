//! Calls of the OCI runtime (runc, crun): its command line, its log, its errors.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde::Deserialize;

use super::error::{Error, Result};
use super::io::Stream;
use super::options::Options;
use super::reaper::{ChildStdio, Reaper};

/// File in the bundle that the runtime logs to, as JSON lines.
pub const LOG: &str = "log.json";

/// Most bytes kept of what the runtime writes to standard output or error.
const MAX_OUTPUT: usize = 1 << 20;

/// How to call the OCI runtime for one container.
#[derive(Debug, Clone)]
pub struct Runtime {
    binary: PathBuf,
    root: PathBuf,
    bundle: PathBuf,
    systemd_cgroup: bool,
}

/// Why a call failed, before it is known what to call it.
#[derive(Debug)]
pub struct Failure {
    /// Last error of the runtime's log, else its standard error, else its exit status.
    pub message: String,
}

impl Failure {
    /// As a task error: `what` in the words of the runc v2 shim.
    pub fn during(self, what: &'static str) -> Error {
        Error::Runtime {
            what,
            message: self.message,
        }
    }
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

impl Runtime {
    /// For a container in `bundle`; `default_binary` where the options name none.
    pub fn new(
        options: &Options,
        default_binary: &str,
        namespace: &str,
        bundle: &Path,
        systemd_cgroup: bool,
    ) -> Self {
        let binary = if options.binary_name.is_empty() {
            default_binary
        } else {
            &options.binary_name
        };
        Self {
            binary: binary.into(),
            root: options.runtime_root(namespace),
            bundle: bundle.to_owned(),
            systemd_cgroup: systemd_cgroup || options.systemd_cgroup,
        }
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The command line up to the verb. Runs in the bundle, so paths in it can be given by their names.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.current_dir(&self.bundle);
        command.arg("--root").arg(&self.root);
        command
            .arg("--log")
            .arg(self.bundle.join(LOG))
            .args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// Runs a verb and returns its standard output.
    pub async fn call<'a>(
        &self,
        reaper: &Arc<Reaper>,
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<u8>, Failure> {
        let mut command = self.command();
        command.args(arguments);
        self.run(reaper, command, None).await
    }

    /// Runs a prepared command. With `stdio` the streams are the container's; without, output is collected.
    ///
    /// The runtime's process is killed when the shim is: what it was doing is nobody's any more, and containerd has the
    /// rest cleared by the shim's `delete`.
    pub async fn run(
        &self,
        reaper: &Arc<Reaper>,
        mut command: Command,
        stdio: Option<ChildStdio>,
    ) -> Result<Vec<u8>, Failure> {
        let log = self.bundle.join(LOG);
        let log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let failed = |message: String| Failure { message };
        let cannot = |error: std::io::Error| failed(format!("{}: {error}", self.binary.display()));

        let mut collected = None;
        let stdio = match stdio {
            Some(stdio) => stdio,
            None => {
                let (stdout, child_stdout) = Stream::pipe_to_us().map_err(cannot)?;
                let (stderr, child_stderr) = Stream::pipe_to_us().map_err(cannot)?;
                collected = Some((stdout, stderr));
                ChildStdio {
                    stdin: None,
                    stdout: Some(child_stdout),
                    stderr: Some(child_stderr),
                }
            }
        };
        stdio.apply(&mut command);
        kbp_kernel::process::end_with_parent(&mut command);
        let child = reaper
            .spawn(command)
            .await
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => failed(format!(
                    "exec: {:?}: executable file not found in $PATH",
                    self.binary.display()
                )),
                _ => cannot(error),
            })?;

        let mut exit = child.exit;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = match &collected {
            None => exit.await,
            Some((out, err)) => {
                let exit = collect(&mut exit, (out, &mut stdout), (err, &mut stderr)).await;
                // What the runtime leaves behind may hold the pipes open: take what is there, do not wait for the end.
                read_rest(out, &mut stdout);
                read_rest(err, &mut stderr);
                exit
            }
        };
        let status = exit
            .map_err(|_| failed("the shim stopped watching its processes".to_owned()))?
            .status;
        if status == 0 {
            return Ok(stdout);
        }
        let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
        let message = last_error(&log, log_start).unwrap_or(stderr);
        Err(failed(if message.is_empty() {
            format!("{} failed with exit status {status}", self.binary.display())
        } else {
            message
        }))
    }
}

type Collected<'a> = (&'a Stream, &'a mut Vec<u8>);

async fn collect<E: Future + Unpin>(
    exit: &mut E,
    out: Collected<'_>,
    err: Collected<'_>,
) -> E::Output {
    let (mut out_open, mut err_open) = (true, true);
    let (mut out_piece, mut err_piece) = (Vec::new(), Vec::new());
    loop {
        tokio::select! {
            ended = &mut *exit => return ended,
            read = out.0.read_with(&mut out_piece, 4096), if out_open => {
                out_open = keep(read, &out_piece, out.1);
            }
            read = err.0.read_with(&mut err_piece, 4096), if err_open => {
                err_open = keep(read, &err_piece, err.1);
            }
        }
    }
}

fn keep(read: std::io::Result<usize>, piece: &[u8], all: &mut Vec<u8>) -> bool {
    let room = MAX_OUTPUT.saturating_sub(all.len());
    all.extend_from_slice(&piece[..piece.len().min(room)]);
    read.is_ok_and(|count| count > 0)
}

fn read_rest(stream: &Stream, all: &mut Vec<u8>) {
    let mut piece = [0; 4096];
    while let Ok(Some(count @ 1..)) = stream.read_now(&mut piece) {
        keep(Ok(count), &piece[..count], all);
    }
}

/// Message of the last error in the log behind `start`, in bytes: earlier ones belong to earlier calls.
fn last_error(log: &Path, start: u64) -> Option<String> {
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal"))
        .map(|line| line.msg.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_behind_the_start_counts() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = directory.path().join(LOG);
        let old = "{\"level\":\"error\",\"msg\":\"old\",\"time\":\"t\"}\n";
        let new = "{\"level\":\"error\",\"msg\":\" new \"}\n{\"level\":\"warning\",\"msg\":\"later\"}\nnot json\n";
        std::fs::write(&log, format!("{old}{new}")).expect("write the log");
        assert_eq!(last_error(&log, 0).as_deref(), Some("new"));
        assert_eq!(last_error(&log, old.len() as u64).as_deref(), Some("new"));
        std::fs::write(&log, old).expect("write the log");
        assert_eq!(last_error(&log, 0).as_deref(), Some("old"));
        assert_eq!(last_error(&log, old.len() as u64), None);
        assert_eq!(last_error(&directory.path().join("none"), 0), None);
    }
}
