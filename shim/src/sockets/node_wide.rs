//! The node-wide `net.core.busy_poll`, for programs that wait in `poll` or `select`: set while a pod of the node wants it, and
//! put back when the last one is gone.
//!
//! The kernel has no such setting for a pod. It makes `poll` and `select` ask, and then only those sockets poll that have a window of
//! their own: sockets outside of kbp's pods have none.
//!
//! A file in the state directory keeps what was there before. Who wants the setting holds a shared lock on it; whoever can lock
//! it exclusively is the last and puts the value back, also after others were killed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kbp_kernel::Micros;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Error;

/// The setting; there only in the first network namespace.
pub const SYSCTL: &str = "/proc/sys/net/core/busy_poll";

/// Below the state directory: what was there before, and what was set.
const FILE: &str = "node-busy-poll";
/// Directory below the state directory that is locked for the moment of a change, so that no two make one at once.
const GUARD: &str = super::home::PARENT;

/// One pod's wish. The setting stays at least until it is dropped.
#[derive(Debug)]
pub struct NodeWide {
    dir: PathBuf,
    sysctl: PathBuf,
    /// None only while it is dropped.
    wish: Option<Flock<File>>,
}

impl NodeWide {
    /// Sets the window unless another pod has already done so: the first one's value stays until the last pod is gone.
    pub fn set(state_dir: &Path, window: Micros, sysctl: &Path) -> Result<Self, Error> {
        let _guard = guard(state_dir)?;
        // Where there is no such setting, nothing is to be kept.
        let current = read(sysctl)?;
        let path = state_dir.join(FILE);
        let mut kept = match open(&path) {
            Ok(file) => file,
            Err(source) => return Err(failed("open", &path)(source)),
        };
        if !is_held(&path)? {
            let before = match read_kept(&mut kept) {
                // A killed one has left it: what it had found is what was there before.
                Some((before, set)) if set == current => before,
                _ => current,
            };
            let text = format!("{before} {}\n", window.0);
            kept.set_len(0)
                .and_then(|()| kept.seek(SeekFrom::Start(0)))
                .and_then(|_| kept.write_all(text.as_bytes()))
                .map_err(failed("write", &path))?;
            fs::write(sysctl, window.0.to_string()).map_err(failed("set", sysctl))?;
        }
        let wish = Flock::lock(kept, FlockArg::LockShared)
            .map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
        Ok(Self {
            dir: state_dir.to_owned(),
            sysctl: sysctl.to_owned(),
            wish: Some(wish),
        })
    }
}

impl Drop for NodeWide {
    fn drop(&mut self) {
        let restored = guard(&self.dir).and_then(|guard| {
            self.wish = None;
            let restored = restore_locked(&self.dir, &self.sysctl);
            drop(guard);
            restored
        });
        if let Err(error) = restored {
            tracing::warn!("{error}");
        }
    }
}

/// Puts back what was there before where killed shims have left their setting and nobody wants it any more.
pub fn restore(state_dir: &Path, sysctl: &Path) -> Result<(), Error> {
    if !state_dir.join(FILE).exists() {
        return Ok(());
    }
    let _guard = guard(state_dir)?;
    restore_locked(state_dir, sysctl)
}

