//! `cargo +nightly fuzz run config --fuzz-dir fuzz/shim`
#![no_main]

#[path = "../../../shim/tests/hostile/inputs.rs"]
#[allow(dead_code)]
mod inputs;

libfuzzer_sys::fuzz_target!(|data: &[u8]| inputs::config(data));
