//! What the modules of this crate share around raw system calls.

use crate::{Error, Result};

/// Turns the usual `-1 and errno` answer of a system call into a result.
pub(crate) fn check<T: Copy + Into<i64>>(answer: T, what: impl FnOnce() -> String) -> Result<T> {
    if answer.into() == -1 {
        // Taken before `what` runs: formatting may allocate, and allocating may change errno.
        let source = std::io::Error::last_os_error();
        return Err(Error::Syscall {
            what: what(),
            source,
        });
    }
    Ok(answer)
}

/// A failed call of nix as this crate's error.
pub(crate) fn errno(what: impl FnOnce() -> String) -> impl FnOnce(nix::errno::Errno) -> Error {
    |errno| Error::Syscall {
        what: what(),
        source: errno.into(),
    }
}

/// The request of an ioctl that concerns the link `name` (netdevice(7)).
pub(crate) fn interface_request(name: &str) -> Result<libc::ifreq> {
    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(Error::Invalid {
            name: "link name",
            value: name.to_owned(),
            expected: "1 to 15 bytes".to_owned(),
        });
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as std::ffi::c_char;
    }
    Ok(request)
}

/// Reads a small text file under /proc or /sys.
pub(crate) fn read_text(path: impl Into<std::path::PathBuf>) -> Result<String> {
    let path = path.into();
    std::fs::read_to_string(&path).map_err(|source| Error::File { path, source })
}
