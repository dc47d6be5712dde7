//! `<state_dir>/uplinks/<interface>.json`: what is true of an uplink now. Written by the daemon that polls it (rename, mode 0600),
//! gone with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::state::{self, WorkerState};
use crate::{Error, Result};

/// What is true of an uplink now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkState {
    /// Name of the interface.
    pub interface: String,
    /// Process that polls it.
    pub owner_pid: u32,
    /// When that process started, in clock ticks since boot: tells it from a later one with the same id.
    pub owner_start: u64,
    /// Its NAPI instances that are polled.
    pub napis: Vec<u32>,
    /// Who polls them.
    pub worker: Option<WorkerState>,
    /// Why they are not polled, where they are not.
    pub degraded: Option<String>,
}

impl UplinkState {
    /// Of an interface that this process is to poll, and does not yet.
    pub(super) fn new(interface: &str) -> Self {
        let pid = std::process::id();
        Self {
            interface: interface.to_owned(),
            owner_pid: pid,
            owner_start: state::start_time(pid).unwrap_or_default(),
            napis: Vec::new(),
            worker: None,
            degraded: None,
        }
    }

    /// Writes or replaces its file.
    pub(super) fn write(&self, state_dir: &Path) -> Result<()> {
        let dir = dir_of(state_dir);
        state::create_dir(&dir)?;
        // A leading dot keeps the half-written file out of `read_all`.
        let temporary = dir.join(format!(".{}.tmp", self.interface));
        state::replace(&file_of(state_dir, &self.interface), &temporary, self)
    }
}

/// Every uplink that a living process polls, or is to poll, by name.
///
/// # Errors
/// When the directory is there and cannot be read.
pub fn read_all(state_dir: &Path) -> Result<Vec<UplinkState>> {
    let read = |path: PathBuf| {
        // Gone since the listing, or of another version: no uplink that could be told of.
        let state: UplinkState = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (state::start_time(state.owner_pid) == Some(state.owner_start)).then_some(state)
    };
    let mut paths = files(state_dir)?;
    paths.sort();
    Ok(paths.into_iter().filter_map(read).collect())
}

/// Removes what a daemon before this one has left. There is one daemon a state directory.
pub(crate) fn clear(state_dir: &Path) -> Result<()> {
    for path in files(state_dir)? {
        state::remove_file(&path)?;
    }
    Ok(())
}

/// Removes one uplink's file; fine when it is not there.
pub(super) fn remove(state_dir: &Path, interface: &str) -> Result<()> {
    state::remove_file(&file_of(state_dir, interface))
}

fn files(state_dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = dir_of(state_dir);
    match fs::read_dir(&dir) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(format!("read directory {}", dir.display()), e)),
    }
}

fn dir_of(state_dir: &Path) -> PathBuf {
    state_dir.join("uplinks")
}

/// The config takes no name with a slash, nor one that is only dots.
fn file_of(state_dir: &Path, interface: &str) -> PathBuf {
    dir_of(state_dir).join(format!("{interface}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_until_its_owner_is_gone_or_it_is_removed() {
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(read_all(dir.path()).expect("none"), []);
        clear(dir.path()).expect("nothing to clear");
        let mut eth0 = UplinkState::new("eth0");
        eth0.degraded = Some("eth0 is down".to_owned());
        let mut of_the_dead = UplinkState::new("eth1");
        of_the_dead.owner_start += 1;
        for state in [&eth0, &of_the_dead] {
            state.write(dir.path()).expect("write");
        }
        fs::write(dir.path().join("uplinks/.eth2.tmp"), "{").expect("half-written");
        assert_eq!(read_all(dir.path()).expect("read"), [eth0.clone()]);
        remove(dir.path(), "eth0").expect("remove");
        remove(dir.path(), "eth0").expect("again");
        assert_eq!(read_all(dir.path()).expect("read"), []);
        clear(dir.path()).expect("clear");
        assert_eq!(files(dir.path()).expect("list"), Vec::<PathBuf>::new());
    }
}
