//! What veths were like before kbp changed them, on disk: a process that was killed cannot put them back, and the next one would
//! take what the first had set for the original.
//!
//! One file a veth in `<state_dir>/offloads/`, named by index and MAC address of the host end, so that a later link with the same
//! index is not taken for it. It goes when the veth has been put back, or is gone.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kbp_kernel::IfIndex;
use kbp_kernel::link::{Link, RouteSocket};

use crate::endpoint::Endpoint;
use crate::state;
use crate::tune::{Offloads, Tuner};

/// What `veth` was like before anybody of kbp changed it, given what it is like `now`. Recorded before this returns.
pub(crate) fn of(state_dir: &Path, tuner: &Tuner, veth: &Endpoint, now: Offloads) -> Offloads {
    let recorded = RouteSocket::open_in(&tuner.host)
        .map_err(|e| e.to_string())
        .and_then(|mut host| {
            sweep(state_dir, &mut host);
            let link = host.link_by_index(veth.host_index);
            let link = link.map_err(|e| e.to_string())?;
            let path = link.and_then(|link| path_of(state_dir, &link));
            let path = path.ok_or("its host end is gone")?;
            match fs::read(&path) {
                Ok(text) => serde_json::from_slice(&text).map_err(|e| e.to_string()),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    write(&path, &now).map(|()| now).map_err(|e| e.to_string())
                }
                Err(e) => Err(e.to_string()),
            }
        });
    recorded.unwrap_or_else(|reason| {
        tracing::warn!(
            "the offloads of {} before this cannot be kept on disk: {reason}",
            veth.host_name
        );
        now
    })
}

/// The veth is as it was.
pub(crate) fn forget(state_dir: &Path, veth: &Endpoint) {
    let prefix = format!("{}-", veth.host_index);
    for path in files(state_dir) {
        let name = path.file_name().and_then(|n| n.to_str());
        if name.is_some_and(|n| n.starts_with(&prefix)) {
            remove(&path);
        }
    }
}

/// Removes the files of veths that are gone.
fn sweep(state_dir: &Path, host: &mut RouteSocket) {
    for path in files(state_dir) {
        let index = path
            .file_name()
            .and_then(|n| n.to_str()?.split('-').next()?.parse().ok());
        let Some(index) = index else {
            continue;
        };
        let is_there = match host.link_by_index(IfIndex(index)) {
            Ok(link) => link.and_then(|link| path_of(state_dir, &link)) == Some(path.clone()),
            Err(_) => true,
        };
        if !is_there {
            remove(&path);
        }
    }
}

fn files(state_dir: &Path) -> Vec<PathBuf> {
    // No directory: nothing was ever recorded.
    let entries = fs::read_dir(dir_of(state_dir)).into_iter().flatten();
    entries.flatten().map(|entry| entry.path()).collect()
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(%error, "{} stays behind", path.display());
    }
}

fn dir_of(state_dir: &Path) -> PathBuf {
    state_dir.join("offloads")
}

fn path_of(state_dir: &Path, link: &Link) -> Option<PathBuf> {
    let mac = link.mac?.to_string().replace(':', "");
    Some(dir_of(state_dir).join(format!("{}-{mac}.json", link.index)))
}

fn write(path: &Path, offloads: &Offloads) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        state::create_dir(dir).map_err(std::io::Error::other)?;
    }
    let temporary = path.with_extension("tmp");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec(offloads)?)?;
    fs::rename(&temporary, path)
}
