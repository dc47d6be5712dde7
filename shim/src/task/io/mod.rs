//! A process' standard streams: where containerd wants them, and the tasks that copy between there and the process.
//!
//! Nothing here can hang the shim. A fifo is opened without waiting for its other end; what a process wrote before it
//! ended is copied to the end, but no longer than [`DRAIN_LIMIT`] after somebody asks for it.

mod console;
mod fd;
mod logger;
mod uri;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::task::JoinHandle;

pub use self::fd::Stream;

use self::console::ConsoleSocket;
use self::logger::Logger;
use self::uri::Uri;
use super::error::{Error, Result};
use super::reaper::{ChildStdio, Reaper};

/// How long a deletion waits for the output of a process that has ended: something that outlived it may hold the pipe,
/// or nobody reads at the other end.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// How long the OCI runtime may take to connect to the console socket once it has reported success.
const CONSOLE_LIMIT: Duration = Duration::from_secs(30);

const PIECE: usize = 32 * 1024;

/// Where the standard streams of a process go, as containerd asked for it. An empty string: nowhere.
#[derive(Debug, Clone, Default)]
pub struct Stdio {
    /// A fifo.
    pub stdin: String,
    /// A fifo (a path or `fifo://`), `file://`, `binary://` or `binary-v2://`.
    pub stdout: String,
    /// As `stdout`; a terminal has only that one.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// Whose streams they are.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// containerd namespace.
    pub namespace: &'a str,
    /// Id of the container or the exec.
    pub id: &'a str,
    /// User and group that own the process' ends of the pipes.
    pub owner: (u32, u32),
    /// The bundle.
    pub bundle: &'a Path,
    /// Starts logging binaries.
    pub reaper: &'a Arc<Reaper>,
}

/// Opened and waiting for the process.
#[derive(Debug)]
pub struct Prepared {
    logger: Option<Logger>,
    child: ChildStdio,
    console: Option<ConsoleSocket>,
    stdin: Option<Input>,
    /// Pairs of what the process writes to and where that goes. For a terminal there is only a destination yet.
    outputs: Vec<(Option<Stream>, Sink)>,
}

#[derive(Debug)]
struct Input {
    fifo: Stream,
    /// Keeps the fifo from ending when a client disconnects; CloseIO drops it.
    keeper: File,
    to: Option<Stream>,
}

/// The running copies of one process' standard streams.
#[derive(Debug)]
pub struct ProcessIo {
    logger: Option<Logger>,
    keeper: Option<File>,
    stdin: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    console: Option<Arc<Stream>>,
}

#[derive(Debug)]
enum Sink {
    Fifo(Stream),
    File(Arc<File>),
    /// Read and thrown away: a terminal whose output nobody wants must not block.
    Nowhere,
}

