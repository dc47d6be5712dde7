//! ADD: lease addresses, make the pair, say what was made. A failed ADD leaves the node as it was.

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use kbp_kernel::{IfIndex, Mtu};
use serde_json::Value;

use super::open_pod;
use crate::attachment::Attachment;
use crate::bridge::plan::Role;
use crate::bridge::wire::Base;
use crate::cni::config::Config;
use crate::cni::delegate::{Ipam, Leased, Leasing, NotLeased, Prepared, Promise};
use crate::cni::env::Call;
use crate::cni::error::{CniError, Result};
use crate::cni::ipam::{Lease, LeasedIp, RouteConfig};
use crate::cni::options::{BridgeOptions, Mode, Options};
use crate::cni::result::{self, Attached, Interface};
use crate::sysctl::{self, PodSysctl};
use crate::uplink::UplinkMtu;
use crate::wire::{self, DEVICE_MTU, End, Pair, Port, Side};
use crate::{bridge, masquerade, routed, tune};

/// Attaches the container and hands the result to `deliver`, without which nobody would know of the attachment.
pub(crate) fn add(
    call: &Call,
    config: &Config,
    deliver: impl FnOnce(&Value) -> Result<()>,
) -> Result<()> {
    // Everything that can be refused is refused before anything is made.
    let options = Options::read(&config.json, call)?;
    config.prev_result()?;
    config.dns()?;
    let attachment = Attachment::new(&config.name, &call.container_id, &call.ifname);
    if options.mode == Mode::Tune {
        // DEL gives back what the config leased in another mode, and would refuse what cannot be asked.
        if config.wants_ipam() {
            Ipam::find(config, call)?;
        }
        return tune(call, config, &options, &attachment, deliver);
    }
    let ipam = Ipam::find(config, call)?;
    // An IPAM plugin takes longer than all the rest: its start is not waited for, and it is told nothing before nothing can be refused.
    let leasing = ipam.prepare_add();
    let mut host = Side::host()?;
    let (mut pod, sandbox) = open_pod(call, &host)?;
    wire::refuse_existing(&mut host, &mut pod, &attachment)?;

    let mut add = Add {
        config,
        attachment,
        options,
        ipam: &ipam,
        host,
        pod,
        promise: Promise::default(),
        made: Made::default(),
    };
    add.run(sandbox, leasing)
        .and_then(|result| add.register(sandbox).map(|()| result))
        .and_then(|result| deliver(&result))
        .map_err(|error| add.undo(error))
}

fn tune(
    call: &Call,
    config: &Config,
    options: &Options,
    attachment: &Attachment,
    deliver: impl FnOnce(&Value) -> Result<()>,
) -> Result<()> {
    let result = tune::add(call, config, options)?;
    let poller = options.poller.as_ref().zip(call.netns.as_deref());
    let registered = match poller {
        Some((poller, netns)) => poller.register(attachment, netns, options),
        None => Ok(false),
    };
    registered
        .and_then(|registered| {
            deliver(&result).inspect_err(|_| {
                if let Some((poller, _)) = poller.filter(|_| registered) {
                    poller.unregister(attachment);
                }
            })
        })
        .map_err(|error| tune::undo(call, error))
}

/// What there is to undo.
#[derive(Debug, Default)]
struct Made {
    lease: bool,
    host_end: Option<IfIndex>,
    masquerade: bool,
    bridge: Option<Base>,
    sysctls: Vec<PodSysctl>,
    registration: bool,
}

#[derive(Debug)]
struct Add<'a> {
    config: &'a Config,
    attachment: Attachment,
    options: Options,
    ipam: &'a Ipam<'a>,
    host: Side,
    pod: Side,
    /// What the IPAM plugin has yet to confirm by its end.
    promise: Promise<'a>,
    made: Made,
}

