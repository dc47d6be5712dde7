//! The one place that starts child processes and the one that reaps them.
//!
//! Two kinds of processes end up as children of a shim: those it starts itself (the OCI runtime, logging
//! binaries), and orphans that the kernel hands to it as their subreaper (a container's init, exec'd processes,
//! and whatever outlives those). Both are announced by SIGCHLD alone, so one loop looks at every zombie
//! *without* consuming it (WNOWAIT), decides whose it is, and only then consumes it by pid.
//!
//! Exits are not lost, however early they come: a child is started and registered under the lock that the loop
//! takes, and while a caller holds an [`Adoption`] the exits of unknown processes are kept for it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use kbp_kernel::process;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::error::Error;
use super::launcher::Launcher;

/// Environment that tunes the memory of the shim's own process and is nobody else's business.
pub const OWN_ENVIRONMENT: [&str; 4] = [
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
];

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Process id.
    pub pid: u32,
    /// Exit code, or 128 plus the signal that killed it.
    pub status: u32,
    /// When the shim saw it.
    pub at: SystemTime,
}

/// Starts, watches and reaps the processes of one shim.
#[derive(Debug)]
pub struct Reaper {
    table: Mutex<Table>,
    launcher: Launcher,
}

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<u32, oneshot::Sender<Exit>>,
    /// Exits that nobody had asked for, kept while somebody may still do so; with a running number.
    unclaimed: Vec<(u64, Exit)>,
    adoptions: usize,
    next: u64,
}

/// A process started by [`Reaper::spawn`].
#[derive(Debug)]
pub struct Child {
    /// Its process id.
    pub pid: u32,
    /// Resolves when it has ended.
    pub exit: oneshot::Receiver<Exit>,
}

/// While it lives, exits of processes that are not children yet are kept, so that a process which the OCI runtime
/// leaves behind can be watched once its pid is known, even when it has ended by then.
#[derive(Debug)]
pub struct Adoption {
    reaper: Arc<Reaper>,
    since: u64,
}

impl Reaper {
    /// Makes the calling process a subreaper and reaps for it until the runtime ends; `launcher` starts what is started.
    ///
    /// # Errors
    /// When the kernel refuses PR_SET_CHILD_SUBREAPER or the signal handler.
    pub fn start(launcher: Launcher) -> super::error::Result<Arc<Self>> {
        process::become_subreaper()?;
        let mut signals = signal(SignalKind::child()).map_err(Error::io("listen for SIGCHLD"))?;
        let reaper = Arc::new(Self {
            table: Mutex::default(),
            launcher,
        });
        let this = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                this.reap();
                if signals.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `command` and watches it.
    ///
    /// The child gets transparent huge pages back, which the shim switches off for itself: the setting belongs to
    /// the address space and is inherited at exec, so it is switched for the moment of the spawn: std waits for
    /// the child's exec.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        for name in OWN_ENVIRONMENT {
            command.env_remove(name);
        }
        let mut table = self.lock();
        let thp_off = process::thp_disabled().unwrap_or(false);
        if thp_off {
            let _ = process::set_thp_disabled(false);
        }
        let spawned = self.launcher.launch(command);
        if thp_off {
            let _ = process::set_thp_disabled(true);
        }
        let pid = spawned?;
        let (sender, exit) = oneshot::channel();
        table.watched.insert(pid, sender);
        Ok(Child { pid, exit })
    }

    /// Announces that a process is about to be left to the shim by one that it started.
    pub fn adopt(self: &Arc<Self>) -> Adoption {
        let mut table = self.lock();
        table.adoptions += 1;
        Adoption {
            reaper: Arc::clone(self),
            since: table.next,
        }
    }

    /// Sends a signal, by number, to a process that is watched and has not been reaped, so that the pid cannot mean
    /// another one. False when it has ended.
    ///
    /// # Errors
    /// When the kernel refuses, e.g. a number that is no signal.
    pub fn signal(&self, pid: u32, signal: i32) -> kbp_kernel::Result<bool> {
        let table = self.lock();
        if !table.watched.contains_key(&pid) {
            return Ok(false);
        }
        process::kill(pid, signal)
    }

    /// Consumes every zombie there is.
    fn reap(&self) {
        loop {
            let mut table = self.lock();
            let pid = match process::peek_ended() {
                Ok(Some(pid)) => pid,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!("cannot look for processes that ended: {error}");
                    return;
                }
            };
            let ended = match process::consume(pid) {
                Ok(ended) => ended,
                Err(error) => {
                    // Started without the reaper, and waited for meanwhile by whoever did.
                    tracing::debug!("nothing to reap: {error}");
                    continue;
                }
            };
            let exit = Exit {
                pid: ended.pid,
                status: ended.status(),
                at: SystemTime::now(),
            };
            match table.watched.remove(&exit.pid) {
                // Whoever watched may have stopped caring.
                Some(watcher) => drop(watcher.send(exit)),
                None if table.adoptions > 0 => {
                    let number = table.next;
                    table.next += 1;
                    table.unclaimed.push((number, exit));
                }
                None => {}
            }
        }
    }
}

impl Adoption {
    /// Watches `pid`; resolves at once when it has ended since the adoption was announced.
    pub fn watch(&self, pid: u32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.lock();
        let found = table
            .unclaimed
            .iter()
            .rposition(|(number, exit)| *number >= self.since && exit.pid == pid);
        match found {
            Some(index) => {
                let (_, exit) = table.unclaimed.remove(index);
                let _ = sender.send(exit);
            }
            None => {
                table.watched.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Adoption {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.adoptions -= 1;
        if table.adoptions == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Standard streams of a child.
#[derive(Debug, Default)]
pub struct ChildStdio {
    /// Its standard input; /dev/null when there is none.
    pub stdin: Option<OwnedFd>,
    /// Its standard output.
    pub stdout: Option<OwnedFd>,
    /// Its standard error.
    pub stderr: Option<OwnedFd>,
}

impl ChildStdio {
    /// Gives the streams to `command`.
    pub fn apply(self, command: &mut Command) {
        let stdio = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        command
            .stdin(stdio(self.stdin))
            .stdout(stdio(self.stdout))
            .stderr(stdio(self.stderr));
    }
}
