//! The thread that waits for connections of the runtime and for trapped calls.
//!
//! A call of an unmodified program waits while this runs, so nothing on its way is allocated. The first listeners are waited for
//! directly, which is what a synchronous wake-up needs; the others, of a pod with a great many processes of their own, together.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kbp_kernel::notify::{Listener, Received, WaitSet};
use nix::libc::EINTR;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
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
/// Listeners that are waited for directly: scanning them costs a microsecond or two a call.
const MAX_NEAR: usize = 64;
/// Calls of the other listeners that are answered in one round.
const FAR_BATCH: usize = 32;
/// Pause after there was no memory or no descriptor for a connection or for what it sends.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Supervisor {
    socket: UnixListener,
    stop: Arc<EventFd>,
    shared: Arc<Shared>,
    node: Node,
    waits: WaitSet,
    handshakes: Vec<Handshake>,
    near: Vec<Supervised>,
    /// None until it is needed.
    far: Option<Far>,
    /// Until when no connection is accepted nor read from.
    accept_after: Option<Instant>,
}

struct Supervised {
    listener: Listener,
    container: Arc<Container>,
    failures: u32,
}

/// Listeners beyond [`MAX_NEAR`], behind one descriptor.
struct Far {
    epoll: Epoll,
    listeners: BTreeMap<u64, Supervised>,
    next: u64,
    events: [EpollEvent; FAR_BATCH],
}

/// Places in the set of what is waited for.
struct Places {
    stop: usize,
    socket: usize,
    /// The first of the handshakes.
    handshakes: usize,
    /// The first of the near listeners.
    near: usize,
    far: Option<usize>,
}

impl Supervisor {
    pub(super) fn new(socket: UnixListener, stop: Arc<EventFd>, shared: Arc<Shared>) -> Self {
        Self {
            socket,
            stop,
            shared,
            node: Node::read(),
            waits: WaitSet::default(),
            handshakes: Vec::new(),
            near: Vec::new(),
            far: None,
            accept_after: None,
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let Some(places) = self.wait() else {
                continue;
            };
            if self.waits.is_ready(places.stop) {
                return;
            }
            // Calls first: somebody waits for each of them.
            self.serve(&places);
            if !self.has_room(&places) {
                self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                continue;
            }
            self.advance(places.handshakes);
            if self.waits.is_ready(places.socket) {
                self.accept();
            }
        }
    }

    /// Waits until somebody has something to say; None: nobody has.
    fn wait(&mut self) -> Option<Places> {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|until| *until > now);
        let deadline = self
            .handshakes
            .iter()
            .filter_map(|h| h.started.map(|s| s + MESSAGE_TIME))
            .chain(self.accept_after)
            .min();
        self.waits.clear();
        let stop = self.waits.add(self.stop.as_fd(), true);
        let socket = self
            .waits
            .add(self.socket.as_fd(), self.accept_after.is_none());
        for handshake in &self.handshakes {
            self.waits
                .add(handshake.as_fd(), self.accept_after.is_none());
        }
        for supervised in &self.near {
            self.waits.add(supervised.listener.as_fd(), true);
        }
        let places = Places {
            stop,
            socket,
            handshakes: socket + 1,
            near: socket + 1 + self.handshakes.len(),
            far: self
                .far
                .as_ref()
                .map(|far| self.waits.add(far.epoll.0.as_fd(), true)),
        };
        match self
            .waits
            .wait(deadline.map(|until| until.saturating_duration_since(now)))
        {
            Ok(_) => Some(places),
            Err(error) if error.errno() == Some(EINTR) => None,
            Err(_) => {
                // Only want of memory is left (poll(2)); the calls wait a moment longer.
                std::thread::sleep(Duration::from_millis(1));
                None
            }
        }
    }

    /// Whether a listener that somebody has sent would find a free descriptor: one that does not is lost, and the calls of its process
    /// fail.
    fn has_room(&self, places: &Places) -> bool {
        let mut handshakes = places.handshakes..places.near;
        let sent = handshakes.any(|place| self.waits.is_ready(place));
        !sent || self.stop.as_fd().try_clone_to_owned().is_ok()
    }

    /// Answers one call of each listener that has one, and drops those that nobody uses any more.
    fn serve(&mut self, places: &Places) {
        let (node, shared, waits) = (self.node, &self.shared, &self.waits);
        let mut place = places.near;
        self.near.retain_mut(|supervised| {
            place += 1;
            !waits.is_ready(place - 1) || supervised.serve(node, shared)
        });
        if places.far.is_some_and(|place| waits.is_ready(place))
            && let Some(far) = &mut self.far
        {
            far.serve(node, shared);
            // Its descriptor is not kept for a burst that may never come again.
            if far.listeners.is_empty() {
                self.far = None;
            }
        }
    }

    /// Takes a listener over: near while there is room.
    fn supervise(&mut self, supervised: Supervised) {
        if self.near.len() < MAX_NEAR {
            self.near.push(supervised);
            return;
        }
        if self.far.is_none() {
            self.far = Far::new();
        }
        let left = match &mut self.far {
            Some(far) => far.take(supervised),
            None => Some(supervised),
        };
        // Slower than it should be, but answered.
        self.near.extend(left);
    }

    fn advance(&mut self, first: usize) {
        let (shared, waits) = (&self.shared, &self.waits);
        let now = Instant::now();
        let mut place = first;
        // Allocates only when there is one.
        let mut done = Vec::new();
        self.handshakes.retain_mut(|handshake| {
            place += 1;
            let progress = match waits.is_ready(place - 1) {
                true => handshake.advance(shared),
                false => Progress::Waiting,
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
                    done.push(Supervised {
                        listener: accepted.listener,
                        container: accepted.container,
                        failures: 0,
                    });
                    false
                }
            }
        });
        for supervised in done {
            self.supervise(supervised);
        }
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

impl Supervised {
    /// Answers a call, when there is one; false when nobody uses the filter any more.
    fn serve(&mut self, node: Node, shared: &Shared) -> bool {
        match self.listener.receive() {
            Ok(Received::Call(call)) => {
                answer(node, &self.listener, &call, &self.container, shared);
                self.failures = 0;
                true
            }
            Ok(Received::Gone) => true,
            Ok(Received::Closed) => false,
            Err(error) => {
                self.failures += 1;
                let keep = self.failures < MAX_FAILURES;
                if !keep {
                    shared.tell(Event::Refused(format!(
                        "the listener of container {} any longer: {error}",
                        self.container.id
                    )));
                }
                keep
            }
        }
    }
}

impl Far {
    fn new() -> Option<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).ok()?;
        Some(Self {
            epoll,
            listeners: BTreeMap::new(),
            next: 0,
            events: [EpollEvent::empty(); FAR_BATCH],
        })
    }

    /// Takes a listener; gives it back when it cannot be waited for here.
    fn take(&mut self, supervised: Supervised) -> Option<Supervised> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.next);
        if self.epoll.add(supervised.listener.as_fd(), event).is_err() {
            return Some(supervised);
        }
        self.listeners.insert(self.next, supervised);
        self.next += 1;
        None
    }

    fn serve(&mut self, node: Node, shared: &Shared) {
        // Nothing to be read is an interruption: the next round asks again.
        let count = self
            .epoll
            .wait(&mut self.events, EpollTimeout::ZERO)
            .unwrap_or(0);
        for event in &self.events[..count] {
            let keep = self
                .listeners
                .get_mut(&event.data())
                .is_some_and(|supervised| supervised.serve(node, shared));
            if !keep {
                // Closing it takes it out of the epoll instance as well.
                self.listeners.remove(&event.data());
            }
        }
    }
}
