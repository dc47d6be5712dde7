//! What can go wrong between kbp and the kernel.

use std::path::PathBuf;

use crate::IfIndex;

/// Result of a kernel operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed kernel operation. Every message names what was tried and on what;
/// the kernel's own errno, and its extended acknowledgement where it gave one, are kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Syscall {
        /// What was tried on what, e.g. `open network namespace /run/netns/a`.
        what: String,
        /// The kernel's errno.
        source: std::io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("{what}: {}{}", std::io::Error::from_raw_os_error(*errno), extack.as_deref().map(|t| format!(" (kernel: {t})")).unwrap_or_default())]
    Netlink {
        /// What was tried on what, e.g. `create veth kbpa1b2c3d4`.
        what: String,
        /// The kernel's errno, positive.
        errno: i32,
        /// Text of the extended acknowledgement (`NLMSGERR_ATTR_MSG`).
        extack: Option<String>,
    },
    /// The kernel's answer could not be read.
    #[error("{what}: unexpected answer from the kernel: {detail}")]
    Protocol {
        /// What was tried on what.
        what: String,
        /// What is wrong with the answer.
        detail: String,
    },
    /// The thing asked for does not exist.
    #[error("{what} not found")]
    NotFound {
        /// The missing thing.
        what: String,
    },
    /// A value is outside what the kernel or kbp accepts.
    #[error("{name} {value:?} is not valid: {expected}")]
    Invalid {
        /// Name of the value.
        name: &'static str,
        /// The value as it was given.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// The kernel lacks a feature, found out by trying it.
    #[error("{feature} is not available: {reason}")]
    Unsupported {
        /// The feature.
        feature: &'static str,
        /// How that was found out.
        reason: String,
    },
    /// A file under /proc or /sys could not be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    /// The errno behind this error, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Syscall { source, .. } | Self::File { source, .. } => source.raw_os_error(),
            Self::Netlink { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// What an answer about `link` comes to: the kernel's ENODEV means that there is no such link.
    pub(crate) fn of_link(self, link: IfIndex) -> Self {
        match self.errno() {
            Some(libc::ENODEV) => Self::NotFound {
                what: format!("link {link}"),
            },
            _ => self,
        }
    }
}
