//! The few kernel switches that routing between links needs, each in the namespace of the calling thread.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::cni::error::{CniError, Code, Result};

const ROOT: &str = "/proc/sys/net";

/// Lets the node forward the families in use, as every routing CNI plugin does.
pub(crate) fn enable_forwarding(v4: bool, v6: bool) -> Result<()> {
    if v4 {
        ensure(&path("ipv4/ip_forward"), "1")?;
    }
    let all = path("ipv6/conf/all/forwarding");
    if v6 && read(&all)? != "1" {
        keep_router_advertisements()?;
        ensure(&all, "1")?;
    }
    Ok(())
}

/// A router ignores router advertisements (accept_ra 1) and the kernel drops the default routes it had from
/// them at once: the node would lose its own way out. 2 means: accept them, forwarding or not.
fn keep_router_advertisements() -> Result<()> {
    let conf = path("ipv6/conf");
    let entries = fs::read_dir(&conf).map_err(|error| io("read", &conf, &error))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        // `all` has no effect on interfaces, and what comes later shall get the kernel's default.
        if name == "all" || name == "default" || name == "lo" {
            continue;
        }
        let accept_ra = entry.path().join("accept_ra");
        // An interface may vanish while we look.
        if read(&accept_ra).is_ok_and(|value| value == "1") {
            match fs::write(&accept_ra, "2") {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(io("write 2 to", &accept_ra, &error));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The host end must not take router advertisements from a pod: they would let it redirect the node's traffic
/// (CVE-2020-10749). On a kernel without IPv6 there is nothing to do.
pub(crate) fn refuse_router_advertisements(link: &str) -> Result<()> {
    let path = conf_v6(link, "accept_ra");
    match fs::write(&path, "0") {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io("write 0 to", &path, &error)),
        _ => Ok(()),
    }
}

/// Switches IPv6 on for a link; runtimes switch it off for new namespaces.
pub(crate) fn enable_v6(link: &str) -> Result<()> {
    ensure(&conf_v6(link, "disable_ipv6"), "0")
}

fn conf_v6(link: &str, key: &str) -> PathBuf {
    path("ipv6/conf").join(link).join(key)
}

fn path(key: &str) -> PathBuf {
    Path::new(ROOT).join(key)
}

/// Writes only what is not there already: /proc/sys may be read-only, and right all the same.
fn ensure(path: &Path, value: &str) -> Result<()> {
    if read(path)? == value {
        return Ok(());
    }
    fs::write(path, value).map_err(|error| io(&format!("write {value} to"), path, &error))
}

fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|error| io("read", path, &error))?;
    Ok(text.trim().to_owned())
}

fn io(what: &str, path: &Path, error: &std::io::Error) -> CniError {
    CniError::new(Code::IO, format!("{what} {}: {error}", path.display()))
}
