//! Gives sockets and epoll instances that are there already another window.
//!
//! What a program has set itself is left alone, as when a socket is made: only what has the old window gets the new one. An epoll
//! instance of the notifier's is known by its budget, which stays when the window goes; one that was made while there was no window has
//! the kernel's, and gets a place as a new one would.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_kernel::sockopt::{self, EpollParams, SocketKind};

use super::Treatment;
use super::answer::{EPOLL_BUDGET, Node};
use super::crowd::Crowd;

/// Longest that one round may take. A pod with more is retuned in part: what is missing keeps the old window.
const ROUND: Duration = Duration::from_millis(500);

/// What became of a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retuned {
    /// Sockets that have the new window now.
    pub sockets: u64,
    /// Epoll instances that have it.
    pub epolls: u64,
    /// Whether the time was up before everything was looked at.
    pub cut_short: bool,
}

/// Has what `processes` have and has the window `from` (None: none) polled as `to` says.
pub(super) fn retune(
    processes: &[u32],
    from: Option<Micros>,
    to: Treatment,
    crowd: &Crowd,
) -> Retuned {
    let round = Round {
        node: Node::read(),
        from: from.unwrap_or(Micros(0)),
        to,
        window: to.window.unwrap_or(Micros(0)),
        crowd,
        until: Instant::now() + ROUND,
    };
    let mut retuned = Retuned::default();
    for pid in processes {
        // Whoever is gone has nothing.
        if round.process(*pid, &mut retuned).is_none() && Instant::now() >= round.until {
            retuned.cut_short = true;
            break;
        }
    }
    retuned
}

struct Round<'a> {
    node: Node,
    from: Micros,
    to: Treatment,
    window: Micros,
    crowd: &'a Crowd,
    until: Instant,
}

