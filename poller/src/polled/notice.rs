//! How one learns that a daemon has begun to serve.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::RETRY;
use crate::api;

/// How one learns that a daemon has begun to serve.
#[derive(Debug)]
pub(super) enum Notice {
    /// The kernel tells.
    Events(Inotify),
    /// By looking: a user has 128 inotify instances unless the node allows more (fs.inotify.max_user_instances), and a node
    /// can have more pods than that.
    Looks { file: PathBuf, seen: Option<Stamp> },
}

/// What makes a file another one under the same name.
type Stamp = (u64, i64, i64);

impl Notice {
    pub(super) fn new(state_dir: &Path) -> Self {
        let watched = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).and_then(|i| {
            i.add_watch(state_dir, AddWatchFlags::IN_MOVED_TO)
                .map(|_| i)
        });
        match watched {
            Ok(inotify) => Self::Events(inotify),
            Err(errno) => {
                tracing::info!(%errno, "the state directory is looked at once a second instead of being watched");
                Self::looks(state_dir)
            }
        }
    }

    fn looks(state_dir: &Path) -> Self {
        let file = state_dir.join(api::READY);
        Self::Looks {
            seen: stamp(&file),
            file,
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Events(inotify) => Some(inotify.as_fd()),
            Self::Looks { .. } => None,
        }
    }

    pub(super) fn interval(&self) -> Option<Duration> {
        match self {
            Self::Events(_) => None,
            Self::Looks { .. } => Some(RETRY),
        }
    }

    /// Whether a daemon has begun to serve since the last call.
    pub(super) fn is_ready(&mut self) -> bool {
        match self {
            Self::Events(inotify) => {
                let mut ready = false;
                while let Ok(events) = inotify.read_events() {
                    // Some were lost: look.
                    ready |= events.iter().any(|e| {
                        e.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
                            || e.name.as_deref() == Some(api::READY.as_ref())
                    });
                }
                ready
            }
            Self::Looks { file, seen } => {
                let now = stamp(file);
                let changed = now.is_some() && now != *seen;
                *seen = now;
                changed
            }
        }
    }
}

fn stamp(file: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(file).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_begins_to_serve_is_noticed_once_with_and_without_events() {
        let dir = tempfile::tempdir().expect("directory");
        let rename = |name: &str| {
            let temporary = dir.path().join(".new");
            std::fs::write(&temporary, "1\n").expect("write");
            std::fs::rename(&temporary, dir.path().join(name)).expect("rename");
        };
        let mut notices = [Notice::new(dir.path()), Notice::looks(dir.path())];
        assert!(matches!(notices[0], Notice::Events(_)), "{notices:?}");
        let mut ready = || notices.each_mut().map(Notice::is_ready);
        assert_eq!(ready(), [false, false]);
        rename("other");
        assert_eq!(ready(), [false, false]);
        rename(api::READY);
        assert_eq!(ready(), [true, true]);
        assert_eq!(ready(), [false, false]);
        // Another one in its place, and one after the file was away.
        rename(api::READY);
        assert_eq!(ready(), [true, true]);
        std::fs::remove_file(dir.path().join(api::READY)).expect("remove");
        assert_eq!(ready(), [false, false]);
        rename(api::READY);
        assert_eq!(ready(), [true, true]);
    }
}
