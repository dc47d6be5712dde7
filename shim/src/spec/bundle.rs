//! Reads, writes and restores a bundle's `config.json`.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use kbp_kernel::CpuSet;
use serde_json::Value;

use super::{Error, Result};

/// Period of a CPU quota where the specification gives none (cpu.cfs_period_us' default).
const DEFAULT_PERIOD: u64 = 100_000;

/// Name of the file while it is written.
const TEMPORARY: &str = ".config.json.kbp";

/// Removes what a killed shim may have left of a half-written file; fine when there is nothing.
pub fn remove_temporary(bundle: &Path) -> Result<()> {
    let path = bundle.join(TEMPORARY);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            what: "remove",
            path,
            source,
        }),
        _ => Ok(()),
    }
}

/// A `config.json`: the file as it was found, and its content as it shall be.
#[derive(Debug, Clone)]
pub struct Spec {
    path: PathBuf,
    original: Vec<u8>,
    value: Value,
}

/// Where a container's network comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The specification asks for no network namespace: the container shares the runtime's, which is the host's.
    Host,
    /// A new namespace, empty when the container is created.
    New,
    /// The namespace at this path.
    Path(PathBuf),
}

/// A container's CPU limits as the specification writes them; None where it is silent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuLimits {
    /// CPUs it may run on (`cpu.cpus`), in the kernel's list format.
    pub cpus: Option<String>,
    /// CPU time a period in µs; not positive: no quota.
    pub quota: Option<i64>,
    /// Length of a period in µs.
    pub period: Option<u64>,
}

impl CpuLimits {
    /// Reads the `resources` object of the runtime specification (`linux.resources`, or the body of an update).
    pub fn from_resources(resources: &Value) -> Self {
        let cpu = &resources["cpu"];
        Self {
            cpus: cpu["cpus"]
                .as_str()
                .filter(|c| !c.trim().is_empty())
                .map(str::to_owned),
            quota: cpu["quota"].as_i64(),
            period: cpu["period"].as_u64(),
        }
    }

    /// These limits after an update that names only what changes.
    #[must_use]
    pub fn updated(&self, update: &Self) -> Self {
        Self {
            cpus: update.cpus.clone().or_else(|| self.cpus.clone()),
            quota: update.quota.or(self.quota),
            period: update.period.or(self.period),
        }
    }

    /// The cpuset. One that cannot be read counts as none: the runtime will refuse it.
    pub fn cpuset(&self) -> Option<CpuSet> {
        self.cpus.as_deref()?.parse().ok()
    }

    /// The quota in CPUs.
    pub fn quota_cpus(&self) -> Option<f64> {
        let quota = self.quota.filter(|q| *q > 0)?;
        let period = self.period.filter(|p| *p > 0).unwrap_or(DEFAULT_PERIOD);
        Some(quota as f64 / period as f64)
    }
}

impl Spec {
    /// Reads `config.json` of a bundle.
    pub fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let original = fs::read(&path).map_err(|source| Error::Io {
            what: "read",
            path: path.clone(),
            source,
        })?;
        let value = serde_json::from_slice(&original).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            original,
            value,
        })
    }

    /// The content.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The content, to be edited; it reaches the file with [`Spec::write`].
    pub fn value_mut(&mut self) -> &mut Value {
        &mut self.value
    }

    /// The annotations. One that is no text is an error only when it is kbp's own.
    pub fn annotations(&self) -> Result<BTreeMap<String, String>> {
        let mut annotations = BTreeMap::new();
        for (name, value) in self.value["annotations"].as_object().into_iter().flatten() {
            match value.as_str() {
                Some(text) => {
                    annotations.insert(name.clone(), text.to_owned());
                }
                None if name.starts_with(kbp_poller::policy::PREFIX) => {
                    return Err(Error::Malformed {
                        member: format!("annotations[{name:?}]"),
                        expected: "a string",
                    });
                }
                None => {}
            }
        }
        Ok(annotations)
    }

    /// The CPU limits.
    pub fn cpu_limits(&self) -> CpuLimits {
        CpuLimits::from_resources(&self.value["linux"]["resources"])
    }

    /// Where the network comes from.
    pub fn network(&self) -> Network {
        let namespaces = self.value["linux"]["namespaces"].as_array();
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|n| n["type"] == "network");
        match network {
            None => Network::Host,
            Some(namespace) => match namespace["path"].as_str().filter(|p| !p.is_empty()) {
                Some(path) => Network::Path(path.into()),
                None => Network::New,
            },
        }
    }

    /// Writes the content to the file, which is replaced as a whole and keeps its mode and owner.
    pub fn write(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.value).map_err(|source| Error::Json {
            path: self.path.clone(),
            source,
        })?;
        self.replace("write", &text)
    }

    /// Puts the file back as it was found, byte for byte.
    pub fn restore(&self) -> Result<()> {
        self.replace("restore", &self.original)
    }

    fn replace(&self, what: &'static str, text: &[u8]) -> Result<()> {
        // The runtime may read it at any moment, and half a file is worse than either whole one.
        let temporary = self.path.with_file_name(TEMPORARY);
        write_like(&self.path, &temporary, text)
            .and_then(|()| fs::rename(&temporary, &self.path))
            .map_err(|source| {
                // Best effort: the replacing is what failed, and it is reported.
                let _ = fs::remove_file(&temporary);
                Error::Io {
                    what,
                    path: self.path.clone(),
                    source,
                }
            })
    }
}

