//! Opens the network namespaces that requests name.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kbp_kernel::netns::Netns;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// Opens the namespace at `path`, without doing anything to what else may be there: opening a device can be an act.
pub(super) fn open(path: &str) -> Result<Netns, String> {
    let refuse = |reason: &str| {
        Err(format!(
            "{path:?} is no network namespace: {reason}; name one like /run/netns/NAME or /proc/PID/ns/net"
        ))
    };
    if !Path::new(path).is_absolute() {
        return refuse("it is not an absolute path");
    }
    let opened = File::options()
        .read(true)
        .custom_flags(nix::libc::O_PATH)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => return refuse(&error.to_string()),
    };
    match fstatfs(&file) {
        Ok(stat) if stat.filesystem_type() == NSFS_MAGIC => {}
        Ok(_) => return refuse("it is not a namespace at all"),
        Err(errno) => return refuse(errno.desc()),
    }
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    match Netns::open(Path::new(&again)) {
        Ok(netns) => Ok(netns),
        Err(error) => refuse(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_namespaces_are_opened() {
        for (path, reason) in [
            ("", "absolute"),
            ("run/netns/x", "absolute"),
            ("/nonexistent", "No such file"),
            ("/dev/null", "not a namespace at all"),
            ("/proc/self/ns", "not a namespace at all"),
            ("/proc/self/ns/mnt", "another type"),
            ("/run/\0", "NUL"),
        ] {
            let error = open(path).expect_err(path);
            assert!(error.contains(reason), "{error}");
            assert!(error.contains("/run/netns/NAME"), "{error}");
        }
        let own = open("/proc/self/ns/net").expect("own");
        assert!(
            own.is_same(&Netns::current().expect("current"))
                .expect("ids")
        );
    }
}
