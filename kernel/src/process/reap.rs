//! Children that ended, and whose children they become.

use super::{prctl, raw_pid};
use crate::sys::check;
use crate::{Error, Result};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal {
        /// Number of the signal, real-time ones too.
        signal: i32,
        /// Whether it left a core.
        core_dumped: bool,
    },
}

/// A child that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitInfo {
    /// Its process id, free again after [`consume`].
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

impl ExitInfo {
    /// The status as shells and containerd tell it: the exit code, or 128 and the signal.
    pub fn status(&self) -> u32 {
        match self.exit {
            Exit::Code(code) => (code & 0xff) as u32,
            Exit::Signal { signal, .. } => 128 + signal as u32,
        }
    }
}

/// waitid(2) through libc: nix refuses a child that a real-time signal killed.
fn waitid(kind: libc::idtype_t, id: libc::id_t, flags: i32) -> std::io::Result<Option<ExitInfo>> {
    // SAFETY: all bytes zero is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: `info` lives through the call.
        if unsafe { libc::waitid(kind, id, &raw mut info, flags) } == 0 {
            break;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    // SAFETY: waitid filled it for a child, or left the zeroes: then the pid is 0.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let exit = match info.si_code {
        libc::CLD_EXITED => Exit::Code(status),
        code => Exit::Signal {
            signal: status,
            core_dumped: code == libc::CLD_DUMPED,
        },
    };
    Ok(Some(ExitInfo {
        pid: pid as u32,
        exit,
    }))
}

fn peek(flags: i32) -> Result<Option<u32>> {
    match waitid(libc::P_ALL, 0, libc::WEXITED | libc::WNOWAIT | flags) {
        Ok(info) => Ok(info.map(|info| info.pid)),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        Err(source) => Err(Error::Syscall {
            what: "wait for a child to end".to_owned(),
            source,
        }),
    }
}

/// Blocks until a child has ended and tells which, leaving it to be reaped by whoever waits for it; None when there are no children.
///
/// The same child is told again until somebody reaps it. Reap it with [`consume`] when it is nobody else's.
pub fn wait_any_peek() -> Result<Option<u32>> {
    peek(0)
}

/// A child that has ended, as [`wait_any_peek`] tells it, without blocking; None when there is none now.
pub fn peek_ended() -> Result<Option<u32>> {
    peek(libc::WNOHANG)
}

/// Reaps the child `pid`, which has ended; does not wait for one that still runs ([`Error::NotFound`]).
pub fn consume(pid: u32) -> Result<ExitInfo> {
    let raw = raw_pid(pid)?;
    waitid(
        libc::P_PID,
        raw as libc::id_t,
        libc::WEXITED | libc::WNOHANG,
    )
    .map_err(|source| Error::Syscall {
        what: format!("reap child {pid}"),
        source,
    })?
    .ok_or_else(|| Error::NotFound {
        what: format!("the exit of child {pid} (it still runs)"),
    })
}

/// Makes the calling process the reaper of its orphaned descendants (PR_SET_CHILD_SUBREAPER).
pub fn become_subreaper() -> Result<()> {
    let answer = prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
    check(answer, || {
        "become the reaper of orphaned descendants".to_owned()
    })?;
    Ok(())
}
