//! What a container of a bench sees: its root and its spec.

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};
use kbp_kernel::CpuId;
use serde_json::{Value, json};

use super::{App, Arm, Node, PROGRAM, SHARED};

impl Node {
    /// A root with nothing in it: programs and libraries are the node's own, mounted read-only, so the two sides of a comparison run
    /// the same files, and whatever is installed can be measured.
    pub(super) fn make_root(&self) -> Result<()> {
        let root = self.dir().join("root");
        let make = |dir: &Path| {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))
        };
        for dir in [
            "proc", "sys", "dev", "run", "etc", "tmp", "var/log", "bench",
        ] {
            make(&root.join(dir))?;
        }
        make(&self.shared())?;
        for (name, is_dir) in system_dirs() {
            match is_dir {
                true => make(&root.join(&name))?,
                false => {
                    let from = Path::new("/").join(&name);
                    let target = std::fs::read_link(&from)
                        .with_context(|| format!("read {}", from.display()))?;
                    let link = root.join(&name);
                    symlink(target, &link).with_context(|| format!("link {}", link.display()))?;
                }
            }
        }
        let files = [
            ("kbpctl", ""),
            ("etc/ld.so.cache", ""),
            (
                "etc/passwd",
                "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            ),
            ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ];
        for (name, text) in files {
            let file = root.join(name);
            std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        }
        for app in App::ALL {
            if let Some((name, text)) = app.config() {
                let file = self.shared().join(name);
                std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
            }
        }
        Ok(())
    }

    pub(super) fn spec_of(
        &self,
        id: &str,
        command: &[String],
        cpu: CpuId,
        netns: &Path,
        arm: &Arm,
    ) -> Result<Value> {
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(command);
        spec["process"]["terminal"] = json!(false);
        spec["process"]["cwd"] = json!("/");
        // Nothing of the person's own environment.
        spec["process"]["env"] =
            json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        spec["root"] = json!({ "path": self.dir().join("root"), "readonly": false });
        spec["hostname"] = json!(id);
        spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.keeper.kept().name));
        spec["linux"]["resources"]["cpu"] = json!({ "cpus": cpu.to_string() });
        let annotations: serde_json::Map<String, Value> = arm
            .annotations
            .iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect();
        spec["annotations"] = Value::Object(annotations);
        let own = std::env::current_exe().context("find this program")?;
        let bind = |from: &Path, to: &str, mode: &str| json!({ "type": "bind", "source": from, "destination": to, "options": ["rbind", mode] });
        let mut mounts = vec![
            bind(&own, PROGRAM, "ro"),
            bind(&self.shared(), SHARED, "rw"),
        ];
        for (name, is_dir) in system_dirs() {
            if is_dir {
                mounts.push(bind(&Path::new("/").join(&name), &format!("/{name}"), "ro"));
            }
        }
        let cache = Path::new("/etc/ld.so.cache");
        if cache.exists() {
            mounts.push(bind(cache, "/etc/ld.so.cache", "ro"));
        }
        match spec["mounts"].as_array_mut() {
            Some(there) => there.extend(mounts),
            None => spec["mounts"] = json!(mounts),
        }
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|n| n["type"] != "network");
            namespaces.push(json!({ "type": "network", "path": netns }));
        }
        Ok(spec)
    }
}

/// Where programs and libraries are: name below `/`, and whether it is a directory (else a link to one).
fn system_dirs() -> Vec<(String, bool)> {
    [
        "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix", "gnu",
    ]
    .into_iter()
    .filter_map(|name| {
        let kind = Path::new("/")
            .join(name)
            .symlink_metadata()
            .ok()?
            .file_type();
        (kind.is_dir() || kind.is_symlink()).then(|| (name.to_owned(), kind.is_dir()))
    })
    .collect()
}
