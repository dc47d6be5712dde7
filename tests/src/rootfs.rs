//! Root file systems and images, made from the machine's own binaries.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::binaries::program;
use crate::command;
use crate::error::IoContext;
use crate::{Error, Result};

const LIMIT: Duration = Duration::from_secs(60);

/// A directory that a container can have as its root.
#[derive(Debug, Clone)]
pub struct Rootfs {
    dir: PathBuf,
}

impl Rootfs {
    /// An empty one: mount points, `/etc/passwd` and `/etc/group`.
    pub fn empty(dir: &Path) -> Result<Self> {
        for sub in [
            "proc", "sys", "dev", "run", "etc", "tmp", "root", "bin", "usr/bin", "usr/sbin",
            "var/tmp",
        ] {
            let path = dir.join(sub);
            std::fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        }
        let rootfs = Self {
            dir: dir.to_path_buf(),
        };
        rootfs.file(
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        )?;
        rootfs.file("etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
        rootfs.file("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
        Ok(rootfs)
    }

    /// One with every applet of the machine's static busybox.
    pub fn busybox(dir: &Path) -> Result<Self> {
        let busybox = program("busybox", "busybox-static")?;
        let rootfs = Self::empty(dir)?;
        if !libraries(&busybox)?.is_empty() {
            return Err(Error::Missing {
                what: format!(
                    "a static busybox ({} is linked dynamically)",
                    busybox.display()
                ),
                remedy: "apt-get install busybox-static".to_owned(),
            });
        }
        copy(&busybox, &rootfs.dir.join("bin/busybox"))?;
        let mut list = Command::new(&busybox);
        list.arg("--list");
        for applet in command::run(list, LIMIT)?
            .success()?
            .stdout
            .lines()
            .filter(|a| *a != "busybox")
        {
            let link = rootfs.dir.join("bin").join(applet);
            if link.symlink_metadata().is_err() {
                symlink("busybox", &link).context(|| format!("link {}", link.display()))?;
            }
        }
        Ok(rootfs)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds a binary of this machine, with the shared libraries that it asks for, at `inside`.
    pub fn binary(&self, binary: &Path, inside: &str) -> Result<&Self> {
        let mut files = vec![(
            binary.to_path_buf(),
            self.dir.join(inside.trim_start_matches('/')),
        )];
        for library in libraries(binary)? {
            let target = self.dir.join(library.strip_prefix("/").unwrap_or(&library));
            files.push((library, target));
        }
        for (from, to) in files {
            copy(&from, &to)?;
        }
        Ok(self)
    }

    /// Adds a text file.
    pub fn file(&self, inside: &str, text: &str) -> Result<&Self> {
        let path = self.dir.join(inside.trim_start_matches('/'));
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
        }
        std::fs::write(&path, text).context(|| format!("write {}", path.display()))?;
        Ok(self)
    }

    /// Writes it as an archive of one image that `ctr images import` takes (the format of `docker save`), and returns its path.
    /// `reference` is the full name, e.g. `docker.io/library/redis:test`; `command` what the image runs by default.
    pub fn archive(&self, reference: &str, command: &[&str], work: &Path) -> Result<PathBuf> {
        let stem = reference.replace(['/', ':'], "-");
        let dir = work.join(format!("{stem}.image"));
        std::fs::create_dir_all(&dir).context(|| format!("create {}", dir.display()))?;
        let layer = dir.join("layer.tar");
        let mut tar = Command::new("tar");
        tar.args([
            "--numeric-owner",
            "--owner=0",
            "--group=0",
            "--sort=name",
            "-C",
        ])
        .arg(&self.dir)
        .arg("-cf")
        .arg(&layer)
        .arg(".");
        command::run(tar, LIMIT)?.success()?;
        let mut sum = Command::new("sha256sum");
        sum.arg(&layer);
        let sum = command::run(sum, LIMIT)?.success()?.stdout;
        let digest = sum.split_whitespace().next().unwrap_or_default();
        let architecture = if cfg!(target_arch = "aarch64") {
            "arm64"
        } else {
            "amd64"
        };
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": { "Cmd": command, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
        });
        let manifest =
            json!([{ "Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"] }]);
        for (name, value) in [("config.json", config), ("manifest.json", manifest)] {
            let path = dir.join(name);
            std::fs::write(&path, value.to_string())
                .context(|| format!("write {}", path.display()))?;
        }
        let archive = work.join(format!("{stem}.tar"));
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&dir).arg("-cf").arg(&archive).args([
            "manifest.json",
            "config.json",
            "layer.tar",
        ]);
        command::run(tar, LIMIT)?.success()?;
        std::fs::remove_dir_all(&dir).context(|| format!("remove {}", dir.display()))?;
        Ok(archive)
    }
}

/// The shared libraries and the loader of a binary as `ldd` finds them; none for a static one.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    ldd.arg(binary);
    let output = command::run(ldd, LIMIT)?;
    if output.text().contains("not a dynamic executable")
        || output.text().contains("statically linked")
    {
        return Ok(Vec::new());
    }
    if let Some(line) = output.stdout.lines().find(|l| l.contains("not found")) {
        return Err(Error::Missing {
            what: format!("library of {}: {}", binary.display(), line.trim()),
            remedy: "install the package that has it".to_owned(),
        });
    }
    let output = output.success()?;
    // `name => /path (0x…)` or, for the loader, `/path (0x…)`; the vdso has no path.
    Ok(output
        .stdout
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
    }
    std::fs::copy(from, to).context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
