//! The few things that the plain shim reads from a bundle's config.json.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::error::{Error, Result};

/// What matters of an OCI runtime specification; everything else is the runtime's.
#[derive(Debug, Default, Deserialize)]
pub struct Spec {
    /// Annotations.
    #[serde(default)]
    pub annotations: HashMap<String, String>,
    /// The Linux part.
    #[serde(default)]
    pub linux: Option<Linux>,
}

/// The Linux part of [`Spec`].
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Linux {
    /// cgroup of the container: a path, or `slice:prefix:name` for systemd.
    #[serde(default)]
    pub cgroups_path: String,
    /// Namespaces to make or to join.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
}

/// A namespace in [`Linux`].
#[derive(Debug, Deserialize)]
pub struct Namespace {
    /// `pid`, `network`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The namespace to join; a new one when empty.
    #[serde(default)]
    pub path: String,
}

impl Spec {
    /// Reads `config.json` of a bundle.
    pub fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(Error::io(format!(
            "read {} (the shim is to be started in a container's bundle)",
            path.display()
        )))?;
        serde_json::from_slice(&text).map_err(|error| Error::Malformed {
            path,
            detail: format!("{error}: an OCI runtime spec in JSON is expected"),
        })
    }

    /// Whether the container has a pid namespace of its own, so that the kernel ends all its processes with its init.
    pub fn has_own_pid_namespace(&self) -> bool {
        self.linux
            .iter()
            .flat_map(|linux| &linux.namespaces)
            .any(|namespace| namespace.kind == "pid" && namespace.path.is_empty())
    }

    /// Whether systemd is to make the cgroup: its path is one of systemd's, and systemd runs (sd_booted(3)). On a node without
    /// systemd the OCI runtimes take such a path for an ordinary one, and refuse to be asked for systemd.
    pub fn wants_systemd_cgroup(&self) -> bool {
        self.has_systemd_path() && Path::new("/run/systemd/system").is_dir()
    }

    /// Whether the cgroup path is systemd's: `slice:prefix:name`.
    fn has_systemd_path(&self) -> bool {
        self.linux.as_ref().is_some_and(|linux| {
            let mut parts = linux.cgroups_path.split(':');
            let slice = parts.next().unwrap_or_default();
            parts.count() == 2 && (slice.is_empty() || slice.ends_with(".slice"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!("{{\"linux\":{linux},\"hooks\":null}}"))
            .expect("a specification")
    }

    #[test]
    fn systemd_cgroups_have_three_parts() {
        for (path, systemd) in [
            ("system.slice:docker:abc", true),
            (":docker:abc", true),
            ("/default/abc", false),
            ("", false),
            ("a:b", false),
            ("/kubepods/pod:1:2", false),
        ] {
            let spec = spec(&format!("{{\"cgroupsPath\":\"{path}\"}}"));
            assert_eq!(spec.has_systemd_path(), systemd, "{path}");
        }
        assert!(!Spec::default().has_systemd_path());
    }

    #[test]
    fn a_pid_namespace_is_one_s_own_when_it_has_no_path() {
        assert!(
            spec(r#"{"namespaces":[{"type":"mount"},{"type":"pid"}]}"#).has_own_pid_namespace()
        );
        assert!(
            !spec(r#"{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}"#)
                .has_own_pid_namespace()
        );
        assert!(!spec(r#"{"namespaces":[{"type":"network"}]}"#).has_own_pid_namespace());
        assert!(!spec("{}").has_own_pid_namespace());
    }
}
