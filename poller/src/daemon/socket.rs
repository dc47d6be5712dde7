//! The daemon's sockets: its own or the init system's, root's alone, and one daemon at a time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kbp_kernel::fd::{self, peer};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::connection::{Connections, Http, Stream};
use super::{DaemonError, Options, Result};
use crate::api;
use crate::state;

/// Name of the metrics' socket in the state directory.
const METRICS: &str = "metrics.sock";

/// Longest path of a socket (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Sockets that the init system passes (sd_listen_fds(3)); none where it passes none.
#[derive(Debug, Default)]
pub struct Inherited {
    api: Option<UnixListener>,
}

/// Takes over what `LISTEN_FDS` announces. Call it at the start of `main`.
///
/// # Errors
/// When more than the one socket is passed, or it is no unix socket.
pub fn take_inherited() -> Result<Inherited> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    if variable("LISTEN_PID") != std::process::id().to_string() {
        return Ok(Inherited::default());
    }
    match variable("LISTEN_FDS").as_str() {
        "" | "0" => Ok(Inherited::default()),
        "1" => {
            let socket = fd::take_inherited(3).map_err(crate::Error::from)?;
            let listener = UnixListener::from(socket);
            let failed = |e| DaemonError::io("use the socket of the init system", e);
            listener.local_addr().map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            Ok(Inherited {
                api: Some(listener),
            })
        }
        count => Err(DaemonError::io(
            "use the sockets of the init system",
            io::Error::other(format!("{count} were passed, and one is expected")),
        )),
    }
}

/// Everything the daemon listens on; what it made goes when this is dropped.
#[derive(Debug)]
pub(super) struct Sockets {
    listeners: Vec<Listener>,
    state_dir: PathBuf,
    path: PathBuf,
    own: Vec<PathBuf>,
    _lock: Flock<File>,
}

/// One of them.
#[derive(Debug)]
pub(super) enum Listener {
    Api(UnixListener),
    Metrics(UnixListener),
    MetricsTcp(TcpListener),
}

impl Sockets {
    pub(super) fn open(options: &Options) -> Result<Self> {
        let state_dir = options.config.state_dir.clone();
        state::create_dir(&state_dir)?;
        check_directory(&state_dir)?;
        // Better told now than at each attach.
        state::create_dir(&state::pods_dir(&state_dir))?;
        let lock = lock(&state_dir)?;
        let path = state_dir.join(api::SOCKET);
        // From here on, what was made goes when something fails.
        let mut sockets = Self {
            listeners: Vec::new(),
            state_dir,
            path,
            own: Vec::new(),
            _lock: lock,
        };
        let inherited = options.inherited.api.as_ref().map(UnixListener::try_clone);
        let api = match inherited {
            Some(listener) => {
                listener.map_err(|e| DaemonError::io("use the socket of the init system", e))?
            }
            None => bind(&sockets.path, &mut sockets.own)?,
        };
        sockets.listeners.push(Listener::Api(api));
        let metrics = bind(&sockets.state_dir.join(METRICS), &mut sockets.own)?;
        sockets.listeners.push(Listener::Metrics(metrics));
        if let Some(address) = options.metrics {
            if !address.ip().is_loopback() {
                return Err(DaemonError::NotLoopback { address });
            }
            let listener = TcpListener::bind(address)
                .and_then(|l| l.set_nonblocking(true).map(|()| l))
                .map_err(|e| DaemonError::io(format!("listen on {address}"), e))?;
            // The port may have been the kernel's to choose.
            if let Ok(address) = listener.local_addr() {
                tracing::info!("metrics at http://{address}/metrics");
            }
            sockets.listeners.push(Listener::MetricsTcp(listener));
        }
        Ok(sockets)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// Tells whoever watches the directory that there is a daemon now.
    pub(super) fn announce(&self) -> Result<()> {
        let path = self.state_dir.join(api::READY);
        let temporary = self.state_dir.join(format!(".{}.tmp", api::READY));
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| {
                io::Write::write_all(&mut file, format!("{}\n", std::process::id()).as_bytes())
            })
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|e| DaemonError::io(format!("write {}", path.display()), e))
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        // While the lock is held: a daemon that comes next makes its own.
        for path in self.own.iter().chain([&self.state_dir.join(api::READY)]) {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "{} stays behind", path.display());
            }
        }
    }
}

impl Listener {
    /// Accepts one connection.
    pub(super) fn accept(&self, connections: &mut Connections, readers: &mut Vec<Http>) {
        let accepted = match self {
            Self::Api(listener) => listener.accept().and_then(|(stream, _)| {
                let peer = peer(&stream).map_err(io::Error::other)?;
                connections.add(stream, peer)
            }),
            Self::Metrics(listener) => listener
                .accept()
                .and_then(|(stream, _)| Http::add(readers, Stream::Unix(stream))),
            Self::MetricsTcp(listener) => listener
                .accept()
                .and_then(|(stream, _)| Http::add(readers, Stream::Tcp(stream))),
        };
        if let Err(error) = accepted
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::warn!(%error, "a connection was not accepted");
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Api(listener) | Self::Metrics(listener) => listener.as_fd(),
            Self::MetricsTcp(listener) => listener.as_fd(),
        }
    }
}

/// Whoever may write to the directory could put a socket in the place of ours.
fn check_directory(dir: &Path) -> Result<()> {
    let metadata = fs::symlink_metadata(dir)
        .map_err(|e| DaemonError::io(format!("look at {}", dir.display()), e))?;
    let untrusted = |reason: String| DaemonError::Untrusted {
        path: dir.to_owned(),
        reason,
    };
    if !metadata.is_dir() {
        return Err(untrusted("it is not a directory".to_owned()));
    }
    if metadata.uid() != 0 {
        return Err(untrusted(format!(
            "it belongs to user {}; give it to root (chown root)",
            metadata.uid()
        )));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(untrusted(format!(
            "others may write to it (mode {mode:04o}); forbid it (chmod 0700)"
        )));
    }
    Ok(())
}

/// The directory itself is the lock: nothing to create, nothing left over.
fn lock(dir: &Path) -> Result<Flock<File>> {
    let file =
        File::open(dir).map_err(|e| DaemonError::io(format!("open {}", dir.display()), e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| DaemonError::AlreadyRunning {
        lock: dir.to_owned(),
        pid: fs::read_to_string(dir.join(api::READY))
            .map_or_else(|_| "just starting".to_owned(), |pid| pid.trim().to_owned()),
    })
}

/// A socket for root alone, complete when it appears; an old one that nobody serves is replaced.
fn bind(path: &Path, own: &mut Vec<PathBuf>) -> Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(DaemonError::io(format!("look at {}", path.display()), e)),
        Ok(there) if there.file_type().is_socket() && there.uid() == 0 => {}
        Ok(there) => {
            return Err(DaemonError::Untrusted {
                path: path.to_owned(),
                reason: format!(
                    "something else than a socket of root's is there (user {}, mode {:o}); look at what it is and remove it",
                    there.uid(),
                    there.mode()
                ),
            });
        }
    }
    let failed = |e| DaemonError::io(format!("make the socket {}", path.display()), e);
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let what = format!(
            "make the socket {}, whose path may have {MAX_SOCKET_PATH} bytes (choose a shorter state-dir)",
            path.display()
        );
        return Err(DaemonError::io(
            what,
            std::io::Error::from(Errno::ENAMETOOLONG),
        ));
    }
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary).map_err(failed)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(failed)?;
    own.push(path.to_owned());
    Ok(listener)
}
