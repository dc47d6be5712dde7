//! `kbpctl doctor` on that kernel: it names what is missing there, and nothing else of the kernel.

use std::collections::BTreeMap;

use kbp_tests::binaries::kbp_binary;
use kbp_tests::command;
use serde_json::Value;

use crate::known::Known;

const LIMIT: std::time::Duration = std::time::Duration::from_secs(120);

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn doctor_names_what_the_kernel_lacks_in_a_guest() {
    let known = Known::here();
    let kbpctl = kbp_binary("kbpctl").expect("kbpctl");
    let mut doctor = std::process::Command::new(kbpctl);
    doctor
        .args(["doctor", "--json"])
        .env("KBP_CONFIG", "/nonexistent");
    let output = command::run(doctor, LIMIT).expect("doctor");
    let report: Value = serde_json::from_str(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("checks");
    let verdicts: BTreeMap<&str, &str> = checks
        .iter()
        .filter_map(|c| Some((c["name"].as_str()?, c["verdict"].as_str()?)))
        .collect();
    // SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP came with 6.6, before napi-get.
    for (name, there) in [
        ("veth-napi", true),
        ("socket-busy-poll", true),
        ("seccomp-notify", true),
        ("pidfd-getfd", true),
        ("netdev-family", known.napi_ids),
        ("epoll-busy-poll", known.epoll),
        ("sqpoll-napi", known.sqpoll),
        ("seccomp-sync-wake-up", known.napi_ids),
    ] {
        let expected = if there { "ok" } else { "degraded" };
        assert_eq!(verdicts.get(name), Some(&expected), "{name}: {output}");
    }
    let threads = checks.iter().find(|c| c["name"] == "threaded-busy-poll");
    let found = threads.and_then(|c| c["found"].as_str()).expect("a line");
    assert_eq!(
        found.contains("has no threaded busy polling"),
        !known.kthread,
        "{found}"
    );
}
