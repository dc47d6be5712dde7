//! A client of the node's daemon, synchronous and without threads: for a CNI plugin that lives for milliseconds as well
//! as for a shim.
//!
//! Everything it does ends within the limit it is given: connecting, sending and receiving together. After an error the
//! connection is of no use any more, since an answer that is late would be taken for the next one's.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kbp_kernel::fd::{Peer, peer};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use prost::Message;

use crate::api::{
    self, AttachRequest, AttachResponse, Code, DetachRequest, DetachResponse, Frame, FrameError,
    Kind, ListRequest, ListResponse, MAX_REQUEST, Pod, REMOTE_CLOSED, Request, Response,
    UpdateRequest, UpdateResponse, Uplink, WatchEvent, WatchRequest,
};

/// Why the daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error(
        "no kbp-poller serves {socket}: {source}; start it (systemctl start kbp-poller, or kbp-poller serve), or do without"
    )]
    NotRunning {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket is there, but it is not root's, or this process may not use it.
    #[error("{socket} cannot be trusted or used: {reason}; it belongs to root and has mode 0600")]
    Untrusted {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The limit ran out.
    #[error(
        "kbp-poller at {socket} did not {what} within {} ms; look at its log (journalctl -u kbp-poller), or restart it",
        limit.as_millis()
    )]
    TimedOut {
        /// The socket.
        socket: PathBuf,
        /// What was waited for.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The daemon ended, or closed the connection.
    #[error("kbp-poller at {socket} closed the connection: {reason}")]
    Closed {
        /// The socket.
        socket: PathBuf,
        /// What was seen.
        reason: String,
    },
    /// The daemon refused; the text is its own, with the remedy.
    #[error("kbp-poller: {message}")]
    Refused {
        /// Why, by kind; None: a code that it does not use.
        code: Option<Code>,
        /// Why, in words.
        message: String,
    },
    /// It does not speak this protocol.
    #[error(
        "{socket} answered something else than ttrpc's {}: {reason}; is it another program's, or another version's?",
        api::SERVICE
    )]
    Protocol {
        /// The socket.
        socket: PathBuf,
        /// What came.
        reason: String,
    },
    /// The request is longer than the daemon takes.
    #[error("a request of {length} bytes; kbp-poller takes {MAX_REQUEST}")]
    TooLong {
        /// Its bytes.
        length: usize,
    },
}

/// Result of a call.
pub type Result<T, E = ClientError> = std::result::Result<T, E>;

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    socket: PathBuf,
    server: Peer,
    received: Vec<u8>,
    next_stream: u32,
    limit: Duration,
    until: Instant,
}

/// What became of an attach.
#[derive(Debug, Clone, PartialEq)]
pub enum Attached {
    /// Attached, perhaps with degraded parts.
    Pod(Box<Pod>),
    /// Registered; it is attached once the one ends that holds the namespace. Never an answer to a bound request.
    Waiting,
    /// The namespace has only a loopback (yet).
    NoInterface,
    /// It is the host's own namespace.
    HostNetwork,
}

