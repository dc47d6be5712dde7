//! The pods' entries in the node's masquerade table.

use std::net::IpAddr;

use ipnet::IpNet;
use kbp_kernel::netns::Netns;
use kbp_kernel::nft::MasqueradeTable;
use kbp_kernel::{Error, Result};

use crate::attachment::Attachment;

/// Name of the table, which is of the family `inet`.
const TABLE: &str = "kbp";

/// Masquerades what the pod sends from its addresses beyond the node's pod ranges.
pub(crate) fn add(
    host: &Netns,
    attachment: &Attachment,
    addresses: &[IpAddr],
    ranges: &[IpNet],
) -> Result<()> {
    let mut table = MasqueradeTable::open(host, TABLE)?;
    table.add(&attachment.masquerade_owner(), addresses, ranges)
}

/// Removes every entry whose owner `is_gone`, and the table with the last one.
pub(crate) fn remove(host: &Netns, is_gone: impl Fn(&str) -> bool) -> Result<()> {
    let mut table = match MasqueradeTable::open(host, TABLE) {
        // A kernel without nf_tables masquerades nothing.
        Err(Error::Unsupported { .. }) => return Ok(()),
        other => other?,
    };
    if table.remove_owned(is_gone)? == 0 {
        return Ok(());
    }
    table.delete_if_unused()?;
    Ok(())
}

/// The pod's addresses that are not masqueraded although they should be.
pub(crate) fn missing(
    host: &Netns,
    attachment: &Attachment,
    addresses: &[IpAddr],
) -> Result<Vec<IpAddr>> {
    let mut table = MasqueradeTable::open(host, TABLE)?;
    if !table.is_active()? {
        return Ok(addresses.to_vec());
    }
    let owner = attachment.masquerade_owner();
    let entries = table.list()?;
    let has = |address: &IpAddr| {
        entries
            .iter()
            .any(|entry| entry.address == *address && entry.owner == owner)
    };
    Ok(addresses
        .iter()
        .copied()
        .filter(|address| !has(address))
        .collect())
}
