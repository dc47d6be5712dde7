//! Other kernels: stock ones of the distribution, each in an emulated machine (`tests/scripts/vm`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::binaries::target_dir;
use crate::command::{self, Output};
use crate::error::IoContext;
use crate::{Error, Result};

/// What `tests/scripts/vm` is given beyond the limit: to build the first file system, and to wait for another machine to
/// end, of which one runs at a time.
const AROUND: Duration = Duration::from_secs(900);

/// A kernel that `tests/scripts/fetch-kernel` has unpacked.
#[derive(Debug, Clone)]
pub struct Kernel {
    dir: PathBuf,
    version: String,
}

impl Kernel {
    /// The kernel of a series: `6.12`, or `7` for the newest of the suites.
    pub fn unpacked(series: &str) -> Result<Self> {
        let dir = std::env::var_os("KBP_KERNEL_DIR")
            .map(PathBuf::from)
            .or_else(|| target_dir().map(|t| t.join("kernels")))
            .unwrap_or_default()
            .join(series);
        if !dir.join("version").is_file() {
            return Err(Error::Missing {
                what: dir.join("vmlinuz").display().to_string(),
                remedy: format!("run tests/scripts/fetch-kernel {series}"),
            });
        }
        let path = dir.join("version");
        let version =
            std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        Ok(Self {
            dir,
            version: version.trim().to_owned(),
        })
    }

    /// What `uname -r` says there.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Runs a program of this machine's file system in a machine of that kernel, as root, and ends the machine; the
    /// program has `limit`. Variables of the environment whose names begin with `KBP_` are handed on. What it writes, to
    /// either output, is in the output's `stdout`.
    pub fn run(&self, limit: Duration, program: &Path, arguments: &[&str]) -> Result<Output> {
        self.run_with(limit, program, arguments, &[])
    }

    /// [`Kernel::run`] with more environment: names that begin with `KBP_`, and those of `tests/scripts/vm` itself.
    pub fn run_with(
        &self,
        limit: Duration,
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Output> {
        let mut vm = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/vm"));
        vm.arg(&self.dir)
            .arg(limit.as_secs().to_string())
            .arg(program)
            .args(arguments)
            .envs(environment.iter().copied());
        command::run(vm, limit + AROUND)
    }
}
