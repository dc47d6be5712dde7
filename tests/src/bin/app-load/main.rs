//! A plain client for the servers of the tests and benches: every answer is compared with what it has to be, every round trip is in
//! an HDR histogram. Its connections are in one epoll instance, each with one request under way.
//!
//! `app-load echo|http|memcache|resp ADDRESS CLIENTS MILLISECONDS [RATE]` (with a rate, requests come at that many a second whether or
//! not earlier ones are answered, and wait for a free connection; their time counts from when they were due),
//! `app-load --after MILLISECONDS …` (the same without a rate; what is answered before that counts for nothing),
//! `app-load [--after MILLISECONDS] postgres ADDRESS CLIENTS MILLISECONDS` (PostgreSQL's protocol, a thread a connection, which blocks),
//! `app-load connect ADDRESS COUNT` (short connections to an echo server, one after the other), `app-load calls MILLISECONDS` (a call
//! that kbp's shim answers, and that does next to nothing itself: `connect` of a UDP socket) or
//! `app-load syscalls MILLISECONDS` (a program without sockets). Prints one JSON object.

mod postgres;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// A request without an answer after this long ends the run.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// As long as what Redis' own benchmark stores, roughly.
const VALUE: &str = "0123456789abcdef0123456789abcdef";

/// What is asked and what has to come back.
struct Protocol {
    /// Sent once on each connection, with its answer.
    first: Option<(Vec<u8>, Vec<u8>)>,
    request: Vec<u8>,
    answer: Answer,
}

enum Answer {
    /// These bytes.
    Exactly(Vec<u8>),
    /// `HTTP/1.1 200` with a body of its stated length that begins with a greeting.
    Http,
}

impl Protocol {
    fn named(name: &str) -> Result<Self> {
        let exactly = |request: &str, answer: &str| Self {
            first: None,
            request: request.into(),
            answer: Answer::Exactly(answer.into()),
        };
        Ok(match name {
            "echo" => {
                let text = VALUE.repeat(2);
                exactly(&text, &text)
            }
            "http" => Self {
                first: None,
                request: b"GET / HTTP/1.1\r\nHost: server\r\n\r\n".to_vec(),
                answer: Answer::Http,
            },
            "memcache" => Self {
                first: Some((
                    format!("set key 0 0 {}\r\n{VALUE}\r\n", VALUE.len()).into(),
                    b"STORED\r\n".to_vec(),
                )),
                ..exactly(
                    "get key\r\n",
                    &format!("VALUE key 0 {}\r\n{VALUE}\r\nEND\r\n", VALUE.len()),
                )
            },
            "resp" => Self {
                first: Some((format!("SET key {VALUE}\r\n").into(), b"+OK\r\n".to_vec())),
                ..exactly(
                    "*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n",
                    &format!("${}\r\n{VALUE}\r\n", VALUE.len()),
                )
            },
            other => bail!("{other}: not echo, http, memcache or resp"),
        })
    }
}

impl Answer {
    /// Whether `bytes` are a whole answer: None while more has to come, false when it is a wrong one.
    fn judge(&self, bytes: &[u8]) -> Option<bool> {
        match self {
            Self::Exactly(expected) if bytes.len() < expected.len() => {
                (!expected.starts_with(bytes)).then_some(false)
            }
            Self::Exactly(expected) => Some(bytes == expected),
            Self::Http => judge_http(bytes),
        }
    }
}

fn judge_http(bytes: &[u8]) -> Option<bool> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let Ok(head) = std::str::from_utf8(&bytes[..end]) else {
        return Some(false);
    };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    let Some(length) = length else {
        return Some(false);
    };
    let body = &bytes[end + 4..];
    if body.len() < length {
        return None;
    }
    Some(
        head.starts_with("HTTP/1.1 200") && body.len() == length && body.starts_with(b"hello from"),
    )
}

/// How long a load lasts, and from when on it counts.
#[derive(Debug, Clone, Copy)]
struct Span {
    lead: Duration,
    length: Duration,
}

