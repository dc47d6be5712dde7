//! The one place that starts child processes and the one that reaps them.
//!
//! Two kinds of processes end up as children of a shim: those it starts itself (the OCI runtime, logging
//! binaries), and orphans that the kernel hands to it as their subreaper (a container's init, exec'd processes,
//! and whatever outlives those). Both are announced by SIGCHLD alone, so one loop looks at every zombie
//! *without* consuming it (WNOWAIT), decides whose it is, and only then consumes it by pid.
//!
//! Exits are not lost, however early they come: while a caller holds an [`Adoption`] the exits of unknown processes are kept for it,
//! and while a program is being started they are left alone: the one that is being started is among them, and std waits itself for one
//! that could not be executed.

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
    /// Programs that are being started.
    starts: usize,
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

    /// Starts `command` and watches it. No lock is held meanwhile: the ends of watched processes are told, however long the start takes.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub async fn spawn(self: &Arc<Self>, mut command: Command) -> io::Result<Child> {
        for name in OWN_ENVIRONMENT {
            command.env_remove(name);
        }
        let this = Arc::clone(self);
        // Of its own, so that it comes to its end when the caller goes away.
        let start = tokio::spawn(async move {
            this.lock().starts += 1;
            let started = this.launcher.launch(command).await;
            let child = {
                let mut table = this.lock();
                table.starts -= 1;
                started.map(|pid| {
                    let (sender, exit) = oneshot::channel();
                    table.watched.insert(pid, sender);
                    Child { pid, exit }
                })
            };
            this.reap();
            child
        });
        start.await.map_err(io::Error::other)?
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

    /// Consumes every zombie there is; while a program is being started those that are watched.
    fn reap(&self) {
        loop {
            let mut table = self.lock();
            if table.starts > 0 {
                let watched: Vec<u32> = table.watched.keys().copied().collect();
                for ended in watched.into_iter().flat_map(process::consume) {
                    table.told(ended);
                }
                return;
            }
            let pid = match process::peek_ended() {
                Ok(Some(pid)) => pid,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!("cannot look for processes that ended: {error}");
                    return;
                }
            };
            match process::consume(pid) {
                Ok(ended) => table.told(ended),
                // Started without the reaper, and waited for meanwhile by whoever did.
                Err(error) => tracing::debug!("nothing to reap: {error}"),
            }
        }
    }
}

impl Table {
    /// Passes on the end of a process to whoever watches it, or keeps it.
    fn told(&mut self, ended: process::ExitInfo) {
        let exit = Exit {
            pid: ended.pid,
            status: ended.status(),
            at: SystemTime::now(),
        };
        match self.watched.remove(&exit.pid) {
            // Whoever watched may have stopped caring.
            Some(watcher) => drop(watcher.send(exit)),
            None if self.adoptions > 0 => {
                let number = self.next;
                self.next += 1;
                self.unclaimed.push((number, exit));
            }
            None => {}
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
                // It may have been left alone for a start that is under way.
                drop(table);
                self.reaper.reap();
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
