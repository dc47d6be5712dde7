//! Ranges of addresses, and which address of them is next.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Addresses of one subnet, from `start` to `end`, both included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Range {
    /// The subnet: its prefix length is the leased addresses'.
    pub(crate) subnet: IpNet,
    /// First address.
    pub(crate) start: IpAddr,
    /// Last address.
    pub(crate) end: IpAddr,
    /// Goes with every address of this range and is itself never leased.
    pub(crate) gateway: IpAddr,
}

impl Range {
    /// Whether the address may be leased from this range, its gateway included.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.start.is_ipv4() && (self.start..=self.end).contains(&address)
    }

    /// The first address after the subnet's own.
    pub(crate) fn first_of(subnet: &IpNet) -> IpAddr {
        of_number(number(subnet.network()) + 1, subnet.network())
    }

    /// The last address that an interface may have; IPv4 has a broadcast address after it.
    pub(crate) fn last_of(subnet: &IpNet) -> IpAddr {
        match subnet {
            IpNet::V4(v4) => of_number(number(v4.broadcast().into()) - 1, v4.broadcast().into()),
            IpNet::V6(v6) => v6.broadcast().into(),
        }
    }
}

/// Ranges of one family of which a container gets one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RangeSet(pub(crate) Vec<Range>);

impl RangeSet {
    /// The range that the address is in.
    pub(crate) fn range_of(&self, address: IpAddr) -> Option<&Range> {
        self.0.iter().find(|range| range.contains(address))
    }

    /// Whether the address is a gateway of this set.
    pub(crate) fn is_gateway(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.gateway == address)
    }

    /// The first address after `last` that is not taken, going round through all ranges; None when all are.
    /// Who gets an address gets it as late as possible after its last owner, whom others may still remember.
    pub(crate) fn next(
        &self,
        last: Option<IpAddr>,
        taken: impl Fn(IpAddr) -> bool,
    ) -> Option<IpAddr> {
        let from = last.and_then(|last| {
            let index = self.0.iter().position(|range| range.contains(last))?;
            Some((index, last))
        });
        let free = |start: IpAddr, end: IpAddr| {
            (number(start)..=number(end))
                .map(|n| of_number(n, start))
                .find(|address| !self.is_gateway(*address) && !taken(*address))
        };
        let Some((index, last)) = from else {
            return self.0.iter().find_map(|range| free(range.start, range.end));
        };
        let range = &self.0[index];
        let rest = || {
            let after = number(last).checked_add(1)?;
            (after <= number(range.end)).then(|| free(of_number(after, last), range.end))?
        };
        let others = || {
            let (before, after) = (&self.0[..index], &self.0[index + 1..]);
            let mut others = after.iter().chain(before);
            others.find_map(|range| free(range.start, range.end))
        };
        rest().or_else(others).or_else(|| free(range.start, last))
    }
}

/// The address as a number, for counting.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The address of that number, in the family of `like`.
fn of_number(number: u128, like: IpAddr) -> IpAddr {
    match like {
        // The callers count between two addresses of the family.
        IpAddr::V4(_) => Ipv4Addr::from_bits(number as u32).into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn range(subnet: &str, start: &str, end: &str, gateway: &str) -> Range {
        Range {
            subnet: subnet.parse().expect("a subnet"),
            start: ip(start),
            end: ip(end),
            gateway: ip(gateway),
        }
    }

    #[test]
    fn the_usable_part_of_a_subnet_leaves_out_its_own_and_the_broadcast_address() {
        for (subnet, first, last) in [
            ("10.1.0.0/16", "10.1.0.1", "10.1.255.254"),
            ("0.0.0.0/0", "0.0.0.1", "255.255.255.254"),
            ("10.1.2.4/30", "10.1.2.5", "10.1.2.6"),
            ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff"),
            ("fd00::4/126", "fd00::5", "fd00::7"),
        ] {
            let subnet = subnet.parse().expect("a subnet");
            assert_eq!(Range::first_of(&subnet), ip(first));
            assert_eq!(Range::last_of(&subnet), ip(last));
        }
    }

    #[test]
    fn addresses_go_round_through_all_ranges_of_a_set() {
        let set = RangeSet(vec![
            range("10.1.0.0/24", "10.1.0.1", "10.1.0.3", "10.1.0.1"),
            range("10.2.0.0/24", "10.2.0.8", "10.2.0.9", "10.2.0.1"),
        ]);
        let free = |_| false;
        let order = ["10.1.0.2", "10.1.0.3", "10.2.0.8", "10.2.0.9", "10.1.0.2"];
        let mut last = None;
        for expected in order {
            last = set.next(last, free);
            assert_eq!(last, Some(ip(expected)));
        }
        // A last one that is in no range, as after a change of the config, is as good as none.
        assert_eq!(set.next(Some(ip("10.9.0.1")), free), Some(ip("10.1.0.2")));
        assert_eq!(set.next(Some(ip("fd00::1")), free), Some(ip("10.1.0.2")));

        let mut taken = BTreeSet::new();
        let mut last = Some(ip("10.1.0.3"));
        while let Some(address) = set.next(last, |address| taken.contains(&address)) {
            assert!(taken.insert(address), "{address} twice");
            last = Some(address);
        }
        assert_eq!(taken.len(), 4);
        assert!(!taken.contains(&ip("10.1.0.1")), "the gateway");
    }

    #[test]
    fn the_ends_of_the_number_space_are_no_trap() {
        let v4 = RangeSet(vec![range(
            "255.255.255.0/24",
            "255.255.255.254",
            "255.255.255.255",
            "255.255.255.1",
        )]);
        let last = Some(ip("255.255.255.255"));
        assert_eq!(v4.next(last, |_| false), Some(ip("255.255.255.254")));
        let end = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let v6 = RangeSet(vec![range("ffff::/16", end, end, "ffff::1")]);
        assert_eq!(v6.next(Some(ip(end)), |_| false), Some(ip(end)));
        assert_eq!(v6.next(Some(ip(end)), |_| true), None);
    }
}
