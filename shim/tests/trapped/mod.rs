//! Threads of a test whose calls a notifier answers.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kbp_kernel::notify::trap_calling_thread;
use kbp_kernel::{Micros, fd, sockopt};
use kbp_shim::sockets::{Notifier, Treatment};
use nix::libc;

/// What the sockets are given.
pub(crate) const WINDOW: Micros = Micros(37);

/// A notifier that takes listeners of the container `app`, whose windows are bounded by its CPUs or not.
pub(crate) fn notifier(dir: &std::path::Path, bounded: bool) -> Notifier {
    let notifier = Notifier::start(dir, "test", "pod", |_| {}).expect("start a notifier");
    let treatment = Treatment {
        window: Some(WINDOW),
        epoll: true,
        bounded,
        prefer: Default::default(),
    };
    notifier.admit("app", treatment);
    notifier
}

/// Has the calling thread's calls trapped until it ends, and hands the listener over as the runtime does.
#[allow(dead_code, reason = "not every test takes both")]
pub(crate) fn trap(notifier: &Notifier) {
    drop(trap_after(notifier, || {}));
}

/// The same, with something done before the listener is handed over. Returns the thread's own descriptors of the connection and of the
/// listener, of which the runtime keeps none.
pub(crate) fn trap_after(notifier: &Notifier, before: impl FnOnce()) -> [OwnedFd; 2] {
    let message = serde_json::json!({
        "fds": ["seccompFd"], "pid": 1, "metadata": notifier.metadata(), "state": {"id": "app"},
    })
    .to_string();
    // Before the filter is there: afterwards nobody would answer.
    let connection = UnixStream::connect(notifier.socket()).expect("connect");
    let traps = [libc::SYS_bind, libc::SYS_epoll_create1];
    let listener = trap_calling_thread(&traps).expect("install a filter");
    before();
    fd::send(connection.as_fd(), message.as_bytes(), &[listener.as_fd()])
        .expect("send the listener");
    [connection.into(), listener]
}

#[allow(dead_code, reason = "not every test makes them")]
/// Makes a socket and an epoll instance, without the heap; whether both have the window.
pub(crate) fn one_of_each() -> bool {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let socket = UdpSocket::bind(any).expect("bind");
    let epoll = sockopt::epoll_create().expect("epoll_create1");
    sockopt::busy_poll(socket.as_fd()).is_ok_and(|w| w == WINDOW)
        && sockopt::epoll_params(epoll.as_fd()).is_ok_and(|p| p.busy_poll == WINDOW)
}
