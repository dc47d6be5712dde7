//! What several tests of sockets need.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use kbp_kernel::Micros;

use super::{Prefer, Treatment};

/// As `auto` treats a container, with this window; 0 is none.
pub(super) const fn treatment(window: Micros) -> Treatment {
    Treatment {
        window: if window.0 > 0 { Some(window) } else { None },
        epoll: true,
        bounded: true,
        prefer: Prefer {
            sockets: false,
            epolls: false,
        },
    }
}

/// A process that has these two descriptors and does nothing.
pub(super) struct Holder(Child);

impl Holder {
    pub(super) fn new(first: &OwnedFd, second: &OwnedFd) -> Self {
        let copy = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("duplicate"));
        let child = Command::new("sleep")
            .arg("600")
            .stdin(copy(first))
            .stdout(copy(second))
            .spawn()
            .expect("sleep");
        Self(child)
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
