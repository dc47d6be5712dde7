//! The plain task service: containers by an OCI runtime, as the runc v2 shim runs them.
//!
//! [`TaskService`] answers containerd's Task service. A [`container::Container`] orders what happens to one container,
//! a [`process::Process`] is one process of it, the [`reaper::Reaper`] starts and reaps every process of the shim,
//! [`runtime::Runtime`] calls the OCI runtime, [`events::Publisher`] tells containerd what happened.
//!
//! Locks: the list of containers and the state of a process are behind plain mutexes that nobody holds while waiting,
//! so `State` always answers at once. What changes a process runs under that process' own `operation` lock.

pub mod cgroup;
pub mod container;
pub mod error;
pub mod events;
pub mod io;
pub mod launcher;
pub mod mounts;
pub mod options;
pub mod process;
pub mod reaper;
pub mod runtime;
mod service;
pub mod spec;

pub use error::{Error, Result};
pub use service::TaskService;
