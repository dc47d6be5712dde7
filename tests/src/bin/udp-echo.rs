//! A plain UDP echo server on epoll: ordinary POSIX sockets, level-triggered, one thread. It knows nothing of busy polling.
//!
//! `udp-echo [ADDRESS]`, by default `0.0.0.0:7`. Runs until it is killed.

use std::net::UdpSocket;

use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

fn main() -> Result<()> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "0.0.0.0:7".to_owned());
    let socket = UdpSocket::bind(&address).with_context(|| format!("bind {address}"))?;
    socket.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    epoll
        .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))
        .context("epoll_ctl")?;
    println!("echo on {address}");

    let mut events = [EpollEvent::empty()];
    let mut datagram = [0u8; 65536];
    loop {
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("epoll_wait"),
        }
        // A datagram that cannot be answered (its sender is gone) must not end the server.
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    }
}
