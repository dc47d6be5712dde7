//! What can go wrong in the harness.

/// Result of the harness.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed step of a test's set-up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that the test needs is not on this machine.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// What is missing.
        what: String,
        /// How to get it.
        remedy: String,
    },
    /// A program did not start, failed or spoke nonsense.
    #[error("{command}: {reason}")]
    Command {
        /// The command line.
        command: String,
        /// Exit status and error output, or why it did not start.
        reason: String,
    },
    /// Something did not happen in time.
    #[error("{what}: not within {seconds} s{detail}")]
    Timeout {
        /// What was awaited.
        what: String,
        /// For how long.
        seconds: f64,
        /// What was there instead; empty or starting with `: `.
        detail: String,
    },
    /// A file could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was tried on which file.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] kbp_kernel::Error),
}

/// Names the file when an I/O operation on it failed.
pub(crate) trait IoContext<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what(),
            source,
        })
    }
}
