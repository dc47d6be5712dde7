//! The contract of the binary with containerd: `start`, `delete`, `-info`, and the server process.
