//! Programs that are run to their end within a bounded time, and waiting in general.

use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// How a program ended and what it wrote.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; None when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Output {
    /// This output when the exit code is 0, else an error with everything the program wrote.
    pub fn success(self) -> Result<Self> {
        self.expect_code(0)
    }

    /// This output when the exit code is `code`, else an error with everything the program wrote.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code == Some(code) {
            return Ok(self);
        }
        Err(Error::Command {
            command: self.command.clone(),
            reason: self.to_string(),
        })
    }

    /// Standard output and error, for messages that may go to either.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "exit code {code}")?,
            None => write!(f, "ended by a signal")?,
        }
        write!(f, " after {:.1} s", self.elapsed.as_secs_f64())?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.is_empty() {
                write!(f, "\n--- {name}\n{text}")?;
            }
        }
        Ok(())
    }
}

/// A command line in one string, for messages.
pub fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Runs a program without input; it is killed after `limit`.
pub fn run(command: Command, limit: Duration) -> Result<Output> {
    run_with_input(command, b"", limit)
}

/// Runs a program with `input` on its standard input; it is killed after `limit`, which is an error.
pub fn run_with_input(mut command: Command, input: &[u8], limit: Duration) -> Result<Output> {
    let name = describe(&command);
    command.stdin(if input.is_empty() {
        Stdio::null()
    } else {
        Stdio::piped()
    });
    let mut running = Running::start(command)?;
    if let Some(mut pipe) = running.child.stdin.take() {
        let input = input.to_vec();
        // A program that does not read its input must not block the test; a broken pipe is its own affair.
        thread::spawn(move || pipe.write_all(&input));
    }
    match running.wait(limit) {
        Some(output) => Ok(output),
        None => {
            let output = running.kill();
            Err(Error::Timeout {
                what: name,
                seconds: limit.as_secs_f64(),
                detail: format!(": {output}"),
            })
        }
    }
}

/// A program that runs beside the test, its output collected; killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    started: Instant,
    child: Child,
    stdout: Collector,
    stderr: Collector,
}

impl Running {
    /// Starts a program; its standard input is what the command says.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::start_as_is(command)
    }

    /// Starts a program whose output goes where the command says; what is not piped is not collected.
    pub fn start_as_is(mut command: Command) -> Result<Self> {
        let name = describe(&command);
        let mut child = command.spawn().map_err(|error| Error::Command {
            command: name.clone(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            stdout: Collector::new(child.stdout.take()),
            stderr: Collector::new(child.stderr.take()),
            name,
            started: Instant::now(),
            child,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard input, when that is a pipe; once.
    pub fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&mut self) -> &str {
        self.stdout.so_far()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&mut self) -> &str {
        self.stderr.so_far()
    }

    /// Waits until it ends; None when it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<Output> {
        let deadline = self.started.max(Instant::now()) + limit;
        let mut pause = Duration::from_micros(500);
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(self.output(Some(status)));
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// Kills it and returns what it wrote.
    pub fn kill(&mut self) -> Output {
        let _ = self.child.kill();
        let status = self.child.wait().ok();
        self.output(status)
    }

    fn output(&mut self, status: Option<ExitStatus>) -> Output {
        Output {
            command: self.name.clone(),
            code: status.and_then(|s| s.code()),
            stdout: self.stdout.rest(),
            stderr: self.stderr.rest(),
            elapsed: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a pipe in a thread of its own, so that a full pipe never stops the program.
#[derive(Debug)]
struct Collector {
    chunks: mpsc::Receiver<Vec<u8>>,
    bytes: Vec<u8>,
    text: String,
}

impl Collector {
    fn new(pipe: Option<impl Read + Send + 'static>) -> Self {
        let (sender, chunks) = mpsc::channel();
        if let Some(mut pipe) = pipe {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n) = pipe.read(&mut buffer) {
                    if n == 0 || sender.send(buffer[..n].to_vec()).is_err() {
                        return;
                    }
                }
            });
        }
        Self {
            chunks,
            bytes: Vec::new(),
            text: String::new(),
        }
    }

    fn so_far(&mut self) -> &str {
        while let Ok(chunk) = self.chunks.try_recv() {
            self.bytes.extend(chunk);
        }
        self.text = String::from_utf8_lossy(&self.bytes).into_owned();
        &self.text
    }

    /// Everything up to the end of the pipe. A grandchild may hold it open: that is worth some seconds, not the whole test, and is
    /// said in the text.
    fn rest(&mut self) -> String {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match self
                .chunks
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(chunk) => self.bytes.extend(chunk),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.bytes.extend(b"\n[the pipe is still open]\n");
                    break;
                }
            }
        }
        self.so_far().to_owned()
    }
}

/// Polls `look` until it returns something; its last remark goes into the error.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(remark) if started.elapsed() >= limit => {
                let detail = if remark.is_empty() {
                    remark
                } else {
                    format!(": {remark}")
                };
                return Err(Error::Timeout {
                    what: what.to_owned(),
                    seconds: limit.as_secs_f64(),
                    detail,
                });
            }
            Err(_) => thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Whether a process exists and is not a zombie.
pub fn running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}
