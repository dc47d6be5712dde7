//! Trapped system calls of a real child and of threads, on the running kernel.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kbp_kernel::notify::{Listener, Notification, Received, trap_calling_thread};
use kbp_kernel::process::{self, PidFd};
use kbp_kernel::sockopt::{self, EpollParams};
use kbp_kernel::syscalls::{FirstArgument, Syscall, identify};
use kbp_kernel::{Micros, fd};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const WINDOW: Micros = Micros(77);
const PARAMS: EpollParams = EpollParams {
    busy_poll: WINDOW,
    budget: 64,
    prefer: false,
};

/// Waits until the listener has something to say, and reads it.
fn next(listener: &Listener) -> Received {
    let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    assert_eq!(
        poll(&mut waiting, 10_000u16).expect("poll"),
        1,
        "nothing within 10 s"
    );
    listener.receive().expect("receive")
}

fn next_call(listener: &Listener) -> Notification {
    match next(listener) {
        Received::Call(call) => call,
        other => panic!("{other:?}"),
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "{what}: not within 10 s");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What the child does after it has sent its listener and got a byte.
const BIND_AND_EPOLL: u8 = b'b';
const EPOLL_WITHOUT_ROOM: u8 = b'e';

#[test]
#[ignore = "the child that the other tests start, with a socket as its standard input"]
fn trapped_child() {
    let supervisor = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .expect("stdin");
    let mut supervisor = UnixStream::from(supervisor);
    let listener = trap_calling_thread(&[libc::SYS_bind, libc::SYS_epoll_create1]).expect("filter");
    fd::send(supervisor.as_fd(), b"l", &[listener.as_fd()]).expect("send the listener");
    drop(listener);
    let mut order = [0];
    supervisor.read_exact(&mut order).expect("an order");
    let text = match order[0] {
        BIND_AND_EPOLL => {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
            let window = sockopt::busy_poll(socket.as_fd()).expect("window");
            let epoll = sockopt::epoll_create().expect("epoll");
            let params = sockopt::epoll_params(epoll.as_fd()).expect("params");
            let flags = FdFlag::from_bits_retain(fcntl(&epoll, FcntlArg::F_GETFD).expect("flags"));
            format!("{window} {params:?} {}", flags.contains(FdFlag::FD_CLOEXEC))
        }
        EPOLL_WITHOUT_ROOM => {
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
            setrlimit(Resource::RLIMIT_NOFILE, 1, hard).expect("no more descriptors");
            format!(
                "{:?}",
                sockopt::epoll_create().map_err(|error| error.errno())
            )
        }
        other => panic!("order {other}"),
    };
    supervisor.write_all(text.as_bytes()).expect("tell");
}

/// A child under a filter whose listener is here. Killed and reaped at the latest when the test is over.
struct Trapped {
    child: Child,
    socket: UnixStream,
    listener: Listener,
}

impl Trapped {
    fn start(order: u8) -> Self {
        let (mut socket, theirs) = UnixStream::pair().expect("a pair");
        let child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "trapped_child", "--ignored"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .expect("child");
        socket
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("timeout");
        let message = fd::receive(socket.as_fd(), 1, 1).expect("the listener");
        let listener = message.fds.into_iter().next().expect("one descriptor");
        socket.write_all(&[order]).expect("order");
        Self {
            child,
            socket,
            listener: Listener::new(listener),
        }
    }

    fn told(&mut self) -> String {
        let mut text = String::new();
        self.socket
            .read_to_string(&mut text)
            .expect("what the child tells");
        text
    }
}

impl Drop for Trapped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_childs_socket_gets_a_window_and_its_epoll_instance_is_ours() {
    let mut trapped = Trapped::start(BIND_AND_EPOLL);
    let listener = &trapped.listener;
    let call = next_call(listener);
    let Some((Syscall::Bind, FirstArgument::Value(number))) =
        identify(call.arch, call.syscall, &call.args)
    else {
        panic!("not a bind: {call:?}");
    };
    // libtest runs a test on a thread of its own, so this is not the id of the process.
    assert_ne!(call.tid, trapped.child.id());
    let caller = PidFd::open_by_thread(call.tid).expect("its process");
    let socket = caller.get_fd(number).expect("its socket");
    assert!(listener.is_valid(call.id));
    sockopt::set_busy_poll(socket.as_fd(), WINDOW).expect("window");
    listener.continue_call(call.id).expect("continue");

    let call = next_call(listener);
    assert_eq!(
        identify(call.arch, call.syscall, &call.args),
        Some((
            Syscall::EpollCreate1,
            FirstArgument::Value(libc::EPOLL_CLOEXEC)
        ))
    );
    let epoll = sockopt::epoll_create().expect("epoll");
    sockopt::set_epoll_params(epoll.as_fd(), PARAMS).expect("params");
    listener
        .answer_with_fd(call.id, epoll.as_fd(), true)
        .expect("answer");
    assert!(!listener.is_valid(call.id), "answered");

    assert_eq!(trapped.told(), format!("{WINDOW} {PARAMS:?} true"));
    assert!(trapped.child.wait().expect("wait").success());
    assert!(matches!(next(&trapped.listener), Received::Closed));
}

#[test]
fn a_call_whose_answer_failed_still_waits_for_one() {
    let mut trapped = Trapped::start(EPOLL_WITHOUT_ROOM);
    let call = next_call(&trapped.listener);
    let epoll = sockopt::epoll_create().expect("epoll");
    let answer = trapped
        .listener
        .answer_with_fd(call.id, epoll.as_fd(), false);
    let error = answer.expect_err("the child may have no more descriptors");
    assert_eq!(error.errno(), Some(libc::EMFILE), "{error}");
    assert!(trapped.listener.is_valid(call.id));
    trapped.listener.continue_call(call.id).expect("continue");
    assert_eq!(trapped.told(), format!("Err(Some({}))", libc::EMFILE));
}

#[test]
fn answering_a_dead_caller_is_fine() {
    let mut trapped = Trapped::start(BIND_AND_EPOLL);
    let call = next_call(&trapped.listener);
    trapped.child.kill().expect("kill");
    trapped.child.wait().expect("reap");
    let listener = &trapped.listener;
    eventually("the call is over", || !listener.is_valid(call.id));
    listener.continue_call(call.id).expect("continue");
    listener
        .answer_with_error(call.id, libc::EPERM)
        .expect("error");
    let epoll = sockopt::epoll_create().expect("epoll");
    listener
        .answer_with_fd(call.id, epoll.as_fd(), true)
        .expect("descriptor");
    assert!(matches!(next(listener), Received::Closed));
}

#[test]
fn a_caller_that_dies_before_it_is_read_does_not_block_the_reader() {
    let mut trapped = Trapped::start(BIND_AND_EPOLL);
    let mut waiting = [PollFd::new(trapped.listener.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut waiting, 10_000u16).expect("poll"), 1);
    trapped.child.kill().expect("kill");
    trapped.child.wait().expect("reap");
    eventually("closed", || {
        match trapped.listener.receive().expect("receive") {
            Received::Closed => true,
            Received::Gone => false,
            Received::Call(call) => panic!("{call:?} of a dead child"),
        }
    });
}

/// A thread of this process under a filter, and its listener.
fn trapped_thread<T: Send + 'static>(
    number: i64,
    work: impl FnOnce() -> T + Send + 'static,
) -> (thread::JoinHandle<T>, OwnedFd) {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        sender
            .send(trap_calling_thread(&[number]))
            .expect("hand over the listener");
        work()
    });
    let listener = receiver
        .recv()
        .expect("a listener")
        .expect("install a filter");
    (thread, listener)
}