/// Writes `text` to a new file at `path` with mode and owner of `model`.
fn write_like(model: &Path, path: &Path, text: &[u8]) -> io::Result<()> {
    let meta = fs::metadata(model)?;
    // What a killed shim left here would keep its own mode.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    fchown(&file, Some(meta.uid()), Some(meta.gid()))?;
    file.set_permissions(fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    file.write_all(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(dir: &Path, text: &str) -> Spec {
        fs::write(dir.join("config.json"), text).expect("write config.json");
        Spec::read(dir).expect("read it back")
    }

    #[test]
    fn an_edit_keeps_what_it_does_not_know_in_its_place() {
        let dir = tempfile::tempdir().expect("tempdir");
        let text = r#"{"zeta":{"b":1,"a":18446744073709551615},"linux":{"x":-5,"seccomp":null},"alpha":[1.5,null]}"#;
        let mut spec = spec(dir.path(), text);
        let file = dir.path().join("config.json");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("chmod");

        spec.value_mut()["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
        spec.write().expect("write");
        assert_eq!(
            fs::read_to_string(&file).expect("read"),
            text.replace(
                "\"seccomp\":null",
                r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}"#
            )
        );
        assert_eq!(
            fs::metadata(&file).expect("stat").permissions().mode() & 0o777,
            0o640
        );

        spec.restore().expect("restore");
        assert_eq!(fs::read_to_string(&file).expect("read"), text);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn the_remains_of_a_killed_shim_do_not_stop_the_next() {
        let dir = tempfile::tempdir().expect("tempdir");
        let spec = spec(dir.path(), "{}");
        fs::write(dir.path().join(".config.json.kbp"), "half a fi").expect("write");
        spec.write().expect("write");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn networks_are_told_apart() {
        let dir = tempfile::tempdir().expect("tempdir");
        for (text, expected) in [
            ("{}", Network::Host),
            (r#"{"linux":null}"#, Network::Host),
            (
                r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#,
                Network::Host,
            ),
            (
                r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"network"}]}}"#,
                Network::New,
            ),
            (
                r#"{"linux":{"namespaces":[{"type":"network","path":""}]}}"#,
                Network::New,
            ),
            (
                r#"{"linux":{"namespaces":[{"type":"network","path":"/run/netns/a"}]}}"#,
                Network::Path("/run/netns/a".into()),
            ),
        ] {
            assert_eq!(spec(dir.path(), text).network(), expected, "{text}");
        }
    }

    #[test]
    fn cpu_limits_are_read_and_updated() {
        let read = |value| CpuLimits::from_resources(&value);
        assert_eq!(read(json!(null)), CpuLimits::default());
        let limits = read(json!({"cpu":{"cpus":"2-3","quota":50000,"period":100000,"shares":2}}));
        assert_eq!(limits.cpuset(), Some("2-3".parse().expect("cpus")));
        assert_eq!(limits.quota_cpus(), Some(0.5));
        // No period: the kernel's own.
        assert_eq!(
            read(json!({"cpu":{"quota":200000}})).quota_cpus(),
            Some(2.0)
        );
        assert_eq!(read(json!({"cpu":{"quota":-1}})).quota_cpus(), None);
        assert_eq!(
            read(json!({"cpu":{"quota":0,"period":0}})).quota_cpus(),
            None
        );
        assert_eq!(read(json!({"cpu":{"cpus":""}})).cpuset(), None);

        let update = read(json!({"cpu":{"quota":-1}}));
        let updated = limits.updated(&update);
        assert_eq!(updated.quota_cpus(), None);
        assert_eq!(updated.cpuset(), limits.cpuset());
    }

    #[test]
    fn annotations_that_are_no_text_matter_only_when_they_are_ours() {
        let dir = tempfile::tempdir().expect("tempdir");
        let fine = spec(dir.path(), r#"{"annotations":{"a":"b","n":1}}"#);
        assert_eq!(
            fine.annotations().expect("annotations"),
            BTreeMap::from([("a".to_owned(), "b".to_owned())])
        );
        let wrong = spec(dir.path(), r#"{"annotations":{"kbp.io/required":true}}"#);
        let error = wrong.annotations().expect_err("refused").to_string();
        assert!(error.contains("kbp.io/required"), "{error}");
    }

    #[test]
    fn broken_files_are_errors_that_name_the_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let error = Spec::read(dir.path()).expect_err("no file").to_string();
        assert!(error.contains("config.json"), "{error}");
        fs::write(dir.path().join("config.json"), "{").expect("write");
        let error = Spec::read(dir.path()).expect_err("no JSON").to_string();
        assert!(error.contains("config.json"), "{error}");
    }
}
