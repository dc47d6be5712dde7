//! Threads that wait for nothing but timers, as many servers have them beside those that serve, and how late they are.
//!
//! `ticks THREADS SECONDS`: the first thread wakes up every millisecond, the second every two, and so on. Prints one JSON object.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [threads, seconds] = arguments.as_slice() else {
        bail!("usage: ticks THREADS SECONDS");
    };
    let threads: u64 = threads
        .parse()
        .with_context(|| format!("threads: {threads}"))?;
    ensure!(
        (1..=1000).contains(&threads),
        "threads: {threads} is not between 1 and 1000"
    );
    let seconds: f64 = seconds
        .parse()
        .with_context(|| format!("seconds: {seconds}"))?;
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let ticking: Vec<_> = (1..=threads)
        .map(|ms| std::thread::spawn(move || tick(Duration::from_millis(ms), end)))
        .collect();
    let mut late = Histogram::<u64>::new(3).context("histogram")?;
    for thread in ticking {
        let Ok(own) = thread.join() else {
            bail!("a thread panicked");
        };
        late.add(own?).context("histogram")?;
    }
    let microseconds = |quantile| late.value_at_quantile(quantile) as f64 / 1000.0;
    println!(
        "{}",
        serde_json::json!({
            "ticks": late.len(),
            "p50_us": microseconds(0.5),
            "p99_us": microseconds(0.99),
            "max_us": late.max() as f64 / 1000.0,
        })
    );
    Ok(())
}

/// How late each tick was, in ns.
fn tick(every: Duration, end: Instant) -> Result<Histogram<u64>> {
    let mut late = Histogram::<u64>::new(3).context("histogram")?;
    while Instant::now() < end {
        let due = Instant::now() + every;
        std::thread::sleep(every);
        late.record(u64::try_from(due.elapsed().as_nanos())?)?;
    }
    Ok(late)
}
