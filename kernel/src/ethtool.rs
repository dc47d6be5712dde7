//! Offload features of a link by the `SIOCETHTOOL` ioctls (linux/ethtool.h): the ones that decide whether a veth can be polled.

use crate::netns::Netns;
use crate::Result;

/// Features of one link that matter to kbp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Generic receive offload.
    pub gro: bool,
    /// Any TCP segmentation offload (`ETHTOOL_GTSO` tells whether one of NETIF_F_ALL_TSO is on).
    pub tso: bool,
}

/// Reads the features of `name` in `netns`.
pub fn features(_netns: &Netns, _name: &str) -> Result<Features> { todo!() }
/// Sets both features and reads them back; an error names the feature that the device refused to change.
pub fn set_features(_netns: &Netns, _name: &str, _wanted: Features) -> Result<()> { todo!() }
