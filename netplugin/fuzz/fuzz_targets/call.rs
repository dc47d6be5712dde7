//! Whatever stdin and environment are, kbp answers with a valid error object, or with what it says.
//!
//! The input is the six variables of a call, each ended by a NUL, and then stdin. In `netplugin/`, with cargo-fuzz and a
//! nightly toolchain: `cargo +nightly fuzz run call`.

#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const VARIABLES: [&str; 6] = [
    "CNI_COMMAND",
    "CNI_CONTAINERID",
    "CNI_NETNS",
    "CNI_IFNAME",
    "CNI_PATH",
    "CNI_ARGS",
];

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(VARIABLES.len() + 1, |byte| *byte == 0);
    let variables = VARIABLES.map(|name| (name, parts.next()));
    let input = parts.next().unwrap_or_default();
    let answer = kbp_netplugin::rehearse(
        |wanted| {
            let (_, value) = variables.iter().find(|(name, _)| *name == wanted)?;
            value.map(|bytes| OsString::from_vec(bytes.to_vec()))
        },
        input,
    );
    let Err(error) = answer else {
        return;
    };
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
    assert!(error["code"].as_u64().is_some_and(|code| code > 0));
    assert!(!text("msg").is_empty() && !text("cniVersion").is_empty());
});
