//! The veth pair: making it pollable and up, removing it. What hangs on it is each mode's own.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::link::{Batch, DEFAULT_VLAN, Route, RouteSocket, VethPair, VlanId};
use kbp_kernel::netns::Netns;
use kbp_kernel::{IfIndex, MacAddr, Mtu};
use nix::errno::Errno;

use crate::attachment::Attachment;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam::RouteConfig;
use crate::cni::options::{Options, Profile};
use crate::sysctl;

/// The largest MTU that the kernel lets a veth have (ETH_MAX_MTU).
pub(crate) const DEVICE_MTU: Mtu = Mtu(65535);

/// A network namespace and a socket that belongs to it.
#[derive(Debug)]
pub(crate) struct Side {
    /// The namespace.
    pub(crate) netns: Netns,
    /// The socket.
    pub(crate) route: RouteSocket,
}

impl Side {
    /// The namespace in which the plugin runs.
    pub(crate) fn host() -> Result<Self> {
        Ok(Self {
            netns: Netns::current()?,
            route: RouteSocket::open()?,
        })
    }

    /// The namespace of the pod.
    pub(crate) fn pod(netns: Netns) -> Result<Self> {
        let route = RouteSocket::open_in(&netns)?;
        Ok(Self { netns, route })
    }

    /// Index of a link that has just been created.
    fn index_of(&self, name: &str) -> Result<IfIndex> {
        let vanished = || format!("{name} vanished right after it was created");
        let index = self.route.index_of(name)?;
        index.ok_or_else(|| CniError::new(Code::KERNEL, vanished()))
    }
}

/// One end of the pair.
#[derive(Debug)]
pub(crate) struct End {
    /// Index in its namespace.
    pub(crate) index: IfIndex,
    /// Name.
    pub(crate) name: String,
    /// MAC.
    pub(crate) mac: MacAddr,
    /// MTU.
    pub(crate) mtu: Mtu,
}

/// A pair that was created.
#[derive(Debug)]
pub(crate) struct Pair {
    /// The host end.
    pub(crate) host: End,
    /// The pod end.
    pub(crate) pod: End,
}

/// Where on a bridge the host end belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Port {
    /// The bridge.
    pub(crate) bridge: IfIndex,
    /// The VLAN in which the port is, untagged; None: the bridge's default.
    pub(crate) vlan: Option<VlanId>,
}

/// Which end of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// Receives what the pod sends: nobody polls it but a worker, and whoever makes one sets it up for that.
    Host,
    /// Receives what the pod is sent: its sockets poll it.
    Pod,
}

/// What an end's features are to be, with what does not matter as it `is`: packets to the pod pass the pod end's NAPI, which is
/// there for GRO, when the host end leaves no segmentation for later. Those from the pod take the shorter way without
/// a NAPI until there is somebody to poll it.
pub(crate) fn features(end: Which, profile: Profile, is: Features) -> Features {
    match end {
        Which::Host => Features {
            tso: profile == Profile::Throughput,
            ..is
        },
        Which::Pod => Features { gro: true, ..is },
    }
}

/// What a veth has that nobody has changed.
pub(crate) const NEW: Features = Features {
    gro: false,
    tso: true,
};

/// A link that is no pod's, both of whose ends are the node's: every end is the receiver of somebody's packets.
pub(crate) const OF_THE_NODE: Features = Features {
    gro: true,
    tso: false,
};

/// Refuses when one of the names is taken already.
pub(crate) fn refuse_existing(
    host: &mut Side,
    pod: &mut Side,
    attachment: &Attachment,
) -> Result<()> {
    let exists = |msg| Err(CniError::new(Code::EXISTS, msg));
    let ifname = &attachment.ifname;
    if pod.route.index_of(ifname)?.is_some() {
        return exists(format!(
            "interface {ifname} exists already in the namespace of container {}; call DEL first",
            attachment.container_id,
        ));
    }
    let name = attachment.host_end();
    if host.route.index_of(&name)?.is_none() {
        return Ok(());
    }
    match host.route.link_by_name(&name)? {
        Some(link) if attachment.owns(&link) => exists(format!(
            "host end {name} of {attachment} exists already, with a pod end in another namespace or of another name; call DEL first",
        )),
        Some(link) => exists(format!(
            "the name {name} of the host end is taken by a link with the alias {:?}; remove it or use another container id",
            link.alias.unwrap_or_default(),
        )),
        None => Ok(()),
    }
}

/// Creates the pair, each end in its namespace, both up and pollable, the host end on a bridge where `port` is given.
/// Without `host_v6` IPv6 is off at the host end.
pub(crate) fn create(
    host: &mut Side,
    pod: &mut Side,
    attachment: &Attachment,
    options: &Options,
    mtu: Mtu,
    port: Option<Port>,
    host_v6: bool,
) -> Result<Pair> {
    let host_name = attachment.host_end();
    let pod_mac = options.mac.unwrap_or_else(|| attachment.pod_mac());
    let mut batch = Batch::new();
    let veth = VethPair {
        host_name: &host_name,
        host_mac: attachment.host_mac(),
        pod_name: &attachment.ifname,
        pod_mac,
        pod_netns: &pod.netns,
        mtu,
        tx_queue_len: options.tx_queue_len,
    };
    batch
        .create_veth_with(&veth, options.queues, port.map(|port| port.bridge))
        // Without its alias GC would not know whose it is, should this process be killed.
        .set_alias_of(&host_name, &attachment.alias());
    match host.route.execute(&batch) {
        // The name was taken meanwhile: nothing was made, and what is there is somebody else's.
        Err(error) if error.errno() == Some(Errno::EEXIST as i32) => return Err(error.into()),
        created => created.map_err(CniError::from),
    }
    .and_then(|()| {
        let end = |side: &Side, name: &str, mac| -> Result<End> {
            let index = side.index_of(name)?;
            let name = name.to_owned();
            Ok(End {
                index,
                name,
                mac,
                mtu,
            })
        };
        let pair = Pair {
            host: end(host, &host_name, attachment.host_mac())?,
            pod: end(pod, &attachment.ifname, pod_mac)?,
        };
        // Before the port is up: not a frame of the pod gets into another VLAN.
        if let Some(vlan) = port.and_then(|port| port.vlan) {
            join_vlan(host, pair.host.index, vlan)?;
        }
        if !host_v6 {
            sysctl::disable_v6(&pair.host.name)?;
        }
        set_up(host, pod, &pair, options)?;
        Ok(pair)
    })
    .map_err(|error| {
        // The caller knows nothing of the pair yet.
        match delete_host_end(host, attachment) {
            Ok(()) => error,
            Err(more) => error.with_details(&more.to_string()),
        }
    })
}

