//! Making or adopting the bridge, and giving a pair that is its port what the plan says.

use std::fs;

use ipnet::IpNet;
use kbp_kernel::link::{Batch, Bridge, Link, LinkKind, VlanId, announce};
use kbp_kernel::{IfIndex, MacAddr, Mtu};
use nix::errno::Errno;
use serde_json::json;

use super::plan::Plan;
use super::vlan::{self, Gateway};
use crate::cni::error::{CniError, Code, Result};
use crate::cni::options::BridgeOptions;
use crate::sysctl;
use crate::wire::{self, Pair, Side, kernel_route};

/// How often a bridge is looked for that others make and remove meanwhile.
const ATTEMPTS: usize = 8;

/// A bridge, and what there is to undo about it.
#[derive(Debug)]
pub(crate) struct Base {
    /// Its index.
    pub(crate) index: IfIndex,
    /// Its name.
    pub(crate) name: String,
    /// Its MAC.
    pub(crate) mac: MacAddr,
    /// What it and all its ports have, this pod's included.
    pub(crate) mtu: Mtu,
    /// The pods' VLAN.
    vlan: Option<VlanId>,
    /// What has the gateways' addresses in the pods' VLAN, where that is not the bridge.
    gateway: Option<Gateway>,
    hairpin: bool,
    created: bool,
    was_down: bool,
    was_unfiltered: bool,
    added: Vec<IpNet>,
}

/// Finds the bridge or creates it. With other ports on it the MTU is theirs: one that differs is refused. Else it is
/// `wanted`, or `default` when that is None.
pub(crate) fn ensure(
    host: &mut Side,
    bridge: &BridgeOptions,
    wanted: Option<Mtu>,
    default: Mtu,
) -> Result<Base> {
    let name = bridge.name.as_str();
    let options = bridge;
    for _ in 0..ATTEMPTS {
        if let Some(link) = host.route.link_by_name(name)? {
            return adopt(host, link, options, wanted, default);
        }
        let bridge = Bridge {
            name,
            mac: random_mac()?,
            mtu: wanted.unwrap_or(default),
            vlan_filtering: options.vlan.is_some(),
        };
        match host.route.execute(Batch::new().create_bridge(&bridge)) {
            Ok(()) => {}
            // Somebody else was faster.
            Err(error) if error.errno() == Some(Errno::EEXIST as i32) => continue,
            Err(error) => return Err(unfiltered(error, name, options.vlan)),
        }
        // The caller knows nothing of it yet: a bridge that cannot be looked up once is looked up for its removal.
        let (index, failed) = match host.route.link_by_name(name) {
            Ok(None) => continue,
            Ok(Some(link)) => (link.index, None),
            Err(error) => match host.route.link_by_name(name)? {
                Some(link) => (link.index, Some(CniError::from(error))),
                None => return Err(error.into()),
            },
        };
        let base = Base {
            index,
            name: name.to_owned(),
            mac: bridge.mac,
            mtu: bridge.mtu,
            vlan: options.vlan,
            gateway: None,
            hairpin: options.hairpin,
            created: true,
            was_down: false,
            was_unfiltered: false,
            added: Vec::new(),
        };
        // A pod must not redirect the node's traffic with router advertisements (CVE-2020-10749).
        let refused = failed.map_or_else(|| sysctl::refuse_router_advertisements(name), Err);
        return match refused {
            Ok(()) => Ok(base),
            Err(error) => Err(match release(host, &base) {
                Ok(()) => error,
                Err(more) => error.with_details(&more.to_string()),
            }),
        };
    }
    let msg = format!("bridge {name} comes and goes; try again");
    Err(CniError::new(Code::TRY_AGAIN, msg))
}

