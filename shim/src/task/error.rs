//! What a call of the task service can fail with, and the ttrpc status that containerd gets for it.

use std::path::PathBuf;

use containerd_shim_protos::ttrpc::{self, Code};

/// Result of a task operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed task operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container, exec or process of that name, or it has ended.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The task is not in a state that allows this.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request holds a value that cannot be used.
    #[error("{0}")]
    InvalidArgument(String),
    /// This node or runtime cannot do that.
    #[error("{0}")]
    Unimplemented(String),
    /// The OCI runtime failed.
    #[error("{what}: {message}")]
    Runtime {
        /// Which operation, in the words of the runc v2 shim, e.g. `OCI runtime create failed`.
        what: &'static str,
        /// Last error of the runtime's log, else what it wrote to its standard error.
        message: String,
    },
    /// A system call or file operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried on what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file of the bundle could not be understood.
    #[error("{}: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A kernel operation failed.
    #[error(transparent)]
    Kernel(#[from] kbp_kernel::Error),
}

impl Error {
    /// An [`Error::Io`] for `what`; use with `map_err`.
    pub fn io<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Runtime { .. } | Self::Io { .. } | Self::Malformed { .. } | Self::Kernel(_) => {
                Code::UNKNOWN
            }
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}