impl Prepared {
    /// Opens everything that can be opened before the process exists.
    pub async fn new(stdio: &Stdio, origin: Origin<'_>) -> Result<Self> {
        let mut prepared = Self {
            logger: None,
            child: ChildStdio::default(),
            console: None,
            stdin: None,
            outputs: Vec::new(),
        };
        // The logging binary takes both outputs, and what stderr names does not count.
        let uri = Uri::parse(&stdio.stdout)?;
        let mut logger = None;
        if Logger::is_named_by(&uri) {
            let started = Logger::start(&uri, &origin).await?;
            prepared.logger = Some(started.logger);
            logger = Some((started.stdout, started.stderr));
        }
        if stdio.terminal {
            let sink = match logger {
                Some((stdout, _)) => Sink::Fifo(
                    Stream::new(stdout, Interest::WRITABLE)
                        .map_err(Error::io("use the pipe to a logging binary"))?,
                ),
                None if stdio.stdout.is_empty() => Sink::Nowhere,
                None => Sink::open(&stdio.stdout)?,
            };
            prepared.console = Some(ConsoleSocket::bind(origin.bundle)?);
            prepared.stdin = Input::open(&stdio.stdin, None)?;
            prepared.outputs.push((None, sink));
            return Ok(prepared);
        }
        let pipe = |error| Error::Io {
            what: "make a pipe for a standard stream".to_owned(),
            source: error,
        };
        if !stdio.stdin.is_empty() {
            let (theirs, ours) = Stream::pipe_from_us().map_err(pipe)?;
            give(&theirs, origin.owner)?;
            prepared.child.stdin = Some(theirs);
            prepared.stdin = Input::open(&stdio.stdin, Some(ours))?;
        }
        if let Some((stdout, stderr)) = logger {
            give(&stdout, origin.owner)?;
            give(&stderr, origin.owner)?;
            prepared.child.stdout = Some(stdout);
            prepared.child.stderr = Some(stderr);
            return Ok(prepared);
        }
        let streams = [
            (&stdio.stdout, &mut prepared.child.stdout),
            (&stdio.stderr, &mut prepared.child.stderr),
        ];
        for (name, slot) in streams.into_iter().filter(|(name, _)| !name.is_empty()) {
            let sink = Sink::open(name)?;
            let (ours, theirs) = Stream::pipe_to_us().map_err(pipe)?;
            give(&theirs, origin.owner)?;
            *slot = Some(theirs);
            prepared.outputs.push((Some(ours), sink));
        }
        Ok(prepared)
    }

    /// The streams to start the OCI runtime with; None with a terminal: then they are the runtime's own.
    pub fn take_child(&mut self) -> Option<ChildStdio> {
        self.console
            .is_none()
            .then(|| std::mem::take(&mut self.child))
    }

    /// Path of the console socket for the runtime, relative to the bundle.
    pub fn console_socket(&self) -> Option<&str> {
        self.console.as_ref().map(ConsoleSocket::name)
    }

    /// Starts to copy, once the runtime has made the process.
    pub async fn start(self) -> Result<ProcessIo> {
        let mut io = ProcessIo {
            logger: self.logger,
            keeper: None,
            stdin: None,
            outputs: Vec::new(),
            console: None,
        };
        if let Some(socket) = self.console {
            let master = tokio::time::timeout(CONSOLE_LIMIT, socket.receive())
                .await
                .map_err(|_| Error::Io {
                    what: "receive the terminal from the OCI runtime".to_owned(),
                    source: std::io::ErrorKind::TimedOut.into(),
                })??;
            let interest = Interest::READABLE | Interest::WRITABLE;
            let master = Stream::new(master, interest).map_err(Error::io("use the terminal"))?;
            io.console = Some(Arc::new(master));
        }
        if let Some(input) = self.stdin {
            io.keeper = Some(input.keeper);
            let to = match (input.to, &io.console) {
                (Some(pipe), _) => Some(Arc::new(pipe)),
                (None, console) => console.clone(),
            };
            if let Some(to) = to {
                io.stdin = Some(tokio::spawn(copy_in(input.fifo, to)));
            }
        }
        for (from, sink) in self.outputs {
            let from = match (from, &io.console) {
                (Some(pipe), _) => Arc::new(pipe),
                (None, Some(console)) => Arc::clone(console),
                (None, None) => continue,
            };
            io.outputs.push(tokio::spawn(copy_out(from, sink)));
        }
        Ok(io)
    }
}

/// Gives a process' end of a pipe to the user that the process runs as, so that it can open /dev/stdout again.
fn give(pipe: &OwnedFd, owner: (u32, u32)) -> Result<()> {
    if owner == (0, 0) {
        return Ok(());
    }
    std::os::unix::fs::fchown(pipe.as_fd(), Some(owner.0), Some(owner.1)).map_err(Error::io(
        format!("give a standard stream's pipe to {}:{}", owner.0, owner.1),
    ))
}