impl Span {
    fn counts(self, begin: Instant, now: Instant) -> bool {
        now.duration_since(begin) >= self.lead
    }

    fn goes_on(self, begin: Instant, now: Instant) -> bool {
        now.duration_since(begin) < self.lead + self.length
    }

    /// For how long answers have counted.
    fn counted(self, begin: Instant) -> Duration {
        begin.elapsed().saturating_sub(self.lead)
    }
}

/// One connection with the request that is under way.
struct Connection {
    stream: TcpStream,
    answers: u64,
    sent: Instant,
    received: Vec<u8>,
}

impl Connection {
    fn open(address: &str, protocol: &Protocol) -> Result<Self> {
        let mut stream =
            TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOST_AFTER))?;
        if let Some((request, answer)) = &protocol.first {
            stream.write_all(request)?;
            let mut got = vec![0; answer.len()];
            stream.read_exact(&mut got).context("the first answer")?;
            ensure!(
                got == *answer,
                "wrong first answer: {}",
                String::from_utf8_lossy(&got)
            );
        }
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            answers: 0,
            sent: Instant::now(),
            received: Vec::with_capacity(4096),
        })
    }

    fn ask(&mut self, request: &[u8]) -> Result<()> {
        self.received.clear();
        self.sent = Instant::now();
        // A request of some bytes on an idle connection always fits.
        self.stream.write_all(request).context("send")
    }

    /// Takes what has come; whether the answer is whole.
    fn take(&mut self, answer: &Answer) -> Result<bool> {
        let mut piece = [0; 4096];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => bail!("the server closed a connection"),
                Ok(n) => self.received.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).context("receive"),
            }
            match answer.judge(&self.received) {
                Some(true) => return Ok(true),
                Some(false) => bail!("wrong answer: {}", String::from_utf8_lossy(&self.received)),
                None => {}
            }
        }
    }
}

/// Connections, and an epoll instance that watches each by its place among them.
fn connections(
    protocol: &Protocol,
    address: &str,
    clients: usize,
) -> Result<(Epoll, Vec<Connection>)> {
    ensure!((1..=10_000).contains(&clients), "{clients} clients");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    let connections: Vec<Connection> = (0..clients)
        .map(|_| Connection::open(address, protocol))
        .collect::<Result<_>>()?;
    for (n, connection) in connections.iter().enumerate() {
        epoll.add(
            connection.stream.as_fd(),
            EpollEvent::new(EpollFlags::EPOLLIN, n as u64),
        )?;
    }
    Ok((epoll, connections))
}

/// How many events there are; 0 after a signal. `under_way` requests are waited for.
fn wait(epoll: &Epoll, events: &mut [EpollEvent], under_way: usize) -> Result<usize> {
    match epoll.wait(events, EpollTimeout::try_from(LOST_AFTER)?) {
        Ok(0) => bail!("{under_way} requests without an answer"),
        Ok(count) => Ok(count),
        Err(nix::errno::Errno::EINTR) => Ok(0),
        Err(errno) => Err(errno).context("epoll_wait"),
    }
}

fn load(protocol: &Protocol, address: &str, clients: usize, span: Span) -> Result<()> {
    let (epoll, mut connections) = connections(protocol, address, clients)?;
    let mut latency = Histogram::<u64>::new(3).context("histogram")?;
    let mut events = vec![EpollEvent::empty(); clients];
    let begin = Instant::now();
    for connection in &mut connections {
        connection.ask(&protocol.request)?;
    }
    let mut under_way = clients;
    while under_way > 0 {
        let count = wait(&epoll, &mut events, under_way)?;
        for event in &events[..count] {
            let connection = &mut connections[event.data() as usize];
            if !connection.take(&protocol.answer)? {
                continue;
            }
            let now = Instant::now();
            if span.counts(begin, now) {
                latency.record(u64::try_from((now - connection.sent).as_nanos())?)?;
                connection.answers += 1;
            }
            if span.goes_on(begin, now) {
                connection.ask(&protocol.request)?;
            } else {
                under_way -= 1;
            }
        }
    }
    let elapsed = span.counted(begin);
    let fewest = connections.iter().map(|c| c.answers).min().unwrap_or(0);
    let mean = latency.len() as f64 / clients as f64;
    tell(&latency, elapsed, fewest as f64 / mean);
    Ok(())
}

