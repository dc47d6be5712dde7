//! GC: remove what this network still has of attachments that are gone.

use std::collections::BTreeSet;

use kbp_kernel::link::LinkKind;

use crate::attachment::Attachment;
use crate::cni::config::Config;
use crate::cni::delegate::Ipam;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Result};
use crate::masquerade;
use crate::poller::PollerOptions;
use crate::wire::{self, Side};

/// Removes every host end and every masqueraded address of this network whose attachment is not in
/// `cni.dev/valid-attachments`, and has IPAM do the same. Without that key there is nothing to go by.
pub(crate) fn gc(call: &Call, config: &Config) -> Result<()> {
    let Some(valid) = config.valid_attachments()? else {
        return Ok(());
    };
    let valid: Vec<_> = valid
        .iter()
        .map(|(container_id, ifname)| Attachment::new(&config.name, container_id, ifname))
        .collect();
    let mut host = Side::host()?;
    let mut failed = Vec::new();

    let stale = stale(&mut host, &config.name, &valid);
    let stale = stale.unwrap_or_else(|error| {
        failed.push(error);
        Vec::new()
    });
    for attachment in &stale {
        failed.extend(wire::delete_host_end(&mut host, attachment).err());
    }
    if let Ok(Some(poller)) = PollerOptions::read(&config.json) {
        poller.collect(&config.name, &valid);
    }
    let owners: BTreeSet<_> = valid.iter().map(Attachment::masquerade_owner).collect();
    let network = format!("{}/", config.name);
    let is_gone = |owner: &str| owner.starts_with(&network) && !owners.contains(owner);
    failed.extend(
        masquerade::remove(&host.netns, is_gone)
            .err()
            .map(CniError::from),
    );
    if config.wants_ipam() {
        match Ipam::find(config, call) {
            Ok(ipam) => failed.extend(ipam.gc(&stale)),
            Err(error) => failed.push(error),
        }
    }
    CniError::join(failed).map_or(Ok(()), Err)
}

/// Our host ends in this network that belong to no valid attachment.
fn stale(host: &mut Side, network: &str, valid: &[Attachment]) -> Result<Vec<Attachment>> {
    let links = host
        .route
        .links()?
        .into_iter()
        .filter(|link| link.kind == LinkKind::Veth);
    Ok(links
        .filter_map(|link| {
            Attachment::from_alias(link.alias.as_deref()?)
                .filter(|found| found.host_end() == link.name)
        })
        .filter(|found| found.network == network && !valid.contains(found))
        .collect())
}
