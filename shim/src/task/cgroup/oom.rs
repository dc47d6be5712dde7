//! Tells when a process of a cgroup was killed because memory ran out.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;

use super::Cgroup;
use super::files::table;
use crate::task::io::Stream;

/// Watches one cgroup.
#[derive(Debug)]
pub struct OomWatch {
    directory: PathBuf,
    stream: Stream,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Version 1 signals an eventfd, before it kills.
    Eventfd,
    /// Version 2 changes memory.events; holds how many kills are known.
    Events(Mutex<u64>),
}

impl OomWatch {
    /// Starts to watch. None where the memory controller does not manage the cgroup.
    pub fn new(cgroup: &Cgroup) -> io::Result<Option<Self>> {
        match cgroup {
            Cgroup::V1(directories) => match directories.get("memory") {
                Some(directory) if directory.join("memory.oom_control").exists() => {
                    Self::by_eventfd(directory.clone()).map(Some)
                }
                _ => Ok(None),
            },
            Cgroup::V2(directory) if directory.join("memory.events").exists() => {
                Self::by_inotify(directory.clone()).map(Some)
            }
            Cgroup::V2(_) => Ok(None),
        }
    }

    /// Documentation/admin-guide/cgroup-v1/memory.rst, "OOM Control".
    fn by_eventfd(directory: PathBuf) -> io::Result<Self> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let control = OpenOptions::new()
            .read(true)
            .open(directory.join("memory.oom_control"))?;
        let order = format!("{} {}", eventfd.as_fd().as_raw_fd(), control.as_raw_fd());
        fs::write(directory.join("cgroup.event_control"), order)?;
        let stream = Stream::new(eventfd.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        Ok(Self {
            directory,
            stream,
            kind: Kind::Eventfd,
        })
    }

    /// Documentation/admin-guide/cgroup-v2.rst: a change of memory.events generates a file modified event.
    fn by_inotify(directory: PathBuf) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(&directory.join("memory.events"), AddWatchFlags::IN_MODIFY)?;
        let stream = Stream::new(inotify.into(), Interest::READABLE)?;
        let known = Mutex::new(Self::kills(&directory));
        Ok(Self {
            directory,
            stream,
            kind: Kind::Events(known),
        })
    }

    fn kills(directory: &std::path::Path) -> u64 {
        table(directory, "memory.events")
            .ok()
            .flatten()
            .map_or(0, |events| events.get("oom_kill"))
    }

    /// Waits for the next kill; None when the cgroup is gone.
    pub async fn next(&self) -> Option<()> {
        loop {
            let mut notes = Vec::new();
            self.stream
                .read_with(&mut notes, 4096)
                .await
                .ok()
                .filter(|count| *count > 0)?;
            if !self.directory.exists() {
                return None;
            }
            if matches!(self.kind, Kind::Eventfd) || self.is_new() {
                return Some(());
            }
        }
    }

    /// Whether there was a kill that [`Self::next`] has not told yet; tells it once.
    pub fn missed(&self) -> bool {
        match self.kind {
            // The removal of the cgroup signals the eventfd too.
            Kind::Eventfd => {
                matches!(self.stream.read_now(&mut [0; 8]), Ok(Some(1..)))
                    && self.directory.exists()
            }
            Kind::Events(_) => self.is_new(),
        }
    }

    fn is_new(&self) -> bool {
        let Kind::Events(known) = &self.kind else {
            return false;
        };
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Self::kills(&self.directory);
        let more = now > *known;
        *known = now.max(*known);
        more
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// Version 2 is files that change, wherever they are.
    #[tokio::test]
    async fn each_kill_of_version_2_is_told_once() {
        let root = tempfile::tempdir().expect("a directory");
        let kills = |count: u32| {
            let text = format!("low 0\nhigh {count}0\nmax 3\noom 1\noom_kill {count}\n");
            fs::write(root.path().join("memory.events"), text).expect("write");
        };
        let cgroup = Cgroup::V2(root.path().to_owned());
        assert!(
            OomWatch::new(&cgroup).expect("no error").is_none(),
            "no memory controller"
        );
        kills(4);
        let watch = OomWatch::new(&cgroup).expect("inotify").expect("a watch");
        assert!(!watch.missed(), "those before do not count");
        kills(5);
        timeout(Duration::from_secs(30), watch.next())
            .await
            .expect("in time")
            .expect("a kill");
        assert!(!watch.missed(), "told already");
        kills(6);
        assert!(watch.missed());
        // Changes, and none is a kill that is not known.
        kills(6);
        timeout(Duration::from_millis(100), watch.next())
            .await
            .expect_err("nothing new");
    }
}
