//! Shows what is being done and how long it will still take, on stderr.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Progress through a known number of steps of about the same length.
#[derive(Debug)]
pub(crate) struct Progress {
    steps: usize,
    done: usize,
    expected: Duration,
    begin: Instant,
    terminal: bool,
}

impl Progress {
    /// `expected`: how long a step will take, until the first ones have shown it.
    pub(crate) fn new(steps: usize, expected: Duration) -> Self {
        Self {
            steps,
            done: 0,
            expected,
            begin: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// Announces a step; the one before it is done.
    pub(crate) fn step(&mut self, what: &str) {
        let left = remaining(self.steps, self.done, self.begin.elapsed(), self.expected);
        self.done += 1;
        let line = format!(
            "[{:>2}/{}] {what} · about {} left",
            self.done,
            self.steps,
            human(left)
        );
        let mut stderr = std::io::stderr();
        // On a terminal one line is rewritten; in a log each step has its own. Nothing can be done about a closed stderr.
        let _ = if self.terminal {
            write!(stderr, "\r\x1b[K{line}")
        } else {
            writeln!(stderr, "{line}")
        };
        let _ = stderr.flush();
    }

    /// Ends the line that was being rewritten.
    pub(crate) fn finish(&self) {
        if self.terminal {
            eprintln!();
        }
    }
}

fn remaining(steps: usize, done: usize, elapsed: Duration, expected: Duration) -> Duration {
    let a_step = if done == 0 {
        expected
    } else {
        elapsed / u32::try_from(done).unwrap_or(u32::MAX)
    };
    a_step * u32::try_from(steps - done.min(steps)).unwrap_or(u32::MAX)
}

/// `2 min 05 s`, `40 s`.
pub(crate) fn human(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match seconds / 60 {
        0 => format!("{seconds} s"),
        minutes => format!("{minutes} min {:02} s", seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_what_the_steps_took() {
        let seconds = Duration::from_secs;
        assert_eq!(remaining(10, 0, seconds(0), seconds(6)), seconds(60));
        assert_eq!(remaining(10, 5, seconds(40), seconds(6)), seconds(40));
        assert_eq!(remaining(10, 10, seconds(80), seconds(6)), seconds(0));
        assert_eq!(human(seconds(125)), "2 min 05 s");
        assert_eq!(human(seconds(40)), "40 s");
    }
}
