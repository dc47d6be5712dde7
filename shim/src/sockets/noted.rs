//! The processes of a pod that may come to poll with several threads, noted as their calls are answered.
//!
//! Which thread will wait where cannot be told when a server makes its epoll instances or listens, so its process is only written down
//! here, and looked at later ([`super::pollers`]) by whoever looks at the pod.

use std::sync::{Arc, Mutex, PoisonError};

use kbp_kernel::process::{self, PidFd};

use super::Container;

/// Processes that are kept until somebody looks; further ones are left as they are.
const MOST: usize = 256;

/// A process that listens or makes epoll instances.
#[derive(Debug)]
pub struct Noted {
    /// Its id.
    pub pid: u32,
    /// While this is open, the number means no other one.
    pub process: PidFd,
    container: Arc<Container>,
}

impl Noted {
    /// The container that it belongs to.
    pub fn container(&self) -> &str {
        &self.container.id
    }
}

/// Those that nobody has looked at yet.
#[derive(Debug)]
pub(super) struct Notes(Mutex<Vec<Noted>>);

impl Notes {
    pub(super) fn new() -> Self {
        // What comes later waits for nothing but a lock.
        Self(Mutex::new(Vec::with_capacity(MOST)))
    }

    /// Writes the process of thread `tid` down, once. `waits`: whether the thread still waits in its call, so that its number was no
    /// other's until then.
    pub(super) fn add(&self, tid: u32, container: &Arc<Container>, waits: impl FnOnce() -> bool) {
        let Ok(pid) = process::process_of(tid) else {
            return;
        };
        let mut notes = self.lock();
        if notes.len() >= MOST || notes.iter().any(|n| n.pid == pid) {
            return;
        }
        let Ok(process) = PidFd::open(pid) else {
            return;
        };
        if !waits() {
            return;
        }
        notes.push(Noted {
            pid,
            process,
            container: Arc::clone(container),
        });
    }

    /// Those that were written down since it was asked last.
    pub(super) fn take(&self) -> Vec<Noted> {
        self.lock().drain(..).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Noted>> {
        // The list is whole between any two operations on it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