fn try_to_listen() -> Option<i32> {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("bind is not trapped here");
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::MAXCONN)
        .err()
        .map(|e| e as i32)
}

#[test]
fn nothing_to_read_is_told_at_once_and_errors_reach_the_caller() {
    let (go, gone) = mpsc::channel::<()>();
    let (thread, listener) = trapped_thread(libc::SYS_listen, move || {
        gone.recv().expect("go");
        try_to_listen()
    });
    let listener = Listener::new(listener);
    assert!(matches!(
        listener.receive().expect("receive"),
        Received::Gone
    ));
    go.send(()).expect("go");
    let call = next_call(&listener);
    assert_eq!(call.syscall, libc::SYS_listen as i32);
    listener
        .answer_with_error(call.id, libc::EXFULL)
        .expect("answer");
    assert_eq!(thread.join().expect("thread"), Some(libc::EXFULL));
}

#[test]
fn a_call_that_continues_runs_as_if_it_was_not_trapped() {
    let (thread, listener) = trapped_thread(libc::SYS_listen, try_to_listen);
    let listener = Listener::new(listener);
    let call = next_call(&listener);
    listener.continue_call(call.id).expect("continue");
    assert_eq!(
        thread.join().expect("thread"),
        Some(libc::EOPNOTSUPP),
        "UDP does not listen"
    );
}

#[test]
fn a_closed_listener_gives_the_caller_enosys() {
    let (thread, listener) = trapped_thread(libc::SYS_listen, try_to_listen);
    let listener = Listener::new(listener);
    next_call(&listener);
    drop(listener);
    assert_eq!(thread.join().expect("thread"), Some(libc::ENOSYS));
}

/// A 64-bit thread may make a 32-bit call: that is all it takes to have i386's numbers here.
#[cfg(target_arch = "x86_64")]
#[test]
#[allow(unsafe_code)]
fn the_socket_of_a_32_bit_socketcall_is_found_in_memory() {
    const SOCKETCALL: i64 = 102;
    const BIND: u32 = 2;
    // SAFETY: a new mapping at a place that the kernel picks, where a 32-bit pointer reaches.
    let memory = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED);
    let address = u32::try_from(memory as usize).expect("below 4 GiB");
    // SAFETY: the mapping is writable, aligned, and has room for bind's three arguments.
    unsafe { memory.cast::<[u32; 3]>().write([4321, 0, 0]) };

    let (thread, listener) = trapped_thread(SOCKETCALL, move || {
        let answer: i32;
        // SAFETY: the 32-bit entry of the kernel; it reads the three words at `address` and clobbers only what is listed.
        unsafe {
            std::arch::asm!(
                "xchg rbx, {call}",
                "int 0x80",
                "xchg rbx, {call}",
                call = inout(reg) u64::from(BIND) => _,
                inlateout("eax") SOCKETCALL as i32 => answer,
                in("ecx") address,
                lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
            );
        }
        answer
    });
    let listener = Listener::new(listener);
    let call = next_call(&listener);
    let Some((Syscall::Bind, FirstArgument::At(at))) =
        identify(call.arch, call.syscall, &call.args)
    else {
        panic!("not a bind through socketcall: {call:?}");
    };
    assert_eq!(at, u64::from(address));
    let mut number = [0; 4];
    process::read_memory(call.tid, at, &mut number).expect("the caller's memory");
    assert_eq!(u32::from_ne_bytes(number), 4321);
    listener.continue_call(call.id).expect("continue");
    assert_eq!(thread.join().expect("thread"), -libc::EBADF);
    // SAFETY: mapped above, and the thread that used it is gone.
    assert_eq!(unsafe { libc::munmap(memory, 4096) }, 0);
}
