//! Who owns a state: the process that wrote it, and the one that may look at all of them and write its own.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::files::{create_dir, pods_dir};
use crate::Error;

/// How long to wait for another process that places its worker. It takes a few milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// When process `pid` started, in clock ticks since boot (field 22 of /proc/PID/stat); None when there is none.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold spaces and parentheses itself.
    let (_, after_name) = stat.rsplit_once(')')?;
    // A zombie has no memory, no files and no threads left: nobody owns anything through it.
    let mut fields = after_name.split_ascii_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    // The state was field 3, so the next one is field 4.
    fields.nth(22 - 4)?.parse().ok()
}

/// Serialises those who look at every pod's state and then write their own; held until it is dropped or the process dies.
/// None when it could not be had within [`LOCK_WAIT`] (a stopped process holds it, say): better an uneven placement
/// than a pod that does not start.
pub(crate) fn lock(state_dir: &Path) -> Option<Flock<File>> {
    let pods = pods_dir(state_dir);
    let until = Instant::now() + LOCK_WAIT;
    loop {
        // The directory itself is the lock: nothing to create, nothing left over.
        let dir = create_dir(&pods).and_then(|()| {
            File::open(&pods)
                .map_err(|e| Error::io(format!("open directory {}", pods.display()), e))
        });
        match dir.map(|dir| Flock::lock(dir, FlockArg::LockExclusiveNonblock)) {
            Ok(Ok(lock)) => return Some(lock),
            Ok(Err((_, Errno::EWOULDBLOCK))) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(Err((_, error))) => {
                tracing::warn!(%error, "could not lock {}", pods.display());
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, "could not lock the state directory");
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_tells_living_processes() {
        assert!(start_time(std::process::id()).is_some());
        // Above the kernel's limit for process ids.
        assert_eq!(start_time(u32::MAX), None);
    }
}
