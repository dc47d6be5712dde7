//! A bar with the time that is left, where there is somebody to look at it.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// The bar.
pub(crate) struct Progress {
    bar: ProgressBar,
    begin: Instant,
    steps: u64,
    done: u64,
    expected: Duration,
}

impl Progress {
    /// For so many steps that are expected to take so long each. Drawn on a terminal only.
    pub(crate) fn new(steps: usize, each: Duration) -> Self {
        let bar = ProgressBar::new(steps as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            bar,
            begin: Instant::now(),
            steps: steps as u64,
            done: 0,
            expected: each,
        }
    }

    /// Says what comes now.
    pub(crate) fn step(&mut self, what: &str) {
        let left = Duration::from_secs_f64(
            self.each().as_secs_f64() * (self.steps - self.done.min(self.steps)) as f64,
        );
        self.bar
            .set_message(format!("{what}, about {} s left", left.as_secs() + 1));
        self.bar.tick();
    }

    /// Counts it.
    pub(crate) fn done(&mut self) {
        self.done += 1;
        self.bar.set_position(self.done);
    }

    /// What a step takes: as expected, and after the first ones as seen.
    fn each(&self) -> Duration {
        match u32::try_from(self.done) {
            Ok(done) if done > 0 => self.begin.elapsed() / done,
            _ => self.expected,
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
