//! What an OCI runtime can do with a seccomp listener, by asking it.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::features;

/// How long a runtime may take to tell.
const LIMIT: Duration = Duration::from_secs(3);
/// Longest answer.
const MAX_ANSWER: u64 = 1024 * 1024;
/// Keeps signals from taking a trapped call back while it is answered (5.19+).
const WAIT_KILLABLE: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// What matters of an OCI runtime.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OciRuntime {
    /// Why it cannot install a listener, where it says so itself.
    pub(super) unable: Option<String>,
    /// Flags for a filter with a listener that both the runtime and the kernel know.
    pub(super) flags: Vec<String>,
    /// Whether it is runc, which hands the listener over from outside the container. Others do it from inside, under the filter.
    pub(super) is_runc: bool,
}

impl OciRuntime {
    /// Asks `binary`, unless its answer is kept below `state_dir`. A runtime that does not tell, as older ones do, is tried.
    pub(super) fn ask(binary: &str, state_dir: &Path) -> Self {
        let answer = features::of(binary, state_dir, || output(binary, "features"));
        Self::read(binary, &answer.unwrap_or_default())
    }

    /// Understands the answer to `features` (runtime specification, "Features Structure").
    fn read(binary: &str, features: &[u8]) -> Self {
        let Ok(features) = serde_json::from_slice::<Value>(features) else {
            return Self::default();
        };
        let seccomp = &features["linux"]["seccomp"];
        let list = |key: &str| -> Option<Vec<&str>> {
            seccomp[key]
                .as_array()
                .map(|l| l.iter().filter_map(Value::as_str).collect())
        };
        let unable = if seccomp["enabled"] == false {
            Some(format!("{binary} was built without seccomp"))
        } else if list("actions").is_some_and(|actions| !actions.contains(&"SCMP_ACT_NOTIFY")) {
            Some(format!(
                "{binary} does not know SCMP_ACT_NOTIFY; it needs libseccomp 2.5 or later"
            ))
        } else {
            None
        };
        let flags = list("supportedFlags").unwrap_or_default();
        Self {
            unable,
            flags: flags
                .into_iter()
                .filter(|f| *f == WAIT_KILLABLE)
                .map(str::to_owned)
                .collect(),
            is_runc: features["annotations"]["org.opencontainers.runc.version"].is_string(),
        }
    }
}

/// What `binary verb` prints; None when it cannot be run, or does not end in time.
fn output(binary: &str, verb: &str) -> Option<Vec<u8>> {
    let mut child = Command::new(binary)
        .arg(verb)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let until = Instant::now() + LIMIT;
    let text = child
        .stdout
        .take()
        .and_then(|stdout| read_bounded(stdout, until));
    // Who has closed its output is about to end. The shim's reaper may be faster than this: then there is no child left.
    while let Ok(None) = child.try_wait() {
        if text.is_none() || Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    text
}

fn read_bounded(mut from: impl Read + AsFd, until: Instant) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    while (text.len() as u64) < MAX_ANSWER {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).ok()?) {
            Ok(0) => return None,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return None,
            Ok(_) => {}
        }
        match from.read(&mut piece).ok()? {
            0 => return Some(text),
            bytes => text.extend_from_slice(&piece[..bytes]),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(dir: &Path, text: &str) -> String {
        let path = dir.join("runtime");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        path.to_str().expect("UTF-8").to_owned()
    }

    #[test]
    fn features_say_what_a_runtime_can_do() {
        let can =
            br#"{"linux":{"seccomp":{"enabled":true,"actions":["SCMP_ACT_ALLOW","SCMP_ACT_NOTIFY"],
            "supportedFlags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}},
            "annotations":{"org.opencontainers.runc.version":"1.2.0"}}"#;
        let runtime = OciRuntime::read("x", can);
        assert_eq!(runtime.unable, None);
        assert_eq!(runtime.flags, [WAIT_KILLABLE]);
        assert!(runtime.is_runc);

        let off = OciRuntime::read("x", br#"{"linux":{"seccomp":{"enabled":false}}}"#);
        assert!(off.unable.expect("unable").contains("without seccomp"));
        let old = OciRuntime::read(
            "x",
            br#"{"linux":{"seccomp":{"enabled":true,"actions":["SCMP_ACT_ALLOW"]}}}"#,
        );
        assert!(old.unable.expect("unable").contains("libseccomp"));
        for silent in [&b""[..], b"unknown command features", b"{}", b"[]"] {
            assert_eq!(OciRuntime::read("x", silent), OciRuntime::default());
        }
    }

    #[test]
    fn real_runtimes_are_understood() {
        let dir = tempfile::tempdir().expect("tempdir");
        // Asked, and read again.
        for _ in 0..2 {
            let runc = OciRuntime::ask("runc", dir.path());
            assert!(runc.is_runc && runc.unable.is_none(), "{runc:?}");
            let crun = OciRuntime::ask("crun", dir.path());
            assert!(!crun.is_runc && crun.unable.is_none(), "{crun:?}");
        }
    }

    #[test]
    fn what_cannot_be_asked_is_tried() {
        let dir = tempfile::tempdir().expect("tempdir");
        let ask = |binary: &str| OciRuntime::ask(binary, dir.path());
        assert_eq!(ask("/nowhere/runc"), OciRuntime::default());
        let endless = script(dir.path(), "exec cat /dev/zero");
        assert_eq!(ask(&endless), OciRuntime::default());
    }
}