impl<'a> Add<'a> {
    fn run(&mut self, sandbox: &Path, leasing: Prepared<'a>) -> Result<Value> {
        let leasing = leasing.begin();
        let mode = self.options.mode.clone();
        let uplink = UplinkMtu::find(&mut self.host.route).map_err(CniError::from);
        // The pair needs no address: it is made while the IPAM plugin works.
        let pair = uplink.and_then(|uplink| {
            let pair = match &mode {
                Mode::Bridge(bridge) => self.port(bridge, uplink),
                Mode::Routed | Mode::Tune => self.pair(DEVICE_MTU, None),
            };
            Ok((pair?, uplink))
        });
        // Also when there is no pair, for what was leased has to be given back.
        let lease = self.lease(leasing);
        let ((pair, uplink), lease) = (pair?, lease?);
        match &mode {
            Mode::Bridge(bridge) => self.bridge(&lease, &pair, bridge, uplink, sandbox),
            Mode::Routed | Mode::Tune => self.routed(&lease, &pair, uplink, sandbox),
        }
    }

    fn routed(
        &mut self,
        lease: &Lease,
        pair: &Pair,
        uplink: UplinkMtu,
        sandbox: &Path,
    ) -> Result<Value> {
        let plan = routed::plan::plan(
            lease,
            &self.config.ipam_ranges(),
            self.options.is_default_gateway,
            self.options.mtu,
            uplink,
        )?;
        routed::wire::configure(&mut self.host, &mut self.pod, pair, &plan)?;
        self.masquerade(&plan.addresses(), &plan.ranges)?;
        self.sysctls()?;
        let host = vec![interface(&pair.host)];
        let result = self.result(lease, host, pair, &plan.leased(), &plan.routes, sandbox)?;
        self.make_ready(plan.gateways(), plan.addresses())?;
        // Last: it is the only thing that is not undone, for others may have come to need it.
        sysctl::enable_forwarding(plan.has_v4(), plan.has_v6())?;
        Ok(result)
    }

    /// Makes a pair that is a port of the bridge, which is made, too, where there is none.
    fn port(&mut self, bridge: &BridgeOptions, uplink: UplinkMtu) -> Result<Pair> {
        // Where packets that leave pass the node, their routes can be narrower than the ports.
        let default = if bridge.is_gateway {
            DEVICE_MTU
        } else {
            uplink.v4.min(uplink.v6)
        };
        let base = bridge::wire::ensure(&mut self.host, bridge, self.options.mtu, default)?;
        let (index, mtu) = (base.index, base.mtu);
        self.made.bridge = Some(base);
        let vlan = bridge.vlan;
        self.pair(
            mtu,
            Some(Port {
                bridge: index,
                vlan,
            }),
        )
    }

    fn bridge(
        &mut self,
        lease: &Lease,
        pair: &Pair,
        bridge: &BridgeOptions,
        uplink: UplinkMtu,
        sandbox: &Path,
    ) -> Result<Value> {
        let role = Role {
            gateway: bridge.is_gateway,
            default_gateway: self.options.is_default_gateway,
        };
        let ranges = self.config.ipam_ranges();
        let mtu = pair.host.mtu;
        let plan = bridge::plan::plan(lease, &ranges, role, mtu, uplink)?;
        let mut host = vec![interface(&pair.host)];
        if let Some(base) = &mut self.made.bridge {
            bridge::wire::configure(&mut self.host, &mut self.pod, pair, base, &plan)?;
            let on_bridge = Interface {
                name: &bridge.name,
                mac: base.mac,
                mtu,
            };
            host.insert(0, on_bridge);
        }
        self.masquerade(&plan.addresses(), &plan.ranges)?;
        self.sysctls()?;
        let result = self.result(lease, host, pair, &plan.ips, &plan.routes, sandbox)?;
        let gateways = plan.gateways.iter().map(IpNet::addr).collect();
        self.make_ready(gateways, plan.addresses())?;
        if bridge.is_gateway {
            sysctl::enable_forwarding(plan.has(false), plan.has(true))?;
        }
        Ok(result)
    }

