//! The gateway of a VLAN: the node's own place in one VLAN of a bridge.
//!
//! The bridge's own address is in its default VLAN. For another one there is a veth pair, as with the reference plugin:
//! one end is a port of the bridge in that VLAN alone, the other, `<bridge>.<vlan>`, has the gateways' addresses. Like
//! the bridge it is shared by all pods of the VLAN and stays when they go. A link of that name that kbp has not made
//! (an 802.1Q device on the bridge, say) is taken for the VLAN's gateway as it is.

use kbp_kernel::ethtool;
use kbp_kernel::link::{Batch, VethPair, VlanId};
use kbp_kernel::{IfIndex, Mtu};
use nix::errno::Errno;

use super::wire::random_mac;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::options::DEFAULT_TX_QUEUE_LEN;
use crate::sysctl;
use crate::wire::{self, Side};

/// How often a link is looked for that others make and remove meanwhile.
const ATTEMPTS: usize = 8;

/// What has the gateways' addresses of a VLAN.
#[derive(Debug)]
pub(super) struct Gateway {
    /// Its index.
    pub(super) index: IfIndex,
    /// Its name.
    pub(super) name: String,
    /// The bridge's port that leads to it, where kbp has made it.
    pub(super) port: Option<IfIndex>,
    /// Whether this call has made it.
    pub(super) created: bool,
}

/// Name of the link that has the gateways' addresses.
pub(crate) fn gateway_name(bridge: &str, vlan: VlanId) -> String {
    format!("{bridge}.{vlan}")
}

/// Name of the port that leads to it.
fn port_name(bridge: IfIndex, vlan: VlanId) -> String {
    format!("kbv{:x}.{vlan}", bridge.0)
}

/// Finds the gateway or makes it. One that an interrupted call has left unfinished is finished.
pub(super) fn ensure(
    host: &mut Side,
    bridge: (IfIndex, &str),
    vlan: VlanId,
    mtu: Mtu,
) -> Result<Gateway> {
    let (name, port_name) = (gateway_name(bridge.1, vlan), port_name(bridge.0, vlan));
    for _ in 0..ATTEMPTS {
        let mut created = false;
        if host.route.index_of(&name)?.is_none() {
            let pair = VethPair {
                host_name: &port_name,
                host_mac: random_mac()?,
                pod_name: &name,
                pod_mac: random_mac()?,
                pod_netns: &host.netns,
                mtu,
                tx_queue_len: DEFAULT_TX_QUEUE_LEN,
            };
            let mut batch = Batch::new();
            batch.create_veth_with(&pair, 1, Some(bridge.0));
            match host.route.execute(&batch) {
                Ok(()) => created = true,
                // Somebody else was faster.
                Err(error) if error.errno() == Some(Errno::EEXIST as i32) => continue,
                Err(error) => return Err(error.into()),
            }
        }
        let found = find(host, &name, &port_name, created);
        let gateway = match found {
            Ok(Some(gateway)) => gateway,
            Ok(None) => continue,
            Err(error) => return Err(undone(host, &port_name, created, error)),
        };
        return match finish(host, &gateway, &port_name, vlan) {
            Ok(()) => Ok(gateway),
            Err(error) => Err(undone(host, &port_name, created, error)),
        };
    }
    let msg = format!("{name} comes and goes; try again");
    Err(CniError::new(Code::TRY_AGAIN, msg))
}

/// None: it was removed meanwhile.
fn find(host: &mut Side, name: &str, port: &str, created: bool) -> Result<Option<Gateway>> {
    let Some(index) = host.route.index_of(name)? else {
        return Ok(None);
    };
    Ok(Some(Gateway {
        index,
        name: name.to_owned(),
        port: host.route.index_of(port)?,
        created,
    }))
}

/// Everything but the addresses. All of it can be done again.
fn finish(host: &mut Side, gateway: &Gateway, port_name: &str, vlan: VlanId) -> Result<()> {
    let Some(port) = gateway.port else {
        return Ok(());
    };
    // A pod must not redirect the node's traffic with router advertisements (CVE-2020-10749).
    sysctl::refuse_router_advertisements(&gateway.name)?;
    sysctl::disable_v6(port_name)?;
    wire::join_vlan(host, port, vlan)?;
    for (index, name) in [(port, port_name), (gateway.index, &gateway.name)] {
        if host.route.link_by_index(index)?.is_some_and(|link| link.up) {
            continue;
        }
        ethtool::set_features_of_new(&host.route, name, wire::OF_THE_NODE)?;
        let mut batch = Batch::new();
        batch.set_pfifo(index, DEFAULT_TX_QUEUE_LEN).set_up(index);
        host.route.execute(&batch)?;
    }
    Ok(())
}

/// The caller knows nothing of the pair yet.
fn undone(host: &mut Side, port: &str, created: bool, error: CniError) -> CniError {
    let deleted = match host.route.index_of(port) {
        Ok(Some(port)) if created => wire::delete(host, port),
        Ok(_) => Ok(()),
        Err(more) => Err(more.into()),
    };
    match deleted {
        Ok(()) => error,
        Err(more) => error.with_details(&more.to_string()),
    }
}
