//! The shim of kbp. containerd starts it, speaks the Task service with it, and
//! gets everything that the stock runc v2 shim does.
//!
//! [`bootstrap`] is the contract of the binary with containerd (`start`, `delete`,
//! the server process), [`task`] the plain task service. [`pod`] decorates that one with
//! what kbp adds: [`spec`] edits the bundle, [`sockets`] answers the trapped calls.

pub mod bootstrap;
pub mod pod;
pub mod sockets;
pub mod spec;
pub mod task;
