//! Ctrl-C: the running step is given up and everything is cleaned up; more of them change nothing.

use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Whether a signal asked the demo to stop.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

/// The error of a step that was given up for a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP over for the whole process.
    pub(crate) fn listen() -> Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("take over SIGINT, SIGTERM and SIGHUP")?;
        let interrupt = Self::default();
        let flag = interrupt.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for _ in signals.forever() {
                    let again = flag.0.swap(true, Ordering::SeqCst);
                    eprintln!("\n{}", if again { "still cleaning up, please wait" } else { "interrupted: cleaning up" });
                }
            })
            .context("start the signal thread")?;
        Ok(interrupt)
    }

    /// An error once a signal came.
    pub(crate) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::SeqCst) { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Waits for a child, for at most `limit`; kills it on a signal or when the limit is over.
    pub(crate) fn wait(&self, child: &mut Child, what: &str, limit: Duration) -> Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = child.try_wait().with_context(|| format!("wait for {what}"))? {
                return Ok(status);
            }
            let interrupted = self.check();
            if interrupted.is_err() || begin.elapsed() > limit {
                let _ = child.kill();
                let _ = child.wait();
                interrupted?;
                bail!("{what} did not end within {} s", limit.as_secs());
            }
            // Coarse on purpose: the demo must not use the CPUs that it measures.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
