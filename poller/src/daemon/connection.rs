//! Connections: non-blocking, each with bounds on what it may make the daemon keep.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use kbp_kernel::fd::Peer;
use nix::poll::PollFlags;

use super::METRICS_LIMIT;
use super::service::{Answer, Service};
use crate::api::{
    self, Code, Frame, FrameError, Kind, MAX_ANSWER, MAX_REQUEST, REMOTE_CLOSED, WatchEvent,
};

/// Most connections of the API: one a pod, and some.
const MAX_CONNECTIONS: usize = 4096;

/// Most readers of metrics at a time.
const MAX_READERS: usize = 16;

/// Most bytes that wait for a client to read them; a watcher that does not read is let go.
const MAX_WAITING: usize = 2 * MAX_ANSWER;

/// Most bytes of a metrics request.
const MAX_HTTP: usize = 8 << 10;

/// Names a connection while the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ConnectionId(u64);

/// Every connection of the API.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: BTreeMap<ConnectionId, Connection>,
    next: u64,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    peer: Peer,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Streams that are told of changes.
    watches: Vec<u32>,
    /// Close once the output is written.
    closing: bool,
}

impl Connections {
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn add(&mut self, stream: UnixStream, peer: Peer) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut connection = Connection {
            stream,
            peer,
            input: Vec::new(),
            output: Vec::new(),
            watches: Vec::new(),
            closing: false,
        };
        // The mode of the socket keeps others away, but the init system's may be set otherwise.
        let refusal = if peer.uid != 0 {
            Some((
                Code::PermissionDenied,
                format!(
                    "only root may ask kbp-poller; process {} is user {}",
                    peer.pid, peer.uid
                ),
            ))
        } else if self.open.len() >= MAX_CONNECTIONS {
            Some((
                Code::ResourceExhausted,
                format!("{MAX_CONNECTIONS} connections are open, which is all there may be"),
            ))
        } else {
            None
        };
        if let Some((code, reason)) = refusal {
            // Nobody's request as yet: the first stream of a client is 1.
            connection.answer(1, Answer::refused(code, reason));
            connection.write();
            return Err(io::Error::other("refused"));
        }
        self.next += 1;
        self.open.insert(ConnectionId(self.next), connection);
        Ok(())
    }

    /// What each waits for, in the order of their names.
    pub(super) fn waits(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        self.open.values().map(|connection| {
            let mut flags = PollFlags::POLLIN;
            if !connection.output.is_empty() {
                flags |= PollFlags::POLLOUT;
            }
            (connection.stream.as_fd(), flags)
        })
    }

    /// Serves those that are ready, in the same order.
    pub(super) fn serve(&mut self, ready: &[bool], service: &mut Service) {
        let ids: Vec<ConnectionId> = self
            .open
            .keys()
            .zip(ready)
            .filter(|(_, ready)| **ready)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(connection) = self.open.get_mut(&id) else {
                continue;
            };
            if !connection.go_on(id, service) {
                self.open.remove(&id);
                service.closed(id);
            }
        }
    }

    /// Tells every watcher.
    pub(super) fn tell(&mut self, event: &WatchEvent) {
        for connection in self.open.values_mut() {
            for stream in connection.watches.clone() {
                connection.data(stream, event);
            }
            connection.write();
        }
    }
}

