//! The daemon's API `kbp.poller.v1`: its messages (`proto/poller.proto`), and ttrpc's framing around them.

mod convert;
mod frame;
mod message;

pub use convert::{degraded, pod, read_degraded, read_sockets, sockets, uplink};
pub use frame::{Frame, FrameError, Kind, REMOTE_CLOSED, REMOTE_OPEN, next_frame};
pub use message::*;

/// Full name of the service.
pub const SERVICE: &str = "kbp.poller.v1.Poller";

/// Bytes of the longest request. The longest that means anything (an id, a path, a few reasons) has a few thousand.
pub const MAX_REQUEST: usize = 64 << 10;

/// Bytes of the longest answer: ttrpc's own limit, thousands of pods.
pub const MAX_ANSWER: usize = 4 << 20;

/// Name of the daemon's socket in the state directory.
pub const SOCKET: &str = "poller.sock";

/// Name of the file in the state directory that a daemon renames into place once it serves: whoever watches the
/// directory learns that there is one, also where the socket is an init system's and always there.
pub const READY: &str = "poller.pid";

/// Codes of `google.rpc.Code` that the daemon uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// Fine.
    Ok = 0,
    /// The request says something that is not valid.
    InvalidArgument = 3,
    /// There is no such attachment.
    NotFound = 5,
    /// Somebody else has attached it.
    AlreadyExists = 6,
    /// Only root may ask.
    PermissionDenied = 7,
    /// A bound of the daemon is reached.
    ResourceExhausted = 8,
    /// `required` is set and something is missing.
    FailedPrecondition = 9,
    /// There is no such method.
    Unimplemented = 12,
    /// The node did not let it be done.
    Internal = 13,
    /// The daemon is just ending.
    Unavailable = 14,
}

impl Code {
    const ALL: [Self; 10] = [
        Self::Ok,
        Self::InvalidArgument,
        Self::NotFound,
        Self::AlreadyExists,
        Self::PermissionDenied,
        Self::ResourceExhausted,
        Self::FailedPrecondition,
        Self::Unimplemented,
        Self::Internal,
        Self::Unavailable,
    ];

    /// The code of that number; None where the daemon uses no such.
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|c| *c as i32 == number)
    }
}
