//! Errors of the poller.

/// Result of the poller.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed poller operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A policy key or config value is not valid.
    #[error("{origin}: {key} = {value:?} is not valid; allowed: {allowed}")]
    InvalidValue {
        /// Where it was written: `annotation`, `runtime options`, or the config file's path.
        origin: String,
        /// The key.
        key: String,
        /// The value as it was given.
        value: String,
        /// What would be accepted.
        allowed: String,
    },
    /// A key that kbp does not know.
    #[error("{origin}: {key} is not a kbp setting; known: {known}")]
    UnknownKey {
        /// Where it was written.
        origin: String,
        /// The key.
        key: String,
        /// The known keys.
        known: String,
    },
    /// The config file could not be read or parsed.
    #[error("config {path}: {reason}")]
    Config {
        /// The file.
        path: String,
        /// Why, with line and column where the parser knows.
        reason: String,
    },
    /// A worker wants a CPU of the pool, and the node has none.
    #[error(
        "no CPU pool for a {kind} worker: set cpus in {config} (cpus = \"2-3\", or \"isolated\" where the kernel isolates CPUs), or ask for kbp.io/worker: auto or none"
    )]
    NoPool {
        /// `dedicated` or `shared`.
        kind: &'static str,
        /// The config file.
        config: String,
    },
    /// Every CPU of the pool is held or offline.
    #[error(
        "no free CPU for a {kind} worker in the pool {pool} (cpus in {config}): {holders}; enlarge the pool, or ask for kbp.io/worker: auto or none"
    )]
    NoFreeCpu {
        /// `dedicated` or `shared`.
        kind: &'static str,
        /// The pool.
        pool: String,
        /// The config file that sets it.
        config: String,
        /// What holds each of its CPUs.
        holders: String,
    },
    /// A part that the pod requires does not work here.
    #[error("kbp.io/required is true, but {part} is not active: {reason}")]
    Required {
        /// The part.
        part: crate::state::Part,
        /// Why.
        reason: String,
    },
    /// Another process has attached this pod.
    #[error("{id} is attached already, by process {owner}: end that first, or choose another id")]
    AlreadyAttached {
        /// The pod's id.
        id: String,
        /// The process.
        owner: u32,
    },
    /// The state directory could not be read or written.
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

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }
}

/// An error and its causes on one line; a cause that the line names already is not named again.
pub fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line
}
