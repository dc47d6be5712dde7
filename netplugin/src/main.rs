//! The binary `kbp`; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    kbp_netplugin::main()
}
