//! A thread of this process that busy-polls NAPI instances through sockets (5.13+): one UDP socket an instance, whose last packet
//! came through it, and a `recv` on each in turn.
//!
//! What the kernel does (net/core/dev.c `napi_busy_loop`, net/ipv4/udp.c), each point held by a test:
//! - A connected UDP socket takes over the id of the instance that each of its packets comes through. One packet primes it
//!   ([`prime`]); the socket is connected to an address that never sends again, so the id stays.
//! - A `recv` that does not wait polls the instance once when the socket has SO_BUSY_POLL, and lets go of it again: as with a
//!   polling ring ([`crate::ring`]), a packet that comes in between is handled by softirq.
//! - An instance that is gone is passed over, until it is removed. Nothing tells when it has come back: it has another id then.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

use crate::netns::Netns;
use crate::process::{Scheduling, set_affinity, set_scheduling};
use crate::{CpuId, CpuSet, Error, Micros, NapiId, Result, sockopt};

/// Any window makes the kernel poll; a call that does not wait polls once, however long it is.
const WINDOW: Micros = Micros(1);

/// How long a priming packet may take; the first one waits for the address resolution.
const ARRIVAL: Duration = Duration::from_millis(50);

/// Enough for system calls and an error message.
const STACK: usize = 64 * 1024;

/// The two ends of the link whose instance is to be polled.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    /// Namespace of the polled end.
    pub polled: &'a Netns,
    /// Namespace of the other end, from which the priming packet is sent.
    pub other: &'a Netns,
    /// Name of the link there.
    pub other_name: &'a str,
    /// Addresses of the polled end's namespace, the likeliest first: the packet goes to the first that works.
    pub addresses: &'a [IpAddr],
}

/// A socket whose NAPI id is known.
#[derive(Debug)]
pub struct Primed {
    socket: UdpSocket,
    napi: NapiId,
}

impl Primed {
    /// The instance that it polls.
    pub fn napi(&self) -> NapiId {
        self.napi
    }
}

/// Sends one datagram over the link and returns the socket that received it, through `wanted` where that is given.
///
/// # Errors
/// [`Error::Unsupported`] with what was tried when no packet arrives, or arrives through another instance.
pub fn prime(ends: &Ends<'_>, wanted: Option<NapiId>) -> Result<Primed> {
    let mut tried = Vec::new();
    for address in ends.addresses {
        match prime_by(ends, *address, wanted) {
            Ok(primed) => return Ok(primed),
            Err(reason) => tried.push(format!("{address}: {reason}")),
        }
    }
    let tried = if tried.is_empty() {
        "the host has no address that the pod could send to".to_owned()
    } else {
        tried.join("; ")
    };
    Err(Error::Unsupported {
        feature: "a busy-polling socket",
        reason: format!(
            "no packet from {} reaches a socket through its NAPI: {tried}",
            ends.other_name
        ),
    })
}

