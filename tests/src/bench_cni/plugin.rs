//! Which plugins are compared, and the configs that they get.

use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

/// A plugin with its IPAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum Arm {
    /// The reference `ptp` with `host-local`.
    #[serde(rename = "ptp")]
    Ptp,
    /// The reference `bridge` with `host-local`.
    #[serde(rename = "bridge")]
    Bridge,
    /// kbp with `host-local`.
    #[serde(rename = "kbp+host-local")]
    KbpHostLocal,
    /// kbp with its built-in IPAM.
    #[serde(rename = "kbp+kbp-local")]
    KbpLocal,
}

impl Arm {
    pub(crate) const ALL: [Self; 4] = [Self::Ptp, Self::Bridge, Self::KbpHostLocal, Self::KbpLocal];

    /// Their order in a round. Within four rounds each comes after every other once: a DEL goes on in the kernel after the call, so
    /// that who always came after the same one would bear the cost of that one's links.
    pub(crate) fn turns(round: usize) -> [Self; 4] {
        [0, 1, 3, 2].map(|place| Self::ALL[(place + round) % 4])
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ptp => "ptp",
            Self::Bridge => "bridge",
            Self::KbpHostLocal => "kbp+host-local",
            Self::KbpLocal => "kbp+kbp-local",
        }
    }

    /// Name of the binary.
    pub(crate) const fn binary(self) -> &'static str {
        match self {
            Self::Ptp => "ptp",
            Self::Bridge => "bridge",
            Self::KbpHostLocal | Self::KbpLocal => "kbp",
        }
    }
}

/// What an attachment shall have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Variant {
    pub(crate) dual_stack: bool,
    pub(crate) masquerade: bool,
}

impl Variant {
    pub(crate) const fn family(self) -> &'static str {
        if self.dual_stack { "dual" } else { "v4" }
    }
}

/// The config of a network that no other arm or variant shares anything with.
pub(crate) fn config(arm: Arm, variant: Variant, leases: &Path) -> Value {
    let number =
        4 * (arm as usize) + 2 * usize::from(variant.dual_stack) + usize::from(variant.masquerade);
    let mut ranges = vec![json!([{ "subnet": format!("10.{}.0.0/16", 100 + number) }])];
    let mut routes = vec![json!({ "dst": "0.0.0.0/0" })];
    if variant.dual_stack {
        ranges.push(json!([{ "subnet": format!("fd{:02x}::/64", 100 + number) }]));
        routes.push(json!({ "dst": "::/0" }));
    }
    let ipam = match arm {
        Arm::KbpLocal => "kbp-local",
        _ => "host-local",
    };
    let mut config = json!({
        "cniVersion": "1.0.0",
        "name": format!("net{number}"),
        "type": arm.binary(),
        "ipMasq": variant.masquerade,
        "ipam": { "type": ipam, "dataDir": leases, "ranges": ranges, "routes": routes },
    });
    if arm == Arm::Bridge {
        config["bridge"] = json!(format!("br{number}"));
        config["isGateway"] = json!(true);
    }
    config
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_plugin_comes_after_every_other() {
        let mut after = BTreeSet::new();
        for round in 0..4 {
            let turns = Arm::turns(round);
            assert_eq!(BTreeSet::from(turns).len(), 4, "{turns:?}");
            after.extend(turns.windows(2).map(|pair| (pair[0], pair[1])));
        }
        assert_eq!(after.len(), 4 * 3, "{after:?}");
    }

    #[test]
    fn no_two_networks_share_a_range() {
        let mut seen = BTreeSet::new();
        for arm in Arm::ALL {
            for (dual_stack, masquerade) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let variant = Variant {
                    dual_stack,
                    masquerade,
                };
                let config = config(arm, variant, Path::new("/x"));
                let ranges = config["ipam"]["ranges"].as_array().expect("ranges");
                assert_eq!(ranges.len(), 1 + usize::from(dual_stack));
                for range in ranges {
                    assert!(seen.insert(range[0]["subnet"].to_string()), "{range}");
                }
            }
        }
    }
}
