//! Looks through the sockets and epoll instances that processes have, gives them another window, and counts those that poll.
//!
//! What a program has set itself is left alone, as when a socket is made: only what has the old window gets the new one. An epoll
//! instance of the notifier's is known by its budget, which stays when the window goes; one that was made while there was no window has
//! the kernel's, and gets a place as a new one would. A window of the program's own that is the same as the pod's cannot be told from
//! one, nor can a socket that it has switched off from one that never had a window.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_kernel::sockopt::{self, EpollParams, SocketKind};

use super::Treatment;
use super::answer::{EPOLL_BUDGET, Node};
use super::copies::Copy;
use super::crowd::Crowd;
use super::pollers::Count;

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

/// Has what `processes` have and has the window `from` (None: none) polled as `to` says. `open`: a handle on one of them, if it is
/// still one.
pub(super) fn retune(
    processes: &[u32],
    open: impl Fn(u32) -> Option<PidFd>,
    from: Option<Micros>,
    to: Treatment,
    crowd: &Crowd,
) -> Retuned {
    let walk = Walk::new(crowd);
    let change = Change::new(from, to);
    let mut retuned = Retuned::default();
    // A connection that is accepted, or a call that is answered, while the first round is under way may still get the old window.
    for _ in 0..2 {
        let before = retuned;
        for pid in processes {
            if let Some(process) = open(*pid) {
                walk.process(*pid, &process, Some(&change), None, &mut retuned);
            }
        }
        if retuned == before || retuned.cut_short {
            break;
        }
    }
    retuned
}

/// What had the one window gets the other.
pub(super) struct Change {
    from: Micros,
    to: Treatment,
    window: Micros,
}

impl Change {
    pub(super) fn new(from: Option<Micros>, to: Treatment) -> Self {
        Self {
            from: from.unwrap_or(Micros(0)),
            to,
            window: to.window.unwrap_or(Micros(0)),
        }
    }
}

/// A round through processes.
pub(super) struct Walk<'a> {
    node: Node,
    crowd: &'a Crowd,
    until: Instant,
}

impl<'a> Walk<'a> {
    pub(super) fn new(crowd: &'a Crowd) -> Self {
        Self {
            node: Node::read(),
            crowd,
            until: Instant::now() + ROUND,
        }
    }

    /// Looks through what a process has.
    pub(super) fn process(
        &self,
        pid: u32,
        process: &PidFd,
        change: Option<&Change>,
        mut count: Option<&mut Count>,
        retuned: &mut Retuned,
    ) {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return;
        };
        for entry in entries.flatten() {
            if Instant::now() >= self.until {
                retuned.cut_short = true;
                return;
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
            let Some((number, copy)) = number.and_then(|n| Some((n, Copy::of(process, n).ok()?)))
            else {
                continue;
            };
            if is_epoll && !copy.is_epoll() {
                continue;
            }
            let fd = copy.as_fd();
            if is_epoll {
                if let Some(count) = count.as_deref_mut() {
                    count.epoll(number);
                }
                retuned.epolls += u64::from(change.is_some_and(|c| self.epoll(c, pid, fd)));
            } else if sockopt::kind(fd) == SocketKind::Inet {
                if let Some(count) = count.as_deref_mut() {
                    count.socket(number, &target, fd);
                }
                retuned.sockets += u64::from(change.is_some_and(|c| self.socket(c, fd)));
            }
        }
    }

    fn socket(&self, change: &Change, socket: BorrowedFd<'_>) -> bool {
        let ours = |window| {
            window == change.from
                || (change.from == Micros(0) && window == self.node.default_window)
        };
        sockopt::busy_poll(socket).is_ok_and(ours)
            && sockopt::set_busy_poll(socket, change.window).is_ok()
    }

    fn epoll(&self, change: &Change, pid: u32, epoll: BorrowedFd<'_>) -> bool {
        let Ok(params) = sockopt::epoll_params(epoll) else {
            return false;
        };
        let to = change.to;
        let marked = params.budget == EPOLL_BUDGET;
        let fresh = params.budget == 0 && change.window > Micros(0) && to.epoll;
        let ours = params.busy_poll == change.from
            && (marked || (fresh && (!to.bounded || self.crowd.admits(pid))));
        let params = EpollParams {
            busy_poll: change.window,
            budget: EPOLL_BUDGET,
            prefer: match marked {
                true => params.prefer,
                false => to.prefer.epolls,
            },
        };
        ours && sockopt::set_epoll_params(epoll, params).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};

    use super::super::testing::{Holder, treatment};
    use super::*;

    fn any(pid: u32) -> Option<PidFd> {
        PidFd::open(pid).ok()
    }

    fn to(window: u32) -> Treatment {
        treatment(Micros(window))
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
            let retuned = retune(&[holder.pid()], any, old, to(window), &crowd);
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
            any,
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
        let retuned = retune(&pids, any, None, to(20), &Crowd::default());
        assert_eq!(retuned.epolls, 1, "one CPU, one process");
        assert_eq!((window_of(&first), window_of(&second)), (20, 0));
        let unbounded = Treatment {
            bounded: false,
            ..to(20)
        };
        retune(&pids, any, None, unbounded, &Crowd::default());
        assert_eq!(window_of(&second), 20);
    }

    #[test]
    fn one_that_is_no_longer_meant_is_left_alone() {
        let (socket, epoll) = (accepted(), epoll(20, EPOLL_BUDGET));
        let holder = Holder::new(&socket, &epoll);
        let retuned = retune(
            &[holder.pid()],
            |_| None,
            Some(Micros(20)),
            to(0),
            &Crowd::default(),
        );
        assert_eq!((retuned, window_of(&epoll)), (Retuned::default(), 20));
    }

    #[test]
    fn a_process_that_is_gone_has_nothing() {
        let gone = Holder::new(&accepted(), &epoll(20, EPOLL_BUDGET)).pid();
        let retuned = retune(&[gone], any, Some(Micros(20)), to(0), &Crowd::default());
        assert_eq!(retuned, Retuned::default());
    }
}