impl Connection {
    /// Reads and answers what is there; false when the connection is to be closed.
    fn go_on(&mut self, id: ConnectionId, service: &mut Service) -> bool {
        if self.closing {
            return self.write() && !self.output.is_empty();
        }
        let mut chunk = [0; 16 << 10];
        let mut ended = false;
        // One request and the beginning of the next at most, so that nobody keeps the others waiting.
        while self.input.len() <= MAX_REQUEST {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    ended = true;
                    break;
                }
                Ok(read) => self.input.extend(chunk.get(..read).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        // Who has closed waits for no answer, and may have turned to another way already.
        if ended {
            return false;
        }
        loop {
            match api::next_frame(&self.input) {
                Ok(None) => break,
                Ok(Some((frame, used))) => {
                    self.input.drain(..used);
                    if !self.frame(frame, id, service) {
                        return false;
                    }
                }
                Err(error) => {
                    let (FrameError::TooLong { stream, .. }
                    | FrameError::UnknownKind { stream, .. }) = error;
                    let refused = Answer::refused(Code::InvalidArgument, error.to_string());
                    self.answer(stream, refused);
                    // Where the next message begins is not known.
                    self.closing = true;
                    break;
                }
            }
        }
        self.write() && (!self.closing || !self.output.is_empty())
    }

    fn frame(&mut self, frame: Frame, id: ConnectionId, service: &mut Service) -> bool {
        match frame.kind {
            Kind::Request => {}
            // A client that ends its half of a stream; no method takes data.
            Kind::Data => return true,
            Kind::Response => return false,
        }
        match service.call(&frame.payload, id, self.peer) {
            Answer::Watch(pods) => {
                self.watches.push(frame.stream);
                for event in pods {
                    self.data(frame.stream, &event);
                }
            }
            answer => self.answer(frame.stream, answer),
        }
        self.output.len() <= MAX_WAITING
    }

    fn answer(&mut self, stream: u32, answer: Answer) {
        self.output.extend(
            Frame {
                stream,
                kind: Kind::Response,
                flags: REMOTE_CLOSED,
                payload: answer.encode(),
            }
            .encode(),
        );
    }

    fn data(&mut self, stream: u32, event: &WatchEvent) {
        self.output.extend(
            Frame {
                stream,
                kind: Kind::Data,
                flags: 0,
                payload: prost::Message::encode_to_vec(event),
            }
            .encode(),
        );
    }

    /// Writes what the client takes now; false when it is to be let go.
    fn write(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return false,
                Ok(written) => drop(self.output.drain(..written)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        if self.output.len() > MAX_WAITING {
            tracing::warn!("process {} does not read what it asked for", self.peer.pid);
            self.closing = true;
            self.output.clear();
        }
        true
    }
}

/// A socket of either kind.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A reader of metrics: one request of HTTP/1, one answer.
#[derive(Debug)]
pub(super) struct Http {
    stream: Stream,
    input: Vec<u8>,
    output: Option<Vec<u8>>,
    deadline: Instant,
    done: bool,
}

impl Http {
    pub(super) fn add(readers: &mut Vec<Self>, stream: Stream) -> io::Result<()> {
        match &stream {
            Stream::Unix(stream) => stream.set_nonblocking(true)?,
            Stream::Tcp(stream) => stream.set_nonblocking(true)?,
        }
        if readers.len() >= MAX_READERS {
            return Err(io::Error::other(format!(
                "{MAX_READERS} programs read metrics already"
            )));
        }
        readers.push(Self {
            stream,
            input: Vec::new(),
            output: None,
            deadline: Instant::now() + METRICS_LIMIT,
            done: false,
        });
        Ok(())
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    pub(super) fn waits(&self) -> (BorrowedFd<'_>, PollFlags) {
        let fd = match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        };
        let flags = match self.output {
            Some(_) => PollFlags::POLLOUT,
            None => PollFlags::POLLIN,
        };
        (fd, flags)
    }

    pub(super) fn go_on(&mut self, service: &mut Service) {
        let passing = |e: &io::Error| {
            matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            )
        };
        let (reader, writer): (&mut dyn Read, &mut dyn Write) = match &self.stream {
            Stream::Unix(stream) => (&mut &*stream, &mut &*stream),
            Stream::Tcp(stream) => (&mut &*stream, &mut &*stream),
        };
        if self.output.is_none() {
            let mut chunk = [0; 1024];
            match reader.read(&mut chunk) {
                Ok(0) => self.done = true,
                Ok(read) => self.input.extend(chunk.get(..read).unwrap_or_default()),
                Err(e) if passing(&e) => {}
                Err(_) => self.done = true,
            }
            self.output = answer_to(&self.input, service);
        }
        let Some(output) = &mut self.output else {
            return;
        };
        match writer.write(output) {
            Ok(written) => drop(output.drain(..written)),
            Err(e) if passing(&e) => {}
            Err(_) => self.done = true,
        }
        self.done |= output.is_empty();
    }
}

/// None: the request is not whole yet.
fn answer_to(request: &[u8], service: &mut Service) -> Option<Vec<u8>> {
    let (status, kind, body) = match classify(request) {
        Asked::More => return None,
        Asked::Metrics => (
            "200 OK",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            service.metrics(),
        ),
        Asked::Refused(status) => (status, "text/plain", format!("{status}\n")),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    Some([head, body].concat().into_bytes())
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    More,
    Metrics,
    Refused(&'static str),
}

fn classify(request: &[u8]) -> Asked {
    let whole = request.windows(4).any(|w| w == b"\r\n\r\n");
    if !whole {
        return if request.len() > MAX_HTTP {
            Asked::Refused("431 Request Header Fields Too Large")
        } else {
            Asked::More
        };
    }
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    match words[..] {
        [b"GET", b"/metrics", version] if version.starts_with(b"HTTP/1.") => Asked::Metrics,
        [b"GET", _, version] if version.starts_with(b"HTTP/1.") => Asked::Refused("404 Not Found"),
        [_, _, version] if version.starts_with(b"HTTP/1.") => {
            Asked::Refused("405 Method Not Allowed")
        }
        _ => Asked::Refused("400 Bad Request"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_get_of_metrics_is_answered_with_them() {
        for (request, expected) in [
            ("", Asked::More),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", Asked::More),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Asked::Metrics),
            ("GET /metrics HTTP/1.0\r\n\r\n", Asked::Metrics),
            ("GET / HTTP/1.1\r\n\r\n", Asked::Refused("404 Not Found")),
            (
                "POST /metrics HTTP/1.1\r\n\r\n",
                Asked::Refused("405 Method Not Allowed"),
            ),
            ("\r\n\r\n", Asked::Refused("400 Bad Request")),
            (
                "GET /metrics HTTP/2\r\n\r\n",
                Asked::Refused("400 Bad Request"),
            ),
        ] {
            assert_eq!(classify(request.as_bytes()), expected, "{request:?}");
        }
        let long = vec![b'x'; MAX_HTTP + 1];
        assert_eq!(
            classify(&long),
            Asked::Refused("431 Request Header Fields Too Large")
        );
    }
}