fn restore_locked(state_dir: &Path, sysctl: &Path) -> Result<(), Error> {
    let path = state_dir.join(FILE);
    if !path.exists() || is_held(&path)? {
        return Ok(());
    }
    let mut kept = open(&path).map_err(failed("open", &path))?;
    // What somebody else has set meanwhile is theirs.
    if let Some((before, set)) = read_kept(&mut kept)
        && read(sysctl)? == set
    {
        fs::write(sysctl, before.to_string()).map_err(failed("restore", sysctl))?;
    }
    fs::remove_file(&path).map_err(failed("remove", &path))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn guard(state_dir: &Path) -> Result<Flock<File>, Error> {
    let path = state_dir.join(GUARD);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .map_err(failed("make directory", &path))?;
    let file = File::open(&path).map_err(failed("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed("lock", &path)(errno.into()))
}

/// Whether somebody's lock is on the file.
fn is_held(path: &Path) -> Result<bool, Error> {
    let file = open(path).map_err(failed("open", path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(_) => Ok(false),
        Err((_, Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, errno)) => Err(failed("lock", path)(errno.into())),
    }
}

/// What was there before, and what was set; None of a file that was just made, or half written.
fn read_kept(file: &mut File) -> Option<(u32, u32)> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    let (before, set) = text.strip_suffix('\n')?.split_once(' ')?;
    Some((before.parse().ok()?, set.parse().ok()?))
}

fn read(sysctl: &Path) -> Result<u32, Error> {
    let text = fs::read_to_string(sysctl).map_err(failed("read", sysctl))?;
    text.trim().parse().map_err(|_| {
        let what = format!("{:?} is no number", text.trim());
        failed("read", sysctl)(io::Error::other(what))
    })
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        dir: tempfile::TempDir,
        sysctl: PathBuf,
    }

    impl Node {
        fn new(value: u32) -> Self {
            let dir = tempfile::tempdir().expect("tempdir");
            let sysctl = dir.path().join("busy_poll");
            fs::write(&sysctl, format!("{value}\n")).expect("write");
            Self { dir, sysctl }
        }

        fn set(&self, window: u32) -> NodeWide {
            NodeWide::set(&self.state_dir(), Micros(window), &self.sysctl).expect("set")
        }

        fn state_dir(&self) -> PathBuf {
            self.dir.path().join("state")
        }

        fn value(&self) -> u32 {
            read(&self.sysctl).expect("value")
        }
    }

    #[test]
    fn the_last_pod_puts_back_what_was_there() {
        let node = Node::new(7);
        let first = node.set(50);
        assert_eq!(node.value(), 50);
        let second = node.set(60);
        assert_eq!(node.value(), 50, "the first one's stays");
        drop(first);
        assert_eq!(node.value(), 50, "the second still wants it");
        drop(second);
        assert_eq!(node.value(), 7);
        assert!(!node.state_dir().join(FILE).exists());
        drop(node.set(60));
        assert_eq!(node.value(), 7);
    }

    #[test]
    fn what_a_killed_shim_has_set_goes_with_the_next_one_or_with_its_cleanup() {
        let node = Node::new(7);
        drop(node.set(1));
        // As a killed one leaves it: the file, the value, no lock.
        let killed = || {
            fs::write(node.state_dir().join(FILE), "7 50\n").expect("write");
            fs::write(&node.sysctl, "50").expect("write");
        };
        killed();
        let next = node.set(60);
        assert_eq!(node.value(), 60);
        drop(next);
        assert_eq!(node.value(), 7);
        killed();
        restore(&node.state_dir(), &node.sysctl).expect("restore");
        assert_eq!(node.value(), 7);
        // Half a file says nothing of what was there before.
        fs::write(node.state_dir().join(FILE), "4").expect("write");
        drop(node.set(50));
        assert_eq!(node.value(), 7);
    }

    #[test]
    fn what_the_operator_sets_meanwhile_stays() {
        let node = Node::new(7);
        let wish = node.set(50);
        fs::write(&node.sysctl, "33").expect("write");
        drop(wish);
        assert_eq!(node.value(), 33);
    }

    #[test]
    fn a_node_without_the_setting_is_told_by_its_path() {
        let node = Node::new(7);
        fs::remove_file(&node.sysctl).expect("remove");
        let error = NodeWide::set(&node.state_dir(), Micros(50), &node.sysctl)
            .expect_err("no such setting")
            .to_string();
        assert!(error.contains("busy_poll"), "{error}");
    }

    #[test]
    fn many_pods_that_come_and_go_leave_the_value() {
        let node = Node::new(7);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let wish = node.set(50);
                        assert_eq!(node.value(), 50);
                        drop(wish);
                    }
                });
            }
        });
        assert_eq!(node.value(), 7);
    }

    /// On the real setting, which is everybody's: it is put back at once.
    #[test]
    fn the_kernels_own_setting_is_set_and_put_back() {
        let sysctl = Path::new(SYSCTL);
        let before =
            read(sysctl).expect("net.core.busy_poll; this takes the first network namespace");
        let dir = tempfile::tempdir().expect("tempdir");
        let wish = NodeWide::set(dir.path(), Micros(before + 1), sysctl).expect("set");
        assert_eq!(read(sysctl).expect("value"), before + 1);
        drop(wish);
        assert_eq!(read(sysctl).expect("value"), before);
    }
}
