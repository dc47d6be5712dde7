//! How many of a pod's programs' threads poll at once, looked at while they run.
//!
//! Which thread will wait where cannot be told when a server makes its epoll instances or listens: memcached makes one for each of its
//! threads, HAProxy too, and others have a thread for each connection, which blocks. With more of them on the way than the process may use
//! CPUs, each spins while the others wait for its CPU. At a rate that a CPU bears easily that can take all of it. So a thread of its own
//! counts, for each process that listens or makes epoll instances under `auto`, those epoll instances that watch a connection, and the
//! connections that are waited for by blocking. Where they are more than the CPUs, all of them lose their window, and get it back when
//! they have been fewer for two looks.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kbp_kernel::Micros;
use kbp_kernel::process::{self, PidFd};
use kbp_kernel::sockopt::{self, SocketKind};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::sockopt::{AcceptConn, SockType};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockopt};

use super::Container;

/// Between two looks at processes that work.
const WORKING: Duration = Duration::from_millis(500);
/// The longest time between two looks: at processes that do nothing.
const IDLE: Duration = Duration::from_secs(4);
/// A process that has run less than this since the last look does nothing.
const WORK: Duration = Duration::from_millis(5);
/// Processes that are looked at; further ones are left as they are.
const MOST: usize = 256;
/// It reads small files and asks for options.
const STACK_SIZE: usize = 64 * 1024;

/// The processes of a pod that are looked at, and the thread that does.
#[derive(Debug)]
pub(super) struct Pollers {
    shared: Arc<(Mutex<Watched>, Condvar)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Watched {
    processes: Vec<Watch>,
    ended: bool,
    /// Whether a process has come since the last look.
    new: bool,
}

/// One process.
#[derive(Debug, Clone)]
struct Watch {
    pid: u32,
    /// While it lives, the number means no other one.
    process: Arc<PidFd>,
    container: Arc<Container>,
    /// CPU time of its threads at the last look.
    worked: Duration,
    /// Whether its windows were ever taken.
    taken: bool,
    /// Looks in a row that found few enough.
    few: u32,
}

/// What of a process polls, or would with a window.
#[derive(Debug, Default)]
struct Found {
    /// Epoll instances that watch a connection.
    loops: Vec<OwnedFd>,
    /// Connections that a thread waits for by blocking, and listening sockets, from which the next ones inherit.
    blocking: Vec<OwnedFd>,
    /// What each of the loops watches. One instance may have several descriptors (tokio's registry is a copy), which watch the same.
    watched: BTreeSet<Vec<String>>,
    /// The links of those that are connections: one socket may have several descriptors, too.
    connections: BTreeSet<PathBuf>,
}

impl Pollers {
    pub(super) fn new() -> Self {
        Self {
            shared: Arc::default(),
            thread: Mutex::new(None),
        }
    }

    /// Starts the thread, once. Without one nothing is looked at.
    pub(super) fn start(&self) {
        let mut thread = lock(&self.thread);
        if thread.is_some() {
            return;
        }
        // What comes later waits for nothing but a lock.
        lock(&self.shared.0).processes.reserve(MOST);
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name("kbp-pollers".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || run(&shared));
        match started {
            Ok(started) => *thread = Some(started),
            Err(error) => tracing::warn!(%error, "what polls at once cannot be counted"),
        }
    }

    /// Has the process of thread `tid` looked at from now on.
    pub(super) fn watch(&self, tid: u32, container: &Arc<Container>) {
        let Ok(pid) = process::process_of(tid) else {
            return;
        };
        let mut watched = lock(&self.shared.0);
        let room = watched.processes.len() < MOST.min(watched.processes.capacity());
        if !room || watched.processes.iter().any(|w| w.pid == pid) {
            return;
        }
        let Ok(process) = PidFd::open(pid) else {
            return;
        };
        watched.processes.push(Watch {
            pid,
            process: Arc::new(process),
            container: Arc::clone(container),
            worked: Duration::ZERO,
            taken: false,
            few: 0,
        });
        watched.new = true;
        drop(watched);
        self.shared.1.notify_one();
    }
}

impl Drop for Pollers {
    fn drop(&mut self) {
        lock(&self.shared.0).ended = true;
        self.shared.1.notify_one();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that counts pollers had panicked");
        }
    }
}

/// What is behind these locks is whole between any two operations on it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(shared: &(Mutex<Watched>, Condvar)) {
    let mut pause = WORKING;
    loop {
        let mut watched = lock(&shared.0);
        while !watched.ended && watched.processes.is_empty() {
            watched = shared
                .1
                .wait(watched)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if !watched.ended {
            let (awake, _) = shared
                .1
                .wait_timeout_while(watched, pause, |w| !(w.ended || w.new && pause > WORKING))
                .unwrap_or_else(PoisonError::into_inner);
            watched = awake;
        }
        if watched.ended {
            return;
        }
        watched.new = false;
        // A program's call may want to add one meanwhile.
        let mut looked: Vec<Watch> = watched.processes.clone();
        drop(watched);
        let mut works = false;
        let lives: Vec<bool> = looked
            .iter_mut()
            .map(|watch| look(watch).inspect(|worked| works |= worked).is_some())
            .collect();
        pause = if works {
            WORKING
        } else {
            (pause * 2).min(IDLE)
        };
        let mut looked = looked.into_iter().zip(lives);
        // What was added is behind those that were looked at.
        lock(&shared.0)
            .processes
            .retain_mut(|watch| match looked.next() {
                Some((seen, lives)) => {
                    *watch = seen;
                    lives
                }
                None => true,
            });
    }
}

