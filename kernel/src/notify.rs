//! The supervisor's side of seccomp user notification (seccomp_unotify(2)).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::Result;

/// A trapped system call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub struct Notification {
    /// Cookie of this call.
    pub id: u64,
    /// Thread id of the caller in the supervisor's pid namespace; 0 when it is not visible from here.
    pub tid: u32,
    /// System call number of the caller's architecture.
    pub syscall: i32,
    /// `AUDIT_ARCH_*` of the caller.
    pub arch: u32,
    /// Arguments as passed; pointers are the caller's.
    pub args: [u64; 6],
}

/// What became of waiting for a notification.
#[derive(Debug)]
pub enum Received {
    /// A call waits for an answer.
    Call(Notification),
    /// The caller died before it was read: wait again.
    Gone,
    /// Nobody uses the filter any more.
    Closed,
}

/// The listener of one filter.
#[derive(Debug)]
pub struct Listener { fd: OwnedFd }

impl Listener {
    /// Takes over the fd that runc sent and asks for synchronous wake-ups where the kernel has them (6.6+); without them a call costs one scheduler trip more.
    pub fn new(fd: OwnedFd) -> Self { Self { fd } }
    /// Waits for the next notification without blocking: call when poll(2) says readable or hung up.
    pub fn receive(&self) -> Result<Received> { todo!() }
    /// Whether the call still waits (SECCOMP_IOCTL_NOTIF_ID_VALID); check after opening anything of the caller by its pid.
    pub fn is_valid(&self, _id: u64) -> bool { todo!() }
    /// Lets the call run as if it had not been trapped. Ok also when the caller is gone.
    pub fn continue_call(&self, _id: u64) -> Result<()> { todo!() }
    /// Puts a copy of `fd` into the caller as the result of its call, atomically (ADDFD with SEND, 5.14+). On error the call still waits for an answer.
    pub fn answer_with_fd(&self, _id: u64, _fd: BorrowedFd<'_>, _close_on_exec: bool) -> Result<()> { todo!() }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> { self.fd.as_fd() }
}