impl Input {
    fn open(name: &str, to: Option<Stream>) -> Result<Option<Self>> {
        if name.is_empty() {
            return Ok(None);
        }
        let path = Path::new(name.strip_prefix("fifo://").unwrap_or(name));
        if !fd::is_fifo(path) {
            return Err(Error::InvalidArgument(format!("stdin {name}: not a fifo")));
        }
        let fifo = Stream::fifo_reader(path).map_err(Error::io(format!("open stdin {name}")))?;
        let keeper = fd::open_nonblocking(OpenOptions::new().write(true), path)
            .map_err(Error::io(format!("open stdin {name}")))?;
        Ok(Some(Self { fifo, keeper, to }))
    }
}

impl Sink {
    fn open(name: &str) -> Result<Self> {
        let uri = Uri::parse(name)?;
        let open = |path: &Path| {
            OpenOptions::new()
                .append(true)
                .create(uri.scheme == "file")
                .open(path)
                .map(|file| Self::File(Arc::new(file)))
                .map_err(Error::io(format!("open {name} for output")))
        };
        let path = PathBuf::from(&uri.path);
        match uri.scheme.as_str() {
            "fifo" if fd::is_fifo(&path) => Stream::fifo_writer(&path)
                .map(Self::Fifo)
                .map_err(Error::io(format!("open {name} for output"))),
            "fifo" => open(&path),
            "file" => {
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent)
                        .map_err(Error::io(format!("make {}", parent.display())))?;
                }
                open(&path)
            }
            other => Err(Error::InvalidArgument(format!(
                "{name}: standard streams with scheme {other:?} are not supported; use fifo, file, binary or binary-v2"
            ))),
        }
    }

    async fn write_all(&self, bytes: Vec<u8>) -> std::io::Result<()> {
        match self {
            Self::Fifo(stream) => stream.write_all(&bytes).await,
            Self::File(file) => {
                let file = Arc::clone(file);
                // A file system may block; the other streams must not wait for it.
                tokio::task::spawn_blocking(move || (&*file).write_all(&bytes)).await?
            }
            Self::Nowhere => Ok(()),
        }
    }
}

async fn copy_out(from: Arc<Stream>, to: Sink) {
    let mut broken = false;
    loop {
        let mut piece = Vec::new();
        match from.read_with(&mut piece, PIECE).await {
            Ok(0) => return,
            // A destination that fails must not stop the process: go on reading.
            Ok(_) if broken => {}
            Ok(_) => {
                if let Err(error) = to.write_all(piece).await {
                    tracing::warn!("output is lost from here on: {error}");
                    broken = true;
                }
            }
            Err(error) => {
                tracing::warn!("cannot read the output of a process: {error}");
                return;
            }
        }
    }
}

async fn copy_in(from: Stream, to: Arc<Stream>) {
    loop {
        let mut piece = Vec::new();
        match from.read_with(&mut piece, PIECE).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        // The process closed its standard input: there is nobody to copy to.
        if to.write_all(&piece).await.is_err() {
            return;
        }
    }
}

impl ProcessIo {
    /// Lets the process' standard input end once its client closes it too.
    pub fn close_stdin(&mut self) {
        self.keeper = None;
    }

    /// Sets the size of the terminal, where there is one.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        match &self.console {
            Some(console) => Ok(kbp_kernel::fd::set_window_size(
                console.as_fd(),
                columns,
                rows,
            )?),
            None => Ok(()),
        }
    }

    /// After the process has ended: copies the rest of its output, at most for `limit`, and closes everything.
    pub async fn finish(mut self, limit: Duration) {
        self.stop_input();
        let deadline = tokio::time::Instant::now() + limit;
        for output in &mut self.outputs {
            if tokio::time::timeout_at(deadline, &mut *output)
                .await
                .is_err()
            {
                tracing::warn!(
                    "output was not read to its end within {limit:?}: something holds it open, or nobody reads"
                );
                output.abort();
            }
        }
        if let Some(logger) = self.logger.take() {
            logger.finish(limit).await;
        }
    }

    fn stop_input(&mut self) {
        if let Some(stdin) = self.stdin.take() {
            stdin.abort();
        }
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.stop_input();
        for output in &self.outputs {
            output.abort();
        }
    }
}
