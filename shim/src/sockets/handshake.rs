//! What an OCI runtime sends with a filter's listener: one `ContainerProcessState` and one descriptor a connection
//! (runtime specification, "Container Process State").
//!
//! runc connects, sends and closes at once. crun connects when it creates the container and sends when the container's
//! filter is loaded, which for some containers is only at their start: a silent connection may be a patient one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use kbp_kernel::fd;
use kbp_kernel::notify::Listener;
use serde::Deserialize;

use super::{Container, Shared};

/// Longest message: the state carries the container's annotations, of which Kubernetes allows 256 KiB.
const MAX_MESSAGE: usize = 1024 * 1024;
const PIECE: usize = 16 * 1024;
/// Most descriptors that are read at all; exactly one is accepted.
const MAX_FDS: usize = 4;

/// A connection that has not sent everything yet.
#[derive(Debug)]
pub(super) struct Handshake {
    stream: UnixStream,
    data: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// When its first byte came; None: it is silent so far.
    pub(super) started: Option<Instant>,
}

/// What became of a connection after reading from it.
#[derive(Debug)]
pub(super) enum Progress {
    /// More is to come.
    Waiting,
    /// The peer closed without a word: its container came to nothing.
    Gone,
    /// A listener to answer.
    Done(Accepted),
    /// It is not what it should be; the reason names what is wrong.
    Refused(String),
}

/// A listener and whom it belongs to.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) listener: Listener,
    pub(super) container: Arc<Container>,
    pub(super) pid: i64,
}

#[derive(Debug, Deserialize)]
struct ProcessState {
    #[serde(default)]
    fds: Vec<String>,
    #[serde(default)]
    pid: i64,
    #[serde(default)]
    metadata: String,
    state: State,
}

#[derive(Debug, Deserialize)]
struct State {
    id: String,
}

impl Handshake {
    /// Takes a connection; only root may send listeners.
    pub(super) fn new(stream: UnixStream) -> Result<Self, String> {
        let peer = fd::peer(&stream).map_err(|e| e.to_string())?;
        if peer.uid != 0 {
            return Err(format!(
                "a connection by user {} (process {}): only root may send listeners",
                peer.uid, peer.pid
            ));
        }
        stream
            .set_nonblocking(true)
            .map_err(|e| format!("make a connection non-blocking: {e}"))?;
        Ok(Self {
            stream,
            data: Vec::new(),
            fds: Vec::new(),
            started: None,
        })
    }

    /// Reads what is there.
    pub(super) fn advance(&mut self, shared: &Shared) -> Progress {
        let ended = loop {
            let piece = match fd::receive(self.stream.as_fd(), PIECE, MAX_FDS) {
                Ok(piece) => piece,
                Err(error) if error.errno() == Some(nix::libc::EAGAIN) => break false,
                // The peer died.
                Err(error) if error.errno() == Some(nix::libc::ECONNRESET) => break true,
                Err(error) => return Progress::Refused(error.to_string()),
            };
            if piece.data.is_empty() {
                break true;
            }
            self.started.get_or_insert_with(Instant::now);
            self.data.extend(piece.data);
            self.fds.extend(piece.fds);
            if self.fds.len() > MAX_FDS || self.data.len() > MAX_MESSAGE {
                return Progress::Refused(format!(
                    "a message of more than {MAX_MESSAGE} bytes or {MAX_FDS} descriptors"
                ));
            }
        };
        if self.data.is_empty() {
            return if ended {
                Progress::Gone
            } else {
                Progress::Waiting
            };
        }
        match serde_json::from_slice::<ProcessState>(&self.data) {
            Ok(state) => match accept(state, std::mem::take(&mut self.fds), shared) {
                Ok(accepted) => Progress::Done(accepted),
                Err(reason) => Progress::Refused(reason),
            },
            Err(error) if error.is_eof() && !ended => Progress::Waiting,
            Err(error) if error.is_eof() => Progress::Refused(format!(
                "a connection that ended after {} bytes, in the middle of its message",
                self.data.len()
            )),
            Err(error) => Progress::Refused(format!("not a container process state: {error}")),
        }
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn accept(state: ProcessState, mut fds: Vec<OwnedFd>, shared: &Shared) -> Result<Accepted, String> {
    let id = &state.state.id;
    if state.metadata != shared.metadata {
        return Err(format!(
            "the listener of container {id:?} with metadata {:?}, which is not this pod's",
            state.metadata
        ));
    }
    let container =
        shared.containers().get(id).cloned().ok_or_else(|| {
            format!("the listener of container {id:?}, which is not one of this pod")
        })?;
    if state.fds != ["seccompFd"] || fds.len() != 1 {
        return Err(format!(
            "a message of container {id:?} with {} descriptors named {:?}; one named seccompFd is expected",
            fds.len(),
            state.fds
        ));
    }
    let fd = fds.remove(0);
    check_kind(&fd).map_err(|e| format!("a descriptor of container {id:?}: {e}"))?;
    Ok(Accepted {
        listener: Listener::new(fd),
        container,
        pid: state.pid,
    })
}

/// Anything else than a listener would be readable for ever, or never.
fn check_kind(fd: &OwnedFd) -> io::Result<()> {
    let target = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if target.as_os_str() == "anon_inode:seccomp notify" {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{} is no seccomp listener",
        target.display()
    )))
}
