//! One request and its answer, for every kind of server.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Talk;

/// A datagram that has not come back after this long is counted as lost.
pub(super) const LOST_AFTER: Duration = Duration::from_millis(500);
/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(10);
const VALUE: &[u8] = &[b'x'; 64];

/// A connection to a server, and what is said over it.
pub(super) enum Exchange {
    /// Datagrams that carry a number.
    Udp { socket: UdpSocket, size: usize },
    /// A stream on which each request and each answer always has the same length.
    Tcp {
        stream: TcpStream,
        request: Vec<u8>,
        answer: usize,
    },
}

impl Exchange {
    /// Connects, waiting for a server that still starts, and has the first exchange.
    pub(super) fn open(talk: Talk, to: SocketAddr, size: usize) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        loop {
            match Self::try_open(talk, to, size) {
                Ok(exchange) => return Ok(exchange),
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn try_open(talk: Talk, to: SocketAddr, size: usize) -> Result<Self> {
        if talk == Talk::UdpEcho {
            let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
            socket
                .connect(to)
                .with_context(|| format!("connect {to}"))?;
            socket.set_read_timeout(Some(LOST_AFTER))?;
            let mut exchange = Self::Udp { socket, size };
            let mut buffer = vec![0; size];
            ensure!(
                exchange.round_trip(u64::MAX, &mut buffer)?,
                "no answer from {to}"
            );
            return Ok(exchange);
        }
        let mut stream = TcpStream::connect(to).with_context(|| format!("connect {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let request = match talk {
            Talk::TcpEcho => vec![0x5a; size],
            Talk::Redis => {
                let mut set = b"*3\r\n$3\r\nSET\r\n$3\r\nkbp\r\n$64\r\n".to_vec();
                set.extend(VALUE);
                set.extend(b"\r\n");
                say(&mut stream, &set, b"+OK\r\n")?;
                b"*2\r\n$3\r\nGET\r\n$3\r\nkbp\r\n".to_vec()
            }
            Talk::Memcached => {
                let mut set = b"set kbp 0 0 64\r\n".to_vec();
                set.extend(VALUE);
                set.extend(b"\r\n");
                say(&mut stream, &set, b"STORED\r\n")?;
                b"get kbp\r\n".to_vec()
            }
            Talk::Http => format!("GET / HTTP/1.1\r\nHost: {to}\r\n\r\n").into_bytes(),
            Talk::UdpEcho | Talk::UdpSink | Talk::TcpSink => bail!("{talk:?} has no answers"),
        };
        let answer = match talk {
            Talk::TcpEcho => size,
            Talk::Redis => b"$64\r\n".len() + VALUE.len() + b"\r\n".len(),
            Talk::Memcached => b"VALUE kbp 0 64\r\n".len() + VALUE.len() + b"\r\nEND\r\n".len(),
            _ => 0,
        };
        stream.write_all(&request)?;
        // nginx's headers are as long every time: the date has a fixed form.
        let answer = match talk {
            Talk::Http => http_answer(&mut stream)?,
            _ => {
                stream.read_exact(&mut vec![0; answer])?;
                answer
            }
        };
        stream.set_read_timeout(Some(LOST_AFTER))?;
        Ok(Self::Tcp {
            stream,
            request,
            answer,
        })
    }

    /// Never sleeps in a receive.
    pub(super) fn spin(&self) -> Result<()> {
        match self {
            Self::Udp { socket, .. } => socket.set_nonblocking(true)?,
            Self::Tcp { stream, .. } => stream.set_nonblocking(true)?,
        }
        Ok(())
    }

    /// A buffer for answers.
    pub(super) fn buffer(&self) -> Vec<u8> {
        match self {
            Self::Udp { size, .. } => vec![0; *size],
            Self::Tcp { answer, .. } => vec![0; *answer],
        }
    }

    /// A second handle, for the thread that reads.
    pub(super) fn try_clone(&self) -> Result<Self> {
        Ok(match self {
            Self::Udp { socket, size } => Self::Udp {
                socket: socket.try_clone()?,
                size: *size,
            },
            Self::Tcp {
                stream,
                request,
                answer,
            } => Self::Tcp {
                stream: stream.try_clone()?,
                request: request.clone(),
                answer: *answer,
            },
        })
    }

    /// Sends request `number`.
    pub(super) fn send(&mut self, number: u64, buffer: &mut [u8]) -> Result<()> {
        match self {
            Self::Udp { socket, .. } => {
                buffer[..8].copy_from_slice(&number.to_le_bytes());
                socket.send(buffer).context("send")?;
            }
            Self::Tcp {
                stream, request, ..
            } => write_all(stream, request)?,
        }
        Ok(())
    }

    /// The number of the next answer; None when nothing came for [`LOST_AFTER`]. Those of a stream are not numbered: the caller counts.
    pub(super) fn receive(&mut self, buffer: &mut [u8], next: u64) -> Result<Option<u64>> {
        let begin = Instant::now();
        let mut filled = 0;
        loop {
            let received = match self {
                Self::Udp { socket, .. } => socket.recv(buffer),
                Self::Tcp { stream, .. } => stream.read(&mut buffer[filled..]),
            };
            match (received, &self) {
                (Ok(length), Self::Udp { .. }) if length >= 8 => {
                    return Ok(Some(u64::from_le_bytes(buffer[..8].try_into()?)));
                }
                (Ok(0), Self::Tcp { .. }) => bail!("the server has closed the connection"),
                (Ok(length), Self::Tcp { .. }) => {
                    filled += length;
                    if filled == buffer.len() {
                        return Ok(Some(next));
                    }
                }
                (Ok(_), Self::Udp { .. }) => {}
                (Err(e), _) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // Nobody listens on that port yet.
                (Err(e), _) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                    return Ok(None);
                }
                (Err(e), _) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    // Half an answer of a stream is followed by the other half.
                    if begin.elapsed() >= LOST_AFTER && filled == 0 {
                        return Ok(None);
                    }
                }
                (Err(e), _) => return Err(e).context("receive"),
            }
        }
    }

    /// Request `number` and its answer; false when it was lost. A late answer to an earlier request is passed over.
    pub(super) fn round_trip(&mut self, number: u64, buffer: &mut [u8]) -> Result<bool> {
        self.send(number, buffer)?;
        let begin = Instant::now();
        loop {
            match (self.receive(buffer, number)?, &self) {
                (Some(answered), _) if answered == number => return Ok(true),
                (Some(_), _) => {}
                (None, Self::Udp { .. }) => return Ok(false),
                // A stream loses nothing: its answer is late.
                (None, Self::Tcp { .. }) => ensure!(
                    begin.elapsed() < PATIENCE,
                    "no answer within {} s",
                    PATIENCE.as_secs()
                ),
            }
        }
    }
}

/// `write_all` that spins where the socket does not block.
fn write_all(stream: &mut TcpStream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e).context("send"),
        }
    }
    Ok(())
}

fn say(stream: &mut TcpStream, words: &[u8], expected: &[u8]) -> Result<()> {
    stream.write_all(words)?;
    let mut answer = vec![0; expected.len()];
    stream.read_exact(&mut answer)?;
    ensure!(
        answer == expected,
        "the server answers {:?} instead of {:?}",
        String::from_utf8_lossy(&answer),
        String::from_utf8_lossy(expected)
    );
    Ok(())
}

/// Reads one answer and returns its length.
fn http_answer(stream: &mut TcpStream) -> Result<usize> {
    const END: &[u8] = b"\r\n\r\n";
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(END) {
        ensure!(head.len() < 65536, "headers without end");
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&head).to_lowercase();
    ensure!(
        text.starts_with("http/1.1 200"),
        "the server answers {:?}",
        text.lines().next()
    );
    let length = text
        .lines()
        .find_map(|l| l.strip_prefix("content-length:"))
        .and_then(|n| n.trim().parse::<usize>().ok())
        .context("an answer without Content-Length")?;
    stream.read_exact(&mut vec![0; length])?;
    Ok(head.len() + length)
}
