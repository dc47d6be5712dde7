//! How many of a container's threads poll at once, counted while they run.
//!
//! memcached makes an epoll instance for each of its threads, HAProxy too, and others have a thread for each connection, which blocks.
//! With more of them on the way than the process may use CPUs, each spins while the others wait for its CPU. At a rate that a CPU bears
//! easily that can take all of it. So for each process that listens or makes epoll instances under `auto`, or of which several threads are
//! seen to run or to sleep often, as those of a client that blocks in each of its connections, those epoll instances are counted that watch a connection, and the connections that are waited for by blocking. While they are more than the CPUs, the process
//! has no window; it gets that of its container when they have been few enough for two looks.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use kbp_kernel::process::{self, PidFd};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::sockopt::{AcceptConn, SockType};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockopt};

use super::Treatment;
use super::crowd::Crowd;
use super::noted::Noted;
use super::retune::{Change, Retuned, Walk, retune};

/// Between two counts of one process.
const EVERY: Duration = Duration::from_millis(500);
/// Between two counts in the time that one took: with many descriptors it is not cheap.
const REST: u32 = 20;
/// Time after which no further process is counted in one look: whoever wants the pod's lock waits.
const AT_ONCE: Duration = Duration::from_millis(200);
/// A process that has run less than this since the last count does nothing.
const WORK: Duration = Duration::from_millis(5);
/// Processes of a container that are looked at; further ones are left as they are.
const MOST: usize = 256;
/// Counts in a row that have to find few enough.
const FEW: u32 = 2;

/// The processes of a container that may have more threads polling than CPUs.
#[derive(Debug, Default)]
pub struct Pollers {
    processes: Vec<Watched>,
}

/// One process.
#[derive(Debug)]
struct Watched {
    pid: u32,
    /// While it lives, the number means no other one.
    process: PidFd,
    /// CPU time of its threads at the last count.
    worked: Duration,
    /// When it was counted last, and how long that took.
    counted: Option<(Instant, Duration)>,
    /// Why it has no window, for a person; None: it has its container's.
    crowded: Option<String>,
    /// Counts in a row that found few enough.
    few: u32,
}

/// What of a process polls, or would with a window.
#[derive(Debug, Default)]
pub(super) struct Count {
    epolls: Vec<i32>,
    /// Descriptors of connections.
    receiving: BTreeSet<String>,
    /// Connections that a thread waits for by blocking, by their inodes: one may have several descriptors.
    blocking: BTreeSet<String>,
}

impl Pollers {
    /// Has a process looked at from now on that listens or makes epoll instances.
    pub fn add(&mut self, noted: Noted) {
        self.watch(noted.pid, noted.process);
    }

    /// Has a process looked at from now on; `process`: a handle on it.
    pub fn watch(&mut self, pid: u32, process: PidFd) {
        // The same number may be another process by now.
        let lives = |w: &Watched| w.process.signal(0).unwrap_or(true);
        self.processes.retain(|w| w.pid != pid || lives(w));
        if self.processes.len() < MOST && !self.processes.iter().any(|w| w.pid == pid) {
            self.processes.push(Watched {
                pid,
                process,
                worked: Duration::ZERO,
                counted: None,
                crowded: None,
                few: 0,
            });
        }
    }

    /// Their ids.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.processes.iter().map(|w| w.pid)
    }

    /// Whether that process has no window, since too many of its threads would poll.
    pub fn is_crowded(&self, pid: u32) -> bool {
        let mut processes = self.processes.iter();
        processes.any(|w| w.pid == pid && w.crowded.is_some())
    }

    /// Whether there are such processes and no others.
    pub fn are_all_crowded(&self) -> bool {
        !self.processes.is_empty() && self.processes.iter().all(|w| w.crowded.is_some())
    }

    /// Which processes have no window and why, for a person.
    pub fn reason(&self) -> Option<String> {
        let mut crowded = self.processes.iter().filter_map(|w| w.crowded.as_deref());
        let first = crowded.next()?;
        Some(match crowded.count() {
            0 => first.to_owned(),
            more => format!("{first}, and so of {more} more"),
        })
    }

    /// Counts again where it is time, and takes windows away or gives those of the container: whether any process has come to or
    /// from having one. `soon`: also what was counted lately.
    pub(super) fn look(&mut self, now: Treatment, crowd: &Crowd, soon: bool) -> bool {
        let (mut changed, start) = (false, Instant::now());
        self.processes.retain_mut(|watched| {
            // Signal 0 only asks.
            let lives = watched.process.signal(0).unwrap_or(false);
            changed |= match lives {
                // It is the turn of the rest the next time, when these were counted lately.
                true => start.elapsed() < AT_ONCE && watched.look(now, crowd, soon),
                false => watched.crowded.is_some(),
            };
            lives
        });
        changed
    }
}

