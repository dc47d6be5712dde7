//! Ctrl-C and other signals: everything that waits notices within some milliseconds, and the set-up is taken down on the way out.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Between two looks while something is awaited, at first and at most; it doubles each time. One that went on looking every 2 ms would force
/// the programs that are measured off their CPU as often, and kbp would take their windows away for it.
const SHORTEST: Duration = Duration::from_millis(2);
const LONGEST: Duration = Duration::from_millis(32);

/// A signal asked for the end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; everything that was made is removed")]
pub(crate) struct Interrupted;

/// What a program has as its standard input.
pub(crate) enum Input<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// Something that it does not read, only holds open while it lives.
    Hold(&'a OwnedFd),
}

/// Whether a signal came.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP over for the whole process.
    pub(crate) fn guard() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
            signal_hook::consts::SIGHUP,
        ] {
            signal_hook::flag::register(signal, Arc::clone(&flag)).context("take over signals")?;
        }
        Ok(Self(flag))
    }

    /// An error when a signal came.
    pub(crate) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        Ok(())
    }

    /// Runs a program to its end, unless a signal came before; kills it after `limit`.
    ///
    /// A signal does not end it: a client of containerd that dies leaves its work half done, and nobody could undo that.
    pub(crate) fn run(
        &self,
        command: Command,
        input: Input<'_>,
        limit: Duration,
    ) -> Result<Output> {
        self.run_until(command, input, limit, false)
    }

    /// Runs a program that does nothing which has to be undone; kills it on a signal or after `limit`.
    pub(crate) fn run_or_kill(&self, command: Command, limit: Duration) -> Result<Output> {
        self.run_until(command, Input::Bytes(b""), limit, true)
    }

    fn run_until(
        &self,
        mut command: Command,
        input: Input<'_>,
        limit: Duration,
        kill: bool,
    ) -> Result<Output> {
        use std::io::Write;
        use std::os::unix::process::CommandExt;
        self.check()?;
        let name = describe(&command);
        // A Ctrl-C is ours to handle.
        command.process_group(0);
        match &input {
            Input::Bytes(_) => command.stdin(Stdio::piped()),
            Input::Hold(held) => command.stdin(held.try_clone().context("copy a descriptor")?),
        };
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {name}"))?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        if let (Some(mut stdin), Input::Bytes(bytes)) = (stdin, input) {
            // It may not read it; that is its own affair. A network's configuration fits in a pipe.
            let _ = stdin.write_all(bytes);
        }
        let stdout = std::thread::spawn(move || stdout.map(read).unwrap_or_default());
        let stderr = std::thread::spawn(move || stderr.map(read).unwrap_or_default());
        let status = self.wait(&mut child, &name, limit, kill)?;
        Ok(Output {
            name,
            status,
            stdout: stdout.join().unwrap_or_default(),
            stderr: stderr.join().unwrap_or_default(),
        })
    }

    fn wait(
        &self,
        child: &mut Child,
        name: &str,
        limit: Duration,
        kill: bool,
    ) -> Result<ExitStatus> {
        let until = Instant::now() + limit;
        let mut pause = SHORTEST;
        loop {
            if let Some(status) = child
                .try_wait()
                .with_context(|| format!("wait for {name}"))?
            {
                return Ok(status);
            }
            let interrupted = if kill { self.check() } else { Ok(()) };
            if interrupted.is_err() || Instant::now() >= until {
                let _ = child.kill();
                let _ = child.wait();
                interrupted?;
                bail!("{name}: no end within {} s", limit.as_secs());
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(LONGEST);
        }
    }

    /// Waits until `look` finds something.
    pub(crate) fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let until = Instant::now() + limit;
        let mut pause = SHORTEST;
        loop {
            self.check()?;
            if let Some(found) = look() {
                return Ok(found);
            }
            if Instant::now() >= until {
                bail!("{what} did not come within {} s", limit.as_secs());
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(LONGEST);
        }
    }
}

fn read(mut pipe: impl std::io::Read) -> String {
    let mut bytes = Vec::new();
    // What came before an error is still worth reading.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Output {
    name: String,
    status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// Whether it ended with 0.
    pub(crate) fn is_good(&self) -> bool {
        self.status.success()
    }

    /// Its standard output, when it ended well.
    pub(crate) fn good(self) -> Result<String> {
        if self.is_good() {
            return Ok(self.stdout);
        }
        let said = format!("{}{}", self.stdout, self.stderr);
        bail!("{}: {}: {}", self.name, self.status, said.trim())
    }
}
