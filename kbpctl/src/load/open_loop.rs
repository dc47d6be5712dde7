//! An open loop: requests are sent when they are due, whether or not earlier ones were answered, and latencies count from when a
//! request was due. A server that stalls for a second is seen by every request of that second, as its users would (no coordinated
//! omission).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use hdrhistogram::Histogram;

use super::client::{histogram, record, recorded};
use super::cost::{Cost, retransmits};
use super::exchange::{Exchange, LOST_AFTER};
use super::{ClientArgs, Measured};

/// When each request is due.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    begin: Instant,
    interval: Duration,
    /// The first request that counts.
    first: u64,
    /// The number of requests, warm-up included.
    end: u64,
}

impl Schedule {
    fn due(&self, number: u64) -> Instant {
        self.begin + Duration::from_secs_f64(self.interval.as_secs_f64() * number as f64)
    }
}

/// Measures at `rate` requests a second.
pub(super) fn measure(args: &ClientArgs, rate: f64) -> Result<Measured> {
    // A thread that sleeps until a request is due is woken up to 50 µs late unless it asks for less.
    nix::sys::prctl::set_timerslack(1).context("ask for exact timers")?;
    let mut exchange = Exchange::open(args.talk, args.to, args.size)?;
    let mut reader = exchange.try_clone()?;
    let schedule = Schedule {
        begin: Instant::now() + Duration::from_millis(10),
        interval: Duration::from_secs_f64(1.0 / rate),
        first: (args.warm_up * rate) as u64,
        end: ((args.warm_up + args.seconds) * rate) as u64,
    };
    ensure!(
        schedule.end > schedule.first,
        "no request is due in {} s at {rate} a second",
        args.seconds
    );
    let sent = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let receiver = {
        let (sent, over) = (Arc::clone(&sent), Arc::clone(&over));
        std::thread::Builder::new()
            .name("receiver".to_owned())
            .spawn(move || receive(&mut reader, schedule, &sent, &over))
            .context("start the receiving thread")?
    };
    let mut buffer = exchange.buffer();
    buffer.resize(args.size.max(8), 0);
    let mut late = histogram()?;
    let mut before = (Instant::now(), Cost::now()?, retransmits());
    for number in 0..schedule.end {
        if number == schedule.first {
            before = (Instant::now(), Cost::now()?, retransmits());
        }
        let due = schedule.due(number);
        // What is late is sent at once: the schedule does not wait.
        if let Some(wait) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(wait);
        }
        if number >= schedule.first {
            record(&mut late, due.elapsed());
        }
        exchange.send(number, &mut buffer)?;
        sent.store(number + 1, Ordering::Release);
    }
    let seconds = before.0.elapsed().as_secs_f64();
    let cost = Cost::now()?.since(before.1);
    over.store(true, Ordering::Release);
    let received = receiver
        .join()
        .map_err(|_| anyhow!("the receiving thread panicked"))?;
    let latencies = received?;
    let offered = schedule.end - schedule.first;
    Ok(Measured {
        seconds,
        histogram: recorded(&latencies),
        offered,
        achieved: latencies.len(),
        lost: offered.saturating_sub(latencies.len()),
        late_p99_ns: late.value_at_quantile(0.99),
        retransmits: retransmits().saturating_sub(before.2),
        cost,
        ..Measured::default()
    })
}

fn receive(
    exchange: &mut Exchange,
    schedule: Schedule,
    sent: &AtomicU64,
    over: &AtomicBool,
) -> Result<Histogram<u64>> {
    let mut latencies = histogram()?;
    let mut buffer = exchange.buffer();
    let mut next = 0;
    let mut silent_since = None;
    loop {
        let answered = exchange.receive(&mut buffer, next)?;
        if let Some(number) = answered {
            silent_since = None;
            // Of a stream they come in order; of datagrams some never do.
            next = number.saturating_add(1);
            if number >= schedule.first && number < schedule.end {
                record(&mut latencies, schedule.due(number).elapsed());
            }
            if next >= schedule.end {
                return Ok(latencies);
            }
        } else if over.load(Ordering::Acquire) {
            let since = *silent_since.get_or_insert_with(Instant::now);
            if next >= sent.load(Ordering::Acquire) || since.elapsed() >= LOST_AFTER {
                return Ok(latencies);
            }
        }
    }
}