impl Watched {
    /// Whether it has come to or from having a window.
    fn look(&mut self, now: Treatment, crowd: &Crowd, soon: bool) -> bool {
        let every = if soon { Duration::ZERO } else { EVERY };
        let early = |(at, took): (Instant, Duration)| at.elapsed() < every.max(REST * took);
        if self.counted.is_some_and(early) {
            return false;
        }
        let Ok(worked) = process::cpu_time_of_all(self.pid) else {
            return false;
        };
        if worked.saturating_sub(self.worked) < WORK {
            return false;
        }
        self.worked = worked;
        let start = Instant::now();
        let crowded = self.count(now, crowd);
        self.counted = Some((start, start.elapsed()));
        // Nothing is known of one that is gone, or has more than there was time for.
        crowded.is_ok_and(|crowded| self.settle(crowded, now, crowd))
    }

    /// Why it is crowded; an error: it cannot be told.
    fn count(&self, now: Treatment, crowd: &Crowd) -> Result<Option<String>, ()> {
        let pid = self.pid;
        let cpus = process::affinity_count(pid).map_err(drop)?;
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(drop)?;
        // One that has many connections and few threads waits for few at a time.
        let threads = tasks.count();
        if threads <= cpus && self.crowded.is_none() {
            return Ok(None);
        }
        // What it has come to share with a process that has a window.
        let change = Change::new(now.window, off(now));
        let change = (self.crowded.is_some() && now.window.is_some()).then_some(&change);
        let (mut count, mut retuned) = (Count::default(), Retuned::default());
        Walk::new(crowd).process(pid, &self.process, change, Some(&mut count), &mut retuned);
        let (loops, connections) = (count.loops(pid), count.blocking.len());
        if threads.min(loops + connections) <= cpus {
            return if retuned.cut_short { Err(()) } else { Ok(None) };
        }
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Ok(Some(format!(
            "{loops} event loops and {connections} blocking connections of process {pid} ({}) would poll at once on {}",
            name.trim_end(),
            match cpus {
                1 => "one CPU".to_owned(),
                cpus => format!("{cpus} CPUs"),
            }
        )))
    }

    fn settle(&mut self, crowded: Option<String>, now: Treatment, crowd: &Crowd) -> bool {
        self.few = if crowded.is_some() { 0 } else { self.few + 1 };
        let (was, is) = (self.crowded.is_some(), crowded.is_some());
        if was == is || (was && self.few < FEW) {
            return false;
        }
        if let Some(window) = now.window {
            // Its number is nobody else's while it lives.
            let lives = || self.process.signal(0).unwrap_or(false);
            let open = |pid| PidFd::open(pid).ok().filter(|_| lives());
            let retuned = match is {
                true => retune(&[self.pid], open, Some(window), off(now), crowd),
                false => retune(&[self.pid], open, None, now, crowd),
            };
            tracing::info!(
                sockets = retuned.sockets,
                epolls = retuned.epolls,
                "process {}: {}",
                self.pid,
                crowded.as_deref().map_or_else(
                    || format!("its window is {window} µs again: few of its threads poll at once"),
                    |why| format!("no window for now, since {why}"),
                )
            );
        }
        self.crowded = crowded;
        true
    }
}

/// As the container is treated, without its window.
fn off(now: Treatment) -> Treatment {
    Treatment {
        window: None,
        ..now
    }
}

impl Count {
    pub(super) fn epoll(&mut self, number: i32) {
        self.epolls.push(number);
    }

    /// `link`: what the descriptor's link says.
    pub(super) fn socket(&mut self, number: i32, link: &str, socket: BorrowedFd<'_>) {
        // Datagrams come without a connection, too.
        let receives = getsockopt(&socket, SockType) == Ok(nix::sys::socket::SockType::Datagram)
            || getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok();
        if !receives || getsockopt(&socket, AcceptConn).unwrap_or(false) {
            return;
        }
        self.receiving.insert(number.to_string());
        if blocks(socket) {
            self.blocking.insert(link.to_owned());
        }
    }

    /// The epoll instances that watch a connection. One may have several descriptors (tokio's registry is a copy), which watch the same.
    fn loops(&self, pid: u32) -> usize {
        let mut loops = BTreeSet::new();
        for number in &self.epolls {
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"));
            let info = info.unwrap_or_default();
            let lines = info.lines().filter_map(|line| line.strip_prefix("tfd:"));
            let mut watched: Vec<String> = lines.map(|line| line.trim().to_owned()).collect();
            watched.sort_unstable();
            let connection = |line: &String| {
                let target = line.split_whitespace().next();
                target.is_some_and(|t| self.receiving.contains(t))
            };
            if watched.iter().any(connection) {
                loops.insert(watched);
            }
        }
        loops.len()
    }
}