impl Client {
    /// Connects to the daemon's socket. All that is done with this client has to be done within `limit` from now on; see
    /// [`Client::renew`].
    ///
    /// # Errors
    /// [`ClientError::NotRunning`], [`ClientError::Untrusted`] or [`ClientError::TimedOut`].
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let until = Instant::now() + limit;
        let not_running = |errno: Errno| ClientError::NotRunning {
            socket: path.to_owned(),
            source: errno.into(),
        };
        let untrusted = |reason: String| ClientError::Untrusted {
            socket: path.to_owned(),
            reason,
        };
        let address = UnixAddr::new(path).map_err(not_running)?;
        let stream = loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd =
                socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(not_running)?;
            match connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address) {
                Ok(()) => break UnixStream::from(fd),
                // The queue of a daemon that accepts nobody is full; the kernel tells nobody when it empties.
                Err(Errno::EAGAIN) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(Errno::EAGAIN) => {
                    return Err(ClientError::TimedOut {
                        socket: path.to_owned(),
                        what: "accept the connection",
                        limit,
                    });
                }
                Err(e @ (Errno::EACCES | Errno::EPERM)) => return Err(untrusted(e.to_string())),
                Err(errno) => return Err(not_running(errno)),
            }
        };
        stream
            .set_nonblocking(false)
            .map_err(|e| untrusted(e.to_string()))?;
        // The credentials are those of who listens: somebody else's socket in its place would learn of pods and could
        // claim to poll them.
        let server = peer(&stream).map_err(|e| untrusted(e.to_string()))?;
        if server.uid != 0 {
            return Err(untrusted(format!(
                "it is served by user {} (process {})",
                server.uid, server.pid
            )));
        }
        Ok(Self {
            stream,
            socket: path.to_owned(),
            server,
            received: Vec::new(),
            next_stream: 1,
            limit,
            until,
        })
    }

    /// Starts a new limit.
    pub fn renew(&mut self, limit: Duration) {
        self.limit = limit;
        self.until = Instant::now() + limit;
    }

    /// Process id of the daemon, as it was when it began to listen; 0 when it is not visible from here. With socket
    /// activation it is the init system's.
    pub fn server_pid(&self) -> u32 {
        self.server.pid
    }

    /// Has a pod polled.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the daemon's reason, or another one when it could not be asked.
    pub fn attach(&mut self, request: &AttachRequest) -> Result<Attached> {
        let answer: AttachResponse = self.call("Attach", request)?;
        match (answer.outcome(), answer.pod) {
            (api::Outcome::Attached, Some(pod)) => Ok(Attached::Pod(Box::new(pod))),
            (api::Outcome::Attached, None) if !request.bound => Ok(Attached::Waiting),
            (api::Outcome::NoInterface, _) => Ok(Attached::NoInterface),
            (api::Outcome::HostNetwork, _) => Ok(Attached::HostNetwork),
            (outcome, _) => Err(self.protocol(format!("an attach with outcome {outcome:?}"))),
        }
    }

    /// Ends an attachment; whether there was one.
    ///
    /// # Errors
    /// As [`Client::attach`].
    pub fn detach(&mut self, namespace: &str, id: &str, restore: bool) -> Result<bool> {
        let request = DetachRequest {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            restore,
        };
        let answer: DetachResponse = self.call("Detach", &request)?;
        Ok(answer.was_attached)
    }

    /// Tells what has changed about a pod's sockets.
    ///
    /// # Errors
    /// As [`Client::attach`].
    pub fn update(&mut self, request: &UpdateRequest) -> Result<()> {
        let UpdateResponse {} = self.call("Update", request)?;
        Ok(())
    }

    /// Every attachment.
    ///
    /// # Errors
    /// As [`Client::attach`].
    pub fn list(&mut self) -> Result<Vec<Pod>> {
        let answer: ListResponse = self.call("List", &ListRequest {})?;
        Ok(answer.pods)
    }

    /// Every uplink that the daemon was told to poll.
    ///
    /// # Errors
    /// As [`Client::attach`].
    pub fn uplinks(&mut self) -> Result<Vec<Uplink>> {
        let answer: ListResponse = self.call("List", &ListRequest {})?;
        Ok(answer.uplinks)
    }

    /// Every attachment as it is now, and then each change.
    ///
    /// # Errors
    /// As [`Client::attach`].
    pub fn watch(mut self) -> Result<Watch> {
        let stream = self.send("Watch", &WatchRequest {})?;
        Ok(Watch {
            client: self,
            stream,
        })
    }

    fn call<A: Message + Default>(&mut self, method: &str, request: &impl Message) -> Result<A> {
        let stream = self.send(method, request)?;
        let frame = self.receive(stream, "answer")?;
        if frame.kind != Kind::Response {
            return Err(self.protocol(format!("a message of kind {:?}", frame.kind)));
        }
        self.answer(&frame.payload)
    }

    fn answer<A: Message + Default>(&self, payload: &[u8]) -> Result<A> {
        let response = Response::decode(payload).map_err(|e| self.protocol(e.to_string()))?;
        match response.status {
            Some(status) if status.code != 0 => Err(ClientError::Refused {
                code: Code::from_number(status.code),
                message: status.message,
            }),
            _ => A::decode(response.payload.as_slice()).map_err(|e| self.protocol(e.to_string())),
        }
    }

    /// Sends a request; the stream that its answer will come on.
    fn send(&mut self, method: &str, request: &impl Message) -> Result<u32> {
        let left = self.until.saturating_duration_since(Instant::now());
        let stream = self.next_stream;
        self.next_stream = self.next_stream.wrapping_add(2);
        let call = Request {
            service: api::SERVICE.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: left.as_nanos().try_into().unwrap_or(i64::MAX),
        };
        let payload = call.encode_to_vec();
        if payload.len() > MAX_REQUEST {
            return Err(ClientError::TooLong {
                length: payload.len(),
            });
        }
        let frame = Frame {
            stream,
            kind: Kind::Request,
            flags: REMOTE_CLOSED,
            payload,
        };
        let bytes = frame.encode();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let left = self.left("take a request")?;
            let written = self
                .stream
                .set_write_timeout(Some(left))
                .and_then(|()| self.stream.write(rest));
            match written {
                Ok(0) => return Err(self.closed("it takes no more bytes")),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(self.closed(e.to_string())),
            }
        }
        Ok(stream)
    }

    /// The next message on `stream`; the others belong to nobody any more.
    fn receive(&mut self, stream: u32, what: &'static str) -> Result<Frame> {
        loop {
            match api::next_frame(&self.received) {
                Ok(Some((frame, used))) => {
                    self.received.drain(..used);
                    if frame.stream == stream {
                        return Ok(frame);
                    }
                }
                Ok(None) => self.read_some(what)?,
                Err(error @ (FrameError::TooLong { .. } | FrameError::UnknownKind { .. })) => {
                    return Err(self.protocol(error.to_string()));
                }
            }
        }
    }

    fn read_some(&mut self, what: &'static str) -> Result<()> {
        let mut chunk = [0; 4096];
        loop {
            let left = self.left(what)?;
            let read = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut chunk));
            match read {
                Ok(0) => return Err(self.closed("end of the stream")),
                Ok(read) => {
                    self.received.extend(chunk.get(..read).unwrap_or_default());
                    return Ok(());
                }
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(self.closed(e.to_string())),
            }
        }
    }

    fn left(&self, what: &'static str) -> Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::TimedOut {
                socket: self.socket.clone(),
                what,
                limit: self.limit,
            });
        }
        // The kernel's clock ticks in microseconds here, and 0 means for ever.
        Ok(left.max(Duration::from_micros(1)))
    }

    fn closed(&self, reason: impl Into<String>) -> ClientError {
        ClientError::Closed {
            socket: self.socket.clone(),
            reason: reason.into(),
        }
    }

    fn protocol(&self, reason: String) -> ClientError {
        ClientError::Protocol {
            socket: self.socket.clone(),
            reason,
        }
    }
}

impl AsFd for Client {
    /// Readable outside of a call: the daemon is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A running [`Client::watch`].
#[derive(Debug)]
pub struct Watch {
    client: Client,
    stream: u32,
}

impl Watch {
    /// The next event, within `limit`.
    ///
    /// # Errors
    /// [`ClientError::TimedOut`] when there is none, after which it may be called again; else as [`Client::attach`].
    pub fn next_event(&mut self, limit: Duration) -> Result<WatchEvent> {
        self.client.renew(limit);
        let frame = self.client.receive(self.stream, "tell of a change")?;
        match frame.kind {
            Kind::Data => WatchEvent::decode(frame.payload.as_slice())
                .map_err(|e| self.client.protocol(e.to_string())),
            // The end of the stream, mostly with a reason.
            _ => {
                let _: WatchEvent = self.client.answer(&frame.payload)?;
                Err(self.client.closed("the watch has ended"))
            }
        }
    }
}

/// Whether the limit, and not the peer, decides what comes next.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
