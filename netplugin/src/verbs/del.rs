//! DEL: remove what ADD made, as far as it is there. It can be repeated, and it needs neither the namespace
//! nor the result of ADD: every name derives from the attachment.

use std::panic::resume_unwind;
use std::thread;

use kbp_kernel::netns::Netns;

use crate::attachment::Attachment;
use crate::cni::config::Config;
use crate::cni::delegate::Ipam;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Result};
use crate::poller::PollerOptions;
use crate::wire::{self, Side};
use crate::{masquerade, tune};

/// Detaches the container. A failed part does not keep the others from being removed.
pub(crate) fn del(call: &Call, config: &Config) -> Result<()> {
    let attachment = Attachment::new(&config.name, &call.container_id, &call.ifname);
    let mut host = Side::host()?;
    let mut failed = Vec::new();
    // Whatever else the config says, and whatever becomes of it: DEL does not fail because of the poller.
    if let Ok(Some(poller)) = PollerOptions::read(&config.json) {
        poller.unregister(&attachment);
    }
    // The address is given back last: who gets it next shall not find our route to it.
    let owner = attachment.masquerade_owner();
    let (deleted, unmasked) = thread::scope(|scope| {
        // Both wait for grace periods of the kernel, about 10 ms each: for the same ones, when they wait at once.
        let unmasking = scope.spawn(|| {
            let netns = Netns::current()?;
            masquerade::remove(&netns, |other| other == owner)
        });
        let deleted = wire::delete_host_end(&mut host, &attachment);
        let unmasked = unmasking.join();
        (
            deleted,
            unmasked.unwrap_or_else(|panic| resume_unwind(panic)),
        )
    });
    failed.extend(deleted.err());
    failed.extend(unmasked.err().map(CniError::from));
    if config.is_tune() {
        failed.extend(tune::restore(call, &mut host).err());
    }
    if config.wants_ipam() {
        failed.extend(Ipam::find(config, call).and_then(|ipam| ipam.del()).err());
    }
    CniError::join(failed).map_or(Ok(()), Err)
}
