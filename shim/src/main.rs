//! `containerd-shim-kbp-v1`: runtime `io.containerd.kbp.v1` of containerd.

use std::process::ExitCode;

fn main() -> ExitCode {
    kbp_shim::bootstrap::main()
}
