//! Answers one trapped call.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kbp_kernel::notify::{Listener, Notification};
use kbp_kernel::process::{self, PidFd};
use kbp_kernel::sockopt::{self, EpollParams, SocketKind};
use kbp_kernel::syscalls::{self, FirstArgument, Syscall};
use kbp_kernel::{Error, Micros};
use kbp_poller::state::{Degraded, Part};
use nix::libc::{EBADF, ENOENT, ENOSYS, EPOLL_CLOEXEC, ESRCH};

use super::copies::Copy;
use super::{Container, Event, Shared};

/// Packets that an epoll instance takes in one round of busy polling: NAPI_POLL_WEIGHT, the most that needs no privilege.
pub(super) const EPOLL_BUDGET: u16 = 64;

/// A part that failed for this call.
type Failed = (Part, Error);

/// What an answerer needs to know of the node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    /// `net.core.busy_read`: what a new socket has before anybody touches it.
    pub(super) default_window: Micros,
}

impl Node {
    /// Reads the node's settings. A kernel without busy polling has no such file, and its sockets no window.
    pub(super) fn read() -> Self {
        let text = std::fs::read_to_string("/proc/sys/net/core/busy_read").unwrap_or_default();
        Self {
            default_window: Micros(text.trim().parse().unwrap_or(0)),
        }
    }
}

/// Does what the call's container is to be given, then answers, whatever became of it.
pub(super) fn answer(
    node: Node,
    listener: &Listener,
    call: &Notification,
    container: &Arc<Container>,
    shared: &Shared,
) {
    let answered = match treat(node, listener, call, container, shared) {
        Ok(answered) => answered,
        Err((part, error)) => {
            shared.counters.errors.fetch_add(1, Ordering::Relaxed);
            tell_once(container, shared, part, &error);
            false
        }
    };
    // Before the answer, so that a program that has its answer finds itself counted.
    shared
        .counters
        .calls_handled
        .fetch_add(1, Ordering::Relaxed);
    if !answered && listener.continue_call(call.id).is_err() {
        // Only a kernel before 5.5 refuses to continue. The caller must not hang: this is what it would get from a closed
        // listener. When even this is refused, nothing is left to try.
        let _ = listener.answer_with_error(call.id, ENOSYS);
    }
    shared.tell_active();
}

/// True when the call is answered, false when it is to run on.
fn treat(
    node: Node,
    listener: &Listener,
    call: &Notification,
    container: &Arc<Container>,
    shared: &Shared,
) -> Result<bool, Failed> {
    let treatment = container.treatment();
    let identified = syscalls::identify(call.arch, call.syscall, &call.args);
    let (Some(window), Some((which, argument))) = (treatment.window, identified) else {
        return Ok(false);
    };
    match (which, argument) {
        (Syscall::Bind | Syscall::Connect | Syscall::Listen, argument) => {
            let set = set_window(node, listener, call, argument, window)
                .map_err(|e| (Part::SocketBusyPoll, e))?;
            if let Some(socket) = set {
                shared.counters.sockets_set.fetch_add(1, Ordering::Relaxed);
                if treatment.prefer.sockets {
                    sockopt::set_prefer_busy_poll(socket.as_fd(), true)
                        .map_err(|e| (Part::PreferBusyPoll, e))?;
                }
            }
            if which == Syscall::Listen && treatment.bounded && call.tid != 0 {
                let waits = || listener.is_valid(call.id);
                shared.notes.add(call.tid, container, waits);
            }
            Ok(false)
        }
        (Syscall::EpollCreate | Syscall::EpollCreate1, FirstArgument::Value(value))
            if treatment.epoll =>
        {
            let close_on_exec = match (which, value) {
                // The size means nothing any more, but the kernel still refuses one that is not positive.
                (Syscall::EpollCreate, size) if size > 0 => false,
                (Syscall::EpollCreate1, 0) => false,
                (Syscall::EpollCreate1, EPOLL_CLOEXEC) => true,
                // The kernel knows best what to say to that.
                _ => return Ok(false),
            };
            if treatment.bounded && call.tid != 0 {
                let waits = || listener.is_valid(call.id);
                shared.notes.add(call.tid, container, waits);
            }
            if treatment.bounded && call.tid != 0 && !shared.crowd.admits(call.tid) {
                shared
                    .counters
                    .epolls_crowded
                    .fetch_add(1, Ordering::Relaxed);
                return Ok(false);
            }
            let params = EpollParams {
                busy_poll: window,
                budget: EPOLL_BUDGET,
                prefer: treatment.prefer.epolls,
            };
            give_epoll(listener, call, close_on_exec, params)
                .map_err(|e| (Part::EpollBusyPoll, e))?;
            shared.counters.epolls_given.fetch_add(1, Ordering::Relaxed);
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Gives the caller's socket the window; the socket when it had to be set.
fn set_window(
    node: Node,
    listener: &Listener,
    call: &Notification,
    argument: FirstArgument,
    window: Micros,
) -> Result<Option<Copy>, Error> {
    let Some(socket) = socket_of(listener, call, argument)? else {
        return Ok(None);
    };
    if sockopt::kind(socket.as_fd()) != SocketKind::Inet {
        return Ok(None);
    }
    let current = sockopt::busy_poll(socket.as_fd())?;
    // A window that is neither the node's default nor ours is the program's own choice.
    if current == window || (current != Micros(0) && current != node.default_window) {
        return Ok(None);
    }
    sockopt::set_busy_poll(socket.as_fd(), window)?;
    Ok(Some(socket))
}

/// A copy of the socket that the caller names; None when there is none, or the caller is gone.
fn socket_of(
    listener: &Listener,
    call: &Notification,
    argument: FirstArgument,
) -> Result<Option<Copy>, Error> {
    // Not visible from this pid namespace.
    if call.tid == 0 {
        return Ok(None);
    }
    let caller = match PidFd::open_by_thread(call.tid) {
        Ok(caller) => caller,
        Err(error) if matches!(error.errno(), Some(ESRCH | ENOENT)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let number = match argument {
        FirstArgument::Value(number) => number,
        FirstArgument::At(address) => {
            let mut bytes = [0; 4];
            // A bad address is the caller's mistake; the kernel will tell it.
            if process::read_memory(call.tid, address, &mut bytes).is_err() {
                return Ok(None);
            }
            i32::from_ne_bytes(bytes)
        }
    };
    // The caller may have died and its id be another's: nobody else's descriptors are touched.
    if !listener.is_valid(call.id) {
        return Ok(None);
    }
    match Copy::of(&caller, number) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if matches!(error.errno(), Some(EBADF | ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn give_epoll(
    listener: &Listener,
    call: &Notification,
    close_on_exec: bool,
    params: EpollParams,
) -> Result<(), Error> {
    let epoll = sockopt::epoll_create()?;
    sockopt::set_epoll_params(epoll.as_fd(), params)?;
    listener.answer_with_fd(call.id, epoll.as_fd(), close_on_exec)
}

fn tell_once(container: &Container, shared: &Shared, part: Part, error: &Error) {
    let slot = match part {
        Part::EpollBusyPoll => 1,
        Part::PreferBusyPoll => 2,
        _ => 0,
    };
    if !container.told_degraded[slot].swap(true, Ordering::Relaxed) {
        shared.tell(Event::Degraded(Degraded {
            part,
            reason: format!("container {}: {error}", container.id),
        }));
    }
}