fn adopt(
    host: &mut Side,
    link: Link,
    options: &BridgeOptions,
    wanted: Option<Mtu>,
    default: Mtu,
) -> Result<Base> {
    let name = &link.name;
    let (LinkKind::Other(kind), Some(mac)) = (&link.kind, link.mac) else {
        return Err(no_bridge(name));
    };
    if kind != "bridge" {
        return Err(no_bridge(name));
    }
    let mut mtu = wanted.unwrap_or(default);
    if link.mtu != mtu {
        // Without ports a bridge has 1500 or whatever was left there: that means nothing.
        let ports = host.route.ports(link.index)?;
        if let Some(narrowest) = ports.iter().map(|port| port.mtu).min() {
            let is = narrowest.min(link.mtu);
            if let Some(wanted) = wanted {
                let allowed = format!("{is}, which bridge {name} and its ports have, or 0");
                return Err(CniError::config("mtu", &json!(wanted.0), &allowed));
            }
            mtu = is;
        }
    }
    let mut base = Base {
        index: link.index,
        name: name.clone(),
        mac,
        mtu,
        vlan: options.vlan,
        gateway: None,
        hairpin: options.hairpin,
        created: false,
        was_down: false,
        was_unfiltered: false,
        added: Vec::new(),
    };
    let changed = filter(host, &link, options.vlan, &mut base).and_then(|()| {
        if !link.up {
            host.route.execute(Batch::new().set_up(link.index))?;
            base.was_down = true;
        }
        Ok(())
    });
    match changed {
        Ok(()) => Ok(base),
        // The caller knows nothing of it yet.
        Err(error) => Err(match release(host, &base) {
            Ok(()) => error,
            Err(more) => error.with_details(&more.to_string()),
        }),
    }
}

/// Has a bridge keep VLANs apart where `vlan` asks for it. What tagged frames do on a bridge that others use already is
/// not changed behind their backs.
fn filter(host: &mut Side, link: &Link, vlan: Option<VlanId>, base: &mut Base) -> Result<()> {
    let Some(vlan) = vlan.filter(|_| !link.vlan_filtering) else {
        return Ok(());
    };
    let name = &link.name;
    if !host.route.ports(link.index)?.is_empty() {
        let allowed = format!(
            "0, for bridge {name} has ports and does not filter VLANs; `ip link set {name} type bridge vlan_filtering 1` makes it"
        );
        return Err(CniError::config("vlan", &json!(vlan.0), &allowed));
    }
    host.route
        .execute(Batch::new().set_vlan_filtering(link.index, true))
        .map_err(|error| unfiltered(error, name, Some(vlan)))?;
    base.was_unfiltered = true;
    Ok(())
}

/// The answer of a kernel that cannot filter VLANs, told in the config's words.
fn unfiltered(error: kbp_kernel::Error, bridge: &str, vlan: Option<VlanId>) -> CniError {
    match vlan.filter(|_| error.errno() == Some(Errno::EOPNOTSUPP as i32)) {
        None => error.into(),
        Some(vlan) => {
            let msg = format!(
                "vlan: {vlan} is not supported by this kernel, which cannot filter VLANs on bridge {bridge}: it takes CONFIG_BRIDGE_VLAN_FILTERING; leave vlan out, or use a kernel that has it"
            );
            CniError::new(Code::UNSUPPORTED, msg)
        }
    }
}

fn no_bridge(name: &str) -> CniError {
    let allowed = "the name of a bridge, or one that is not taken; this is another kind of link";
    CniError::config("bridge", &json!(name), allowed)
}

/// Random, for bridges of the same name on two nodes may come to be connected.
pub(super) fn random_mac() -> Result<MacAddr> {
    const SOURCE: &str = "/proc/sys/kernel/random/uuid";
    let error = |what: &dyn std::fmt::Display| CniError::new(Code::IO, format!("{SOURCE}: {what}"));
    let text = fs::read_to_string(SOURCE).map_err(|e| error(&e))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    // The last twelve digits of a random UUID (RFC 9562 section 5.4) are all random.
    let tail = digits
        .get(digits.len().saturating_sub(12)..)
        .unwrap_or_default();
    let bits = u64::from_str_radix(tail, 16).map_err(|e| error(&e))?;
    let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
    Ok(MacAddr([(a & 0xfc) | 0x02, b, c, d, e, f]))
}

