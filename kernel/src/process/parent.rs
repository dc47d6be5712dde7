//! Children that are not to outlive who started them.

use std::os::unix::process::CommandExt;
use std::process::Command;

use super::prctl;

/// Has the process that `command` starts killed as soon as the *thread* that starts it ends, however that comes about
/// (PR_SET_PDEATHSIG): start it from a thread that lives as long as the process. What it starts itself is not affected.
///
/// The kernel forgets this when the program changes its credentials, or gains some by its file's mode.
pub fn end_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let ask = move || {
        if prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) == -1 {
            return Err(std::io::Error::last_os_error());
        }
        // The parent may have ended before this was asked for.
        if std::os::unix::process::parent_id() != parent {
            return Err(std::io::Error::from_raw_os_error(libc::ECANCELED));
        }
        Ok(())
    };
    // SAFETY: between fork and exec it only calls prctl and getppid, which are async-signal-safe, and allocates nothing:
    // an error from a number is a number.
    unsafe { command.pre_exec(ask) };
}
