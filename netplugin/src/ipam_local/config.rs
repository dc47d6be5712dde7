//! The keys of the `ipam` section, which are host-local's, and what the runtime adds for one container.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::range::{Range, RangeSet};
use crate::cni::config::Config;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam::{self, RouteConfig};
use crate::cni::json::{is_empty, object, string};

const DEFAULT_DATA_DIR: &str = "/var/lib/cni/networks";
const SUBNETS: &str = "a subnet of hosts (not loopback, multicast or IPv4-mapped) without host bits, at most /30 or /126, e.g. \"10.88.0.0/16\"";
const RANGES: &str = "a list of lists of {\"subnet\": \"…\"}";
const IPS: &str = "a list of addresses";

/// What a lease is made from.
#[derive(Debug)]
pub(super) struct Settings {
    /// A container gets one address of each.
    pub(super) sets: Vec<RangeSet>,
    /// Addresses that the container shall have.
    pub(super) requested: Vec<IpAddr>,
    /// Routes for the container.
    pub(super) routes: Vec<RouteConfig>,
    /// File to take DNS settings from.
    pub(super) resolv_conf: Option<PathBuf>,
}

/// Where the leases are. The only key that DEL and GC depend on: the others may have been changed since ADD.
pub(super) fn data_dir(config: &Config) -> Result<PathBuf> {
    const ALLOWED: &str = "an absolute path";
    let dir = string(section(config)?, "dataDir", ALLOWED)?.filter(|dir| !dir.is_empty());
    let path = PathBuf::from(dir.unwrap_or(DEFAULT_DATA_DIR));
    if path.is_absolute() {
        return Ok(path);
    }
    Err(CniError::config("ipam.dataDir", &json!(path), ALLOWED))
}

impl Settings {
    /// Reads a config.
    pub(super) fn read(config: &Config, call: &Call) -> Result<Self> {
        let ipam = section(config)?;
        let resolv_conf = string(ipam, "resolvConf", "the path of a file")?;
        Ok(Self {
            sets: sets(&config.json, ipam)?,
            requested: requested(&config.json, call)?,
            routes: ipam::routes(ipam).map_err(|error| CniError {
                code: Code::CONFIG,
                msg: format!("ipam: {}", error.msg),
                ..error
            })?,
            resolv_conf: resolv_conf
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
        })
    }
}

fn section(config: &Config) -> Result<&Map<String, Value>> {
    object(&config.json, "ipam", "ipam")?
        .ok_or_else(|| CniError::config("ipam", &Value::Null, "a JSON object"))
}

/// The range sets: the runtime's for this container, the single subnet of old configs, the config's.
fn sets(json: &Map<String, Value>, ipam: &Map<String, Value>) -> Result<Vec<RangeSet>> {
    let mut sets = Vec::new();
    if let Some(runtime) = object(json, "runtimeConfig", "runtimeConfig")? {
        sets.extend(set_list(runtime.get("ipRanges"), "runtimeConfig.ipRanges")?);
    }
    if ipam.get("subnet").is_some_and(|subnet| !is_empty(subnet)) {
        sets.push(RangeSet(vec![range(ipam, "ipam")?]));
    }
    sets.extend(set_list(ipam.get("ranges"), "ipam.ranges")?);
    if sets.is_empty() {
        let none = ipam.get("ranges").unwrap_or(&Value::Null);
        return Err(CniError::config("ipam.ranges", none, RANGES));
    }
    refuse_overlap(&sets)?;
    Ok(sets)
}

fn set_list(value: Option<&Value>, key: &str) -> Result<Vec<RangeSet>> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(Vec::new());
    };
    let list = |value: &Value, key: &str| {
        value
            .as_array()
            .cloned()
            .ok_or_else(|| CniError::config(key, value, RANGES))
    };
    let mut sets = Vec::new();
    for (n, set) in list(value, key)?.iter().enumerate() {
        let key = format!("{key}[{n}]");
        let mut ranges = Vec::new();
        for (n, entry) in list(set, &key)?.iter().enumerate() {
            let key = format!("{key}[{n}]");
            let entry = entry
                .as_object()
                .ok_or_else(|| CniError::config(&key, entry, RANGES))?;
            ranges.push(range(entry, &key)?);
        }
        let family = ranges.first().map(|range| range.start.is_ipv4());
        if family.is_none() || ranges.iter().any(|r| Some(r.start.is_ipv4()) != family) {
            return Err(CniError::config(
                &key,
                set,
                "ranges of one family, at least one",
            ));
        }
        sets.push(RangeSet(ranges));
    }
    Ok(sets)
}

