//! Root file systems whose files show other owners: those of a container with a user namespace, where containerd's snapshotter does
//! not change the owners on disk (overlay mounts with `uidmap=` and `gidmap=`).

use std::fs;
use std::path::{Path, PathBuf};

use kbp_kernel::idmap::{IdMapping, IdRange};
use kbp_kernel::process::take_up_in_this_thread;
use nix::mount::{MntFlags, umount2};

use super::Parsed;
use crate::task::error::{Error, Result};

/// Where the mapped layers of the root file system `target` are while it is mounted.
fn place(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".layers");
    target.with_file_name(name)
}

/// Ids as containerd writes them: `inside:outside:count`, several of them with commas.
pub(super) fn id_ranges(text: &str) -> Result<Vec<IdRange>> {
    let range = |text: &str| {
        let mut numbers = text.split(':').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let range = IdRange {
            inside: next()?,
            outside: next()?,
            count: next()?,
        };
        numbers.next().is_none().then_some(range)
    };
    let ranges: Option<Vec<IdRange>> = text.split(',').map(range).collect();
    ranges.ok_or_else(|| {
        Error::InvalidArgument(format!(
            "{text:?} maps no ids; expected is INSIDE:OUTSIDE:COUNT, as in 0:100000:65536"
        ))
    })
}

/// Layers with mapped owners; unmounted and removed when this is dropped.
#[derive(Debug)]
pub(super) struct Layers {
    place: PathBuf,
}

impl Drop for Layers {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.place) {
            tracing::warn!("{error}");
        }
    }
}

/// Takes away what a shim that was killed in the middle of mounting may have left beside the root file system.
pub fn unmount_layers(target: &Path) -> Result<()> {
    remove(&place(target))
}

fn remove(place: &Path) -> Result<()> {
    for layer in fs::read_dir(place).into_iter().flatten().flatten() {
        // Not mounted, or not any more: EINVAL.
        let _ = umount2(
            &layer.path(),
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        );
        // Only if it is empty: what is mounted still is not ours to remove.
        fs::remove_dir(layer.path())
            .map_err(Error::io(format!("remove {}", layer.path().display())))?;
    }
    match fs::remove_dir(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", place.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Works in a thread of its own, with every capability that the shim may have: writing a mapping wants some that are out of force.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let failed = |text: String| Error::io("mount with mapped owners")(std::io::Error::other(text));
    std::thread::scope(|scope| {
        let work = || {
            take_up_in_this_thread().map_err(|error| failed(error.to_string()))?;
            work()
        };
        let thread = std::thread::Builder::new()
            .name("mount".to_owned())
            .spawn_scoped(scope, work)
            .map_err(Error::io("start a thread that mounts"))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(failed("the mounting thread died".to_owned())))
    })
}

fn remedy(error: kbp_kernel::Error) -> Error {
    Error::Unimplemented(format!(
        "the root file system cannot have mapped owners: {error}; it takes Linux 5.19 and a file system that knows them (not NFS, not an \
         overlay); else let containerd change the owners of the files (slow_chown = true in its overlayfs snapshotter)"
    ))
}

/// Mounts an overlay's lower layers with the mapped owners beside `target`, and has the options name those.
pub(super) fn layers(parsed: &mut Parsed, target: &Path) -> Result<Layers> {
    let place = place(target);
    remove(&place)?;
    fs::create_dir(&place).map_err(Error::io(format!("make {}", place.display())))?;
    let layers = Layers { place };
    let Some(option) = parsed
        .data
        .iter_mut()
        .find(|option| option.starts_with("lowerdir="))
    else {
        return Ok(layers);
    };
    let (users, groups) = (&parsed.users, &parsed.groups);
    let lower = option.trim_start_matches("lowerdir=").to_owned();
    let mapped = in_thread(|| {
        let mapping = IdMapping::new(users, groups).map_err(remedy)?;
        let mut mapped = Vec::new();
        for (number, layer) in lower.split(':').enumerate() {
            let path = layers.place.join(number.to_string());
            fs::create_dir(&path).map_err(Error::io(format!("make {}", path.display())))?;
            // Read-only: whoever clears this directory must not clear the layer.
            let mount = mapping.mount(Path::new(layer), true).map_err(remedy)?;
            mount.attach(&path).map_err(remedy)?;
            mapped.push(path.display().to_string());
        }
        Ok(mapped)
    })?;
    *option = format!("lowerdir={}", mapped.join(":"));
    Ok(layers)
}

/// Binds `source` at `target` with mapped owners.
pub(super) fn bind(parsed: &Parsed, source: &Path, target: &Path) -> Result<()> {
    in_thread(|| {
        let mapping = IdMapping::new(&parsed.users, &parsed.groups).map_err(remedy)?;
        let mount = mapping.mount(source, false).map_err(remedy)?;
        mount.attach(target).map_err(remedy)
    })
}
