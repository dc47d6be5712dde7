//! The directory of a notifier's socket. Its owner holds a lock on it, so that one whose owner was killed can be told
//! from one that is in use, and removed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use super::Error;

/// Directories of notifiers below the state directory.
const PARENT: &str = "notify";

/// How often a directory is made anew that somebody swept away between its making and its locking.
const ATTEMPTS: usize = 8;

/// Directory of a pod's notifier below the state directory. Ids may be long and a socket's path may not, so its name is a hash.
pub fn directory(state_dir: &Path, namespace: &str, pod_id: &str) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(namespace.as_bytes());
    // Neither of the two can hold a slash.
    hash.update(b"/");
    hash.update(pod_id.as_bytes());
    let name: String = hash.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    state_dir.join(PARENT).join(name)
}

/// Removes what a notifier of this pod has left, and what others have left whose owners were killed; fine when there is
/// nothing.
pub fn remove(state_dir: &Path, namespace: &str, pod_id: &str) -> Result<(), Error> {
    let own = remove_dir(&directory(state_dir, namespace, pod_id));
    sweep(state_dir);
    own
}

/// Removes directories whose owners are gone. What cannot be removed is the next one's to try.
fn sweep(state_dir: &Path) {
    let entries = fs::read_dir(state_dir.join(PARENT));
    for path in entries.into_iter().flatten().flatten().map(|e| e.path()) {
        match lock(&path) {
            Ok(Some(_lock)) => {
                if let Err(error) = remove_dir(&path) {
                    tracing::debug!("{error}");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("{}: {error}", path.display()),
        }
    }
}

/// A directory of one's own; it goes with this.
#[derive(Debug)]
pub(super) struct Home {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Home {
    /// Makes the directory anew, for root only, and locks it.
    pub(super) fn create(state_dir: &Path, namespace: &str, pod_id: &str) -> Result<Self, Error> {
        let path = directory(state_dir, namespace, pod_id);
        let failed = |what, source| Error::Io {
            what,
            path: path.clone(),
            source,
        };
        // A shim that was killed may have left this one, with a socket that nobody can bind again.
        remove(state_dir, namespace, pod_id)?;
        for _ in 0..ATTEMPTS {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|e| failed("make directory", e))?;
            match lock(&path) {
                Ok(Some(lock)) if is_at(&lock, &path) => {
                    return Ok(Self { path, _lock: lock });
                }
                // Another shim found it unlocked and has removed it, or is about to.
                Ok(_) => std::thread::yield_now(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("lock directory", error)),
            }
        }
        Err(failed("lock directory", Errno::EWOULDBLOCK.into()))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = remove_dir(&self.path) {
            tracing::warn!("{error}");
        }
    }
}

/// Locks a directory; None when somebody else has.
fn lock(dir: &Path) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(File::open(dir)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// Whether what was locked is still what the path names.
fn is_at(lock: &Flock<File>, path: &Path) -> bool {
    let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
    match (lock.metadata(), fs::metadata(path)) {
        (Ok(locked), Ok(named)) => identity(locked) == identity(named),
        _ => false,
    }
}

fn remove_dir(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            what: "remove",
            path: dir.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names(state_dir: &Path) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(state_dir.join(PARENT)).into_iter().flatten();
        entries.map(|e| e.expect("entry").path()).collect()
    }

    #[test]
    fn pods_of_the_same_id_in_two_namespaces_do_not_meet() {
        let root = Path::new("/run/kbp");
        assert_ne!(
            directory(root, "default", "a"),
            directory(root, "k8s.io", "a")
        );
        assert!(
            directory(root, "default", &"a".repeat(76))
                .as_os_str()
                .len()
                < 60
        );
    }

    #[test]
    fn what_killed_owners_left_goes_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().expect("tempdir");
        let living = Home::create(dir.path(), "test", "living").expect("create");
        let dead = directory(dir.path(), "test", "dead");
        fs::create_dir_all(&dead).expect("mkdir");
        fs::write(dead.join("seccomp.sock"), "").expect("write");

        let next = Home::create(dir.path(), "test", "next").expect("create");
        let expected = BTreeSet::from([living.path.clone(), next.path.clone()]);
        assert_eq!(names(dir.path()), expected);
        drop(next);
        fs::create_dir_all(&dead).expect("mkdir");
        remove(dir.path(), "test", "none").expect("remove");
        assert_eq!(names(dir.path()), BTreeSet::from([living.path.clone()]));
        drop(living);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn many_that_start_at_once_all_find_a_home() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::thread::scope(|scope| {
            for pod in 0..8 {
                let dir = dir.path();
                scope.spawn(move || {
                    for _ in 0..50 {
                        let home = Home::create(dir, "test", &pod.to_string()).expect("create");
                        fs::write(home.path.join("file"), "").expect("it stays");
                    }
                });
            }
        });
        assert!(names(dir.path()).is_empty());
    }
}