/// [`load`] at a rate.
fn open_loop(
    protocol: &Protocol,
    address: &str,
    clients: usize,
    length: Duration,
    rate: u32,
) -> Result<()> {
    ensure!((1..=1_000_000).contains(&rate), "{rate} a second");
    let (epoll, mut connections) = connections(protocol, address, clients)?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    let interval = Duration::from_secs(1) / rate;
    timer.set(
        Expiration::Interval(TimeSpec::from_duration(interval)),
        TimerSetTimeFlags::empty(),
    )?;
    epoll.add(
        timer.as_fd(),
        EpollEvent::new(EpollFlags::EPOLLIN, clients as u64),
    )?;
    let mut latency = Histogram::<u64>::new(3).context("histogram")?;
    let mut events = vec![EpollEvent::empty(); clients + 1];
    let mut idle: Vec<usize> = (0..clients).collect();
    let begin = Instant::now();
    // Requests that were due by now, and those that were sent.
    let (mut due, mut sent) = (0u32, 0u32);
    let all = u32::try_from(length.as_nanos() / interval.as_nanos())?;
    while sent < all || idle.len() < clients {
        let count = wait(&epoll, &mut events, clients - idle.len())?;
        for event in &events[..count] {
            let Some(connection) = connections.get_mut(event.data() as usize) else {
                // How often it has expired is told by the clock, too.
                timer.wait()?;
                continue;
            };
            if connection.take(&protocol.answer)? {
                latency.record(u64::try_from(connection.sent.elapsed().as_nanos())?)?;
                idle.push(event.data() as usize);
            }
        }
        due = due
            .max(u32::try_from(
                begin.elapsed().as_nanos() / interval.as_nanos(),
            )?)
            .min(all);
        while sent < due
            && let Some(free) = idle.pop()
        {
            sent += 1;
            connections[free].ask(&protocol.request)?;
            connections[free].sent = begin + interval * sent;
        }
    }
    tell(&latency, begin.elapsed(), 1.0);
    Ok(())
}

/// Connections that live for one echo.
fn connect(address: &str, count: u32) -> Result<()> {
    let mut latency = Histogram::<u64>::new(3).context("histogram")?;
    let begin = Instant::now();
    for _ in 0..count {
        let from = Instant::now();
        let mut stream =
            TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
        stream.set_read_timeout(Some(LOST_AFTER))?;
        stream.write_all(VALUE.as_bytes())?;
        let mut got = [0; VALUE.len()];
        stream.read_exact(&mut got).context("receive")?;
        ensure!(got == *VALUE.as_bytes(), "wrong answer");
        drop(stream);
        latency.record(u64::try_from(from.elapsed().as_nanos())?)?;
    }
    tell(&latency, begin.elapsed(), 1.0);
    Ok(())
}

/// What a system call costs a program that makes no socket.
fn syscalls(length: Duration) -> Result<()> {
    const BATCH: u32 = 1000;
    // Per batch, in nanoseconds: a mean over the whole would show every interruption.
    let mut latency = Histogram::<u64>::new(3).context("histogram")?;
    let begin = Instant::now();
    while begin.elapsed() < length {
        let from = Instant::now();
        for _ in 0..BATCH {
            std::hint::black_box(nix::unistd::getppid());
        }
        latency.record(u64::try_from(from.elapsed().as_nanos())?)?;
    }
    tell(&latency, begin.elapsed(), 1.0);
    Ok(())
}

