//! The unix socket of a shim: its name, and the listener behind it.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use sha2::{Digest, Sha256};

/// Where shims of every kind have their sockets, unless containerd says otherwise.
pub const DIRECTORY: &str = "/run/containerd/s";

/// File in a bundle with the address of its shim; containerd before 2.0 finds the shim by it after a restart.
pub const FILE: &str = "address";

/// What came of asking for a group's socket.
#[derive(Debug)]
pub enum Socket {
    /// A shim serves this group already.
    Taken,
    /// This process listens on it now.
    Bound(UnixListener),
}

/// The socket of a group of containers: the name is a hash, because a socket's address holds 107 bytes. The same as the
/// runc v2 shim's, so that each finds what the other left.
pub fn path(directory: &Path, containerd: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Path::new(containerd).join(namespace).join(group);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    directory.join(hex)
}

/// A path as containerd writes addresses.
pub fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Listens on `path`, for this user alone. A socket that nobody listens on any more is replaced.
pub fn bind(path: &Path) -> anyhow::Result<Socket> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .with_context(|| format!("make {}", parent.display()))?;
    }
    let listen = || -> io::Result<UnixListener> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    let listener = match listen() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path) {
                return Ok(Socket::Taken);
            }
            remove(path);
            listen()
        }
        other => other,
    };
    listener
        .map(Socket::Bound)
        .with_context(|| format!("listen on {}", path.display()))
}

/// Whether somebody listens on `path`. Does not wait for one that is slow to accept.
pub fn is_served(path: &Path) -> bool {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connected = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .and_then(|socket| connect(socket.as_raw_fd(), &UnixAddr::new(path)?));
    // EAGAIN: there is a listener, and its queue is full.
    matches!(connected, Ok(()) | Err(Errno::EAGAIN))
}

/// Removes the socket; it may be gone.
pub fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

/// The socket that a bundle's shim listens on, when the bundle says so.
pub fn of_bundle(bundle: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(bundle.join(FILE)).ok()?;
    text.strip_prefix("unix://").map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_one_of_the_runc_v2_shim() {
        // printf /run/containerd/containerd.sock/default/abc | sha256sum
        let expected =
            "/run/containerd/s/8cb244a719603fe00870d5ce1d8e1f1db43a654cb993d107df1f1ae23ddffa59";
        let path = path(
            Path::new(DIRECTORY),
            "/run/containerd/containerd.sock",
            "default",
            "abc",
        );
        assert_eq!(path, Path::new(expected));
    }

    #[test]
    fn a_second_start_finds_the_first_and_a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/socket");
        let Ok(Socket::Bound(first)) = bind(&path) else {
            panic!("not bound")
        };
        assert_eq!(
            fs::metadata(&path).expect("a socket").permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(bind(&path), Ok(Socket::Taken)));
        drop(first);
        assert!(path.exists());
        assert!(matches!(bind(&path), Ok(Socket::Bound(_))));
    }
}