/// Gives pod end, host end and bridge what the plan says. On an error all three are left half configured: delete the
/// pair, then [`release`] the bridge.
pub(crate) fn configure(
    host: &mut Side,
    pod: &mut Side,
    pair: &Pair,
    base: &mut Base,
    plan: &Plan,
) -> Result<()> {
    if plan.has(true) {
        wire::enable_v6(pod, pair)?;
    }
    pod.route.execute(&pod_batch(pair, plan))?;
    if base.hairpin {
        host.route
            .execute(Batch::new().set_hairpin(pair.host.index, true))?;
    }
    if let Some(vlan) = base.vlan.filter(|_| !plan.gateways.is_empty()) {
        let bridge = (base.index, base.name.as_str());
        base.gateway = Some(vlan::ensure(host, bridge, vlan, base.mtu)?);
    }
    add_gateways(host, base, plan)?;
    check_mtu(host, base)?;
    // Who had these addresses before had another MAC.
    announce(&pod.netns, pair.pod.index, pair.pod.mac, &plan.addresses())?;
    Ok(())
}

fn pod_batch(pair: &Pair, plan: &Plan) -> Batch {
    let device = pair.pod.index;
    let mut batch = Batch::new();
    for ip in &plan.ips {
        batch.add_address(device, ip.address, false);
    }
    for route in &plan.routes {
        batch.add_route(&kernel_route(route, device));
    }
    batch
}

fn add_gateways(host: &mut Side, base: &mut Base, plan: &Plan) -> Result<()> {
    if plan.gateways.is_empty() {
        return Ok(());
    }
    let (index, name) = match &base.gateway {
        Some(gateway) => (gateway.index, &gateway.name),
        None => (base.index, &base.name),
    };
    if plan.has(true) {
        sysctl::enable_v6(name)?;
    }
    let present = host.route.addresses(index)?;
    for gateway in &plan.gateways {
        if present.contains(gateway) {
            continue;
        }
        if let Some(other) = present
            .iter()
            .find(|other| other.trunc() == gateway.trunc())
        {
            let msg = format!(
                "{name} has the address {other}, not the gateway {gateway} of the pods; remove it, or name it as the gateway in ipam"
            );
            return Err(CniError::new(Code::CONFIG, msg));
        }
        match host
            .route
            .execute(Batch::new().add_address(index, *gateway, false))
        {
            Ok(()) => base.added.push(*gateway),
            // The ADD of another pod was faster.
            Err(error) if error.errno() == Some(Errno::EEXIST as i32) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The kernel makes the bridge's MTU that of its narrowest port, unless somebody has set it by hand.
fn check_mtu(host: &mut Side, base: &Base) -> Result<()> {
    let is = host.route.link_by_index(base.index)?.map(|link| link.mtu);
    match is {
        Some(is) if is == base.mtu => Ok(()),
        Some(is) => {
            let allowed = format!("{is}, which bridge {} is set to by hand", base.name);
            Err(CniError::config("mtu", &json!(base.mtu.0), &allowed))
        }
        None => {
            let msg = format!("bridge {} was removed meanwhile; try again", base.name);
            Err(CniError::new(Code::TRY_AGAIN, msg))
        }
    }
}

/// Undoes what was made of the bridge, unless other ports use it by now. The pod's own pair has to be gone.
pub(crate) fn release(host: &mut Side, base: &Base) -> Result<()> {
    let untouched =
        !base.created && !base.was_down && !base.was_unfiltered && base.added.is_empty();
    let own = base.gateway.as_ref().and_then(|gateway| gateway.port);
    let gateway_created = base.gateway.as_ref().is_some_and(|gateway| gateway.created);
    if (untouched && !gateway_created)
        || !(host.route.ports(base.index)?.iter()).all(|port| Some(port.index) == own)
    {
        return Ok(());
    }
    if let Some(port) = own.filter(|_| gateway_created) {
        wire::delete(host, port)?;
    }
    if base.created {
        return wire::delete(host, base.index);
    }
    let mut batch = Batch::new();
    // With a link that is gone its addresses are.
    for address in base.added.iter().filter(|_| !gateway_created) {
        let index = base
            .gateway
            .as_ref()
            .map_or(base.index, |gateway| gateway.index);
        batch.delete_address(index, *address);
    }
    if base.was_unfiltered {
        batch.set_vlan_filtering(base.index, false);
    }
    if base.was_down {
        batch.set_down(base.index);
    }
    Ok(host.route.execute(&batch)?)
}