/// Looks at a process and sets what it finds. None: it has ended. Else whether it has worked since the last look.
fn look(watch: &mut Watch) -> Option<bool> {
    // Signal 0 only asks.
    if !watch.process.signal(0).ok()? {
        return None;
    }
    let worked = process::cpu_time_of_all(watch.pid).ok()?;
    let works = worked.saturating_sub(watch.worked) >= WORK;
    watch.worked = worked;
    if !works {
        return Some(false);
    }
    let treatment = watch.container.treatment();
    let (Some(window), true) = (treatment.window, treatment.bounded) else {
        return Some(true);
    };
    let cpus = process::affinity_count(watch.pid).ok()?;
    let found = Found::of(watch.pid, &watch.process);
    // One that has many connections and a single thread waits for one at a time.
    let threads = std::fs::read_dir(format!("/proc/{}/task", watch.pid))
        .ok()?
        .count();
    let crowded = threads.min(found.pollers()) > cpus;
    watch.few = if crowded { 0 } else { watch.few + 1 };
    if crowded {
        watch.taken = true;
        found.set(window, Micros(0), &watch.container);
    } else if watch.taken && watch.few >= 2 {
        // Also what had no connection when the others got theirs back.
        found.set(Micros(0), window, &watch.container);
    }
    Some(true)
}

impl Found {
    fn of(pid: u32, process: &PidFd) -> Self {
        let mut found = Self::default();
        let mut epolls = Vec::new();
        let mut connections = BTreeSet::new();
        let listed = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let numbers = listed.into_iter().flatten().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        for number in numbers {
            let Some(fd) = process.open_fd(number) else {
                continue;
            };
            match sockopt::kind(fd.as_fd()) {
                SocketKind::Inet => {
                    let listens = getsockopt(&fd, AcceptConn).unwrap_or(false);
                    // Datagrams come without a connection, too.
                    let receives = getsockopt(&fd, SockType)
                        == Ok(nix::sys::socket::SockType::Datagram)
                        || getpeername::<SockaddrStorage>(fd.as_raw_fd()).is_ok();
                    if receives {
                        connections.insert(number);
                    }
                    if blocks(&fd) || listens {
                        if receives {
                            let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}"));
                            found.connections.extend(link);
                        }
                        found.blocking.push(fd);
                    }
                }
                SocketKind::NotASocket if sockopt::epoll_params(fd.as_fd()).is_ok() => {
                    epolls.push((number, fd));
                }
                _ => {}
            }
        }
        for (number, fd) in epolls {
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"));
            let info = info.unwrap_or_default();
            let mut watched: Vec<String> = info
                .lines()
                .filter_map(|line| Some(line.strip_prefix("tfd:")?.trim_start().to_owned()))
                .collect();
            watched.sort_unstable();
            let watches = watched.iter().any(|line| {
                let target = line.split_whitespace().next();
                target.is_some_and(|t| t.parse().is_ok_and(|t: i32| connections.contains(&t)))
            });
            if watches {
                found.loops.push(fd);
                found.watched.insert(watched);
            }
        }
        found
    }

    /// How many threads at most these keep polling.
    fn pollers(&self) -> usize {
        self.watched.len() + self.connections.len()
    }

    /// Gives what has the window `from` the window `to`; what has another one was given it by its program.
    fn set(&self, from: Micros, to: Micros, container: &Container) {
        let mut changed = 0usize;
        for fd in &self.blocking {
            if sockopt::busy_poll(fd.as_fd()).is_ok_and(|window| window == from) {
                changed += usize::from(sockopt::set_busy_poll(fd.as_fd(), to).is_ok());
            }
        }
        for fd in &self.loops {
            let Ok(mut params) = sockopt::epoll_params(fd.as_fd()) else {
                continue;
            };
            if params.busy_poll == from {
                params.busy_poll = to;
                params.budget = super::answer::EPOLL_BUDGET;
                changed += usize::from(sockopt::set_epoll_params(fd.as_fd(), params).is_ok());
            }
        }
        if changed > 0 {
            tracing::info!(
                container = container.id,
                loops = self.watched.len(),
                connections = self.connections.len(),
                window = to.0,
                "windows of {changed} sockets and epoll instances changed, by how many poll at once"
            );
        }
    }
}

fn blocks(fd: &OwnedFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFL)
        .is_ok_and(|flags| !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_connection_with_two_descriptors_is_waited_for_once() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let stream = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let copy = stream.try_clone().expect("a copy");
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(OwnedFd::from(stream)))
            .stdout(Stdio::from(OwnedFd::from(copy)))
            .spawn()
            .expect("sleep");
        let process = PidFd::open(child.id()).expect("a pidfd");
        let found = Found::of(child.id(), &process);
        let counts = (found.pollers(), found.blocking.len());
        let _ = child.kill();
        let _ = child.wait();
        assert_eq!(counts, (1, 2));
    }
}
