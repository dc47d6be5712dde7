//! `containerd-shim-kbp-v1`: runtime `io.containerd.kbp.v1` of containerd.

fn main() {}
