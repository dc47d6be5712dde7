//! The few kernel switches that routing between links needs, each in the namespace of the calling thread.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cni::error::{CniError, Code, Result};

const ROOT: &str = "/proc/sys/net";

/// A kernel switch of the pod's namespace that the config sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodSysctl {
    path: PathBuf,
    value: String,
}

impl PodSysctl {
    /// Reads an entry of `sysctl`. The part `IFNAME` of a key stands for the pod's interface.
    pub(crate) fn read(key: &str, value: &Value, ifname: &str) -> Result<Self> {
        const ALLOWED: &str = "net.* of the pod's namespace, with a string as value";
        let refuse = || CniError::config(&format!("sysctl.{key}"), value, ALLOWED);
        // As sysctl(8): with slashes, dots belong to names.
        let separator = if key.contains('/') { '/' } else { '.' };
        let mut parts = key.split(separator);
        let is_net = parts.next() == Some("net");
        let parts: Vec<_> = parts
            .map(|part| if part == "IFNAME" { ifname } else { part })
            .collect();
        let is_name = |part: &&str| !matches!(*part, "" | "." | "..") && !part.contains('\0');
        if !is_net || parts.is_empty() || !parts.iter().all(is_name) {
            return Err(refuse());
        }
        let value = value.as_str().ok_or_else(refuse)?;
        Ok(Self {
            path: path(&parts.join("/")),
            value: value.to_owned(),
        })
    }

    /// Sets it in the calling thread's namespace; what it was before.
    pub(crate) fn set(&self) -> Result<Self> {
        let before = Self {
            path: self.path.clone(),
            value: read(&self.path)?,
        };
        ensure(&self.path, &self.value)?;
        Ok(before)
    }

    /// Whether it is as it should be; else what it is.
    pub(crate) fn difference(&self) -> Result<Option<String>> {
        // Lists are read with tabs, whatever they were written with.
        let words = |text: &str| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let is = read(&self.path)?;
        Ok((words(&is) != words(&self.value)).then(|| {
            let path = self.path.display();
            format!("{path} is {is:?} instead of {:?}", self.value)
        }))
    }
}

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

/// Switches IPv6 off for a link that is to have no IPv6 address. One that has it gets routes with its link-local address,
/// and at each change of a link the kernel goes through the IPv6 routes of all (fib6_clean_all in net/ipv6/ip6_fib.c).
/// On a kernel without IPv6 there is nothing to do.
pub(crate) fn disable_v6(link: &str) -> Result<()> {
    let path = conf_v6(link, "disable_ipv6");
    match fs::write(&path, "1") {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io("write 1 to", &path, &error)),
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
