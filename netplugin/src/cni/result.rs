//! The result of ADD, in the version of the config.

use std::path::Path;

use ipnet::IpNet;
use kbp_kernel::{MacAddr, Mtu};
use serde_json::{Map, Value, json};

use super::error::{CniError, Code, Result};
use super::ipam::{LeasedIp, RouteConfig};
use super::json::is_empty;
use super::version::Version;

/// One end of the pair.
#[derive(Debug)]
pub(crate) struct Interface<'a> {
    /// Name.
    pub(crate) name: &'a str,
    /// MAC.
    pub(crate) mac: MacAddr,
    /// MTU of the device.
    pub(crate) mtu: Mtu,
}

/// What an ADD has made.
#[derive(Debug)]
pub(crate) struct Attached<'a> {
    /// What is on the host: a bridge in mode `bridge`, and the host end.
    pub(crate) host: Vec<Interface<'a>>,
    /// The pod end.
    pub(crate) pod: Interface<'a>,
    /// Namespace of the pod end, as the runtime named it.
    pub(crate) sandbox: &'a Path,
    /// Addresses of the pod end.
    pub(crate) ips: &'a [LeasedIp],
    /// Routes in the pod.
    pub(crate) routes: &'a [RouteConfig],
    /// DNS settings, where there are any.
    pub(crate) dns: Map<String, Value>,
}

/// Writes the result. A `previous` one, of a plugin earlier in the chain, is kept as it is and added to.
pub(crate) fn build(
    version: Version,
    previous: Option<&Map<String, Value>>,
    attached: Attached<'_>,
) -> Result<Value> {
    if version < Version::V0_3_0 {
        return old_form(version, attached);
    }
    let mut result = Map::new();
    result.insert("cniVersion".to_owned(), json!(version.as_str()));
    for (key, value) in previous
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != "cniVersion")
    {
        result.insert(key.clone(), value.clone());
    }
    let interfaces = list(&mut result, "interfaces")?;
    interfaces.extend(attached.host.iter().map(|it| interface(version, it, None)));
    let pod = interfaces.len();
    interfaces.push(interface(version, &attached.pod, Some(attached.sandbox)));
    list(&mut result, "ips")?.extend(attached.ips.iter().map(|ip| leased_ip(version, ip, pod)));
    list(&mut result, "routes")?.extend(attached.routes.iter().map(|r| route(version, r)));
    if !attached.dns.is_empty() {
        result.insert("dns".to_owned(), Value::Object(attached.dns));
    }
    result.retain(|_, value| !is_empty(value));
    Ok(Value::Object(result))
}

/// Before 0.3.0: one address of each family, with its routes, and nothing of interfaces.
fn old_form(version: Version, attached: Attached<'_>) -> Result<Value> {
    let mut result = Map::new();
    result.insert("cniVersion".to_owned(), json!(version.as_str()));
    for (key, v6) in [("ip4", false), ("ip6", true)] {
        let of_family = |net: &IpNet| net.addr().is_ipv6() == v6;
        let mut of_this = attached.ips.iter().filter(|ip| of_family(&ip.address));
        let Some(ip) = of_this.next() else {
            continue;
        };
        if let Some(second) = of_this.next() {
            let msg = format!(
                "the pod gets {} and {}, but a result of cniVersion {:?} has room for one address of each family; use 0.3.0 or later",
                ip.address,
                second.address,
                version.as_str()
            );
            return Err(CniError::new(Code::VERSION, msg));
        }
        let mut entry = json!({ "ip": ip.address.to_string() });
        if let Some(gateway) = ip.gateway {
            entry["gateway"] = json!(gateway.to_string());
        }
        let routes = attached.routes.iter().filter(|it| of_family(&it.dst));
        let routes: Vec<_> = routes.map(|it| route(version, it)).collect();
        if !routes.is_empty() {
            entry["routes"] = json!(routes);
        }
        result.insert(key.to_owned(), entry);
    }
    result.insert("dns".to_owned(), Value::Object(attached.dns));
    result.retain(|_, value| !is_empty(value));
    Ok(Value::Object(result))
}

fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>> {
    let value = result.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    match value {
        Value::Array(list) => Ok(list),
        other => Err(CniError::new(
            Code::DECODE,
            format!("{key} of prevResult: {other} is not a list"),
        )),
    }
}

fn interface(version: Version, end: &Interface<'_>, sandbox: Option<&Path>) -> Value {
    let mut json = json!({ "name": end.name, "mac": end.mac.to_string() });
    if version >= Version::V1_1_0 {
        json["mtu"] = json!(end.mtu.0);
    }
    if let Some(sandbox) = sandbox {
        json["sandbox"] = json!(sandbox.to_string_lossy());
    }
    json
}

