//! Finds a pod's interface and its host end, from both sides.

use kbp_kernel::IfIndex;
use kbp_kernel::link::{Link, LinkKind, RouteSocket};
use kbp_kernel::netns::Netns;

use crate::Result;

/// A pod's veth with both ends known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name in the pod.
    pub pod_name: String,
    /// Index in the pod.
    pub pod_index: IfIndex,
    /// Name on the host.
    pub host_name: String,
    /// Index on the host.
    pub host_index: IfIndex,
}

/// What a namespace holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Interfaces that can be polled, and remarks on those that cannot (`eth1 is a netkit: it has no NAPI`).
    Endpoints {
        /// The veths.
        veths: Vec<Endpoint>,
        /// Why others are left alone.
        not_pollable: Vec<String>,
    },
    /// Only a loopback (yet).
    Empty,
    /// It is the host's own namespace: nothing is ever touched there.
    HostNetwork,
}

/// Looks at the pod's namespace, as seen from `host`.
///
/// # Errors
/// When the kernel does not let one of the namespaces be read.
pub fn find(host: &Netns, pod: &Netns) -> Result<Found> {
    if pod.is_same(host)? {
        return Ok(Found::HostNetwork);
    }
    let mut in_pod = RouteSocket::open_in(pod)?;
    let links: Vec<Link> = in_pod.links()?.into_iter().filter(counts).collect();
    if links.is_empty() {
        return Ok(Found::Empty);
    }
    let mut in_host = RouteSocket::open_in(host)?;
    let mut veths = Vec::new();
    let mut not_pollable = Vec::new();
    for link in links {
        match host_end(&mut in_host, &mut in_pod, host, pod, &link)? {
            Ok(endpoint) => veths.push(endpoint),
            Err(reason) => not_pollable.push(format!("{} {reason}", link.name)),
        }
    }
    Ok(Found::Endpoints {
        veths,
        not_pollable,
    })
}

/// Whether a link is an interface that somebody gave to the pod. The loopback is not, nor are the tunnels (`tunl0`,
/// `sit0`…) that the kernel puts into every namespace once their module is loaded: those are down until used.
fn counts(link: &Link) -> bool {
    !link.loopback && (link.up || link.kind == LinkKind::Veth)
}

/// The host end of a pod's link, or why there is none that can be polled.
fn host_end(
    in_host: &mut RouteSocket,
    in_pod: &mut RouteSocket,
    host: &Netns,
    pod: &Netns,
    link: &Link,
) -> Result<Result<Endpoint, String>> {
    match &link.kind {
        LinkKind::Veth => {}
        LinkKind::None => {
            return Ok(Err(
                "is a device of its own, not a veth: its driver's NAPI is not the pod's to poll"
                    .to_owned(),
            ));
        }
        LinkKind::Other(kind) => return Ok(Err(no_napi(kind))),
    }
    let Some(peer) = link.peer_index else {
        return Ok(Err("is a veth whose other end is not known here".to_owned()));
    };
    let elsewhere = "is a veth whose other end is not in the host's network namespace";
    // Namespace ids exist only where the kernel had a reason to give one; the listing of the links was one.
    match link.peer_nsid {
        None => {
            return Ok(Err(
                "is a veth whose other end is in the pod itself".to_owned()
            ));
        }
        Some(nsid) if in_pod.nsid_of(host)? != Some(nsid) => {
            return Ok(Err(elsewhere.to_owned()));
        }
        Some(_) => {}
    }
    // From the other side: an index means nothing without its namespace, and a link may vanish and its number be given
    // to another between two questions.
    let Some(other) = in_host.link_by_index(peer)? else {
        return Ok(Err(elsewhere.to_owned()));
    };
    let points_back = other.kind == LinkKind::Veth
        && other.peer_index == Some(link.index)
        && other.peer_nsid.is_some()
        && other.peer_nsid == in_host.nsid_of(pod)?;
    if !points_back {
        return Ok(Err(elsewhere.to_owned()));
    }
    Ok(Ok(Endpoint {
        pod_name: link.name.clone(),
        pod_index: link.index,
        host_name: other.name,
        host_index: other.index,
    }))
}

fn no_napi(kind: &str) -> String {
    let why = match kind {
        "netkit" => "packets bypass NAPI there; let the CNI plugin make veths instead",
        "macvlan" | "ipvlan" | "macvtap" | "vlan" => {
            "its packets come through its parent's NAPI; use a veth instead"
        }
        _ => "it has no NAPI of its own; use a veth instead",
    };
    format!("is a {kind}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel makes no link of here can still be said right.
    #[test]
    fn kinds_without_a_napi_are_named_with_what_to_do() {
        for (kind, why) in [
            ("netkit", "packets bypass NAPI"),
            ("macvlan", "its parent's NAPI"),
            ("ipvlan", "its parent's NAPI"),
            ("bridge", "no NAPI of its own"),
        ] {
            let reason = no_napi(kind);
            assert!(reason.starts_with(&format!("is a {kind}: ")), "{reason}");
            assert!(reason.contains(why), "{reason}");
            assert!(reason.contains("veth"), "{reason}");
        }
    }
}
