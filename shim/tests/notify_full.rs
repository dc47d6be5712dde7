//! A shim without a free descriptor takes no listener over until it has one: a listener that does not find room would be lost, and the
//! calls of its process would fail.

mod trapped;

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kbp_kernel::sockopt;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{UnixAddr, bind};
use nix::unistd::dup2;

/// Descriptors that the test has at most, so that it has used them up soon.
const FEW: u64 = 256;
const LIMIT: Duration = Duration::from_secs(60);

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("fd").count()
}

// The only test of this process: it takes all descriptors.
#[test]
fn a_listener_waits_for_a_free_descriptor() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, FEW, hard).expect("fewer descriptors");
    let dir = tempfile::tempdir().expect("tempdir");
    let notifier = trapped::notifier(dir.path(), true);
    // Made by a thread that nobody filters.
    let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("bind"));
    // The kernel refuses it, if it gets to see it.
    let call = |socket: &UdpSocket| bind(socket.as_raw_fd(), &UnixAddr::new("/").expect("address"));
    let (tell, told) = mpsc::channel();
    let (tell_room, told_room) = mpsc::channel();
    let mut full: Vec<File> = Vec::new();
    let idle = open_files();
    let calls = std::thread::scope(|scope| {
        let (notifier, sockets) = (&notifier, &sockets);
        let thread = scope.spawn(move || {
            let mut own = trapped::trap_after(notifier, || {
                // The connection's two ends and the listener.
                let until = Instant::now() + LIMIT;
                while open_files() < idle + 3 {
                    assert!(Instant::now() < until, "the connection is not accepted");
                    std::thread::yield_now();
                }
                while let Ok(file) = File::open("/dev/null") {
                    full.push(file);
                }
            });
            // Closed without a number becoming free.
            for own in &mut own {
                dup2(&full[0], own).expect("close");
            }
            tell.send(full).expect("somebody listens");
            let first = call(&sockets[0]);
            told_room.recv_timeout(LIMIT).expect("there is room again");
            [first, call(&sockets[1])]
        });
        let full = told.recv_timeout(LIMIT).expect("all descriptors are taken");
        // A listener that was lost ends the call at once.
        let until = Instant::now() + Duration::from_millis(500);
        while Instant::now() < until && !thread.is_finished() {
            std::thread::yield_now();
        }
        drop(full);
        tell_room.send(()).expect("somebody listens");
        thread.join().expect("no panic")
    });
    for call in calls {
        assert_ne!(call, Err(Errno::ENOSYS), "nobody answers");
    }
    // The first may have been looked at while there was room for its listener, and none for a copy of the socket.
    let window = sockopt::busy_poll(sockets[1].as_fd()).expect("window");
    assert_eq!(window, trapped::WINDOW);
}
