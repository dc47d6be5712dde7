//! A thread of this process that busy-polls a NAPI instance through a socket (5.13+): a blocking `recv` with a long
//! SO_BUSY_POLL on a UDP socket whose last packet came through that instance.
//!
//! What the kernel does (net/core/dev.c `napi_busy_loop`, net/ipv4/udp.c):
//! - A connected UDP socket takes over the id of the instance that each of its packets comes through. One packet primes it
//!   ([`prime`]); the socket is connected to an address that never sends again, so the id stays.
//! - While it polls, the thread owns the instance and is not preempted; it gives both back as soon as anything else is to run
//!   on its CPU, and then softirq handles the packets.
//! - The window is not cut short by anything but a packet for this socket: it bounds how late the thread hears of its end.
//! - Between two windows `recv` waits out the socket's timeout, one tick at least: softirq handles the packets of that time.
//! - An instance that is gone is not polled: the thread sleeps in `recv` then, in steps of that timeout.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

use crate::netns::Netns;
use crate::process::{Scheduling, set_affinity, set_scheduling};
use crate::{CpuId, CpuSet, Error, Micros, NapiId, Result, sockopt};

/// How long one `recv` polls.
const WINDOW: Micros = Micros(50_000);

/// How long it sleeps after that; the kernel rounds it up to a tick.
const GAP: Duration = Duration::from_micros(1);

/// How long a priming packet may take; the first one waits for the address resolution.
const ARRIVAL: Duration = Duration::from_millis(100);

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
        (Some(napi), _) => Ok(Primed { socket, napi }),
    }
}

/// How a polling thread is set up; as [`crate::ring::RingOptions`].
#[derive(Debug, Clone, Copy)]
pub struct PollSocketOptions {
    /// CPU of the thread.
    pub cpu: CpuId,
    /// Its scheduling class.
    pub scheduling: Scheduling,
    /// It sleeps this long after the last [`PollSocket::wake`].
    pub lease: Duration,
}

/// A polling thread. It ends when this is dropped, a moment later.
#[derive(Debug)]
pub struct PollSocket {
    shared: Arc<Shared>,
    napi: NapiId,
    lease: Duration,
    thread_id: u32,
}

#[derive(Debug)]
struct Shared {
    lease: Mutex<Lease>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lease {
    until: Option<Instant>,
    end: bool,
    asleep: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lease> {
        // Plain values only: nothing can be half done.
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is a lease; false when the thread is to end.
    fn wait(&self) -> bool {
        let mut lease = self.lock();
        loop {
            if lease.end {
                return false;
            }
            lease.asleep = lease.until.is_none_or(|until| Instant::now() >= until);
            if !lease.asleep {
                return true;
            }
            lease = self
                .changed
                .wait(lease)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl PollSocket {
    /// Starts a thread for a primed socket, asleep.
    ///
    /// # Errors
    /// When the process may not use the CPU, has no threads left, or the kernel refuses SO_BUSY_POLL.
    pub fn start(primed: Primed, options: &PollSocketOptions) -> Result<Self> {
        let Primed { socket, napi } = primed;
        let refused = |what: &str, source| Error::Syscall {
            what: format!("{what} of a polling socket"),
            source,
        };
        sockopt::set_busy_poll(socket.as_fd(), WINDOW)?;
        socket
            .set_read_timeout(Some(GAP))
            .map_err(|e| refused("set the timeout", e))?;
        let shared = Arc::new(Shared {
            lease: Mutex::new(Lease {
                asleep: true,
                ..Lease::default()
            }),
            changed: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let (told, thread_id) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("kbp-poll".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                if told.send(nix::unistd::gettid()).is_err() {
                    return;
                }
                while of_thread.wait() {
                    // Whatever it says: what matters is what it does in between.
                    let _ = socket.recv(&mut [0; 8]);
                }
            })
            .map_err(|e| refused("start the thread", e))?;
        let thread_id = thread_id.recv().map_err(|_| Error::Protocol {
            what: "start the thread of a polling socket".to_owned(),
            detail: "it ended at once".to_owned(),
        })?;
        let polling = Self {
            shared,
            napi,
            lease: options.lease,
            thread_id: thread_id.as_raw().unsigned_abs(),
        };
        set_affinity(polling.thread_id, &CpuSet::from_iter([options.cpu]))?;
        set_scheduling(polling.thread_id, options.scheduling)?;
        Ok(polling)
    }

    /// The instance that it polls.
    pub fn napi(&self) -> NapiId {
        self.napi
    }

    /// Starts the lease anew and wakes the thread if it sleeps.
    pub fn wake(&self) {
        let mut lease = self.shared.lock();
        lease.until = Some(Instant::now() + self.lease);
        if lease.asleep {
            self.shared.changed.notify_one();
        }
    }

    /// Whether the thread sleeps now.
    pub fn is_asleep(&self) -> bool {
        self.shared.lock().asleep
    }

    /// Thread id, of a thread of the calling process.
    pub fn thread_id(&self) -> u32 {
        self.thread_id
    }
}

impl Drop for PollSocket {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.changed.notify_one();
    }
}
