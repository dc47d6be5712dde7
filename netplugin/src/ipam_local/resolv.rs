//! DNS settings from a file like `/etc/resolv.conf` (resolv.conf(5)).

use serde_json::{Map, Value, json};

/// What the file says, in the keys of a CNI result.
pub(crate) fn dns(text: &str) -> Map<String, Value> {
    let (mut nameservers, mut options) = (Vec::new(), Vec::new());
    let (mut search, mut domain) = (Vec::new(), None);
    for line in text.lines() {
        // Comments start the line; elsewhere the characters belong to the value.
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => nameservers.extend(words.next()),
            Some("options") => options.extend(words),
            // The last of them counts.
            Some("search") => search = words.collect(),
            Some("domain") => domain = words.next(),
            _ => {}
        }
    }
    let mut dns = Map::new();
    if let Some(domain) = domain {
        dns.insert("domain".to_owned(), json!(domain));
    }
    for (key, list) in [
        ("nameservers", nameservers),
        ("search", search),
        ("options", options),
    ] {
        if !list.is_empty() {
            dns.insert(key.to_owned(), json!(list));
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_keywords_are_read_and_the_rest_is_not() {
        let text = "# comment\n; other\nnameserver 10.0.0.10 # more\nnameserver\tfd00::a\n\
             search a b\nsearch c.d e\ndomain c.d\noptions ndots:5 edns0\noptions rotate\nsortlist 10.0.0.0\nnameserver\n";
        assert_eq!(
            Value::Object(dns(text)),
            json!({
                "nameservers": ["10.0.0.10", "fd00::a"], "search": ["c.d", "e"], "domain": "c.d",
                "options": ["ndots:5", "edns0", "rotate"],
            })
        );
        assert!(dns("").is_empty());
    }
}
