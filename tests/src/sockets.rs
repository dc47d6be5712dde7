//! What the sockets of a running process are set to, read from outside: the process has no part in it.

use std::os::fd::AsFd;
use std::path::Path;

use kbp_kernel::process::PidFd;
use kbp_kernel::sockopt::{self, SocketKind};

use crate::Result;
use crate::error::IoContext;

/// Busy-poll settings of a process' descriptors, in µs; 0: off.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sockets {
    /// SO_BUSY_POLL of each IP socket.
    pub inet: Vec<u32>,
    /// EPIOCGPARAMS' window of each epoll instance.
    pub epoll: Vec<u32>,
    /// SO_BUSY_POLL of each other socket.
    pub other: Vec<u32>,
}

impl Sockets {
    /// Reads those of process `pid`; descriptors that are closed meanwhile are left out.
    pub fn of(pid: u32) -> Result<Self> {
        let process = PidFd::open(pid)?;
        let dir = format!("/proc/{pid}/fd");
        let mut sockets = Self::default();
        for entry in std::fs::read_dir(Path::new(&dir))
            .context(|| format!("read {dir}"))?
            .flatten()
        {
            let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let target = target.to_string_lossy();
            if !target.starts_with("socket:") && !target.contains("eventpoll") {
                continue;
            }
            let Ok(fd) = process.get_fd(number) else {
                continue;
            };
            if sockopt::is_epoll(fd.as_fd()) {
                sockets
                    .epoll
                    .push(sockopt::epoll_params(fd.as_fd())?.busy_poll.0);
                continue;
            }
            match sockopt::kind(fd.as_fd()) {
                SocketKind::Inet => sockets.inet.push(sockopt::busy_poll(fd.as_fd())?.0),
                SocketKind::Other => sockets.other.push(sockopt::busy_poll(fd.as_fd())?.0),
                SocketKind::NotASocket => {}
            }
        }
        Ok(sockets)
    }

    /// Whether there are IP sockets and all of them, and all epoll instances, poll for `window` µs.
    pub fn all_poll_for(&self, window: u32) -> bool {
        !self.inet.is_empty() && self.inet.iter().chain(&self.epoll).all(|w| *w == window)
    }
}
