//! The binary `kbp`; see the library.
//!
//! It is started for every call, so it does without what the standard library does for programs that stay.
#![no_main]

kbp_kernel::short_lived_main!(kbp_netplugin::main);
