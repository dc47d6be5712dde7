//! Datagrams as many as will go, or at a rate.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cost::Cost;
use super::{ClientArgs, FloodArgs, Measured};

/// Asks a sink for its count.
pub(super) const REPORT: &[u8; 8] = b"report!!";
/// A rate is kept by sending what is due this often.
const TICK: Duration = Duration::from_millis(1);

/// Paces by the clock: what is late is sent at once.
struct Pace {
    begin: Instant,
    rate: Option<f64>,
    sent: u64,
}

impl Pace {
    fn new(rate: Option<f64>) -> Self {
        Self {
            begin: Instant::now(),
            rate,
            sent: 0,
        }
    }

    /// How many may be sent now; waits when none may.
    fn due(&mut self) -> u64 {
        /// Between two looks at the clock.
        const BURST: u64 = 64;
        let Some(rate) = self.rate else {
            return BURST;
        };
        let due = (self.begin.elapsed().as_secs_f64() * rate) as u64;
        if due <= self.sent {
            std::thread::sleep(TICK);
            return 0;
        }
        (due - self.sent).min(BURST)
    }
}

/// Sends until it is killed.
pub(super) fn forever(args: &FloodArgs) -> Result<()> {
    let socket = connect(args.to)?;
    let datagram = vec![0u8; args.size];
    let mut pace = Pace::new(Some(args.rate));
    loop {
        for _ in 0..pace.due() {
            // A server that is not there yet, or a full queue: the flood goes on.
            let _ = socket.send(&datagram);
            pace.sent += 1;
        }
    }
}

/// Sends for the time of a measurement; the sink tells how many arrived.
pub(super) fn measure(args: &ClientArgs) -> Result<Measured> {
    let socket = connect(args.to)?;
    let datagram = vec![0u8; args.size.max(REPORT.len() + 1)];
    let mut pace = Pace::new(args.rate);
    let mut send = |seconds: f64| {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let before = pace.sent;
        while Instant::now() < end {
            for _ in 0..pace.due() {
                let _ = socket.send(&datagram);
                pace.sent += 1;
            }
        }
        pace.sent - before
    };
    // The server may not listen yet.
    count(&socket)?;
    send(args.warm_up);
    let before = count(&socket)?;
    let (begin, cost) = (Instant::now(), Cost::now()?);
    let offered = send(args.seconds);
    let seconds = begin.elapsed().as_secs_f64();
    let cost = Cost::now()?.since(cost);
    // What is in the queues before the question is counted with it.
    let achieved = count(&socket)?.saturating_sub(before);
    Ok(Measured {
        seconds,
        offered,
        achieved,
        lost: offered.saturating_sub(achieved),
        cost,
        ..Measured::default()
    })
}

fn connect(to: std::net::SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
    socket
        .connect(to)
        .with_context(|| format!("connect {to}"))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    Ok(socket)
}

fn count(socket: &UdpSocket) -> Result<u64> {
    let mut answer = [0; 64];
    for _ in 0..50 {
        // The question may be lost in the flood.
        let _ = socket.send(REPORT);
        match socket.recv(&mut answer) {
            Ok(8) => {
                let count = u64::from_le_bytes(answer[..8].try_into()?);
                // A second answer to a question that was thought lost would be taken for the next one's.
                socket.set_nonblocking(true)?;
                while socket.recv(&mut answer).is_ok() {}
                socket.set_nonblocking(false)?;
                return Ok(count);
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    anyhow::bail!("the server does not tell how many datagrams arrived")
}
