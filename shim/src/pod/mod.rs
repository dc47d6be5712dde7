//! What kbp adds to a container: a decorator around the plain task service.
//!
//! [`decorate`] returns a task service that forwards every call to the one it is given and does its own work around
//! `create`, `start`, `update`, `delete` and `shutdown`; the others it does not touch, so that `state` answers at once
//! whatever happens here. The plain service knows nothing of this module, and this module nothing of ttrpc framing.
//!
//! What a pod asks for is read in [`asked`] at its first container and holds for all of them. [`life`] is what a pod has:
//! the notifier of its sockets, the attachment of its veth, its containers. [`container`] is what one of these has while it
//! runs, [`adapt`] when a window is taken away that hurts. [`treat`] decides what a container is given and edits its bundle;
//! [`report`] is what the state file says. Everything that may block runs on threads for that.

mod adapt;
mod asked;
mod cleanup;
mod container;
mod course;
mod decorator;
mod features;
mod inner;
mod life;
mod oci_runtime;
mod others;
mod report;
mod short_way;
#[cfg(test)]
mod tests;
mod treat;
mod widen;

pub use cleanup::cleanup;
pub use decorator::decorate;

use containerd_shim_protos::ttrpc::{self, Code};

/// What the shim knows about its pod before the first request.
#[derive(Debug, Clone)]
pub struct Context {
    /// containerd namespace.
    pub namespace: String,
    /// Id that the shim was started with: the sandbox's, or the container's where there is no sandbox.
    pub pod_id: String,
}

/// Why a container is not created or started.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Refusal {
    /// Something that was written by somebody is not valid; the text names it, and what would be.
    InvalidArgument(String),
    /// `required` is set and something is missing; the text says what and why.
    Precondition(String),
    /// Something went wrong that nobody asked for.
    Failed(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::InvalidArgument(text) | Self::Precondition(text) | Self::Failed(text)) = self;
        f.pad(text)
    }
}

impl From<kbp_poller::Error> for Refusal {
    fn from(error: kbp_poller::Error) -> Self {
        use kbp_poller::Error;
        let text = format!("kbp: {error}");
        match error {
            Error::InvalidValue { .. } | Error::UnknownKey { .. } | Error::Config { .. } => {
                Self::InvalidArgument(text)
            }
            Error::Required { .. } => Self::Precondition(text),
            _ => Self::Failed(text),
        }
    }
}

impl From<crate::spec::Error> for Refusal {
    fn from(error: crate::spec::Error) -> Self {
        Self::InvalidArgument(format!("kbp: {error}"))
    }
}

impl From<Refusal> for ttrpc::Error {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Refusal::Precondition(_) => Code::FAILED_PRECONDITION,
            Refusal::Failed(_) => Code::INTERNAL,
        };
        Self::RpcStatus(ttrpc::get_status(code, refusal))
    }
}