fn blocks(fd: BorrowedFd<'_>) -> bool {
    fcntl(fd, FcntlArg::F_GETFL)
        .is_ok_and(|flags| !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};

    use kbp_kernel::{Micros, sockopt};

    use super::super::testing::{Holder, treatment};
    use super::*;

    const WINDOW: Micros = Micros(20);
    const NOW: Treatment = treatment(WINDOW);

    /// A process with a connection that has two descriptors.
    struct Connected {
        holder: Holder,
        socket: OwnedFd,
        _listener: TcpListener,
    }

    impl Connected {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
            let address = listener.local_addr().expect("address");
            let socket = OwnedFd::from(TcpStream::connect(address).expect("connect"));
            sockopt::set_busy_poll(socket.as_fd(), WINDOW).expect("window");
            Self {
                holder: Holder::new(&socket, &socket),
                socket,
                _listener: listener,
            }
        }

        fn watched(&self) -> Watched {
            Watched {
                pid: self.holder.pid(),
                process: PidFd::open(self.holder.pid()).expect("a pidfd"),
                worked: Duration::ZERO,
                counted: None,
                crowded: None,
                few: 0,
            }
        }

        fn window(&self) -> Micros {
            sockopt::busy_poll(self.socket.as_fd()).expect("window")
        }
    }

    #[test]
    fn a_connection_with_two_descriptors_is_waited_for_once() {
        let holder = Connected::new();
        let watched = holder.watched();
        let (mut count, mut retuned) = (Count::default(), Retuned::default());
        let crowd = Crowd::default();
        Walk::new(&crowd).process(
            watched.pid,
            &watched.process,
            None,
            Some(&mut count),
            &mut retuned,
        );
        assert_eq!((count.blocking.len(), count.receiving.len()), (1, 2));
        assert_eq!(count.loops(watched.pid), 0);
        assert_eq!(retuned, Retuned::default(), "it only counts");
    }

    #[test]
    fn a_crowded_process_has_no_window_until_few_poll_twice() {
        let holder = Connected::new();
        let mut watched = holder.watched();
        let crowd = Crowd::default();
        let crowded = || Some("many".to_owned());
        assert!(!watched.settle(None, NOW, &crowd));
        assert!(watched.settle(crowded(), NOW, &crowd));
        assert_eq!(holder.window(), Micros(0));
        assert!(!watched.settle(None, NOW, &crowd));
        assert!(!watched.settle(crowded(), NOW, &crowd), "it is still");
        assert!(!watched.settle(None, NOW, &crowd));
        assert_eq!(holder.window(), Micros(0));
        assert!(watched.settle(None, NOW, &crowd));
        assert_eq!(holder.window(), WINDOW);
    }

    #[test]
    fn what_is_no_longer_crowded_has_no_more_than_its_container() {
        let holder = Connected::new();
        let mut watched = holder.watched();
        let crowd = Crowd::default();
        assert!(watched.settle(Some("many".to_owned()), NOW, &crowd));
        // Its container's was taken meanwhile.
        watched.settle(None, off(NOW), &crowd);
        assert!(watched.settle(None, off(NOW), &crowd));
        assert_eq!(holder.window(), Micros(0));
        let mut own = holder.watched();
        sockopt::set_busy_poll(holder.socket.as_fd(), Micros(33)).expect("its own window");
        assert!(own.settle(Some("many".to_owned()), NOW, &crowd));
        assert_eq!(holder.window(), Micros(33));
    }

    #[test]
    fn a_crowded_process_is_named_and_forgotten_when_it_is_gone() {
        let holder = Connected::new();
        let mut pollers = Pollers::default();
        let mut watched = holder.watched();
        let pid = watched.pid;
        watched.settle(Some("many".to_owned()), NOW, &Crowd::default());
        pollers.processes.push(watched);
        assert!(pollers.is_crowded(pid) && pollers.are_all_crowded());
        assert_eq!(pollers.reason().as_deref(), Some("many"));
        let other = Connected::new();
        pollers.processes.push(other.watched());
        assert!(!pollers.are_all_crowded());
        let crowd = Crowd::default();
        assert!(!pollers.look(NOW, &crowd, true), "nobody works");
        drop(holder);
        assert!(pollers.look(NOW, &crowd, true));
        assert_eq!((pollers.reason(), pollers.ids().count()), (None, 1));
    }
}
