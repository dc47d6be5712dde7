//! The shim as containerd uses it, without containerd: its binary, its Task service, its events.
//!
//! Needs root, runc and busybox-static.

mod bootstrap;
mod hostile;
mod lifecycle;
mod mounts;
#[path = "../random/mod.rs"]
mod random;
mod runtimes;
mod streams;
mod support;
