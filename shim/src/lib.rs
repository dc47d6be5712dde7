//! The shim of kbp. containerd starts it, speaks the Task service with it, and
//! gets everything that the stock runc v2 shim does.
//!
//! [`bootstrap`] is the contract of the binary with containerd (`start`, `delete`,
//! the server process), [`task`] the plain task service.

pub mod bootstrap;
pub mod task;
