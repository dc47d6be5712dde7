//! The notifier against the real kernel: threads of this process are filtered, and their calls answered.

use std::fs;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kbp_kernel::notify::trap_calling_thread;
use kbp_kernel::sockopt::{self, EpollParams};
use kbp_kernel::{Micros, fd};
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags};

use super::testing::treatment;
use super::*;

const WINDOW: Micros = Micros(37);
const ON: Treatment = treatment(WINDOW);
const LIMIT: Duration = Duration::from_secs(60);
const TRAPS: [i64; 5] = [
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_epoll_create1,
    // Trapped although nobody means it: runs on untouched.
    libc::SYS_getppid,
];

/// A notifier of its own directory, with one container `app`.
struct Pod {
    notifier: Notifier,
    events: Mutex<mpsc::Receiver<Event>>,
    dir: tempfile::TempDir,
}

impl Pod {
    fn new(treatment: Treatment) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let (sender, events) = mpsc::channel();
        // The receiver may be gone when the pod ends.
        let tell = move |event| drop(sender.send(event));
        let notifier = Notifier::start(dir.path(), "test", "pod", tell).expect("start a notifier");
        notifier.admit("app", treatment);
        Self {
            notifier,
            events: Mutex::new(events),
            dir,
        }
    }

    /// What runc sends.
    fn message(&self, container: &str) -> String {
        serde_json::json!({
            "ociVersion": "1.0.2-dev",
            "fds": ["seccompFd"],
            "pid": 4711,
            "metadata": self.notifier.metadata(),
            "state": {"ociVersion": "1.0.2-dev", "id": container, "status": "creating", "pid": 4711, "bundle": "/b"},
        })
        .to_string()
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.notifier.socket()).expect("connect to the notifier")
    }

    /// Runs `work` on a thread whose calls are trapped, with its listener handed over as the runtime does.
    fn trapped<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Before the filter is there: afterwards nobody would answer.
                let connection = self.connect();
                let listener = trap_calling_thread(&TRAPS).expect("install a filter");
                let message = self.message("app");
                fd::send(connection.as_fd(), message.as_bytes(), &[listener.as_fd()])
                    .expect("send the listener");
                drop((connection, listener));
                work()
            });
            thread.join().expect("no panic in the trapped thread")
        })
    }

    fn events(&self) -> MutexGuard<'_, mpsc::Receiver<Event>> {
        self.events.lock().expect("nobody panicked with it")
    }

    /// The next event that `pick` wants.
    fn event<T>(&self, pick: impl Fn(Event) -> Option<T>) -> T {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let event = self.events().recv_timeout(left).expect("the event in time");
            if let Some(found) = pick(event) {
                return found;
            }
        }
    }

    fn refusal(&self) -> String {
        self.event(|event| match event {
            Event::Refused(reason) => Some(reason),
            _ => None,
        })
    }
}

fn window_of(socket: impl AsFd) -> Micros {
    sockopt::busy_poll(socket.as_fd()).expect("SO_BUSY_POLL")
}

/// Busy-poll parameters of an epoll instance; None where the kernel has none to tell.
fn epoll_of(epoll: BorrowedFd<'_>) -> EpollParams {
    sockopt::epoll_params(epoll).expect("EPIOCGPARAMS")
}

fn node_default() -> Micros {
    answer::Node::read().default_window
}

#[test]
fn bind_connect_and_listen_set_the_window_of_inet_sockets() {
    let pod = Pod::new(ON);
    // Made outside, so untouched.
    let server = TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = server.local_addr().expect("address");
    pod.trapped(|| {
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bind UDP");
        assert_eq!(window_of(&udp), WINDOW);
        let udp6 = UdpSocket::bind("[::1]:0").expect("bind UDP on v6");
        assert_eq!(window_of(&udp6), WINDOW);
        let client = TcpStream::connect(address).expect("connect");
        assert_eq!(window_of(&client), WINDOW);

        let tcp = TcpListener::bind("127.0.0.1:0").expect("bind and listen");
        assert_eq!(window_of(&tcp), WINDOW);
        let peer = std::thread::scope(|scope| {
            let address = tcp.local_addr().expect("address");
            // This thread inherits the filter.
            let client = scope.spawn(move || TcpStream::connect(address));
            let accepted = tcp.accept().expect("accept").0;
            client.join().expect("no panic").expect("connect");
            accepted
        });
        assert_eq!(window_of(&peer), WINDOW, "accepted sockets inherit it");
    });
    assert_eq!(window_of(&server), node_default());
    let counters = pod.notifier.counters();
    // Binds: 3, connects: 2, listens: 1; the listening socket had its window from its bind.
    assert_eq!(
        counters,
        SocketCounters {
            calls_handled: 6,
            sockets_set: 5,
            epolls_given: 0,
            epolls_crowded: 0,
            errors: 0
        }
    );
}

