//! Real programs of the machine in containers: servers with their loads, for the tests of the sockets and for the benches.
//!
//! Their root is the machine's own `/usr` and `/etc`, read-only, so that nothing of a large runtime has to be copied; what they
//! write goes to a directory of their own.

mod catalogue;
mod figures;
mod node;
mod postgres;

pub use catalogue::{App, PORT};
pub use figures::Figures;
pub use node::{AppNode, AppPod, Guest, processes};