/// What a call that kbp's shim answers costs.
fn calls(length: Duration) -> Result<()> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").context("bind")?;
    let mut latency = Histogram::<u64>::new(3).context("histogram")?;
    let begin = Instant::now();
    while begin.elapsed() < length {
        let from = Instant::now();
        socket.connect("127.0.0.1:9").context("connect")?;
        latency.record(u64::try_from(from.elapsed().as_nanos())?)?;
    }
    tell(&latency, begin.elapsed(), 1.0);
    Ok(())
}

/// `fewest_answers`: to one connection, against the mean.
fn tell(latency: &Histogram<u64>, elapsed: Duration, fewest_answers: f64) {
    let microseconds = |quantile: f64| latency.value_at_quantile(quantile) as f64 / 1000.0;
    println!(
        "{}",
        serde_json::json!({
            "samples": latency.len(),
            "wrong": 0,
            "per_second": latency.len() as f64 / elapsed.as_secs_f64(),
            "p50_us": microseconds(0.5),
            "p99_us": microseconds(0.99),
            "p99_9_us": microseconds(0.999),
            "max_us": latency.max() as f64 / 1000.0,
            "fewest_answers": fewest_answers,
        })
    );
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let milliseconds = |text: &str| -> Result<Duration> {
        Ok(Duration::from_millis(
            text.parse()
                .with_context(|| format!("milliseconds: {text}"))?,
        ))
    };
    let (lead, words) = match words[..] {
        ["--after", lead, ref rest @ ..] => (milliseconds(lead)?, rest),
        ref all => (Duration::ZERO, all),
    };
    let span = |length: &str| -> Result<Span> {
        Ok(Span {
            lead,
            length: milliseconds(length)?,
        })
    };
    let number =
        |text: &str| -> Result<usize> { text.parse().with_context(|| format!("clients: {text}")) };
    match *words {
        ["connect", address, count] => connect(
            address,
            count.parse().with_context(|| format!("count: {count}"))?,
        ),
        ["calls", length] => calls(milliseconds(length)?),
        ["syscalls", length] => syscalls(milliseconds(length)?),
        ["postgres", address, clients, length] => {
            postgres::load(address, number(clients)?, span(length)?)
        }
        [protocol, address, clients, length, rate] => open_loop(
            &Protocol::named(protocol)?,
            address,
            number(clients)?,
            milliseconds(length)?,
            rate.parse().with_context(|| format!("rate: {rate}"))?,
        ),
        [protocol, address, clients, length] => load(
            &Protocol::named(protocol)?,
            address,
            number(clients)?,
            span(length)?,
        ),
        _ => bail!(
            "usage: app-load [--after MILLISECONDS] echo|http|memcache|resp|postgres ADDRESS CLIENTS MILLISECONDS [RATE] | connect ADDRESS COUNT | calls MILLISECONDS | syscalls MILLISECONDS"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_whole() {
        let echo = Protocol::named("echo").expect("protocol");
        assert_eq!(echo.answer.judge(&echo.request), Some(true));
        assert_eq!(echo.answer.judge(&echo.request[..5]), None);
        assert_eq!(echo.answer.judge(b"x"), Some(false));
        assert!(Protocol::named("gopher").is_err());
    }

    #[test]
    fn an_http_answer_is_200_of_its_length_with_a_greeting() {
        let of = |text: &str| judge_http(text.as_bytes());
        let good = "HTTP/1.1 200 OK\r\nDate: x\r\ncontent-length: 12\r\n\r\nhello from x";
        assert_eq!(of(good), Some(true));
        assert_eq!(of(&good[..good.len() - 1]), None);
        assert_eq!(of(&good[..20]), None);
        assert_eq!(of(&format!("{good}y")), Some(false));
        assert_eq!(of(&good.replace("200", "500")), Some(false));
        assert_eq!(of(&good.replace("hello", "hallo")), Some(false));
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\n"), Some(false));
    }
}
