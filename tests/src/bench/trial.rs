//! Runs of a bench's program in its tests: complete figures, and nothing of it stays, also when it is interrupted.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::wait_until;

/// A bench that runs.
#[derive(Debug)]
pub struct Trial {
    child: Child,
    out: PathBuf,
}

impl Trial {
    /// Starts `bench` with `--out out`, which is the file for its figures.
    pub fn start(mut bench: Command, out: &Path) -> Result<Self> {
        let child = bench
            .arg("--out")
            .arg(out)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", bench.get_program().display()))?;
        Ok(Self {
            child,
            out: out.to_owned(),
        })
    }

    /// Waits for its end: the table that it printed and its figures.
    ///
    /// # Errors
    /// When it failed, left no figures, or left its sandbox.
    pub fn finish(self) -> Result<(String, Value)> {
        let pid = self.child.id();
        let output = self.child.wait_with_output().context("wait")?;
        ensure!(output.status.success(), "{output:?}");
        let figures = std::fs::read(&self.out)
            .with_context(|| format!("read figures {}", self.out.display()))?;
        ensure!(sandbox_is_gone(pid)?, "its sandbox is still there");
        Ok((
            String::from_utf8(output.stdout).context("the table")?,
            serde_json::from_slice(&figures).context("the figures")?,
        ))
    }

    /// Interrupts it as Ctrl-C does, as soon as it says what it measures.
    ///
    /// # Errors
    /// When it does not end with 130 and say that everything is removed, or when something is not.
    pub fn interrupt(mut self) -> Result<()> {
        let pid = self.child.id();
        let stderr = self.child.stderr.take().context("stderr is piped")?;
        let mut lines = BufReader::new(stderr).lines();
        lines.next().context("it says nothing")??;
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT).context("interrupt it")?;
        let last = lines.map_while(std::result::Result::ok).last();
        let status = self.child.wait().context("wait")?;
        ensure!(status.code() == Some(130), "{status}: {last:?}");
        let said = last.unwrap_or_default();
        ensure!(said.contains("everything it made is removed"), "{said}");
        ensure!(
            !self.out.exists(),
            "figures of a run that did not end: {}",
            self.out.display()
        );
        let gone = || match sandbox_is_gone(pid) {
            Ok(true) => Ok(()),
            Ok(false) => Err("its directory is there".to_owned()),
            Err(error) => Err(format!("{error:#}")),
        };
        Ok(wait_until(
            "the sandbox to go",
            Duration::from_secs(10),
            gone,
        )?)
    }
}

/// Whether the directory of the sandbox of a process is gone, which its keeper removes.
fn sandbox_is_gone(pid: u32) -> Result<bool> {
    let prefix = format!("kbp-t-{pid}-");
    let mut entries = std::fs::read_dir("/tmp").context("read /tmp")?.flatten();
    Ok(!entries.any(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)))
}
