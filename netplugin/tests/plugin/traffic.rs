//! Packets between namespaces.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use kbp_kernel::netns::Netns;
use nix::sys::socket::{getsockopt, sockopt};

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn any(address: IpAddr) -> SocketAddr {
    let any = if address.is_ipv6() {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    any.parse().expect("an address")
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A socket bound in a namespace; it stays there wherever it is used.
pub(crate) fn udp(netns: &Netns, address: SocketAddr) -> UdpSocket {
    let socket = netns
        .run(|| UdpSocket::bind(address))
        .expect("enter")
        .expect("bind");
    socket
        .set_read_timeout(Some(PATIENCE))
        .expect("set a timeout");
    socket
}

/// Sends a datagram of `size` bytes to `address` and has it echoed; the address that the server saw.
pub(crate) fn udp_echo(client: &Netns, server: &Netns, address: IpAddr, size: usize) -> IpAddr {
    let server = udp(server, (address, 0).into());
    let client = udp(client, any(address));
    let to = server.local_addr().expect("an address");
    let message: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let mut buffer = vec![0; 65536];
    client
        .send_to(&message, to)
        .unwrap_or_else(|error| panic!("send {size} bytes to {to}: {error}"));
    let (n, peer) = server
        .recv_from(&mut buffer)
        .unwrap_or_else(|error| panic!("{size} bytes to {to}: {error}"));
    assert!(buffer[..n] == message, "the datagram changed on its way");
    server.send_to(&buffer[..n], peer).expect("send back");
    let (n, from) = client
        .recv_from(&mut buffer)
        .unwrap_or_else(|error| panic!("{size} bytes back from {to}: {error}"));
    assert!(
        buffer[..n] == message && from == to,
        "another answer came from {from}"
    );
    peer.ip()
}

/// Whether a datagram to `address` arrives; not before a while is it taken for lost.
pub(crate) fn udp_arrives(client: &Netns, server: &Netns, address: IpAddr) -> bool {
    const WHILE: Duration = Duration::from_millis(500);
    let server = udp(server, (address, 0).into());
    server.set_read_timeout(Some(WHILE)).expect("set a timeout");
    let to = server.local_addr().expect("an address");
    // Without a neighbour it waits for one, or is refused.
    let _ = udp(client, any(address)).send_to(&[1], to);
    server.recv_from(&mut [0; 8]).is_ok()
}

/// Sends `size` bytes over TCP to `address`, and gets a sum of them back; the address that the server saw.
pub(crate) fn tcp_transfer(client: &Netns, server: &Netns, address: IpAddr, size: usize) -> IpAddr {
    let listener = server
        .run(|| TcpListener::bind((address, 0)))
        .expect("enter")
        .expect("bind");
    let to = listener.local_addr().expect("an address");
    let mut client = client
        .run(|| TcpStream::connect_timeout(&to, PATIENCE))
        .expect("enter")
        .unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    let (mut server, peer) = listener.accept().expect("accept");
    for stream in [&client, &server] {
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("set a timeout");
        stream
            .set_write_timeout(Some(PATIENCE))
            .expect("set a timeout");
    }
    let message: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let sum = |bytes: &[u8]| {
        bytes.iter().fold(0_u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add((*byte).into())
        })
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut received = vec![0; size];
            server.read_exact(&mut received).expect("receive");
            server
                .write_all(&sum(&received).to_be_bytes())
                .expect("send the sum");
        });
        client.write_all(&message).expect("send");
        let mut answer = [0; 8];
        client.read_exact(&mut answer).expect("receive the sum");
        assert_eq!(
            u64::from_be_bytes(answer),
            sum(&message),
            "the data changed on its way"
        );
    });
    peer.ip()
}

/// The MTU that a namespace has towards an IPv4 address.
pub(crate) fn path_mtu(netns: &Netns, address: IpAddr) -> i32 {
    let socket = udp(netns, any(address));
    socket.connect((address, 9)).expect("a route");
    getsockopt(&socket, sockopt::IpMtu).expect("read the MTU")
}
