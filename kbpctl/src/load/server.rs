//! The servers: one thread, ordinary sockets, epoll, level-triggered. They know nothing of busy polling.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::flood::REPORT;
use super::{ServerArgs, Talk, write_whole};

/// The listener's, among file descriptors.
const LISTENER: u64 = u64::MAX;

/// Serves until it is killed.
pub(super) fn run(args: &ServerArgs) -> Result<()> {
    args.place.take()?;
    if let Some(port) = args.discard {
        let address = (args.bind.ip(), port);
        let socket = UdpSocket::bind(address).with_context(|| format!("bind {address:?}"))?;
        std::thread::Builder::new()
            .name("discard".to_owned())
            .spawn(move || {
                let mut datagram = [0; 65536];
                loop {
                    let _ = socket.recv(&mut datagram);
                }
            })
            .context("start a thread")?;
    }
    let bind = || format!("bind {}", args.bind);
    match args.talk {
        Talk::UdpEcho | Talk::UdpSink => {
            let socket = UdpSocket::bind(args.bind).with_context(bind)?;
            socket.set_nonblocking(true)?;
            write_whole(&args.ready, b"")?;
            udp(&socket, args)
        }
        Talk::TcpEcho | Talk::TcpSink => {
            let listener = TcpListener::bind(args.bind).with_context(bind)?;
            listener.set_nonblocking(true)?;
            write_whole(&args.ready, b"")?;
            tcp(&listener, args)
        }
        other => bail!("{other:?} is answered by a program of its own"),
    }
}

fn udp(socket: &UdpSocket, args: &ServerArgs) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    epoll
        .add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))
        .context("epoll_ctl")?;
    let mut events = [EpollEvent::empty()];
    let mut datagram = [0; 65536];
    let mut count = 0u64;
    loop {
        if !args.spin {
            wait(&epoll, &mut events)?;
        }
        // A datagram that cannot be answered (its sender is gone) must not end the server.
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            if args.talk == Talk::UdpEcho {
                let _ = socket.send_to(&datagram[..length], from);
            } else if &datagram[..length] == REPORT {
                let _ = socket.send_to(&count.to_le_bytes(), from);
            } else {
                count += 1;
            }
        }
    }
}

fn tcp(listener: &TcpListener, args: &ServerArgs) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    epoll
        .add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
        .context("epoll_ctl")?;
    let mut streams: BTreeMap<u64, TcpStream> = BTreeMap::new();
    let mut events = [EpollEvent::empty(); 64];
    let mut bytes = vec![0; 256 << 10];
    loop {
        let ready: Vec<u64> = if args.spin {
            std::iter::once(LISTENER)
                .chain(streams.keys().copied())
                .collect()
        } else {
            let n = wait(&epoll, &mut events)?;
            events[..n].iter().map(EpollEvent::data).collect()
        };
        for key in ready {
            if key == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    let key = u64::try_from(stream.as_raw_fd())?;
                    epoll
                        .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, key))
                        .context("epoll_ctl")?;
                    streams.insert(key, stream);
                }
                continue;
            }
            let Some(stream) = streams.get_mut(&key) else {
                continue;
            };
            match stream.read(&mut bytes) {
                Ok(n) if n > 0 => {
                    if args.talk == Talk::TcpEcho
                        && let Err(e) = answer(stream, &bytes[..n])
                        && e.kind() != std::io::ErrorKind::WouldBlock
                    {
                        streams.remove(&key);
                    }
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                // Closing it takes it out of the epoll instance.
                _ => {
                    streams.remove(&key);
                }
            }
        }
    }
}

/// Writes all of it: an answer of some bytes nearly always fits.
fn answer(stream: &mut TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> Result<usize> {
    match epoll.wait(events, EpollTimeout::NONE) {
        Ok(n) => Ok(n),
        Err(Errno::EINTR) => Ok(0),
        Err(errno) => Err(errno).context("epoll_wait"),
    }
}
