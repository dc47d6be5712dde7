//! The frame of the benches and of the demo: a sandbox around the whole run, rounds that end, and what every report says of the machine.

pub mod clients;
pub mod cpu;
pub mod interrupt;
pub mod interval;
pub mod machine;
pub mod trial;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

pub use interrupt::Interrupt;
pub use interval::Interval;
pub use machine::Machine;

use crate::Sandbox;

/// As a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;

/// The whole `main` of a bench: runs it in a sandbox that is gone afterwards, also after Ctrl-C, and says on stderr what went wrong.
///
/// `name` is the program's, for its messages. Needs root.
pub fn in_sandbox(
    name: &str,
    run: impl FnOnce(&Sandbox, &Interrupt) -> Result<ExitCode>,
) -> ExitCode {
    let sandbox = match Sandbox::new() {
        Ok(sandbox) => Arc::new(sandbox),
        Err(error) => {
            eprintln!("{name}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let interrupt = match Interrupt::guard(&sandbox) {
        Ok(interrupt) => interrupt,
        Err(error) => {
            sandbox.cleanup();
            eprintln!("{name}: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = run(&sandbox, &interrupt);
    // The signal thread holds the sandbox too, so that its end does not depend on who drops it last.
    sandbox.cleanup();
    if interrupt.came() {
        // A program that was being run when the sandbox went may have written into its directory once more.
        let _ = std::fs::remove_dir_all(sandbox.dir());
        eprintln!("{name}: interrupted; everything it made is removed");
        return ExitCode::from(INTERRUPTED);
    }
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\n{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Rounds of a measurement, until they are done, a signal comes or the time is over.
#[derive(Debug)]
pub struct Rounds<'a> {
    interrupt: &'a Interrupt,
    begun: Instant,
    limit: Duration,
}

impl<'a> Rounds<'a> {
    /// The time begins now.
    pub fn new(interrupt: &'a Interrupt, limit: Duration) -> Self {
        Self {
            interrupt,
            begun: Instant::now(),
            limit,
        }
    }

    /// Whether the round of this number, from 0, may begin. The first one may also when the time is over, so that nothing lacks a figure.
    ///
    /// # Errors
    /// When a signal came.
    pub fn goes_on(&self, round: usize) -> Result<bool> {
        self.check()?;
        Ok(round == 0 || self.begun.elapsed() < self.limit)
    }

    /// An error when a signal came, so that what follows is left out.
    pub fn check(&self) -> Result<()> {
        if self.interrupt.came() {
            bail!("interrupted");
        }
        Ok(())
    }
}

/// The median of a figure over the rounds. Of no rounds NaN, which a table shows and no comparison takes for a result.
pub fn over<'a, T: 'a>(samples: impl IntoIterator<Item = &'a T>, field: impl Fn(&T) -> f64) -> f64 {
    kbp_plot::median(samples.into_iter().map(field)).unwrap_or(f64::NAN)
}

/// Writes `figures` as JSON, and makes the directory for it where there is none.
pub fn write_json<T: Serialize + ?Sized>(path: &Path, figures: &T) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let text = serde_json::to_string_pretty(figures).context("write JSON")? + "\n";
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_begins_also_when_the_time_is_over() {
        let interrupt = Interrupt::default();
        let rounds = Rounds::new(&interrupt, Duration::ZERO);
        assert!(rounds.goes_on(0).expect("no signal"));
        assert!(!rounds.goes_on(1).expect("no signal"));
        let rounds = Rounds::new(&interrupt, Duration::from_secs(3600));
        assert!(rounds.goes_on(1).expect("no signal"));
    }

    #[test]
    fn figures_get_the_directory_that_they_want() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("new/figures.json");
        write_json(&path, &[1, 2]).expect("write");
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.ends_with("]\n"), "{text}");
        let figures: Vec<u32> = serde_json::from_str(&text).expect("JSON");
        assert_eq!(figures, [1, 2]);
    }
}
