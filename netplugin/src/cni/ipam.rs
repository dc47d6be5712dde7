//! What an IPAM plugin answers: addresses, routes, DNS.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::error::{CniError, Code, Result};

/// Result of an IPAM plugin's ADD.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Lease {
    /// Addresses for the pod; at least one.
    pub(crate) ips: Vec<LeasedIp>,
    /// Routes for the pod.
    pub(crate) routes: Vec<RouteConfig>,
    /// DNS settings, as they came.
    pub(crate) dns: Map<String, Value>,
}

/// An address with its range's prefix length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeasedIp {
    /// The address.
    pub(crate) address: IpNet,
    /// Its gateway, where IPAM names one.
    pub(crate) gateway: Option<IpAddr>,
}

/// A route as results spell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RouteConfig {
    /// Destination.
    pub(crate) dst: IpNet,
    /// Next hop; None: the gateway of the family.
    pub(crate) gw: Option<IpAddr>,
    /// MTU in bytes (from 1.1.0 on, like all that follow).
    pub(crate) mtu: Option<u32>,
    /// TCP MSS to advertise in bytes.
    pub(crate) advmss: Option<u32>,
    /// Metric.
    pub(crate) priority: Option<u32>,
    /// Routing table.
    pub(crate) table: Option<u32>,
    /// Scope (`RT_SCOPE_*`).
    pub(crate) scope: Option<u8>,
}

impl RouteConfig {
    /// A route without metrics.
    pub(crate) fn new(dst: IpNet, gw: Option<IpAddr>) -> Self {
        Self {
            dst,
            gw,
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
        }
    }
}

impl Lease {
    /// Reads a result of any version.
    pub(crate) fn from_json(json: &Map<String, Value>) -> Result<Self> {
        let mut ips = list(json, "ips")?
            .iter()
            .map(leased_ip)
            .collect::<Result<Vec<_>>>()?;
        let mut routes = routes(json)?;
        // Before 0.3.0 there is at most one of each family, which carries its routes.
        for key in ["ip4", "ip6"] {
            match json.get(key) {
                None | Some(Value::Null) => {}
                Some(Value::Object(of_family)) => {
                    ips.push(old_ip(key, of_family)?);
                    routes.extend(self::routes(of_family)?);
                }
                Some(other) => return Err(decode(key, other)),
            }
        }
        let dns = match json.get("dns") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(dns)) => dns.clone(),
            Some(other) => return Err(decode("dns", other)),
        };
        Ok(Self { ips, routes, dns })
    }
}

/// Reads the routes of a result.
pub(crate) fn routes(json: &Map<String, Value>) -> Result<Vec<RouteConfig>> {
    list(json, "routes")?.iter().map(route).collect()
}

fn decode(key: &str, value: &Value) -> CniError {
    CniError::new(
        Code::DECODE,
        format!("{key} of the result: {value} cannot be read"),
    )
}

/// A list that may be absent or, as Go writes an empty one, null.
pub(crate) fn list<'a>(json: &'a Map<String, Value>, key: &str) -> Result<&'a [Value]> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(decode(key, other)),
    }
}

/// Reads an entry of `ips`.
pub(crate) fn leased_ip(entry: &Value) -> Result<LeasedIp> {
    let refuse = || decode("ips", entry);
    Ok(LeasedIp {
        address: entry.get("address").and_then(parsed).ok_or_else(refuse)?,
        gateway: address(entry, "gateway", refuse)?,
    })
}

/// Reads `ip4` or `ip6` of a result before 0.3.0.
fn old_ip(key: &str, entry: &Map<String, Value>) -> Result<LeasedIp> {
    let whole = Value::Object(entry.clone());
    let refuse = || decode(key, &whole);
    Ok(LeasedIp {
        address: entry.get("ip").and_then(parsed).ok_or_else(refuse)?,
        gateway: address(&whole, "gateway", refuse)?,
    })
}

