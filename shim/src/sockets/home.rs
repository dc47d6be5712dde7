//! The directory of a notifier's socket. Its owner holds a lock on it, so that one whose owner was killed can be told
//! from one that is in use, and removed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use super::Error;

/// Directories of notifiers below the state directory.
pub(super) const PARENT: &str = "notify";

/// How long to wait for others who make or sweep directories. They hold the lock for a few system calls.
const LOCK_WAIT: Duration = Duration::from_secs(2);

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
    let own = directory(state_dir, namespace, pod_id);
    if !state_dir.join(PARENT).is_dir() {
        return Ok(());
    }
    let _lock = lock_all(state_dir);
    let removed = remove_dir(&own);
    sweep(state_dir);
    removed
}

/// Keeps others from sweeping and making directories. Without it a new directory might be swept before its owner has locked
/// it; that is better than a pod that does not start.
fn lock_all(state_dir: &Path) -> Option<Flock<File>> {
    let parent = state_dir.join(PARENT);
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match lock(&parent) {
            Ok(Some(lock)) => return Some(lock),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) => {
                tracing::warn!("{} stays locked by another process", parent.display());
                return None;
            }
            Err(error) => {
                tracing::warn!("lock {}: {error}", parent.display());
                return None;
            }
        }
    }
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
        let failed = |what| {
            let path = path.clone();
            move |source| Error::Io { what, path, source }
        };
        make_dir(&state_dir.join(PARENT)).map_err(failed("make the parent of"))?;
        let _all = lock_all(state_dir);
        // A shim that was killed may have left this one, with a socket that nobody can bind again.
        remove_dir(&path)?;
        sweep(state_dir);
        make_dir(&path).map_err(failed("make directory"))?;
        match lock(&path).map_err(failed("lock directory"))? {
            Some(lock) => Ok(Self { path, _lock: lock }),
            None => Err(failed("lock directory")(Errno::EWOULDBLOCK.into())),
        }
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
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
