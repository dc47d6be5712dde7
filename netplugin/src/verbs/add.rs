//! ADD: lease addresses, make the pair, say what was made. A failed ADD leaves the node as it was.

use std::path::Path;

use kbp_kernel::IfIndex;
use serde_json::Value;

use super::open_pod;
use crate::attachment::Attachment;
use crate::cni::config::Config;
use crate::cni::delegate::Ipam;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam::Lease;
use crate::cni::options::Options;
use crate::cni::result::{self, Attached, Interface};
use crate::routed::plan::{Plan, plan};
use crate::routed::uplink::UplinkMtu;
use crate::routed::wire::{self, End, Pair, Side};
use crate::routed::{DEVICE_MTU, masquerade};
use crate::sysctl;

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
    let ipam = Ipam::find(config, call)?;
    let attachment = Attachment::new(&config.name, &call.container_id, &call.ifname);
    let mut host = Side::host()?;
    let (mut pod, sandbox) = open_pod(call, &host)?;
    wire::refuse_existing(&mut host, &mut pod, &attachment)?;

    let mut add = Add {
        config,
        attachment,
        options,
        ipam,
        host,
        pod,
        made: Made::default(),
    };
    add.run(sandbox)
        .and_then(|result| deliver(&result))
        .map_err(|error| add.undo(error))
}

/// What there is to undo.
#[derive(Debug, Default)]
struct Made {
    lease: bool,
    host_end: Option<IfIndex>,
    masquerade: bool,
}

#[derive(Debug)]
struct Add<'a> {
    config: &'a Config,
    attachment: Attachment,
    options: Options,
    ipam: Ipam<'a>,
    host: Side,
    pod: Side,
    made: Made,
}

impl Add<'_> {
    fn run(&mut self, sandbox: &Path) -> Result<Value> {
        let lease = self.lease()?;
        let plan = self.plan(&lease)?;
        let pair = wire::create(
            &mut self.host,
            &mut self.pod,
            &self.attachment,
            &self.options,
        )?;
        self.made.host_end = Some(pair.host.index);
        wire::configure(&mut self.host, &mut self.pod, &pair, &self.options, &plan)?;
        if self.options.ip_masq {
            self.made.masquerade = true;
            masquerade::add(&self.host.netns, &self.attachment, &plan)?;
        }
        let result = self.result(&lease, &plan, &pair, sandbox)?;
        wire::await_addresses(&mut self.host, &mut self.pod, &plan)?;
        // Last: it is the only thing that is not undone, for others may have come to need it.
        sysctl::enable_forwarding(plan.has_v4(), plan.has_v6())?;
        Ok(result)
    }

    fn lease(&mut self) -> Result<Lease> {
        let lease = self.ipam.add();
        // A plugin that reported its own error has undone what it did, and what is leased under this id may
        // belong to an attachment that lives. One that broke or was killed may have leased already.
        self.made.lease = match &lease {
            Ok(_) => true,
            Err(error) => matches!(error.code, Code::TRY_AGAIN | Code::DECODE | Code::IPAM),
        };
        lease
    }

    fn plan(&mut self, lease: &Lease) -> Result<Plan> {
        let uplink = UplinkMtu::find(&mut self.host.route)?;
        plan(
            lease,
            &self.config.ipam_ranges(),
            self.options.is_default_gateway,
            self.options.mtu,
            uplink,
        )
    }

    fn result(&self, lease: &Lease, plan: &Plan, pair: &Pair, sandbox: &Path) -> Result<Value> {
        let attached = Attached {
            host: interface(&pair.host),
            pod: interface(&pair.pod),
            sandbox,
            ips: &plan.ips,
            routes: &plan.routes,
            dns: self.config.dns()?.unwrap_or_else(|| lease.dns.clone()),
        };
        result::build(self.config.version, self.config.prev_result()?, attached)
    }

    /// Takes back what was made, in the opposite order, all of it even when a part fails.
    fn undo(&mut self, error: CniError) -> CniError {
        let mut failed = Vec::new();
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
        mtu: DEVICE_MTU,
    }
}
