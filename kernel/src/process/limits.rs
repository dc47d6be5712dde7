//! How many descriptors a process may have open.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::Result;
use crate::sys::check;

/// The limit that this process was started with (RLIMIT_NOFILE), after it has raised its own.
#[derive(Debug, Clone, Copy)]
pub struct OpenFiles {
    started_with: libc::rlimit,
}

impl OpenFiles {
    /// Raises the soft limit of this process to the hard one. The programs that it starts should have the old one again
    /// ([`Self::restore_in`]): those that use select(2) break with descriptors above 1023.
    pub fn raise() -> Result<Self> {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the kernel writes a struct rlimit, which `limit` is.
        let answer = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
        check(answer, || "read the limit of open files".to_owned())?;
        let raised = libc::rlimit {
            rlim_cur: limit.rlim_max,
            ..limit
        };
        // SAFETY: the kernel reads a struct rlimit, which `raised` is.
        let answer = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) };
        check(answer, || {
            format!("raise the limit of open files to {}", limit.rlim_max)
        })?;
        Ok(Self {
            started_with: limit,
        })
    }

    /// Has the process that `command` starts begin with the limit that this one began with.
    pub fn restore_in(self, command: &mut Command) {
        let restore = move || {
            // SAFETY: the kernel reads a struct rlimit, which lives through the call.
            match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const self.started_with) } {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            }
        };
        // SAFETY: between fork and exec it only calls setrlimit, which is async-signal-safe, and allocates nothing.
        unsafe { command.pre_exec(restore) };
    }
}
