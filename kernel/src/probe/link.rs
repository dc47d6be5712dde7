//! Probes of links and their NAPI instances, on a veth pair between two throw-away namespaces.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::ethtool::{Features, set_features};
use crate::link::{Batch, RouteSocket, VethPair};
use crate::napi::{Napi, NapiSettings, NetdevSocket, Threaded};
use crate::netns::Netns;
use crate::nft::MasqueradeTable;
use crate::poll_socket::{Ends, prime};
use crate::{Error, IfIndex, MacAddr, Mtu, Result};

/// A veth end in a throw-away namespace gets a NAPI instance once GRO is on.
///
/// # Errors
/// [`Error::Unsupported`] when it gets none or the kernel does not list instances; what the kernel
/// said when a veth cannot be made at all.
pub fn veth_napi() -> Result<()> {
    PolledVeth::new().map(|_| ())
}

/// A veth pair can be made with each end in its namespace, and takes the features with which it can be polled.
///
/// # Errors
/// What the kernel said to the part that failed.
pub fn veth_features() -> Result<()> {
    pollable_veth().map(|_| ())
}

/// A packet from one end of a veth passes a NAPI instance of the other: what [`veth_napi`] asks the kernel, told by a socket. For
/// kernels that do not list instances (before 6.8).
///
/// # Errors
/// [`Error::Unsupported`] when it passes none; what the kernel said when a veth cannot be made at all.
pub fn veth_packet() -> Result<()> {
    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const POD: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
    /// A new veth may take a second until it carries packets.
    const PATIENCE: Duration = Duration::from_secs(3);
    let (host, pod, link) = pollable_veth()?;
    let mut route = RouteSocket::open_in(&pod)?;
    let pod_link = route.link_by_name("probe")?;
    let pod_link = pod_link.ok_or_else(|| Error::NotFound {
        what: "the other end of the new veth".to_owned(),
    })?;
    let pollable = Features {
        gro: true,
        tso: false,
    };
    set_features(&pod, "probe", pollable)?;
    let address = |ip: IpAddr| IpNet::new_assert(ip, 30);
    let mut batch = Batch::new();
    batch.set_up(pod_link.index);
    batch.add_address(pod_link.index, address(POD), false);
    route.execute(&batch)?;
    let mut batch = Batch::new();
    batch.add_address(link, address(HOST), false);
    RouteSocket::open_in(&host)?.execute(&batch)?;
    let ends = Ends {
        polled: &host,
        other: &pod,
        other_name: "probe",
        addresses: &[HOST],
    };
    let until = Instant::now() + PATIENCE;
    loop {
        match prime(&ends, None) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => {}
        }
    }
}

/// The netdev family answers `napi-get`.
///
/// # Errors
/// [`Error::Unsupported`] when there is no such family or command.
pub fn netdev_family() -> Result<()> {
    let netns = Netns::create()?;
    let loopback = RouteSocket::open_in(&netns)?.link_by_name("lo")?;
    let loopback = loopback.ok_or(Error::NotFound {
        what: "the loopback".to_owned(),
    })?;
    NetdevSocket::open_in(&netns)?
        .napis(loopback.index)
        .map(|_| ())
}

/// Interrupts of a single NAPI instance can be deferred and suspended: tried on a throw-away veth.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel does not have it (before 6.13).
pub fn napi_settings() -> Result<()> {
    let mut veth = PolledVeth::new()?;
    let settings = NapiSettings {
        threaded: None,
        gro_flush_timeout: Some(20_000),
        defer_hard_irqs: Some(1),
        irq_suspend_timeout: Some(200_000),
    };
    veth.socket.set(veth.napi.id, settings)
}

/// `napi-set threaded=busy-poll` works on a throw-away veth.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel does not have it.
pub fn threaded_busy_poll() -> Result<()> {
    thread_of_napi(Threaded::BusyPoll)
}

/// `napi-set threaded=enabled` works on a throw-away veth.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel does not have it.
pub fn threaded() -> Result<()> {
    thread_of_napi(Threaded::Enabled)
}

fn thread_of_napi(mode: Threaded) -> Result<()> {
    let mut veth = PolledVeth::new()?;
    let threaded = |threaded| NapiSettings {
        threaded: Some(threaded),
        ..NapiSettings::default()
    };
    let result = veth.socket.set(veth.napi.id, threaded(mode));
    // Its thread would spin until the namespace is taken down, which is later than now.
    if result.is_ok() {
        veth.socket
            .set(veth.napi.id, threaded(Threaded::Disabled))?;
    }
    result
}

/// Pods can be masqueraded through nf_tables.
///
/// # Errors
/// [`Error::Unsupported`] when there is no nf_tables; what the kernel said when a part of it, like
/// the masquerading expression, is missing.
pub fn masquerade() -> Result<()> {
    let netns = Netns::create()?;
    let addresses = [
        [192, 0, 2, 1].into(),
        IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    ];
    MasqueradeTable::open(&netns, "probe")?.add("probe", &addresses, &[])
}

/// A veth pair whose host end has a NAPI instance; it is gone with its namespaces.
struct PolledVeth {
    socket: NetdevSocket,
    napi: Napi,
    _host: Netns,
    _pod: Netns,
}

impl PolledVeth {
    fn new() -> Result<Self> {
        let (host, pod, link) = pollable_veth()?;
        let mut socket = NetdevSocket::open_in(&host)?;
        match socket.napis(link)?.pop() {
            Some(napi) => Ok(Self {
                socket,
                napi,
                _host: host,
                _pod: pod,
            }),
            None => Err(Error::Unsupported {
                feature: "a NAPI instance for veth",
                reason: "a veth end that is up with GRO on has none".to_owned(),
            }),
        }
    }
}

/// Both namespaces of a pair, and its host end, which is up with the features that polling takes.
fn pollable_veth() -> Result<(Netns, Netns, IfIndex)> {
    let (host, pod) = (Netns::create()?, Netns::create()?);
    let mut route = RouteSocket::open_in(&host)?;
    let mut batch = Batch::new();
    batch.create_veth(&VethPair {
        host_name: "probe",
        host_mac: MacAddr([2, 0, 0, 0, 0, 1]),
        pod_name: "probe",
        pod_mac: MacAddr([2, 0, 0, 0, 0, 2]),
        pod_netns: &pod,
        mtu: Mtu(1500),
        tx_queue_len: 1,
    });
    route.execute(&batch)?;
    let link = route.link_by_name("probe")?;
    let link = link.ok_or_else(|| Error::NotFound {
        what: "the new veth".to_owned(),
    })?;
    let pollable = Features {
        gro: true,
        tso: false,
    };
    set_features(&host, "probe", pollable)?;
    Ok((host, pod, link.index))
}
