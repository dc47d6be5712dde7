//! Ranges of addresses and the interval elements that stand for them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use super::read::Element;

/// The address after this one; None after the last.
pub(super) fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

fn previous(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4).checked_sub(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_sub(1).map(|n| IpAddr::V6(n.into())),
    }
}

/// The ranges that no other one contains, without host bits: two prefixes are either disjoint or
/// one is inside the other, and an interval set takes only disjoint ones.
pub(super) fn outermost(ranges: &[IpNet]) -> Vec<IpNet> {
    let mut sorted: Vec<_> = ranges.iter().map(IpNet::trunc).collect();
    sorted.sort_by_key(IpNet::prefix_len);
    let mut kept: Vec<IpNet> = Vec::new();
    for range in sorted {
        if !kept.iter().any(|outer| outer.contains(&range)) {
            kept.push(range);
        }
    }
    kept
}

/// The ranges of one family's interval set. A set that somebody else filled may hold ranges that
/// are no prefix; such a one becomes several.
pub(super) fn from_elements(elements: &[Element]) -> Vec<IpNet> {
    let addresses = |is_end| {
        let wanted = elements
            .iter()
            .filter(move |element| element.is_end == is_end);
        wanted.map(|element| element.address)
    };
    let mut starts: Vec<_> = addresses(false).collect();
    starts.sort();
    starts
        .into_iter()
        .flat_map(|start| {
            let end = addresses(true).filter(|end| *end > start).min();
            prefixes(start, end.and_then(previous))
        })
        .collect()
}

/// The prefixes that make up the range from `first` to `last`, or to the end of the address space.
fn prefixes(first: IpAddr, last: Option<IpAddr>) -> Vec<IpNet> {
    let v4 = |first, last| Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect();
    let v6 = |first, last| Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect();
    match (first, last) {
        (IpAddr::V4(first), None) => v4(first, Ipv4Addr::BROADCAST),
        (IpAddr::V4(first), Some(IpAddr::V4(last))) => v4(first, last),
        (IpAddr::V6(first), None) => v6(first, Ipv6Addr::from(u128::MAX)),
        (IpAddr::V6(first), Some(IpAddr::V6(last))) => v6(first, last),
        // A set has addresses of one family.
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect(text)).collect()
    }

    fn element(address: &str, is_end: bool) -> Element {
        Element {
            address: address.parse().expect(address),
            is_end,
            comment: String::new(),
        }
    }

    #[test]
    fn only_outermost_ranges_are_kept_without_host_bits() {
        let given = nets(&[
            "10.1.2.0/24",
            "10.1.5.9/16",
            "10.2.0.0/16",
            "10.1.0.0/16",
            "fd00::/8",
        ]);
        let kept = outermost(&given);
        assert_eq!(kept, nets(&["fd00::/8", "10.1.0.0/16", "10.2.0.0/16"]));
    }

    #[test]
    fn elements_make_ranges_in_any_order() {
        let elements = [
            element("10.2.0.0", true),
            element("224.0.0.0", false),
            element("10.1.0.0", false),
            element("10.3.0.0", true),
            element("10.2.0.0", false),
        ];
        assert_eq!(
            from_elements(&elements),
            nets(&["10.1.0.0/16", "10.2.0.0/16", "224.0.0.0/3"])
        );
        let no_prefix = [element("10.0.0.1", false), element("10.0.0.4", true)];
        assert_eq!(
            from_elements(&no_prefix),
            nets(&["10.0.0.1/32", "10.0.0.2/31"])
        );
        let v6 = [
            element("fd00::", false),
            element("fd01::", true),
            element("ff00::", false),
        ];
        assert_eq!(from_elements(&v6), nets(&["fd00::/16", "ff00::/8"]));
    }

    #[test]
    fn the_address_space_ends() {
        let address = |text: &str| text.parse::<IpAddr>().expect(text);
        assert_eq!(next(address("255.255.255.255")), None);
        assert_eq!(
            next(address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
            None
        );
        assert_eq!(next(address("10.0.0.255")), Some(address("10.0.1.0")));
        assert_eq!(next(address("fd00::ffff")), Some(address("fd00::1:0")));
    }
}
