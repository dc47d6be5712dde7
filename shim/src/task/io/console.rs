//! The socket over which the OCI runtime sends the master end of a process' terminal.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::Interest;
use tokio::net::UnixListener;

use crate::task::error::{Error, Result};

/// A listening socket in the bundle; removed when dropped.
#[derive(Debug)]
pub(super) struct ConsoleSocket {
    listener: UnixListener,
    name: String,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens in the bundle. The address of a unix socket holds 107 bytes and bundles have long paths, so the directory
    /// is named by a descriptor here, and the runtime, which works in the bundle, is given the bare name.
    pub(super) fn bind(bundle: &Path) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "console-{}-{}.sock",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let path = bundle.join(&name);
        let what = || format!("listen for a terminal on {}", path.display());
        let directory = File::open(bundle).map_err(Error::io(what()))?;
        let address = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
        let listener = UnixListener::bind(address).map_err(Error::io(what()))?;
        Ok(Self {
            listener,
            name,
            path,
        })
    }

    /// Its file name in the bundle.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Takes the terminal that the runtime sends.
    pub(super) async fn receive(self) -> Result<OwnedFd> {
        let what = "receive the terminal from the OCI runtime";
        let (stream, _) = self.listener.accept().await.map_err(Error::io(what))?;
        loop {
            stream.readable().await.map_err(Error::io(what))?;
            let received = stream.try_io(Interest::READABLE, || {
                kbp_kernel::fd::receive(stream.as_fd(), 4096, 1).map_err(|error| {
                    match error.errno() {
                        Some(errno) => std::io::Error::from_raw_os_error(errno),
                        None => std::io::Error::other(error.to_string()),
                    }
                })
            });
            match received {
                Ok(mut message) => {
                    return message.fds.pop().ok_or_else(|| {
                        Error::io(what)(std::io::Error::other(
                            "a message without a file descriptor",
                        ))
                    });
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::io(what)(error)),
            }
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