fn leased_ip(version: Version, ip: &LeasedIp, interface: usize) -> Value {
    let mut json = Map::new();
    if version < Version::V1_0_0 {
        let family = if ip.address.addr().is_ipv6() {
            "6"
        } else {
            "4"
        };
        json.insert("version".to_owned(), json!(family));
    }
    json.insert("interface".to_owned(), json!(interface));
    json.insert("address".to_owned(), json!(ip.address.to_string()));
    if let Some(gateway) = ip.gateway {
        json.insert("gateway".to_owned(), json!(gateway.to_string()));
    }
    Value::Object(json)
}

fn route(version: Version, route: &RouteConfig) -> Value {
    let mut json = json!({ "dst": route.dst.to_string() });
    if let Some(gw) = route.gw {
        json["gw"] = json!(gw.to_string());
    }
    if version >= Version::V1_1_0 {
        let numbers = [
            ("mtu", route.mtu),
            ("advmss", route.advmss),
            ("priority", route.priority),
            ("table", route.table),
        ];
        for (key, number) in numbers
            .into_iter()
            .chain([("scope", route.scope.map(u32::from))])
        {
            if let Some(number) = number {
                json[key] = json!(number);
            }
        }
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(version: Version, previous: Option<Value>) -> Value {
        let ips =
            [("10.88.0.5/16", "10.88.0.1"), ("fd00::5/64", "fd00::1")].map(|(address, gateway)| {
                LeasedIp {
                    address: address.parse().expect("address"),
                    gateway: gateway.parse().ok(),
                }
            });
        let everything = "0.0.0.0/0".parse().expect("range");
        let routes = [RouteConfig {
            mtu: Some(1400),
            ..RouteConfig::new(everything, ips[0].gateway)
        }];
        let end = |name, last| Interface {
            name,
            mac: MacAddr([2, 0, 0, 0, 0, last]),
            mtu: Mtu(65535),
        };
        let attached = Attached {
            host: vec![end("kbp0", 1)],
            pod: end("eth0", 2),
            sandbox: Path::new("/run/netns/x"),
            ips: &ips,
            routes: &routes,
            dns: Map::new(),
        };
        let previous = previous.map(|previous| previous.as_object().expect("an object").clone());
        build(version, previous.as_ref(), attached).expect("result")
    }

    #[test]
    fn each_version_has_its_own_keys() {
        for version in Version::ALL
            .into_iter()
            .filter(|version| *version >= Version::V0_3_0)
        {
            let new = version >= Version::V1_1_0;
            let ip = |family: &str, address: &str, gateway: &str| {
                let mut ip = json!({ "interface": 1, "address": address, "gateway": gateway });
                if version < Version::V1_0_0 {
                    ip["version"] = json!(family);
                }
                ip
            };
            let mut expected = json!({
                "cniVersion": version.as_str(),
                "interfaces": [
                    { "name": "kbp0", "mac": "02:00:00:00:00:01" },
                    { "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x" },
                ],
                "ips": [ip("4", "10.88.0.5/16", "10.88.0.1"), ip("6", "fd00::5/64", "fd00::1")],
                "routes": [{ "dst": "0.0.0.0/0", "gw": "10.88.0.1" }],
            });
            if new {
                expected["interfaces"][0]["mtu"] = json!(65535);
                expected["interfaces"][1]["mtu"] = json!(65535);
                expected["routes"][0]["mtu"] = json!(1400);
            }
            assert_eq!(result(version, None), expected);
        }
    }

    #[test]
    fn before_0_3_0_there_is_one_address_a_family_with_its_routes() {
        for version in [Version::V0_1_0, Version::V0_2_0] {
            let expected = json!({
                "cniVersion": version.as_str(),
                "ip4": {
                    "ip": "10.88.0.5/16", "gateway": "10.88.0.1",
                    "routes": [{ "dst": "0.0.0.0/0", "gw": "10.88.0.1" }],
                },
                "ip6": { "ip": "fd00::5/64", "gateway": "fd00::1" },
            });
            assert_eq!(result(version, None), expected);
        }
    }

    #[test]
    fn a_previous_result_is_kept_and_added_to() {
        let previous = json!({
            "cniVersion": "0.9", "x-more": { "a": 1 },
            "interfaces": [{ "name": "net0", "sandbox": "/run/netns/x", "x": [] }],
            "ips": [{ "address": "10.1.1.1/24", "interface": 0, "y": 2 }], "routes": null, "dns": {},
        });
        let result = result(Version::V1_0_0, Some(previous));
        assert_eq!(result["cniVersion"], "1.0.0");
        assert_eq!(result["x-more"], json!({ "a": 1 }));
        assert_eq!(
            result["interfaces"][0],
            json!({ "name": "net0", "sandbox": "/run/netns/x", "x": [] })
        );
        assert_eq!(result["interfaces"].as_array().map(Vec::len), Some(3));
        assert_eq!(
            result["ips"][0],
            json!({ "address": "10.1.1.1/24", "interface": 0, "y": 2 })
        );
        assert_eq!(result["ips"][1]["interface"], 2);
        assert!(result.get("dns").is_none());
    }
}