fn prime_by(
    ends: &Ends<'_>,
    address: IpAddr,
    wanted: Option<NapiId>,
) -> std::result::Result<Primed, String> {
    let text = |e: std::io::Error| e.to_string();
    let socket = ends
        .polled
        .run(|| UdpSocket::bind((address, 0)))
        .map_err(|e| e.to_string())?
        .map_err(text)?;
    let target = socket.local_addr().map_err(text)?;
    let any: IpAddr = match address {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let sender = ends
        .other
        .run(|| UdpSocket::bind((any, 0)))
        .map_err(|e| e.to_string())?
        .map_err(text)?;
    let device: std::ffi::OsString = ends.other_name.into();
    setsockopt(&sender, BindToDevice, &device).map_err(|e| e.to_string())?;
    sender.connect(target).map_err(text)?;
    let source: SocketAddr = sender.local_addr().map_err(text)?;
    // Nobody but this sender, and it sends no second time.
    socket.connect(source).map_err(text)?;
    socket.set_read_timeout(Some(ARRIVAL)).map_err(text)?;
    sender.send(&[0]).map_err(text)?;
    socket.recv(&mut [0; 8]).map_err(|e| match e.kind() {
        std::io::ErrorKind::WouldBlock => "it does not arrive".to_owned(),
        _ => e.to_string(),
    })?;
    let napi = sockopt::incoming_napi(socket.as_fd()).map_err(|e| e.to_string())?;
    match (napi, wanted) {
        (None, _) => Err("it arrives through no NAPI".to_owned()),
        (Some(napi), Some(wanted)) if napi != wanted => {
            Err(format!("it arrives through NAPI {napi}, not {wanted}"))
        }
        (Some(napi), _) => {
            sockopt::set_busy_poll(socket.as_fd(), WINDOW).map_err(|e| e.to_string())?;
            socket.set_nonblocking(true).map_err(text)?;
            Ok(Primed { socket, napi })
        }
    }
}

/// How a polling thread is set up; as [`crate::ring::RingOptions`].
#[derive(Debug, Clone, Copy)]
pub struct PollSocketsOptions {
    /// CPU of the thread.
    pub cpu: CpuId,
    /// Its scheduling class.
    pub scheduling: Scheduling,
    /// It sleeps this long after the last [`PollSockets::wake`].
    pub lease: Duration,
}

/// The thread and its sockets; it ends when this is dropped.
#[derive(Debug)]
pub struct PollSockets {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    lease: Duration,
    thread_id: u32,
}

#[derive(Debug)]
struct Shared {
    plan: Mutex<Plan>,
    /// The plan is another one, and the thread has not looked at it yet.
    stale: AtomicBool,
    changed: Condvar,
    /// Rounds over all sockets.
    rounds: AtomicU64,
}

/// What the thread is to do. It works on a copy.
#[derive(Debug)]
struct Plan {
    sockets: Vec<Arc<Primed>>,
    until: Option<Instant>,
    end: bool,
    asleep: bool,
    /// Counts the changes of `sockets`, and the last that the thread has taken over.
    made: u64,
    taken: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Plan> {
        // Every change leaves a whole plan behind.
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Plan)) {
        change(&mut self.lock());
        self.stale.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until there is something to poll; None when the thread is to end.
    fn next(&self) -> Option<(Instant, Vec<Arc<Primed>>)> {
        let mut plan = self.lock();
        loop {
            self.stale.store(false, Ordering::Release);
            plan.taken = plan.made;
            self.changed.notify_all();
            if plan.end {
                return None;
            }
            let leased = plan.until.filter(|until| Instant::now() < *until);
            plan.asleep = leased.is_none() || plan.sockets.is_empty();
            match leased {
                Some(until) if !plan.asleep => return Some((until, plan.sockets.clone())),
                _ => {
                    plan = self
                        .changed
                        .wait(plan)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
    }

    fn run(&self) {
        while let Some((until, sockets)) = self.next() {
            while !self.stale.load(Ordering::Acquire) && Instant::now() < until {
                for primed in &sockets {
                    // Whatever it says: what matters is what it does on the way.
                    let _ = primed.socket.recv(&mut [0; 8]);
                }
                self.rounds.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl PollSockets {
    /// Starts the thread, asleep and without sockets.
    ///
    /// # Errors
    /// When the process may not use the CPU or has no threads left.
    pub fn new(options: &PollSocketsOptions) -> Result<Self> {
        let shared = Arc::new(Shared {
            plan: Mutex::new(Plan {
                sockets: Vec::new(),
                until: None,
                end: false,
                asleep: true,
                made: 0,
                taken: 0,
            }),
            stale: AtomicBool::new(false),
            changed: Condvar::new(),
            rounds: AtomicU64::new(0),
        });
        let of_thread = Arc::clone(&shared);
        let (told, thread_id) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("kbp-poll".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                if told.send(nix::unistd::gettid()).is_ok() {
                    of_thread.run();
                }
            })
            .map_err(|source| Error::Syscall {
                what: "start a polling thread".to_owned(),
                source,
            })?;
        let thread_id = thread_id.recv().map_err(|_| Error::Protocol {
            what: "start a polling thread".to_owned(),
            detail: "it ended at once".to_owned(),
        })?;
        let polling = Self {
            shared,
            thread: Some(thread),
            lease: options.lease,
            thread_id: thread_id.as_raw().unsigned_abs(),
        };
        set_affinity(polling.thread_id, &CpuSet::from_iter([options.cpu]))?;
        set_scheduling(polling.thread_id, options.scheduling)?;
        Ok(polling)
    }

    /// Polls this one's instance too, from now on; in the place of another socket for the same instance.
    pub fn add(&mut self, primed: Primed) {
        self.shared.change(|plan| {
            plan.sockets.retain(|s| s.napi != primed.napi);
            plan.sockets.push(Arc::new(primed));
            plan.made += 1;
        });
    }

    /// Polls this instance no more when this returns; fine when it did not.
    pub fn remove(&mut self, napi: NapiId) {
        self.shared.change(|plan| {
            plan.sockets.retain(|s| s.napi != napi);
            plan.made += 1;
        });
        let mut plan = self.shared.lock();
        // A round takes microseconds, but the thread may have to wait for its CPU; after that it would poll once more at most.
        let until = Instant::now() + Duration::from_millis(100);
        while plan.taken != plan.made {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(plan, left);
            plan = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Starts the lease anew and wakes the thread if it sleeps.
    pub fn wake(&self) {
        let until = Instant::now() + self.lease;
        self.shared.change(|plan| plan.until = Some(until));
    }

    /// Whether the thread sleeps now.
    pub fn is_asleep(&self) -> bool {
        self.shared.lock().asleep
    }

    /// How often it has gone over all its sockets.
    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Relaxed)
    }

    /// Thread id, of a thread of the calling process.
    pub fn thread_id(&self) -> u32 {
        self.thread_id
    }
}

impl Drop for PollSockets {
    fn drop(&mut self) {
        self.shared.change(|plan| plan.end = true);
        // In the idle class it might not get to its end for long. It is this process' own, so this is allowed.
        let _ = set_scheduling(self.thread_id, Scheduling::Other(0));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a polling thread had panicked");
        }
    }
}