#[test]
fn other_sockets_and_other_calls_run_on_untouched() {
    let pod = Pod::new(ON);
    let path = pod.dir.path().join("dgram");
    pod.trapped(|| {
        let unix = UnixDatagram::bind(&path).expect("bind a unix socket");
        assert_eq!(window_of(&unix), node_default());
        assert!(nix::unistd::getppid().as_raw() > 0);
        // The kernel's own errors come through: no socket at all, and no such address.
        let file = fs::File::open("/dev/null").expect("open");
        let error =
            nix::sys::socket::listen(&file, nix::sys::socket::Backlog::new(1).expect("backlog"));
        assert_eq!(error, Err(nix::errno::Errno::ENOTSOCK));
        assert!(UdpSocket::bind("192.0.2.1:0").is_err());
    });
    let counters = pod.notifier.counters();
    assert_eq!(
        (counters.calls_handled, counters.errors),
        (4, 0),
        "{counters:?}"
    );
}

#[test]
fn the_programs_own_window_stays() {
    let pod = Pod::new(ON);
    // Made outside, so untouched.
    let own = UdpSocket::bind("127.0.0.1:0").expect("bind");
    sockopt::set_busy_poll(own.as_fd(), Micros(7)).expect("set its own");
    let address = own.local_addr().expect("address");
    pod.trapped(|| own.connect(address).expect("connect"));
    assert_eq!(window_of(&own), Micros(7));
    assert_eq!(pod.notifier.counters().sockets_set, 0);
}

#[test]
fn epoll_instances_are_given_with_their_window() {
    let pod = Pod::new(ON);
    let plain = pod.trapped(|| {
        let kept = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll_create1");
        let params = epoll_of(kept.0.as_fd());
        assert_eq!((params.busy_poll, params.prefer), (WINDOW, false));
        assert!((8..=64).contains(&params.budget), "{params:?}");
        let flags =
            nix::fcntl::fcntl(kept.0.as_fd(), nix::fcntl::FcntlArg::F_GETFD).expect("flags");
        assert_eq!(flags, libc::FD_CLOEXEC);
        Epoll::new(EpollCreateFlags::empty()).expect("epoll_create1")
    });
    assert_eq!(epoll_of(plain.0.as_fd()).busy_poll, WINDOW);
    let flags = nix::fcntl::fcntl(plain.0.as_fd(), nix::fcntl::FcntlArg::F_GETFD).expect("flags");
    assert_eq!(flags, 0, "as the program asked");
    // What the kernel refuses, it refuses still.
    pod.trapped(|| {
        let wrong = Epoll::new(EpollCreateFlags::from_bits_retain(0x1));
        assert_eq!(wrong.err(), Some(nix::errno::Errno::EINVAL));
    });
    let counters = pod.notifier.counters();
    assert_eq!(
        (counters.epolls_given, counters.errors),
        (2, 0),
        "{counters:?}"
    );
}

#[test]
fn a_container_without_a_window_is_left_alone_until_it_gets_one() {
    let pod = Pod::new(treatment(Micros(0)));
    pod.trapped(|| {
        let before = UdpSocket::bind("127.0.0.1:0").expect("bind");
        assert_eq!(window_of(&before), node_default());
        assert_eq!(
            epoll_of(
                Epoll::new(EpollCreateFlags::empty())
                    .expect("epoll")
                    .0
                    .as_fd()
            )
            .busy_poll,
            Micros(0)
        );

        pod.notifier.admit(
            "app",
            Treatment {
                window: Some(WINDOW),
                epoll: false,
                bounded: true,
                prefer: Default::default(),
            },
        );
        let after = UdpSocket::bind("127.0.0.1:0").expect("bind");
        assert_eq!(window_of(&after), WINDOW);
        assert_eq!(
            epoll_of(
                Epoll::new(EpollCreateFlags::empty())
                    .expect("epoll")
                    .0
                    .as_fd()
            )
            .busy_poll,
            Micros(0)
        );
    });
}

