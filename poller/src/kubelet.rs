//! CPUs that the kubelet's static CPU manager has given to containers: a worker there would take from the very pods that
//! asked for a CPU of their own.
//!
//! The file is the kubelet's checkpoint (pkg/kubelet/cm/cpumanager/state): `policyName`, `defaultCpuSet`, and `entries` by
//! pod uid and container name. With the policy `none` it assigns nothing.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use kbp_kernel::{CpuId, CpuSet};
use serde::Deserialize;

use crate::{Error, Result};

/// Where the kubelet keeps it when its root directory is the default one.
pub const DEFAULT_PATH: &str = "/var/lib/kubelet/cpu_manager_state";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    #[serde(default)]
    entries: BTreeMap<String, BTreeMap<String, String>>,
}

/// Every CPU that is given to a container, and to which; none where there is no kubelet.
///
/// # Errors
/// When the file is there but cannot be understood: then nobody knows which CPUs are free.
pub(crate) fn assigned(path: &Path) -> Result<BTreeMap<CpuId, String>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(Error::io(format!("read {}", path.display()), e)),
    };
    let malformed = |reason: String| {
        let reason = format!(
            "{reason}; it is not the CPU manager's state: set kubelet-state in kbp's config to the kubelet's file"
        );
        Error::io(
            format!("read {}", path.display()),
            io::Error::new(io::ErrorKind::InvalidData, reason),
        )
    };
    let state: State = serde_json::from_slice(&text).map_err(|e| malformed(e.to_string()))?;
    let mut assigned = BTreeMap::new();
    for (pod, containers) in &state.entries {
        for (container, cpus) in containers {
            let cpus: CpuSet = cpus
                .parse()
                .map_err(|_| malformed(format!("the CPUs {cpus:?} of container {container:?}")))?;
            for cpu in cpus.iter() {
                assigned.insert(
                    cpu,
                    format!(
                        "given to container {container} of pod {pod} by the kubelet ({}): take it out of cpus, or keep it from pods by the kubelet's reservedSystemCPUs",
                        path.display()
                    ),
                );
            }
        }
    }
    Ok(assigned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<BTreeMap<CpuId, String>> {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("cpu_manager_state");
        std::fs::write(&path, text).expect("write");
        assigned(&path)
    }

    #[test]
    fn cpus_of_containers_are_named_with_their_owner() {
        let assigned = read(
            r#"{"policyName":"static","defaultCpuSet":"0,4-7","entries":{"uid-1":{"db":"1-2"},"uid-2":{"web":"3"}},"checksum":123}"#,
        )
        .expect("valid");
        let cpus: Vec<u32> = assigned.keys().map(|c| c.0).collect();
        assert_eq!(cpus, [1, 2, 3]);
        let by = &assigned[&CpuId(3)];
        assert!(by.contains("web") && by.contains("uid-2"), "{by}");
        assert!(by.contains("reservedSystemCPUs"), "{by}");
    }

    #[test]
    fn without_entries_or_without_a_kubelet_nothing_is_assigned() {
        let none = r#"{"policyName":"none","defaultCpuSet":"","checksum":1353318690}"#;
        assert!(read(none).expect("valid").is_empty());
        let nowhere = Path::new("/nonexistent/cpu_manager_state");
        assert!(assigned(nowhere).expect("none").is_empty());
    }

    #[test]
    fn a_file_that_says_something_else_is_an_error_with_its_name() {
        for text in [
            "",
            "{",
            r#"{"entries":{"u":{"c":"x"}}}"#,
            r#"{"entries":3}"#,
        ] {
            let error = read(text).expect_err(text).to_string();
            assert!(error.contains("cpu_manager_state"), "{error}");
            assert!(error.contains("kubelet-state"), "{error}");
        }
    }
}