/// Whether the addresses of a subnet, as far as its two ends tell, are such as a packet can come from.
fn is_of_hosts(net: &IpNet) -> bool {
    let is_hosts = |address: IpAddr| {
        let is_mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_mapped)
    };
    is_hosts(net.network()) && is_hosts(net.broadcast())
}

fn range(entry: &Map<String, Value>, path: &str) -> Result<Range> {
    let text = |key: &str, allowed: &str| -> Result<Option<String>> {
        let found = string(entry, key, allowed).map_err(|error| CniError {
            msg: format!("{path}.{}", error.msg),
            ..error
        })?;
        Ok(found.filter(|text| !text.is_empty()).map(str::to_owned))
    };
    let refuse = |key: &str, value: Option<&str>, allowed: &str| {
        CniError::config(&format!("{path}.{key}"), &json!(value), allowed)
    };
    let subnet_text = text("subnet", SUBNETS)?;
    let subnet: Option<IpNet> = subnet_text.as_deref().and_then(|text| text.parse().ok());
    let subnet = subnet
        .filter(|net| net.trunc() == *net && net.prefix_len() + 2 <= net.max_prefix_len())
        .filter(is_of_hosts)
        .ok_or_else(|| refuse("subnet", subnet_text.as_deref(), SUBNETS))?;
    let address = |key: &str, default: IpAddr, inside: bool| -> Result<IpAddr> {
        let allowed = if inside {
            format!("an address of {subnet}")
        } else {
            format!("an address of the family of {subnet}")
        };
        let Some(text) = text(key, &allowed)? else {
            return Ok(default);
        };
        let address: Option<IpAddr> = text.parse().ok();
        address
            .filter(|address| address.is_ipv4() == default.is_ipv4())
            .filter(|address| !inside || subnet.contains(address))
            .ok_or_else(|| refuse(key, Some(&text), &allowed))
    };
    let range = Range {
        start: address("rangeStart", Range::first_of(&subnet), true)?,
        end: address("rangeEnd", Range::last_of(&subnet), true)?,
        gateway: address("gateway", Range::first_of(&subnet), false)?,
        subnet,
    };
    if range.start > range.end {
        let allowed = format!("an address not before rangeStart, which is {}", range.start);
        return Err(refuse("rangeEnd", Some(&range.end.to_string()), &allowed));
    }
    Ok(range)
}

/// An address in two ranges would be leased from either, and its place in the results be a matter of luck.
fn refuse_overlap(sets: &[RangeSet]) -> Result<()> {
    let ranges: Vec<_> = sets.iter().flat_map(|set| &set.0).collect();
    for (n, a) in ranges.iter().enumerate() {
        for b in &ranges[n + 1..] {
            if a.contains(b.start) || b.contains(a.start) {
                let msg = format!(
                    "ipam.ranges: {} to {} and {} to {} overlap; give every address to one range",
                    a.start, a.end, b.start, b.end
                );
                return Err(CniError::new(Code::CONFIG, msg));
            }
        }
    }
    Ok(())
}

