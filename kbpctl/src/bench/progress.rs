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
        let left = left(self.steps, self.done, self.begin.elapsed(), self.expected);
        self.bar
            .set_message(format!("{what}, about {} s left", left.as_secs() + 1));
        self.bar.tick();
    }

    /// Counts it.
    pub(crate) fn done(&mut self) {
        self.done += 1;
        self.bar.set_position(self.done);
    }
}

/// The time that is left: a step takes what is expected, and after the first ones what was seen.
fn left(steps: u64, done: u64, elapsed: Duration, expected: Duration) -> Duration {
    let each = match u32::try_from(done) {
        Ok(done) if done > 0 => elapsed / done,
        _ => expected,
    };
    Duration::from_secs_f64(each.as_secs_f64() * steps.saturating_sub(done) as f64)
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_what_the_steps_took() {
        let seconds = Duration::from_secs;
        assert_eq!(left(10, 0, seconds(0), seconds(6)), seconds(60));
        assert_eq!(left(10, 5, seconds(40), seconds(6)), seconds(40));
        assert_eq!(left(10, 10, seconds(80), seconds(6)), seconds(0));
    }
}
