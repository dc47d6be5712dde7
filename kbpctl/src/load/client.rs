//! The client: a closed loop, which asks again when the answer is there; the others are in modules of their own.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use super::cost::{Cost, retransmits};
use super::exchange::Exchange;
use super::{ClientArgs, Measured, Talk, flood, open_loop};

/// Longest latency that is told apart, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;

/// Measures what it is told to.
pub(super) fn run(args: &ClientArgs) -> Result<Measured> {
    match (args.talk, args.rate) {
        (Talk::UdpSink, _) => flood::measure(args),
        (Talk::TcpSink, _) => stream(args),
        (_, Some(rate)) => open_loop::measure(args, rate),
        (_, None) => closed_loop(args),
    }
}

/// Latencies from 1 ns to a minute, to three digits.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, LONGEST_NS, 3).context("histogram")
}

/// What is longer than a minute is counted as a minute.
pub(super) fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    let ns = u64::try_from(latency.as_nanos()).unwrap_or(LONGEST_NS);
    histogram.saturating_record(ns.max(1));
}

/// The histogram as values and counts.
pub(super) fn recorded(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram
        .iter_recorded()
        .map(|v| (v.value_iterated_to(), v.count_at_value()))
        .collect()
}

fn closed_loop(args: &ClientArgs) -> Result<Measured> {
    let mut exchange = Exchange::open(args.talk, args.to, args.size)?;
    if args.spin {
        exchange.spin()?;
    }
    let mut buffer = exchange.buffer();
    let mut number = 0;
    let mut latencies = histogram()?;
    let mut lost = 0;
    let mut ask = |seconds: f64, latencies: &mut Histogram<u64>, lost: &mut u64| -> Result<u64> {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let first = number;
        loop {
            let sent = Instant::now();
            if sent >= end {
                return Ok(number - first);
            }
            match exchange.round_trip(number, &mut buffer)? {
                true => record(latencies, sent.elapsed()),
                false => *lost += 1,
            }
            number += 1;
        }
    };
    ask(args.warm_up, &mut latencies, &mut lost)?;
    latencies.reset();
    lost = 0;
    let again = retransmits();
    let (begin, cost) = (Instant::now(), Cost::now()?);
    let offered = ask(args.seconds, &mut latencies, &mut lost)?;
    let seconds = begin.elapsed().as_secs_f64();
    let cost = Cost::now()?.since(cost);
    ensure!(
        !latencies.is_empty(),
        "no answer from {}: {lost} requests lost",
        args.to
    );
    Ok(Measured {
        seconds,
        histogram: recorded(&latencies),
        offered,
        achieved: latencies.len(),
        lost,
        retransmits: retransmits().saturating_sub(again),
        cost,
        ..Measured::default()
    })
}

/// One TCP stream as fast as it goes. Bytes are counted where they are written: what is still under way at the end is a socket buffer.
fn stream(args: &ClientArgs) -> Result<Measured> {
    const BLOCK: usize = 128 << 10;
    let until = Instant::now() + Duration::from_secs(10);
    let mut stream = loop {
        match TcpStream::connect(args.to) {
            Ok(stream) => break stream,
            Err(e) if Instant::now() >= until => {
                return Err(e).with_context(|| format!("connect {}", args.to));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let block = vec![0u8; BLOCK];
    let mut write = |seconds: f64| -> Result<u64> {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let mut bytes = 0;
        while Instant::now() < end {
            stream.write_all(&block).context("send")?;
            bytes += BLOCK as u64;
        }
        Ok(bytes)
    };
    write(args.warm_up)?;
    let again = retransmits();
    let (begin, cost) = (Instant::now(), Cost::now()?);
    let bytes = write(args.seconds)?;
    Ok(Measured {
        seconds: begin.elapsed().as_secs_f64(),
        cost: Cost::now()?.since(cost),
        bytes,
        retransmits: retransmits().saturating_sub(again),
        ..Measured::default()
    })
}