/// The addresses that are asked for: by the runtime, else by the config's args, else by the environment.
fn requested(json: &Map<String, Value>, call: &Call) -> Result<Vec<IpAddr>> {
    let of = |value: &Value, key: &str| -> Result<Vec<IpAddr>> {
        let list = value
            .as_array()
            .ok_or_else(|| CniError::config(key, value, IPS))?;
        list.iter()
            .map(|entry| {
                // A prefix length may follow; the range's counts.
                let text = entry
                    .as_str()
                    .map(|text| text.split('/').next().unwrap_or(text));
                text.and_then(|text| text.parse().ok())
                    .ok_or_else(|| CniError::config(key, entry, IPS))
            })
            .collect()
    };
    if let Some(runtime) = object(json, "runtimeConfig", "runtimeConfig")?
        && let Some(ips) = runtime.get("ips").filter(|ips| !is_empty(ips))
    {
        return of(ips, "runtimeConfig.ips");
    }
    if let Some(args) = object(json, "args", "args")?
        && let Some(cni) = object(args, "cni", "args.cni")?
        && let Some(ips) = cni.get("ips").filter(|ips| !is_empty(ips))
    {
        return of(ips, "args.cni.ips");
    }
    match call.arg("IP").filter(|ip| !ip.is_empty()) {
        Some(ip) => of(&json!([ip]), "IP of CNI_ARGS"),
        None => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_with(ipam: Value, more: Value, args: &str) -> Result<Settings> {
        let mut json = json!({ "cniVersion": "1.0.0", "name": "net", "type": "kbp", "ipam": ipam });
        if let (Value::Object(json), Value::Object(more)) = (&mut json, more) {
            json.extend(more);
        }
        Settings::read(&Config::for_test(&json), &Call::for_test(args))
    }

    fn read(ipam: Value) -> Result<Settings> {
        read_with(ipam, json!({}), "")
    }

    fn describe(settings: &Settings) -> Vec<String> {
        let ranges = settings.sets.iter().map(|set| {
            let ranges = set
                .0
                .iter()
                .map(|r| format!("{} {} {} {}", r.subnet, r.start, r.end, r.gateway));
            ranges.collect::<Vec<_>>().join(", ")
        });
        ranges.collect()
    }

    #[test]
    fn the_keys_of_host_local_are_understood() {
        let settings = read(json!({
            "ranges": [
                [{ "subnet": "10.1.0.0/16", "rangeStart": "10.1.2.0", "rangeEnd": "10.1.2.9", "gateway": "10.1.0.254" },
                 { "subnet": "10.2.0.0/24" }],
                [{ "subnet": "fd00::/64", "gateway": "fe80::1", "rangeStart": "" }],
            ],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.0.0.0/8", "gw": "10.1.0.7" }],
            "resolvConf": "/etc/resolv.conf", "unknown": 1,
        }))
        .expect("valid");
        assert_eq!(
            describe(&settings),
            [
                "10.1.0.0/16 10.1.2.0 10.1.2.9 10.1.0.254, 10.2.0.0/24 10.2.0.1 10.2.0.254 10.2.0.1",
                "fd00::/64 fd00::1 fd00::ffff:ffff:ffff:ffff fe80::1",
            ]
        );
        assert_eq!(settings.routes.len(), 2);
        assert_eq!(
            settings.resolv_conf,
            Some(PathBuf::from("/etc/resolv.conf"))
        );
        assert!(settings.requested.is_empty());
    }

    #[test]
    fn the_single_subnet_and_the_runtimes_ranges_come_first() {
        let ipam = json!({
            "subnet": "10.1.0.0/24", "rangeEnd": "10.1.0.9",
            "ranges": [[{ "subnet": "fd00::/64" }]],
        });
        let runtime = json!({ "runtimeConfig": { "ipRanges": [[{ "subnet": "10.3.0.0/24" }]] } });
        let settings = read_with(ipam, runtime, "").expect("valid");
        let subnets: Vec<_> = settings
            .sets
            .iter()
            .map(|s| s.0[0].subnet.to_string())
            .collect();
        assert_eq!(subnets, ["10.3.0.0/24", "10.1.0.0/24", "fd00::/64"]);
        assert_eq!(settings.sets[1].0[0].end.to_string(), "10.1.0.9");
    }

    #[test]
    fn malformed_values_are_refused_by_key_and_value() {
        let range = |more: Value| {
            let mut range = json!({ "subnet": "10.1.0.0/24" });
            if let (Value::Object(range), Value::Object(more)) = (&mut range, more) {
                range.extend(more);
            }
            json!({ "ranges": [[range]] })
        };
        for (ipam, parts) in [
            (json!({}), ["ipam.ranges", "null"]),
            (json!({ "ranges": [] }), ["ipam.ranges", "[]"]),
            (
                json!({ "subnet": "127.0.0.0/8" }),
                ["ipam.subnet", "multicast"],
            ),
            (
                json!({ "subnet": "224.0.0.0/24" }),
                ["ipam.subnet", "multicast"],
            ),
            (
                json!({ "subnet": "0.0.0.0/0" }),
                ["ipam.subnet", "multicast"],
            ),
            (
                json!({ "subnet": "::ffff:10.9.0.0/120" }),
                ["ipam.subnet", "multicast"],
            ),
            (
                json!({ "subnet": "ff02::/64" }),
                ["ipam.subnet", "multicast"],
            ),
            (json!({ "subnet": "::/0" }), ["ipam.subnet", "multicast"]),
            (json!({ "ranges": [[]] }), ["ipam.ranges[0]", "[]"]),
            (
                json!({ "ranges": [{ "subnet": "10.1.0.0/24" }] }),
                ["ipam.ranges[0]", "10.1.0.0/24"],
            ),
            (
                json!({ "ranges": [[{}]] }),
                ["ipam.ranges[0][0].subnet", "null"],
            ),
            (
                range(json!({ "subnet": "10.1.0.1/24" })),
                ["ipam.ranges[0][0].subnet", "10.1.0.1/24"],
            ),
            (
                range(json!({ "subnet": "10.1.0.0/31" })),
                ["ipam.ranges[0][0].subnet", "10.1.0.0/31"],
            ),
            (
                range(json!({ "subnet": 7 })),
                ["ipam.ranges[0][0].subnet", "7"],
            ),
            (
                range(json!({ "rangeStart": "10.2.0.1" })),
                ["ipam.ranges[0][0].rangeStart", "10.2.0.1"],
            ),
            (
                range(json!({ "rangeEnd": "x" })),
                ["ipam.ranges[0][0].rangeEnd", "x"],
            ),
            (
                range(json!({ "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.8" })),
                ["ipam.ranges[0][0].rangeEnd", "10.1.0.9"],
            ),
            (
                range(json!({ "gateway": "fd00::1" })),
                ["ipam.ranges[0][0].gateway", "fd00::1"],
            ),
            (
                json!({ "subnet": "10.1.0/24" }),
                ["ipam.subnet", "10.1.0/24"],
            ),
            (
                json!({ "ranges": [[{ "subnet": "10.1.0.0/24" }, { "subnet": "fd00::/64" }]] }),
                ["ipam.ranges[0]", "one family"],
            ),
            (
                json!({ "subnet": "10.1.0.0/16", "ranges": [[{ "subnet": "10.1.5.0/24" }]] }),
                ["overlap", "10.1.5.1"],
            ),
            (
                json!({ "subnet": "10.1.0.0/16", "routes": [{ "dst": "10.0.0.0" }] }),
                ["ipam: routes", "10.0.0.0"],
            ),
            (
                json!({ "subnet": "10.1.0.0/16", "resolvConf": 1 }),
                ["resolvConf", "1"],
            ),
        ] {
            let error = read(ipam).expect_err(parts[1]);
            assert_eq!(error.code, Code::CONFIG, "{error}");
            for part in parts {
                assert!(error.msg.contains(part), "{part} in {error}");
            }
        }
        let dir = json!({ "cniVersion": "1.0.0", "name": "n", "ipam": { "dataDir": "relative" } });
        let error = data_dir(&Config::for_test(&dir)).expect_err("relative");
        assert!(error.msg.contains("ipam.dataDir"), "{error}");
    }

    #[test]
    fn the_runtimes_wish_beats_args_beat_the_environment() {
        let ipam = json!({ "subnet": "10.1.0.0/16" });
        let runtime = json!({ "ips": ["10.1.0.5/16", "fd00::5"] });
        let cni = json!({ "ips": ["10.1.0.6"] });
        let args = "IgnoreUnknown=1;IP=10.1.0.7";
        let both = json!({ "runtimeConfig": runtime, "args": { "cni": cni } });
        for (more, args, expected) in [
            (both, args, vec!["10.1.0.5", "fd00::5"]),
            (
                json!({ "runtimeConfig": { "ips": [] }, "args": { "cni": cni } }),
                args,
                vec!["10.1.0.6"],
            ),
            (json!({}), args, vec!["10.1.0.7"]),
            (json!({}), "", vec![]),
        ] {
            let settings = read_with(ipam.clone(), more, args).expect("valid");
            let found: Vec<_> = settings.requested.iter().map(ToString::to_string).collect();
            assert_eq!(found, expected);
        }
        let wrong = json!({ "runtimeConfig": { "ips": ["10.1.0.300"] } });
        let error = read_with(ipam, wrong, "").expect_err("no address");
        assert!(
            error.msg.contains("runtimeConfig.ips") && error.msg.contains("10.1.0.300"),
            "{error}"
        );
    }
}