fn route(entry: &Value) -> Result<RouteConfig> {
    let refuse = || decode("routes", entry);
    let dst: IpNet = entry.get("dst").and_then(parsed).ok_or_else(refuse)?;
    let number = |key: &str| match entry.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .map(Some)
            .ok_or_else(refuse),
    };
    let scope = number("scope")?
        .map(|scope| u8::try_from(scope).map_err(|_| refuse()))
        .transpose()?;
    Ok(RouteConfig {
        dst: dst.trunc(),
        gw: address(entry, "gw", refuse)?,
        mtu: number("mtu")?.filter(|mtu| *mtu > 0),
        advmss: number("advmss")?.filter(|advmss| *advmss > 0),
        priority: number("priority")?.filter(|priority| *priority > 0),
        table: number("table")?,
        scope,
    })
}

fn parsed<T: std::str::FromStr>(value: &Value) -> Option<T> {
    value.as_str()?.parse().ok()
}

fn address(entry: &Value, key: &str, refuse: impl Fn() -> CniError) -> Result<Option<IpAddr>> {
    match entry.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(value) => parsed(value).map(Some).ok_or_else(refuse),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<Lease> {
        Lease::from_json(json.as_object().expect("an object"))
    }

    #[test]
    fn results_of_all_versions_are_read() {
        let lease = read(json!({
            "cniVersion": "0.3.1",
            "ips": [
                { "version": "4", "address": "10.1.2.2/24", "gateway": "10.1.2.1" },
                { "address": "fd00::2/64", "gateway": "", "interface": null },
            ],
            "routes": [{ "dst": "10.9.9.9/8" }, { "dst": "::/0", "gw": "fd00::1", "mtu": 1400, "scope": 0, "table": 100 }],
            "dns": { "nameservers": ["10.1.2.1"] },
        }))
        .expect("valid");
        assert_eq!(
            lease.ips[0].gateway,
            Some("10.1.2.1".parse().expect("address"))
        );
        assert_eq!(lease.ips[1].address, "fd00::2/64".parse().expect("address"));
        assert_eq!(lease.ips[1].gateway, None);
        assert_eq!(
            lease.routes[0],
            RouteConfig::new("10.0.0.0/8".parse().expect("range"), None)
        );
        assert_eq!(lease.routes[1].mtu, Some(1400));
        assert_eq!(lease.routes[1].table, Some(100));
        assert_eq!(lease.routes[1].scope, Some(0));
        assert_eq!(
            Value::Object(lease.dns),
            json!({ "nameservers": ["10.1.2.1"] })
        );
        assert_eq!(
            read(json!({ "ips": null, "routes": null, "dns": null })).expect("valid"),
            Lease::default()
        );
    }

    #[test]
    fn the_form_before_0_3_0_is_read() {
        let lease = read(json!({
            "cniVersion": "0.2.0",
            "ip4": { "ip": "10.1.2.2/24", "gateway": "10.1.2.1", "routes": [{ "dst": "0.0.0.0/0" }] },
            "ip6": { "ip": "fd00::2/64", "routes": [{ "dst": "::/0", "gw": "fd00::1" }] },
            "dns": {},
        }))
        .expect("valid");
        assert_eq!(
            lease.ips[0].address,
            "10.1.2.2/24".parse().expect("address")
        );
        assert_eq!(lease.ips[1].gateway, None);
        assert_eq!(lease.routes.len(), 2);
        assert_eq!(
            lease.routes[1].gw,
            Some("fd00::1".parse().expect("address"))
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (json, part) in [
            (json!({ "ip4": { "ip": "10.1" } }), "10.1"),
            (json!({ "ip6": [] }), "ip6"),
            (json!({ "ips": {} }), "ips"),
            (json!({ "ips": [{}] }), "ips"),
            (
                json!({ "ips": [{ "address": "10.1.2.300/24" }] }),
                "10.1.2.300",
            ),
            (
                json!({ "ips": [{ "address": "10.1.2.3/24", "gateway": "x" }] }),
                "\"x\"",
            ),
            (json!({ "routes": [{ "dst": "10.0.0.0" }] }), "10.0.0.0"),
            (
                json!({ "routes": [{ "dst": "10.0.0.0/8", "mtu": "x" }] }),
                "mtu",
            ),
            (json!({ "dns": 1 }), "dns"),
        ] {
            let error = read(json).expect_err(part);
            assert_eq!(error.code, Code::DECODE);
            assert!(error.msg.contains(part), "{error}");
        }
    }
}
