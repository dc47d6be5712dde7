//! Who an attachment is: the names that ADD gives and by which DEL, CHECK and GC find it again.
//!
//! Nothing is remembered between calls. Every name derives from the network, the container id and the
//! interface name, which are the same in every call for one attachment; the host end's alias says which
//! they were, for people and for GC.

use std::fmt;

use kbp_kernel::MacAddr;
use kbp_kernel::link::Link;

/// Longest network name in bytes: with the host end's name it has to fit the 127 bytes of an nftables owner.
pub(crate) const MAX_NETWORK: usize = 127 - 1 - 15;
/// Longest container id in bytes: with the other two it has to fit an alias of 255 bytes.
pub(crate) const MAX_CONTAINER_ID: usize = 255 - PREFIX.len() - MAX_NETWORK - 1 - 1 - 15;

const PREFIX: &str = "kbp:";

/// One interface of one container in one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Name of the network.
    pub(crate) network: String,
    /// Container id.
    pub(crate) container_id: String,
    /// Name of the interface inside the container.
    pub(crate) ifname: String,
}

impl Attachment {
    /// The attachment of these three.
    pub(crate) fn new(network: &str, container_id: &str, ifname: &str) -> Self {
        Self {
            network: network.to_owned(),
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
        }
    }

    /// Name of the host end: `kbp` and eleven hexadecimal digits. Two attachments can in theory have the
    /// same one; the alias tells them apart.
    pub(crate) fn host_end(&self) -> String {
        format!("kbp{:011x}", self.hash() >> 20)
    }

    /// Alias of the host end.
    pub(crate) fn alias(&self) -> String {
        format!(
            "{PREFIX}{}/{}/{}",
            self.network, self.container_id, self.ifname
        )
    }

    /// Whether `link` is the host end of this attachment.
    pub(crate) fn owns(&self, link: &Link) -> bool {
        link.alias.as_deref() == Some(&self.alias())
    }

    /// Reads an alias; None when kbp did not write it.
    pub(crate) fn from_alias(alias: &str) -> Option<Self> {
        let mut parts = alias.strip_prefix(PREFIX)?.split('/');
        let attachment = Self::new(parts.next()?, parts.next()?, parts.next()?);
        parts.next().is_none().then_some(attachment)
    }

    /// Whom the elements in the masquerade table belong to.
    pub(crate) fn masquerade_owner(&self) -> String {
        format!("{}/{}", self.network, self.host_end())
    }

    /// MAC of the host end.
    pub(crate) fn host_mac(&self) -> MacAddr {
        local_mac(mix(self.hash() ^ 1))
    }

    /// MAC of the pod end unless another one is asked for.
    pub(crate) fn pod_mac(&self) -> MacAddr {
        local_mac(mix(self.hash() ^ 2))
    }

    /// FNV-1a with a final mix. It has to be the same for every build: a newer kbp takes down what an older one made.
    fn hash(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for part in [&self.network, &self.container_id, &self.ifname] {
            for byte in part.bytes().chain([0]) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        mix(hash)
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "interface {} of container {} in network {}",
            self.ifname, self.container_id, self.network
        )
    }
}

/// Lets every bit of the input change every bit of the output (the finalizer of MurmurHash3).
const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    bits = (bits ^ (bits >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    bits ^ (bits >> 33)
}

/// A unicast, locally administered address.
const fn local_mac(bits: u64) -> MacAddr {
    let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
    MacAddr([(a & 0xfc) | 0x02, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_stay_what_they_are() {
        // Frozen: a changed name would orphan what runs on a node during an upgrade.
        let attachment = Attachment::new("net", "c1", "eth0");
        assert_eq!(attachment.host_end(), "kbpb4b65655071");
        assert_eq!(attachment.host_mac().to_string(), "b2:05:85:a1:25:30");
        assert_eq!(attachment.pod_mac().to_string(), "9e:df:19:d1:8b:28");
        assert_eq!(attachment.alias(), "kbp:net/c1/eth0");
    }

    #[test]
    fn names_fit_and_differ() {
        let mut names = BTreeSet::new();
        for network in ["a", "b"] {
            for container in 0..1000 {
                for ifname in ["eth0", "net1"] {
                    let attachment = Attachment::new(network, &format!("c{container}"), ifname);
                    assert_eq!(attachment.host_end().len(), 14);
                    names.insert(attachment.host_end());
                    for mac in [attachment.host_mac(), attachment.pod_mac()] {
                        assert_eq!(mac.0[0] & 3, 2, "unicast and locally administered: {mac}");
                        names.insert(mac.to_string());
                    }
                }
            }
        }
        assert_eq!(names.len(), 2 * 1000 * 2 * 3);
        // The parts are kept apart.
        assert_ne!(
            Attachment::new("a", "bc", "d").host_end(),
            Attachment::new("ab", "c", "d").host_end()
        );
    }

    #[test]
    fn the_longest_names_fit_their_records() {
        let attachment = Attachment::new(
            &"n".repeat(MAX_NETWORK),
            &"c".repeat(MAX_CONTAINER_ID),
            &"i".repeat(15),
        );
        assert!(attachment.alias().len() <= 255);
        assert!(attachment.masquerade_owner().len() <= 127);
        assert_eq!(
            Attachment::from_alias(&attachment.alias()),
            Some(attachment)
        );
    }

    #[test]
    fn other_aliases_are_not_ours() {
        for alias in ["", "uplink", "kbp:", "kbp:a/b", "kbp:a/b/c/d"] {
            assert_eq!(Attachment::from_alias(alias), None, "{alias}");
        }
    }
}