#[test]
fn activity_is_told_once_until_somebody_looks() {
    let pod = Pod::new(ON);
    let bind = || {
        pod.trapped(|| {
            for _ in 0..20 {
                UdpSocket::bind("127.0.0.1:0").expect("bind");
            }
        });
    };
    let active = || {
        pod.event(|event| (event == Event::Active).then_some(()));
        pod.events()
            .try_iter()
            .filter(|e| *e == Event::Active)
            .count()
    };
    bind();
    assert_eq!(active(), 0, "told again although nobody looked");
    assert_eq!(pod.notifier.counters().calls_handled, 20);
    bind();
    active();
}

#[test]
fn a_listener_comes_with_its_process_and_may_come_in_pieces() {
    let pod = Pod::new(ON);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let connection = pod.connect();
            let listener = trap_calling_thread(&TRAPS).expect("install a filter");
            let message = pod.message("app");
            let (first, rest) = message.as_bytes().split_at(10);
            fd::send(connection.as_fd(), first, &[listener.as_fd()]).expect("send");
            drop(listener);
            for piece in rest.chunks(40) {
                // Let the other side see an unfinished message.
                std::thread::yield_now();
                fd::send(connection.as_fd(), piece, &[]).expect("send");
            }
            // The connection stays open: some runtimes do.
            let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
            assert_eq!(window_of(&socket), WINDOW);
            drop(connection);
        });
        thread.join().expect("no panic");
    });
    let (container, pid) = pod.event(|event| match event {
        Event::Listening { container, pid } => Some((container, pid)),
        _ => None,
    });
    assert_eq!((container.as_str(), pid), ("app", 4711));
}

