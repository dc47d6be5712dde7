//! The bundle's `config.json`, as far as kbp reads and edits it.
//!
//! It is kept as JSON values, not as a typed specification: whatever this version does not know survives an edit, in its
//! place. [`bundle`] reads, writes and restores the file, [`seccomp`] merges the listener into the container's profile.

pub mod bundle;
pub mod seccomp;

pub use bundle::{CpuLimits, Network, Spec};

use std::path::PathBuf;

/// Result of reading or editing a specification.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with a `config.json`, or with our edit of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read or written.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// `read`, `write` or `restore`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no JSON.
    #[error("{} is not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A member is not of the type that the runtime specification gives it.
    #[error("{member} of config.json is not {expected}")]
    Malformed {
        /// The member, e.g. `linux.seccomp.syscalls[3].names`.
        member: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Somebody else already supervises the container's system calls; there can be only one.
    #[error(
        "the container already has a seccomp listener ({0}), and the kernel allows one; remove it to have kbp set up the sockets"
    )]
    Conflict(String),
    /// The runtime could not hand over a listener from inside the container's profile.
    #[error(
        "the OCI runtime needs the call {0} to hand over a seccomp listener, and the container's seccomp profile does not allow it plainly; allow it there"
    )]
    RuntimeNeeds(&'static str),
}