/// Features and qdisc first, while the ends are down, which spares the kernel a grace period for each.
fn set_up(host: &mut Side, pod: &mut Side, pair: &Pair, options: &Options) -> Result<()> {
    sysctl::refuse_router_advertisements(&pair.host.name)?;
    let mut ends = [
        (pod, &pair.pod, Which::Pod),
        (host, &pair.host, Which::Host),
    ];
    for (side, end, which) in &mut ends {
        // A NAPI instance comes with the link's being up.
        let wanted = features(*which, options.profile, NEW);
        ethtool::set_features_of_new(&side.route, &end.name, wanted)?;
        let mut batch = Batch::new();
        if *which == Which::Host {
            batch.set_pfifo(end.index, options.tx_queue_len);
        }
        side.route.execute(batch.set_up(end.index))?;
    }
    // Asking for a link makes the kernel (6.8+) notice at once that it has a carrier, which it else does up to a
    // second later: until then its operational state is down, and programs that look at it would wait.
    for (side, end, which) in ends {
        let link = side.route.link_by_index(end.index)?;
        if link.is_some_and(|link| !link.running) {
            // An older one sends nothing before that either, unless a new qdisc makes it look.
            let mut batch = Batch::new();
            if which == Which::Host {
                batch.delete_qdisc(end.index);
            }
            batch.set_pfifo(end.index, options.tx_queue_len);
            if which == Which::Pod {
                batch.delete_qdisc(end.index);
            }
            side.route.execute(&batch)?;
        }
    }
    Ok(())
}

/// Makes a port a member of one VLAN alone, untagged.
pub(crate) fn join_vlan(host: &mut Side, port: IfIndex, vlan: VlanId) -> Result<()> {
    const NOT_IN_IT: i32 = Errno::ENOENT as i32;
    host.route.execute(Batch::new().set_port_vlan(port, vlan))?;
    if vlan == DEFAULT_VLAN {
        return Ok(());
    }
    match host
        .route
        .execute(Batch::new().delete_port_vlan(port, DEFAULT_VLAN))
    {
        // A bridge can have another default, or none.
        Err(error) if error.errno() == Some(NOT_IN_IT) => Ok(()),
        left => Ok(left?),
    }
}

/// Switches IPv6 on in the pod; runtimes switch it off for new namespaces.
pub(crate) fn enable_v6(pod: &Side, pair: &Pair) -> Result<()> {
    pod.netns
        .run(|| sysctl::enable_v6("lo").and_then(|()| sysctl::enable_v6(&pair.pod.name)))?
}

/// Waits until the kernel takes packets to the pod's addresses, and to the host end's, for its own. With IPv4 that
/// is so at once; with IPv6 a work item has to run, which on a busy node takes longer than a container's start.
pub(crate) fn await_addresses(
    host: (&mut Side, Vec<IpAddr>),
    pod: (&mut Side, Vec<IpAddr>),
) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(10);
    let deadline = Instant::now() + LIMIT;
    for (side, addresses) in [pod, host] {
        for address in addresses.into_iter().filter(IpAddr::is_ipv6) {
            let mut pause = Duration::from_micros(50);
            while !side.route.is_local(address)? {
                if Instant::now() > deadline {
                    let msg = format!(
                        "the kernel does not take {address} into use within {} s",
                        LIMIT.as_secs()
                    );
                    return Err(CniError::new(Code::TRY_AGAIN, msg));
                }
                thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
        }
    }
    Ok(())
}

/// A route of a plan as the kernel gets it.
pub(crate) fn kernel_route(route: &RouteConfig, device: IfIndex) -> Route {
    Route {
        gateway: route.gw,
        onlink: route.gw.is_some(),
        mtu: route.mtu.map(Mtu),
        advmss: route.advmss,
        priority: route.priority,
        table: route.table,
        scope: route.scope,
        ..Route::new(route.dst, device)
    }
}

/// Deletes the host end, and the pod end with it; fine when it is not there. A link of that name without an
/// alias is what an interrupted ADD left; one with another alias is somebody else's.
pub(crate) fn delete_host_end(host: &mut Side, attachment: &Attachment) -> Result<()> {
    match host.route.link_by_name(&attachment.host_end())? {
        Some(link) if link.alias.is_none() || attachment.owns(&link) => delete(host, link.index),
        _ => Ok(()),
    }
}

/// Deletes a link; fine when it is gone already, as it is with its peer's namespace.
pub(crate) fn delete(host: &mut Side, link: IfIndex) -> Result<()> {
    const ENODEV: i32 = Errno::ENODEV as i32;
    match host.route.execute(Batch::new().delete_link(link)) {
        Err(error) if error.errno() == Some(ENODEV) => Ok(()),
        other => Ok(other?),
    }
}
