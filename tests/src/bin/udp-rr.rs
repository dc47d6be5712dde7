//! A plain UDP request/response client: one blocking socket, one request under way, every round trip in an HDR histogram.
//!
//! `udp-rr ADDRESS SECONDS|FILE [BYTES [PAUSE [WARM]]]` sleeps PAUSE µs after each answer (`~PAUSE`: that on average, at random with exponential
//! spread), and prints one JSON object: counts, and the latency in µs at a list of quantiles. What it does in its first WARM seconds,
//! which come before the others, does not count. Given the absolute path of a FILE instead, it goes on until that is there.

use std::net::UdpSocket;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;

/// A datagram that has not come back after this long is counted as lost. Generous, since the server may wait for a CPU.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// The end of a run that waits for a file.
const LONGEST: Duration = Duration::from_secs(600);
/// How many round trips there are between two looks for that file.
const LOOK_EVERY: u64 = 100;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, seconds, rest @ ..] = arguments.as_slice() else {
        bail!("usage: udp-rr ADDRESS SECONDS|FILE [BYTES [PAUSE [WARM]]]");
    };
    let given = |at: usize, default: &'static str| rest.get(at).map_or(default, String::as_str);
    let (bytes, pause, warm) = (given(0, "64"), given(1, "0"), given(2, "0"));
    let warm: f64 = warm.parse().with_context(|| format!("warm: {warm}"))?;
    let mut pauses = Pauses::read(pause)?;
    let (seconds, file) = match seconds.strip_prefix('/') {
        Some(_) => (LONGEST.as_secs_f64(), Some(Path::new(seconds))),
        None => {
            let number = seconds.parse();
            (number.with_context(|| format!("seconds: {seconds}"))?, None)
        }
    };
    let bytes: usize = bytes.parse().with_context(|| format!("bytes: {bytes}"))?;
    ensure!(
        (8..=65507).contains(&bytes),
        "bytes: {bytes} is not between 8 (a sequence number) and 65507"
    );

    let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
    socket
        .connect(address)
        .with_context(|| format!("connect {address}"))?;
    socket.set_read_timeout(Some(LOST_AFTER))?;

    let mut latency = Histogram::<u64>::new(3).context("histogram")?;
    let mut request = vec![0u8; bytes];
    let mut answer = vec![0u8; bytes];
    let mut lost = 0u64;
    let begin = Instant::now() + Duration::from_secs_f64(warm);
    let end = begin + Duration::from_secs_f64(seconds);
    let mut sequence = 0u64;
    while Instant::now() < end {
        if let Some(file) = file
            && sequence.is_multiple_of(LOOK_EVERY)
            && file.exists()
        {
            break;
        }
        request[..8].copy_from_slice(&sequence.to_le_bytes());
        let sent = Instant::now();
        socket
            .send(&request)
            .with_context(|| format!("send to {address}"))?;
        match receive(&socket, &mut answer, sequence)? {
            _ if sent < begin => {}
            true => latency.record(u64::try_from(sent.elapsed().as_nanos())?)?,
            false => lost += 1,
        }
        sequence += 1;
        if let Some(pause) = pauses.next() {
            std::thread::sleep(pause);
        }
    }
    let elapsed = begin.elapsed().as_secs_f64();
    ensure!(
        !latency.is_empty(),
        "no answer from {address}: {lost} datagrams lost"
    );

    let microseconds = |nanoseconds: u64| nanoseconds as f64 / 1000.0;
    // Every halving of the tail, so that the whole curve can be drawn, and the figures that are usually asked for.
    let halvings = (1..=16).map(|k| 1.0 - 0.5f64.powi(k));
    let curve: Vec<(f64, f64)> = halvings
        .map(|q| (q, microseconds(latency.value_at_quantile(q))))
        .collect();
    println!(
        "{}",
        serde_json::json!({
            "samples": latency.len(),
            "lost": lost,
            "seconds": elapsed,
            "p50_us": microseconds(latency.value_at_quantile(0.5)),
            "p99_us": microseconds(latency.value_at_quantile(0.99)),
            "p99_9_us": microseconds(latency.value_at_quantile(0.999)),
            "max_us": microseconds(latency.max()),
            "curve": curve,
        })
    );
    Ok(())
}

/// How long to sleep after each answer.
struct Pauses {
    mean: Duration,
    /// State of a generator of random numbers (xorshift); None: every pause is the mean.
    random: Option<u64>,
}

impl Pauses {
    fn read(text: &str) -> Result<Self> {
        let (number, random) = match text.strip_prefix('~') {
            // Any number but 0; always the same, so that arms are given the same pauses.
            Some(number) => (number, Some(0x9e37_79b9_7f4a_7c15)),
            None => (text, None),
        };
        let mean = number.parse().with_context(|| format!("pause: {text}"))?;
        Ok(Self {
            mean: Duration::from_micros(mean),
            random,
        })
    }

    /// None: no pause.
    fn next(&mut self) -> Option<Duration> {
        if self.mean.is_zero() {
            return None;
        }
        let Some(state) = &mut self.random else {
            return Some(self.mean);
        };
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        // In (0, 1]: its logarithm is finite.
        let uniform = ((*state >> 11) + 1) as f64 / (1u64 << 53) as f64;
        Some(self.mean.mul_f64(-uniform.ln()))
    }
}

/// Waits for the answer to `sequence`; false when it is lost. A late answer to an earlier request is passed over.
fn receive(socket: &UdpSocket, answer: &mut [u8], sequence: u64) -> Result<bool> {
    loop {
        match socket.recv(answer) {
            Ok(length) if length >= 8 && answer[..8] == sequence.to_le_bytes() => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // Nobody listens on that port yet.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                return Ok(false);
            }
            Err(error) => return Err(error).context("recv"),
        }
    }
}
