//! Busy-poll settings of real sockets and epoll instances.

use std::fs::File;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use kbp_kernel::sockopt::{self, EpollParams, SocketKind};
use kbp_kernel::{Error, Micros};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

fn raw(family: AddressFamily, kind: SockType, protocol: Option<SockProtocol>) -> OwnedFd {
    socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).expect("a socket")
}

#[test]
fn only_tcp_and_udp_sockets_are_inet() {
    use AddressFamily as F;
    use SockType as T;
    for family in [F::Inet, F::Inet6] {
        for kind in [T::Stream, T::Datagram] {
            let socket = raw(family, kind, None);
            assert_eq!(
                sockopt::kind(socket.as_fd()),
                SocketKind::Inet,
                "{family:?} {kind:?}"
            );
        }
    }
    let (unix, _peer) = UnixStream::pair().expect("a pair");
    assert_eq!(sockopt::kind(unix.as_fd()), SocketKind::Other);
    let datagram = UnixDatagram::unbound().expect("unix datagram");
    assert_eq!(sockopt::kind(datagram.as_fd()), SocketKind::Other);
    let netlink = raw(F::Netlink, T::Raw, Some(SockProtocol::NetlinkRoute));
    assert_eq!(sockopt::kind(netlink.as_fd()), SocketKind::Other);
    let icmp = raw(F::Inet, T::Raw, Some(SockProtocol::Icmp));
    assert_eq!(sockopt::kind(icmp.as_fd()), SocketKind::Other);

    let file = File::open("/dev/null").expect("/dev/null");
    assert_eq!(sockopt::kind(file.as_fd()), SocketKind::NotASocket);
    let epoll = sockopt::epoll_create().expect("epoll");
    assert_eq!(sockopt::kind(epoll.as_fd()), SocketKind::NotASocket);
}

#[test]
fn windows_are_kept_and_can_be_switched_off() {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("UDP socket");
    for window in [Micros(50), Micros(1), Micros(i32::MAX as u32), Micros(0)] {
        sockopt::set_busy_poll(socket.as_fd(), window).expect("set");
        assert_eq!(sockopt::busy_poll(socket.as_fd()).expect("get"), window);
    }
    let error = sockopt::set_busy_poll(socket.as_fd(), Micros(1 << 31)).expect_err("too long");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    assert!(error.to_string().contains("2147483648"), "{error}");
}

#[test]
fn accepted_sockets_inherit_the_window_of_the_listener() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    sockopt::set_busy_poll(listener.as_fd(), Micros(70)).expect("set");
    let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (accepted, _) = listener.accept().expect("accept");
    assert_eq!(
        sockopt::busy_poll(accepted.as_fd()).expect("get"),
        Micros(70)
    );
    assert_ne!(
        sockopt::busy_poll(client.as_fd()).expect("get"),
        Micros(70),
        "the client's is its own"
    );
}

#[test]
fn what_is_no_socket_is_an_error_with_the_errno() {
    let file = File::open("/dev/null").expect("/dev/null");
    for error in [
        sockopt::busy_poll(file.as_fd()).expect_err("get"),
        sockopt::set_busy_poll(file.as_fd(), Micros(50)).expect_err("set"),
        sockopt::incoming_napi(file.as_fd()).expect_err("napi"),
    ] {
        assert_eq!(error.errno(), Some(libc::ENOTSOCK), "{error}");
    }
}

#[test]
fn a_socket_that_received_nothing_has_no_napi() {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("UDP socket");
    assert_eq!(sockopt::incoming_napi(socket.as_fd()).expect("napi"), None);
    // Loopback has no NAPI of its own: its packets do not give the socket one either.
    let address = socket.local_addr().expect("address");
    socket.send_to(b"x", address).expect("send");
    socket.recv_from(&mut [0]).expect("receive");
    assert_eq!(sockopt::incoming_napi(socket.as_fd()).expect("napi"), None);
}

#[test]
fn epoll_settings_are_kept() {
    let epoll = sockopt::epoll_create().expect("epoll");
    let fresh = sockopt::epoll_params(epoll.as_fd()).expect("get");
    assert_eq!(
        fresh.busy_poll,
        Micros(0),
        "a new instance does not busy-poll"
    );
    for params in [
        EpollParams {
            busy_poll: Micros(100),
            budget: 8,
            prefer: false,
        },
        EpollParams {
            busy_poll: Micros(200),
            budget: 64,
            prefer: true,
        },
        EpollParams {
            busy_poll: Micros(0),
            budget: 0,
            prefer: false,
        },
    ] {
        sockopt::set_epoll_params(epoll.as_fd(), params).expect("set");
        assert_eq!(sockopt::epoll_params(epoll.as_fd()).expect("get"), params);
    }
    let long = EpollParams {
        busy_poll: Micros(u32::MAX),
        budget: 8,
        prefer: false,
    };
    let error = sockopt::set_epoll_params(epoll.as_fd(), long).expect_err("too long");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[test]
fn epoll_instances_are_told_from_other_files() {
    let epoll = sockopt::epoll_create().expect("epoll");
    assert!(sockopt::is_epoll(epoll.as_fd()));
    let socket = UdpSocket::bind("127.0.0.1:0").expect("UDP socket");
    assert!(!sockopt::is_epoll(socket.as_fd()));
    let file = File::open("/dev/null").expect("/dev/null");
    assert!(!sockopt::is_epoll(file.as_fd()));
    // The ioctl on another file is that file's error, not a missing feature of the kernel.
    let params = EpollParams {
        busy_poll: Micros(50),
        budget: 8,
        prefer: false,
    };
    let error = sockopt::set_epoll_params(file.as_fd(), params).expect_err("no epoll");
    assert_eq!(error.errno(), Some(libc::ENOTTY), "{error}");
}

#[test]
fn packets_can_be_had_wait_for_a_socket() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("socket");
    assert!(!sockopt::prefers_busy_poll(socket.as_fd()).expect("read"));
    for prefer in [true, false] {
        sockopt::set_prefer_busy_poll(socket.as_fd(), prefer).expect("set");
        assert_eq!(
            sockopt::prefers_busy_poll(socket.as_fd()).expect("read"),
            prefer
        );
    }
}
