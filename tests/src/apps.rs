//! Real programs of the machine in containers: servers with their loads, for the tests of the sockets and for the benches.
//!
//! Their root is the machine's own `/usr` and `/etc`, read-only, so that nothing of a large runtime has to be copied; what they
//! write goes to a directory of their own.

mod catalogue;
mod node;

pub use catalogue::{App, Figures, PORT};
pub use node::{AppNode, AppPod, Guest, processes};
