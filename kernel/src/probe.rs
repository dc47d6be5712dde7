//! What this kernel can do, found out by trying it on throw-away objects. Each probe leaves nothing behind.

mod link;

pub use link::{netdev_family, threaded_busy_poll, veth_napi};

use crate::Result;

/// An SQPOLL ring with static NAPI tracking can be made.
pub fn sqpoll_napi() -> Result<()> { todo!() }
/// SO_BUSY_POLL can be set on a socket.
pub fn socket_busy_poll() -> Result<()> { todo!() }
/// EPIOCSPARAMS can be set on an epoll instance.
pub fn epoll_busy_poll() -> Result<()> { todo!() }
/// A seccomp filter with a listener can be installed (in a child of its own), and its size structs are what this build expects.
pub fn seccomp_notify() -> Result<()> { todo!() }
/// Synchronous wake-up of seccomp notifications (6.6+).
pub fn seccomp_sync_wake_up() -> Result<()> { todo!() }
/// pidfd_getfd on the calling process.
pub fn pidfd_getfd() -> Result<()> { todo!() }
