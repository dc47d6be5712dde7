//! Harness of the end-to-end tests: a node of its own for every test.
//!
//! A [`Sandbox`] is a private directory plus a private network and mount namespace: to the software inside it looks like a machine
//! whose `/run` is empty. A [`Containerd`] runs there with its own root, state and socket, in the version that the test asks for;
//! [`Network`] calls CNI plugins there as libcni would; [`Rootfs`] builds images from the machine's own binaries. The machine's own
//! interfaces, containerd and `/run` are never touched. When the owner of a sandbox goes away, in whatever way, all of it goes.
//!
//! ```no_run
//! use kbp_tests::{Containerd, Generation, Rootfs, Run, Runtime, Sandbox};
//!
//! # fn main() -> kbp_tests::Result<()> {
//! let sandbox = Sandbox::new()?;
//! let rootfs = Rootfs::busybox(&sandbox.dir().join("rootfs"))?;
//! let containerd = Containerd::start(&sandbox, Generation::Machine)?;
//! let output = containerd.run(&Run::new("hello", &rootfs, ["echo", "hello"]).runtime(Runtime::Kbp))?;
//! assert_eq!(output.stdout, "hello\n");
//! # Ok(())
//! # }
//! ```

pub mod apps;
pub mod bench;
pub mod binaries;
pub mod browser;
pub mod command;
pub mod containerd;
pub mod error;
pub mod events;
pub mod fixtures;
pub mod grpc;
pub mod lab;
pub mod leftovers;
pub mod network;
mod not_tested;
pub mod rootfs;
pub mod run;
pub mod sandbox;
pub mod sockets;
pub mod tasks;
pub mod terminal;
pub mod vm;

pub use command::{Output, running, wait_until};
pub use containerd::{Containerd, Generation, Settings};
pub use error::{Error, Result};
pub use events::Events;
pub use lab::{Arm, Lab, Oci, Pod};
pub use leftovers::Leftovers;
pub use network::{Attached, Network, PodNetns};
pub use not_tested::not_tested;
pub use rootfs::Rootfs;
pub use run::{Run, Runtime};
pub use sandbox::Sandbox;
pub use sockets::Sockets;
pub use tasks::Tasks;
pub use terminal::Terminal;
pub use vm::Kernel;
