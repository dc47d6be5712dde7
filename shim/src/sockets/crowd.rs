//! How many processes of a pod may poll in epoll.
//!
//! A process that polls holds its CPU for its window, while others of the pod wait for that CPU: with more of them than CPUs each
//! waits for the windows of all before it. A server that forks a process for each connection (PostgreSQL) falls to a fraction of
//! its throughput by that. So under `auto` as many processes as the caller may use CPUs are given epoll instances with a window,
//! in the order in which they come, and the others sleep as they always did.
//!
//! What watches no IP socket never polls, whatever its window. So a place goes to the next process that asks when its holder has closed its
//! epoll instances (nginx' master tries one before it forks), or has had time to get an IP socket and has none (PostgreSQL's helpers).

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kbp_kernel::process::{self, Descriptor, PidFd};
use kbp_kernel::sockopt::{self, SocketKind};

use super::copies::Copy;

/// How long a process keeps its place without an IP socket: workers that get theirs from another process have it by then.
const GRACE: Duration = Duration::from_secs(1);
/// Descriptors of a process that are looked at, from 0 on. What a process has beyond them it counts as not having.
const DESCRIPTORS: i32 = 64;
/// Processes that are looked at for one call, which waits meanwhile; the next call goes on with the others.
const AT_ONCE: usize = 8;

/// The processes of a pod that have epoll instances with a window.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    /// The next one to be looked at first.
    places: Mutex<VecDeque<Place>>,
}

/// That of one process.
#[derive(Debug)]
struct Place {
    process: u32,
    since: Instant,
}

impl Crowd {
    /// Whether thread `tid`, which makes an epoll instance, is to have a window: counts its process from then on. A thread that
    /// cannot be asked for its process or its CPUs is gone, or will be let poll.
    pub(super) fn admits(&self, tid: u32) -> bool {
        self.admits_at(tid, Instant::now())
    }

    fn admits_at(&self, tid: u32, now: Instant) -> bool {
        let Ok(process) = process::process_of(tid) else {
            return true;
        };
        // A list of places is whole between any two operations on it.
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.iter().any(|place| place.process == process) {
            return true;
        }
        let Ok(cpus) = process::affinity_count(tid) else {
            return true;
        };
        let mut looks = places.len().min(AT_ONCE);
        while places.len() >= cpus && looks > 0 {
            looks -= 1;
            if let Some(place) = places.pop_front().filter(|place| place.is_needed(now)) {
                places.push_back(place);
            }
        }
        let room = places.len() < cpus;
        if room {
            places.push_back(Place {
                process,
                since: now,
            });
        }
        room
    }
}

impl Place {
    /// Whether its process polls, or may come to. A number that is another process' by now may count one too many.
    fn is_needed(&self, now: Instant) -> bool {
        // Signal 0 only asks.
        if !process::kill(self.process, 0).unwrap_or(true) {
            return false;
        }
        let Ok(process) = PidFd::open(self.process) else {
            return true;
        };
        let new = now.saturating_duration_since(self.since) < GRACE;
        let (mut epoll, mut socket) = (false, new);
        for number in 0..DESCRIPTORS {
            match process::descriptor(self.process, number) {
                Some(Descriptor::Epoll) if !epoll => {
                    let copy = Copy::of(&process, number).ok();
                    let copy = copy.filter(Copy::is_epoll);
                    epoll = copy.is_some_and(|copy| sockopt::is_polling_epoll(copy.as_fd()));
                }
                Some(Descriptor::Socket) if !socket => {
                    let copy = Copy::of(&process, number).ok();
                    socket = copy.is_some_and(|c| sockopt::kind(c.as_fd()) == SocketKind::Inet);
                }
                _ => {}
            }
            if epoll && socket {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command, Stdio};

    use kbp_kernel::sockopt::EpollParams;
    use kbp_kernel::{CpuSet, Micros};

    use super::*;

    /// A process on one CPU.
    struct Sleeper(Child);

    impl Sleeper {
        /// With an epoll instance that has a window or none, and an IP socket or none.
        fn new(polls: bool, talks: bool) -> Self {
            let mut sleep = Command::new("sleep");
            sleep.arg("600");
            if polls {
                let epoll = sockopt::epoll_create().expect("epoll instance");
                let params = EpollParams {
                    busy_poll: Micros(20),
                    budget: 8,
                    prefer: false,
                };
                sockopt::set_epoll_params(epoll.as_fd(), params).expect("a window");
                sleep.stdin(Stdio::from(epoll));
            }
            if talks {
                let socket = TcpListener::bind("127.0.0.1:0").expect("listen");
                sleep.stdout(Stdio::from(OwnedFd::from(socket)));
            }
            let child = sleep.spawn().expect("sleep");
            let usable = kbp_kernel::cpu::usable().expect("cpus");
            let one: CpuSet = usable.iter().take(1).collect();
            process::set_affinity(child.id(), &one).expect("affinity");
            Self(child)
        }

        fn id(&self) -> u32 {
            self.0.id()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn as_many_processes_as_cpus_are_admitted_and_the_dead_make_room() {
        let crowd = Crowd::default();
        let first = Sleeper::new(true, true);
        let second = Sleeper::new(true, true);
        assert!(crowd.admits(first.id()));
        assert!(!crowd.admits(second.id()));
        // The same process may have as many as it likes.
        assert!(crowd.admits(first.id()));
        drop(first);
        assert!(crowd.admits(second.id()));
        let third = Sleeper::new(true, true);
        assert!(!crowd.admits(third.id()));
    }

    #[test]
    fn a_process_that_has_closed_its_epoll_instance_makes_room() {
        let crowd = Crowd::default();
        let master = Sleeper::new(false, true);
        let worker = Sleeper::new(true, true);
        let other = Sleeper::new(true, true);
        assert!(crowd.admits(master.id()));
        assert!(crowd.admits(worker.id()));
        assert!(!crowd.admits(other.id()));
    }

    #[test]
    fn a_process_that_gets_no_ip_socket_makes_room_after_a_while() {
        let crowd = Crowd::default();
        let helper = Sleeper::new(true, false);
        let backend = Sleeper::new(true, true);
        let start = Instant::now();
        assert!(crowd.admits_at(helper.id(), start));
        assert!(!crowd.admits_at(backend.id(), start));
        let later = start + GRACE;
        assert!(crowd.admits_at(backend.id(), later));
        assert!(!crowd.admits_at(helper.id(), later + GRACE));
    }
}
