//! The thread that waits for connections of the runtime and for trapped calls.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kbp_kernel::notify::{Listener, Received};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::answer::{Node, answer};
use super::handshake::{Handshake, Progress};
use super::{Container, Event, Shared};

/// Most connections that are kept while they have not sent everything.
const MAX_HANDSHAKES: usize = 64;
/// How long a message may take from its first byte to its last.
const MESSAGE_TIME: Duration = Duration::from_secs(5);
/// Failed receives in a row after which a listener is given up: it would make the thread spin.
const MAX_FAILURES: u32 = 16;
/// Pause after the socket refused an accept for want of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Supervisor {
    socket: UnixListener,
    stop: Arc<EventFd>,
    shared: Arc<Shared>,
    node: Node,
    handshakes: Vec<Handshake>,
    supervised: Vec<Supervised>,
    /// Until when no connection is accepted.
    accept_after: Option<Instant>,
}

struct Supervised {
    listener: Listener,
    container: Arc<Container>,
    failures: u32,
}

/// Which descriptors have something to say.
#[derive(Debug, Default)]
struct Ready {
    stop: bool,
    socket: bool,
    handshakes: Vec<bool>,
    supervised: Vec<bool>,
}

impl Supervisor {
    pub(super) fn new(socket: UnixListener, stop: Arc<EventFd>, shared: Arc<Shared>) -> Self {
        Self {
            socket,
            stop,
            shared,
            node: Node::read(),
            handshakes: Vec::new(),
            supervised: Vec::new(),
            accept_after: None,
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let ready = self.wait();
            if ready.stop {
                return;
            }
            // Calls first: somebody waits for each of them.
            self.serve(&ready.supervised);
            self.advance(&ready.handshakes);
            if ready.socket {
                self.accept();
            }
        }
    }

    fn wait(&mut self) -> Ready {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|until| *until > now);
        let deadline = self
            .handshakes
            .iter()
            .filter_map(|h| h.started.map(|s| s + MESSAGE_TIME))
            .chain(self.accept_after)
            .min();
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(until) => {
                // Rounded up, so that it is over when poll returns.
                let left = until.saturating_duration_since(now) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let accepts = if self.accept_after.is_none() {
            PollFlags::POLLIN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), accepts),
        ];
        fds.extend(
            self.handshakes
                .iter()
                .map(|h| PollFd::new(h.as_fd(), PollFlags::POLLIN)),
        );
        fds.extend(
            self.supervised
                .iter()
                .map(|s| PollFd::new(s.listener.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ready::default(),
            Err(_) => {
                // Only want of memory is left (poll(2)); the calls wait a moment longer.
                std::thread::sleep(Duration::from_millis(1));
                return Ready::default();
            }
        }
        // A hang-up or an error is something to say, too.
        let mut said = fds.iter().map(|fd| fd.any().unwrap_or(true));
        let stop = said.next().unwrap_or(true);
        let socket = said.next().unwrap_or(false);
        Ready {
            stop,
            socket,
            handshakes: said.by_ref().take(self.handshakes.len()).collect(),
            supervised: said.collect(),
        }
    }

    /// Answers one call of each listener that has one, and drops those that nobody uses any more.
    fn serve(&mut self, ready: &[bool]) {
        let (node, shared) = (self.node, &self.shared);
        let mut ready = ready.iter();
        self.supervised.retain_mut(|supervised| {
            if ready.next() != Some(&true) {
                return true;
            }
            match supervised.listener.receive() {
                Ok(Received::Call(call)) => {
                    answer(
                        node,
                        &supervised.listener,
                        &call,
                        &supervised.container,
                        shared,
                    );
                    supervised.failures = 0;
                    true
                }
                Ok(Received::Gone) => true,
                Ok(Received::Closed) => false,
                Err(error) => {
                    supervised.failures += 1;
                    let keep = supervised.failures < MAX_FAILURES;
                    if !keep {
                        shared.tell(Event::Refused(format!(
                            "the listener of container {} any longer: {error}",
                            supervised.container.id
                        )));
                    }
                    keep
                }
            }
        });
    }

    fn advance(&mut self, ready: &[bool]) {
        let (shared, supervised) = (&self.shared, &mut self.supervised);
        let now = Instant::now();
        let mut ready = ready.iter();
        self.handshakes.retain_mut(|handshake| {
            let progress = match ready.next() {
                Some(true) => handshake.advance(shared),
                _ => Progress::Waiting,
            };
            match progress {
                Progress::Waiting => {
                    let late = handshake
                        .started
                        .is_some_and(|s| now.saturating_duration_since(s) >= MESSAGE_TIME);
                    if late {
                        shared.tell(Event::Refused(format!(
                            "a connection whose message was not complete after {} s",
                            MESSAGE_TIME.as_secs()
                        )));
                    }
                    !late
                }
                Progress::Gone => false,
                Progress::Refused(reason) => {
                    shared.tell(Event::Refused(reason));
                    false
                }
                Progress::Done(accepted) => {
                    shared.tell(Event::Listening {
                        container: accepted.container.id.clone(),
                        pid: accepted.pid,
                    });
                    supervised.push(Supervised {
                        listener: accepted.listener,
                        container: accepted.container,
                        failures: 0,
                    });
                    false
                }
            }
        });
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The peer gave up before it was its turn.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    // The connection stays in the queue and would be readable for ever.
                    self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                    self.shared
                        .tell(Event::Refused(format!("a connection for now: {error}")));
                    return;
                }
            };
            match Handshake::new(stream) {
                Ok(handshake) => {
                    if self.handshakes.len() == MAX_HANDSHAKES {
                        self.handshakes.remove(0);
                        self.shared.tell(Event::Refused(format!(
                            "the oldest of more than {MAX_HANDSHAKES} connections that sent nothing"
                        )));
                    }
                    self.handshakes.push(handshake);
                }
                Err(reason) => self.shared.tell(Event::Refused(reason)),
            }
        }
    }
}
