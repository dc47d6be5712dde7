//! Attachments that belong to no connection, on disk: a daemon that is started again takes them up.
//!
//! One file an attachment in `<state-dir>/registrations/`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kbp_kernel::netns::NetnsId;
use serde::{Deserialize, Serialize};

use crate::api::AttachRequest;
use crate::state;
use crate::{Error, Result};

/// What is needed to attach once more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registration {
    pub(super) id: String,
    pub(super) namespace: String,
    pub(super) netns: String,
    /// Device and inode of the namespace: another one may be made under the same name.
    pub(super) netns_id: (u64, u64),
    worker: String,
    profile: String,
    required: bool,
    cpuset: String,
    cpu_latency_us: Option<u32>,
}

impl Registration {
    pub(super) fn new(request: &AttachRequest, id: NetnsId) -> Self {
        Self {
            id: request.id.clone(),
            namespace: request.namespace.clone(),
            netns: request.netns.clone(),
            netns_id: (id.dev, id.ino),
            worker: request.worker.clone(),
            profile: request.profile.clone(),
            required: request.required,
            cpuset: request.cpuset.clone(),
            cpu_latency_us: request.cpu_latency_us,
        }
    }

    pub(super) fn request(&self) -> AttachRequest {
        AttachRequest {
            id: self.id.clone(),
            namespace: self.namespace.clone(),
            netns: self.netns.clone(),
            worker: self.worker.clone(),
            profile: self.profile.clone(),
            required: self.required,
            cpuset: self.cpuset.clone(),
            cpu_latency_us: self.cpu_latency_us,
            ..AttachRequest::default()
        }
    }

    /// Writes it; the id and namespace have been found to be fit for file names.
    pub(super) fn write(&self, state_dir: &Path) -> Result<()> {
        let dir = dir_of(state_dir);
        state::create_dir(&dir)?;
        let path = dir.join(format!("{}@{}.json", self.id, self.namespace));
        let temporary = path.with_extension("tmp");
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&serde_json::to_vec(self)?))
            .and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|e| Error::io(format!("write {}", path.display()), e))
    }

    pub(super) fn remove(&self, state_dir: &Path) {
        remove(&dir_of(state_dir).join(format!("{}@{}.json", self.id, self.namespace)));
    }
}

/// All of them. What cannot be read is removed: it can be of no use to anybody.
pub(super) fn read_all(state_dir: &Path) -> Vec<Registration> {
    // No directory: nothing was ever registered.
    let entries = fs::read_dir(dir_of(state_dir)).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    let read = |path: &PathBuf| {
        let text = fs::read(path).ok()?;
        let registration = serde_json::from_slice(&text).ok();
        if registration.is_none() {
            tracing::warn!("{} is no registration; it is removed", path.display());
            remove(path);
        }
        registration
    };
    paths.iter().filter_map(read).collect()
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("{} stays behind: {e}", path.display());
        }
        _ => {}
    }
}

fn dir_of(state_dir: &Path) -> PathBuf {
    state_dir.join("registrations")
}
