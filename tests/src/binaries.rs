//! Where the programs under test and the machine's own programs are.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Directory with kbp's binaries: `KBP_BIN_DIR`, else the cargo target directory beside the running executable, the release
/// build before the debug one.
pub fn bin_dir() -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = match std::env::var_os("KBP_BIN_DIR") {
        Some(dir) => vec![PathBuf::from(dir)],
        None => target_dir()
            .map(|t| vec![t.join("release"), t.join("debug")])
            .unwrap_or_default(),
    };
    candidates
        .iter()
        .find(|dir| dir.join("containerd-shim-kbp-v1").is_file())
        .cloned()
        .ok_or_else(|| Error::Missing {
            what: format!("containerd-shim-kbp-v1 in {}", join(&candidates)),
            remedy: "run `make build`, or set KBP_BIN_DIR to the directory with kbp's binaries"
                .to_owned(),
        })
}

/// One of kbp's binaries.
pub fn kbp_binary(name: &str) -> Result<PathBuf> {
    let path = bin_dir()?.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::Missing {
        what: path.display().to_string(),
        remedy: "run `make build`".to_owned(),
    })
}

/// A client of containerd that is written in Go and that `tests/scripts/fetch-go-tools` builds into the target directory.
pub fn go_tool(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("KBP_GO_TOOLS_DIR")
        .map(PathBuf::from)
        .or_else(|| target_dir().map(|target| target.join("go-tools/bin")))
        .unwrap_or_default()
        .join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::Missing {
        what: path.display().to_string(),
        remedy: "run tests/scripts/fetch-go-tools, which needs Go and the Go module proxy"
            .to_owned(),
    })
}

/// The cargo target directory: the nearest parent of the running executable that has cargo's tag in it.
pub fn target_dir() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok()?;
    executable
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").is_file())
        .map(Path::to_path_buf)
}

/// A program of the machine, looked up in PATH and the usual administrator's directories; `package` is where Debian has it.
pub fn program(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain([
            "/usr/local/go/bin",
            "/usr/local/sbin",
            "/usr/sbin",
            "/sbin",
            "/usr/bin",
            "/bin",
        ])
        .map(|dir| Path::new(dir).join(name))
        .find(|p| p.is_file())
        .ok_or_else(|| Error::Missing {
            what: name.to_owned(),
            remedy: format!("apt-get install {package}"),
        })
}

/// Directory of the reference CNI plugins (Debian's place, then upstream's).
pub fn reference_cni_dir() -> Result<PathBuf> {
    ["/usr/lib/cni", "/opt/cni/bin"]
        .iter()
        .map(PathBuf::from)
        .find(|d| d.join("host-local").is_file())
        .ok_or_else(|| Error::Missing {
            what: "host-local in /usr/lib/cni".to_owned(),
            remedy: "apt-get install containernetworking-plugins".to_owned(),
        })
}

fn join(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|p| p.display().to_string())
        .collect::<Vec<_>>()
        .join(" and ")
}