    fn pair(&mut self, mtu: Mtu, port: Option<Port>) -> Result<Pair> {
        // A bridge's port needs no address. A routed pod's families are what IPAM says; where its ranges tell them
        // already, what it says else is made good later.
        let ranges = self.config.ipam_ranges();
        let is_v6 = |range: &IpNet| range.addr().is_ipv6();
        let host_v6 = port.is_none() && (ranges.is_empty() || ranges.iter().any(is_v6));
        let pair = wire::create(
            &mut self.host,
            &mut self.pod,
            &self.attachment,
            &self.options,
            mtu,
            port,
            host_v6,
        )?;
        self.made.host_end = Some(pair.host.index);
        Ok(pair)
    }

    fn masquerade(&mut self, addresses: &[IpAddr], ranges: &[IpNet]) -> Result<()> {
        if self.options.ip_masq {
            self.made.masquerade = true;
            masquerade::add(&self.host.netns, &self.attachment, addresses, ranges)?;
        }
        Ok(())
    }

    fn sysctls(&mut self) -> Result<()> {
        for sysctl in &self.options.sysctls {
            let before = self.pod.netns.run(|| sysctl.set())??;
            self.made.sysctls.push(before);
        }
        Ok(())
    }

    fn register(&mut self, sandbox: &Path) -> Result<()> {
        if let Some(poller) = &self.options.poller {
            self.made.registration = poller.register(&self.attachment, sandbox, &self.options)?;
        }
        Ok(())
    }

    fn make_ready(&mut self, host: Vec<IpAddr>, pod: Vec<IpAddr>) -> Result<()> {
        wire::await_addresses((&mut self.host, host), (&mut self.pod, pod))?;
        std::mem::take(&mut self.promise).keep()
    }

    fn lease(&mut self, leasing: Leasing<'a>) -> Result<Lease> {
        match leasing.finish() {
            Ok(Leased { mut lease, promise }) => {
                self.promise = promise;
                self.made.lease = true;
                lease.routes.extend(self.options.routes.iter().cloned());
                Ok(lease)
            }
            Err(NotLeased {
                error,
                may_be_leased,
            }) => {
                self.made.lease = may_be_leased;
                Err(error)
            }
        }
    }

    fn result(
        &self,
        lease: &Lease,
        host: Vec<Interface<'_>>,
        pair: &Pair,
        ips: &[LeasedIp],
        routes: &[RouteConfig],
        sandbox: &Path,
    ) -> Result<Value> {
        let attached = Attached {
            host,
            pod: interface(&pair.pod),
            sandbox,
            ips,
            routes,
            dns: self.config.dns()?.unwrap_or_else(|| lease.dns.clone()),
        };
        result::build(self.config.version, self.config.prev_result()?, attached)
    }

    /// Takes back what was made, in the opposite order, all of it even when a part fails.
    fn undo(&mut self, error: CniError) -> CniError {
        let mut failed = Vec::new();
        if let Some(poller) = self
            .options
            .poller
            .as_ref()
            .filter(|_| self.made.registration)
        {
            poller.unregister(&self.attachment);
        }
        for before in std::mem::take(&mut self.made.sysctls).iter().rev() {
            let restored = self.pod.netns.run(|| before.set());
            failed.extend(restored.map_err(CniError::from).and_then(|set| set).err());
        }
        if self.made.masquerade {
            let owner = self.attachment.masquerade_owner();
            failed.extend(
                masquerade::remove(&self.host.netns, |other| other == owner)
                    .err()
                    .map(CniError::from),
            );
        }
        if let Some(host_end) = self.made.host_end {
            failed.extend(wire::delete(&mut self.host, host_end).err());
        }
        if let Some(base) = self.made.bridge.take() {
            failed.extend(bridge::wire::release(&mut self.host, &base).err());
        }
        // Its end is waited for, or what it still does would come after the DEL. How it ended matters no more.
        let _ = std::mem::take(&mut self.promise).keep();
        if self.made.lease {
            failed.extend(self.ipam.del().err());
        }
        match CniError::join(failed) {
            Some(more) => error.with_details(&format!("and it could not be undone: {more}")),
            None => error,
        }
    }
}

fn interface(end: &End) -> Interface<'_> {
    Interface {
        name: &end.name,
        mac: end.mac,
        mtu: end.mtu,
    }
}