impl Round<'_> {
    /// None: it is gone, or the time is up.
    fn process(&self, pid: u32, retuned: &mut Retuned) -> Option<()> {
        let process = PidFd::open(pid).ok()?;
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
            if Instant::now() >= self.until {
                return None;
            }
            // The link tells what it is without a copy of it.
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            let is_epoll = target == "anon_inode:[eventpoll]";
            if !is_epoll && !target.starts_with("socket:") {
                continue;
            }
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            let Some(fd) = number.and_then(|number| process.open_fd(number)) else {
                continue;
            };
            match is_epoll {
                true => retuned.epolls += u64::from(self.epoll(pid, fd.as_fd())),
                false => retuned.sockets += u64::from(self.socket(fd.as_fd())),
            }
        }
        Some(())
    }

    fn socket(&self, socket: std::os::fd::BorrowedFd<'_>) -> bool {
        let ours = |window| {
            window == self.from || (self.from == Micros(0) && window == self.node.default_window)
        };
        sockopt::kind(socket) == SocketKind::Inet
            && sockopt::busy_poll(socket).is_ok_and(ours)
            && sockopt::set_busy_poll(socket, self.window).is_ok()
    }

    fn epoll(&self, pid: u32, epoll: std::os::fd::BorrowedFd<'_>) -> bool {
        let Ok(params) = sockopt::epoll_params(epoll) else {
            return false;
        };
        let marked = params.budget == EPOLL_BUDGET;
        let fresh = params.budget == 0 && self.window > Micros(0) && self.to.epoll;
        let ours = params.busy_poll == self.from
            && (marked || (fresh && (!self.to.bounded || self.crowd.admits(pid))));
        let params = EpollParams {
            busy_poll: self.window,
            budget: EPOLL_BUDGET,
            prefer: match marked {
                true => params.prefer,
                false => self.to.prefer.epolls,
            },
        };
        ours && sockopt::set_epoll_params(epoll, params).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};
    use std::process::{Child, Command, Stdio};

    use super::super::Prefer;
    use super::*;

    /// A process that has these two descriptors and does nothing.
    struct Holder(Child);

    impl Holder {
        fn new(first: &OwnedFd, second: &OwnedFd) -> Self {
            let copy = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("duplicate"));
            let child = Command::new("sleep")
                .arg("60")
                .stdin(copy(first))
                .stdout(copy(second))
                .spawn()
                .expect("sleep");
            Self(child)
        }

        fn pid(&self) -> u32 {
            self.0.id()
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn to(window: u32) -> Treatment {
        Treatment {
            window: (window > 0).then_some(Micros(window)),
            epoll: true,
            bounded: true,
            prefer: Prefer::default(),
        }
    }

    fn accepted() -> OwnedFd {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = listener.local_addr().expect("address");
        let _client = TcpStream::connect(address).expect("connect");
        listener.accept().expect("accept").0.into()
    }

    fn epoll(window: u32, budget: u16) -> OwnedFd {
        let epoll = sockopt::epoll_create().expect("epoll instance");
        let params = EpollParams {
            busy_poll: Micros(window),
            budget,
            prefer: false,
        };
        if budget > 0 {
            sockopt::set_epoll_params(epoll.as_fd(), params).expect("parameters");
        }
        epoll
    }

    fn window_of(fd: &OwnedFd) -> u32 {
        match sockopt::is_epoll(fd.as_fd()) {
            true => sockopt::epoll_params(fd.as_fd()).map(|p| p.busy_poll.0),
            false => sockopt::busy_poll(fd.as_fd()).map(|w| w.0),
        }
        .expect("window")
    }

    #[test]
    fn what_a_process_has_gets_the_new_window_and_none_and_one_again() {
        let (socket, epoll) = (accepted(), epoll(20, EPOLL_BUDGET));
        sockopt::set_busy_poll(socket.as_fd(), Micros(20)).expect("window");
        let holder = Holder::new(&socket, &epoll);
        let crowd = Crowd::default();
        let mut from = 20;
        for window in [100, 0, 20] {
            let old = (from > 0).then_some(Micros(from));
            let retuned = retune(&[holder.pid()], old, to(window), &crowd);
            assert_eq!((retuned.sockets, retuned.epolls), (1, 1), "{window}");
            assert_eq!((window_of(&socket), window_of(&epoll)), (window, window));
            from = window;
        }
    }

    #[test]
    fn what_a_program_has_set_itself_stays() {
        let (socket, own) = (accepted(), epoll(20, 8));
        sockopt::set_busy_poll(socket.as_fd(), Micros(33)).expect("window");
        let holder = Holder::new(&socket, &own);
        let retuned = retune(
            &[holder.pid()],
            Some(Micros(20)),
            to(100),
            &Crowd::default(),
        );
        assert_eq!(retuned, Retuned::default());
        assert_eq!((window_of(&socket), window_of(&own)), (33, 20));
    }

    #[test]
    fn an_instance_made_meanwhile_gets_a_window_where_there_is_room() {
        let (first, second) = (epoll(0, 0), epoll(0, 0));
        let socket = accepted();
        let holders = [Holder::new(&socket, &first), Holder::new(&socket, &second)];
        let one = kbp_kernel::cpu::usable()
            .expect("cpus")
            .iter()
            .take(1)
            .collect();
        for holder in &holders {
            kbp_kernel::process::set_affinity(holder.pid(), &one).expect("pin");
        }
        let pids: Vec<u32> = holders.iter().map(Holder::pid).collect();
        let retuned = retune(&pids, None, to(20), &Crowd::default());
        assert_eq!(retuned.epolls, 1, "one CPU, one process");
        assert_eq!((window_of(&first), window_of(&second)), (20, 0));
        let unbounded = Treatment {
            bounded: false,
            ..to(20)
        };
        retune(&pids, None, unbounded, &Crowd::default());
        assert_eq!(window_of(&second), 20);
    }

    #[test]
    fn a_process_that_is_gone_has_nothing() {
        let gone = Holder::new(&accepted(), &epoll(20, EPOLL_BUDGET)).pid();
        let retuned = retune(&[gone], Some(Micros(20)), to(0), &Crowd::default());
        assert_eq!(retuned, Retuned::default());
    }
}
