//! Ctrl-C: everything is cleaned up at once; more of them change nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::Sandbox;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Whether a signal asked the program to stop, and whether that is done.
#[derive(Debug, Default)]
pub struct Interrupt {
    came: AtomicBool,
    cleaned: Mutex<bool>,
    changed: Condvar,
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP over for the whole process: the first removes the sandbox with everything in it, which also
    /// ends whatever the main thread waits for.
    pub fn guard(sandbox: &Arc<Sandbox>) -> Result<Arc<Self>> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
            .context("take over SIGINT, SIGTERM and SIGHUP")?;
        let interrupt = Arc::new(Self::default());
        let (flag, sandbox) = (Arc::clone(&interrupt), Arc::clone(sandbox));
        // Its own thread, because it must answer while the clean-up runs.
        let cleaner = move |sandbox: Arc<Sandbox>, flag: Arc<Self>| {
            sandbox.cleanup();
            *flag.cleaned.lock().unwrap_or_else(PoisonError::into_inner) = true;
            flag.changed.notify_all();
        };
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for _ in signals.forever() {
                    if flag.came.swap(true, Ordering::SeqCst) {
                        eprintln!("\nstill cleaning up, please wait");
                        continue;
                    }
                    eprintln!("\ninterrupted: cleaning up");
                    let (sandbox, flag) = (Arc::clone(&sandbox), Arc::clone(&flag));
                    std::thread::spawn(move || cleaner(sandbox, flag));
                }
            })
            .context("start the signal thread")?;
        Ok(interrupt)
    }

    /// Whether a signal came; returns only after the clean-up that it started.
    pub fn came(&self) -> bool {
        if !self.came.load(Ordering::SeqCst) {
            return false;
        }
        let mut cleaned = self.cleaned.lock().unwrap_or_else(PoisonError::into_inner);
        while !*cleaned {
            cleaned = self
                .changed
                .wait(cleaned)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}
