//! The node's `/etc/kbp/config.toml`; another path by `KBP_CONFIG`.

use std::path::{Path, PathBuf};

use kbp_kernel::CpuSet;

use crate::policy::Layer;
use crate::Result;

/// The node's settings. A missing file is the default; a malformed one is an error.
#[derive(Debug, Clone)]
pub struct Config {
    /// Policy where neither annotations nor runtime options speak (`worker`, `busy-poll`, `profile`, `required`).
    pub policy: Layer,
    /// CPUs for workers: `cpus = "2-3"` or `"isolated"`; empty: no pool.
    pub cpus: CpuSet,
    /// Directory of state, claims and notifier sockets; default `/run/kbp`.
    pub state_dir: PathBuf,
    /// OCI runtime binary when containerd's options name none (`runtime = "runc"`).
    pub runtime: String,
}

impl Config {
    /// Reads the file that `KBP_CONFIG` names, else `/etc/kbp/config.toml`.
    pub fn load() -> Result<Self> { todo!() }
    /// Reads one file.
    pub fn read(_path: &Path) -> Result<Self> { todo!() }
}