#[test]
fn what_is_no_listener_of_this_pod_is_refused_and_the_rest_goes_on() {
    let pod = Pod::new(ON);
    let file = fs::File::open("/dev/null").expect("open");
    let file = [file.as_fd()];
    let good = pod.message("app");
    let large = format!(
        "{{\"state\":{{\"id\":\"app\"}},\"x\":\"{}",
        "x".repeat(2 * 1024 * 1024)
    );
    let cases: [(&str, &[BorrowedFd<'_>], &str); 8] = [
        ("hello", &[], "not a container process state"),
        ("[]", &file, "not a container process state"),
        (
            &good[..good.len() / 2],
            &file,
            "in the middle of its message",
        ),
        (&good, &[], "0 descriptors"),
        (&good, &file, "/dev/null is no seccomp listener"),
        (&good, &[file[0]; 5], "descriptors"),
        (
            &good.replace("test/pod", "test/other"),
            &file,
            "is not this pod's",
        ),
        (
            &pod.message("stranger"),
            &file,
            "\"stranger\", which is not one of this pod",
        ),
    ];
    for (message, fds, reason) in cases {
        let connection = pod.connect();
        fd::send(connection.as_fd(), message.as_bytes(), fds).expect("send");
        drop(connection);
        let refusal = pod.refusal();
        assert!(refusal.contains(reason), "{refusal}");
    }
    let connection = pod.connect();
    let mut left = large.as_bytes();
    while !left.is_empty() {
        // The other side hangs up in the middle.
        match fd::send(connection.as_fd(), left, &[]) {
            Ok(sent) => left = &left[sent..],
            Err(_) => break,
        }
    }
    assert!(!left.is_empty(), "2 MiB were taken");
    let refusal = pod.refusal();
    assert!(refusal.contains("more than"), "{refusal}");

    pod.trapped(|| {
        assert_eq!(
            window_of(UdpSocket::bind("127.0.0.1:0").expect("bind")),
            WINDOW
        )
    });
}

#[test]
fn silent_connections_do_not_delay_anybody() {
    let pod = Pod::new(ON);
    // More than are kept: the oldest make room.
    let silent: Vec<UnixStream> = (0..80).map(|_| pod.connect()).collect();
    pod.trapped(|| {
        assert_eq!(
            window_of(UdpSocket::bind("127.0.0.1:0").expect("bind")),
            WINDOW
        )
    });
    assert!(pod.refusal().contains("oldest"));
    drop(silent);
}

#[test]
fn only_root_may_send_listeners() {
    let pod = Pod::new(ON);
    let socket = pod.notifier.socket();
    let mode = |path: &Path| fs::metadata(path).expect("stat").permissions().mode() & 0o777;
    let dir = directory(pod.dir.path(), "test", "pod");
    assert_eq!(mode(Path::new(socket)), 0o600);
    assert_eq!(mode(&dir), 0o700);

    // Also when the modes did not help.
    for path in [
        pod.dir.path(),
        &pod.dir.path().join("notify"),
        &dir,
        Path::new(socket),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("chmod");
    }
    let mut child = Command::new("perl")
        .args([
            "-MIO::Socket::UNIX",
            "-e",
            "IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!",
            socket,
        ])
        .uid(65534)
        .gid(65534)
        .spawn()
        .expect("run perl");
    assert!(child.wait().expect("wait").success());
    let refusal = pod.refusal();
    assert!(refusal.contains("user 65534"), "{refusal}");
}

#[test]
fn the_end_of_a_notifier_leaves_nothing_and_a_killed_ones_socket_is_no_obstacle() {
    let pod = Pod::new(ON);
    let dir = directory(pod.dir.path(), "test", "pod");
    assert!(dir.join("seccomp.sock").exists());
    let Pod {
        notifier,
        dir: root,
        ..
    } = pod;
    drop(notifier);
    assert!(!dir.exists());

    fs::create_dir_all(&dir).expect("mkdir");
    drop(UnixListener::bind(dir.join("seccomp.sock")).expect("a stale socket"));
    let again =
        Notifier::start(root.path(), "test", "pod", |_| {}).expect("start over the stale socket");
    drop(again);
    fs::create_dir_all(&dir).expect("mkdir");
    remove(root.path(), "test", "pod").expect("remove");
    remove(root.path(), "test", "pod").expect("removing twice is fine");
    assert!(!dir.exists());
}

#[test]
fn a_state_directory_that_is_too_deep_is_named() {
    let deep = std::env::temp_dir().join("d".repeat(90));
    let error = Notifier::start(&deep, "test", "pod", |_| {})
        .expect_err("too long")
        .to_string();
    assert!(
        error.contains("state-dir") && error.contains("107"),
        "{error}"
    );
    assert!(!deep.exists());
}

#[test]
fn a_thread_that_dies_in_its_call_does_no_harm() {
    let pod = Pod::new(ON);
    // A child of its own, so that it can be killed at any moment: it binds for ever.
    let program = "use Socket; for (;;) { socket(S, PF_INET, SOCK_DGRAM, 0); bind(S, pack_sockaddr_in(0, INADDR_LOOPBACK)) or die; close(S) }";
    let mut children: Vec<_> = pod.trapped(|| {
        (0..8)
            .map(|_| {
                Command::new("perl")
                    .args(["-e", program])
                    .spawn()
                    .expect("run perl")
            })
            .collect()
    });
    let until = Instant::now() + LIMIT;
    while pod.notifier.counters().sockets_set < 100 {
        assert!(Instant::now() < until, "{:?}", pod.notifier.counters());
        std::thread::yield_now();
    }
    for child in &mut children {
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
    pod.trapped(|| {
        assert_eq!(
            window_of(UdpSocket::bind("127.0.0.1:0").expect("bind")),
            WINDOW
        )
    });
    assert_eq!(pod.notifier.counters().errors, 0);
}

#[test]
fn listeners_go_with_their_processes() {
    const PROCESSES: usize = 300;
    let pod = Pod::new(ON);
    for _ in 0..PROCESSES {
        pod.trapped(|| UdpSocket::bind("127.0.0.1:0").expect("bind"));
    }
    // Other tests of this process have a few of their own.
    let open = || {
        let fds = fs::read_dir("/proc/self/fd").expect("list").flatten();
        fds.filter_map(|fd| fs::read_link(fd.path()).ok())
            .filter(|target| target.as_os_str() == "anon_inode:seccomp notify")
            .count()
    };
    let until = Instant::now() + LIMIT;
    while open() > PROCESSES / 10 {
        assert!(Instant::now() < until, "{} listeners stay open", open());
        std::thread::yield_now();
    }
}
