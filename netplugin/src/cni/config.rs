//! The network config: what kbp reads of it, checked, and the whole of it untouched for IPAM.
//!
//! Unknown keys are nobody's mistake: another plugin or a newer kbp may want them.

use std::io::Read;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::env::{IDENTIFIER, Verb, is_identifier};
use super::error::{CniError, Code, Result};
use super::json::{is_empty, number, object, string, texts};
use super::version::Version;
use crate::attachment::MAX_NETWORK;

/// Long enough for a DHCP exchange with retries, short enough for the runtime's own limit of minutes.
const DEFAULT_IPAM_TIMEOUT_SECONDS: u64 = 60;
const MAX_IPAM_TIMEOUT_SECONDS: u64 = 600;

/// A network config.
#[derive(Debug)]
pub(crate) struct Config {
    /// As it came on stdin.
    pub(crate) raw: Vec<u8>,
    /// The same, decoded.
    pub(crate) json: Map<String, Value>,
    /// Its version, which is also the result's.
    pub(crate) version: Version,
    /// Name of the network.
    pub(crate) name: String,
}

impl Config {
    /// Reads stdin. `version` becomes the config's as soon as that is known.
    pub(crate) fn from_stdin(version: &mut Version) -> Result<Self> {
        let mut raw = Vec::new();
        std::io::stdin()
            .lock()
            .read_to_end(&mut raw)
            .map_err(|error| {
                CniError::new(
                    Code::IO,
                    format!("read the network config from stdin: {error}"),
                )
            })?;
        Self::parse(raw, version)
    }

    /// As [`Config::from_stdin`], with input from elsewhere.
    pub(crate) fn parse(raw: Vec<u8>, version: &mut Version) -> Result<Self> {
        let decode = |msg| CniError::new(Code::DECODE, msg);
        let json: Value = serde_json::from_slice(&raw)
            .map_err(|error| {
            decode(match raw.trim_ascii().is_empty() {
                true => "the network config on stdin is not JSON but empty; the runtime has to write it there".to_owned(),
                false => format!("the network config on stdin is not JSON: {error}; correct the file that the runtime reads it from"),
            })
        })?;
        let Value::Object(json) = json else {
            return Err(decode(format!(
                "the network config on stdin is not a JSON object but {json}"
            )));
        };
        *version = Version::of_config(string(&json, "cniVersion", "a version as a string")?)?;
        let name = string(&json, "name", IDENTIFIER)?
            .unwrap_or_default()
            .to_owned();
        if !is_identifier(&name) {
            return Err(CniError::config("name", &json!(name), IDENTIFIER));
        }
        if name.len() > MAX_NETWORK {
            return Err(CniError::config(
                "name",
                &json!(name),
                &format!("at most {MAX_NETWORK} bytes"),
            ));
        }
        Ok(Self {
            raw,
            json,
            version: *version,
            name,
        })
    }

    /// A config of that content.
    #[cfg(test)]
    pub(crate) fn for_test(json: &Value) -> Self {
        let json = json.to_string().into_bytes();
        Self::parse(json, &mut Version::NEWEST.clone()).expect("a valid config")
    }

    /// Refuses a verb that the config's version does not have.
    pub(crate) fn require_verb(&self, verb: Verb) -> Result<()> {
        let since = match verb {
            Verb::Check => Version::V0_4_0,
            Verb::Gc | Verb::Status => Version::V1_1_0,
            Verb::Add | Verb::Del | Verb::Version => Version::V0_1_0,
        };
        if self.version >= since {
            return Ok(());
        }
        Err(CniError::new(
            Code::VERSION,
            format!(
                "cniVersion {:?} has no {}; it needs {} or later",
                self.version.as_str(),
                verb.as_str(),
                since.as_str()
            ),
        ))
    }

    /// Whether it tunes another plugin's veth. Never fails: DEL has to work with any config.
    pub(crate) fn is_tune(&self) -> bool {
        self.json.get("mode").is_some_and(|mode| mode == "tune")
    }

    /// Whether IPAM has a part in it: always, but in mode `tune` only when the config names one, as it may have done
    /// before it was changed to that mode.
    pub(crate) fn wants_ipam(&self) -> bool {
        !self.is_tune() || self.json.get("ipam").is_some_and(|ipam| !is_empty(ipam))
    }

    /// Name of the IPAM plugin's binary.
    pub(crate) fn ipam_type(&self) -> Result<&str> {
        const ALLOWED: &str =
            "\"kbp-local\", or the name of an IPAM plugin in CNI_PATH, e.g. \"host-local\"";
        let refuse = |key: &str, value: &Value| CniError::config(key, value, ALLOWED);
        let ipam = object(&self.json, "ipam", "ipam")?.ok_or_else(|| {
            CniError::new(
                Code::CONFIG,
                format!("ipam is missing; it needs \"type\": {ALLOWED}"),
            )
        })?;
        match ipam.get("type") {
            // A path separator would make it a program from anywhere.
            Some(Value::String(name))
                if !name.is_empty() && !name.contains('/') && name != "." && name != ".." =>
            {
                Ok(name)
            }
            Some(other) => Err(refuse("ipam.type", other)),
            None => Err(refuse("ipam.type", &Value::Null)),
        }
    }

    /// How long the IPAM plugin may take for one verb.
    pub(crate) fn ipam_timeout(&self) -> Result<Duration> {
        let range = format!("1 to {MAX_IPAM_TIMEOUT_SECONDS} seconds");
        let seconds = number(
            &self.json,
            "ipamTimeout",
            1,
            MAX_IPAM_TIMEOUT_SECONDS,
            &range,
        )?;
        Ok(Duration::from_secs(
            seconds.unwrap_or(DEFAULT_IPAM_TIMEOUT_SECONDS),
        ))
    }

    /// Ranges that the IPAM section names, as far as they can be read: it is the IPAM plugin's to judge them.
    pub(crate) fn ipam_ranges(&self) -> Vec<IpNet> {
        let Some(Value::Object(ipam)) = self.json.get("ipam") else {
            return Vec::new();
        };
        let sets = ipam.get("ranges").and_then(Value::as_array);
        let of_sets = sets
            .into_iter()
            .flatten()
            .filter_map(Value::as_array)
            .flatten();
        of_sets
            .filter_map(|range| range.get("subnet"))
            .chain(ipam.get("subnet"))
            .filter_map(|subnet| subnet.as_str()?.parse::<IpNet>().ok())
            .map(|subnet| subnet.trunc())
            .collect()
    }

    /// The result of ADD, or of the plugin before in the chain. Before 0.3.0 there are no chains.
    pub(crate) fn prev_result(&self) -> Result<Option<&Map<String, Value>>> {
        if self.version < Version::V0_3_0 {
            return Ok(None);
        }
        object(&self.json, "prevResult", "prevResult")
    }

    /// The DNS settings that go before IPAM's: the runtime's for this container, else the config's for all.
    pub(crate) fn dns(&self) -> Result<Option<Map<String, Value>>> {
        if let Some(runtime) = object(&self.json, "runtimeConfig", "runtimeConfig")?
            && let Some(dns) = object(runtime, "dns", "runtimeConfig.dns")?
        {
            // The capability names them otherwise than the result (CONVENTIONS.md of the specification).
            let names = [
                ("servers", "nameservers"),
                ("searches", "search"),
                ("options", "options"),
            ];
            for (name, _) in names {
                texts(dns, name, &format!("runtimeConfig.dns.{name}"))?;
            }
            let dns: Map<_, _> = names
                .into_iter()
                .filter_map(|(from, to)| Some((to.to_owned(), dns.get(from)?.clone())))
                .filter(|(_, value)| !is_empty(value))
                .collect();
            if !dns.is_empty() {
                return Ok(Some(dns));
            }
        }
        let mut dns = object(&self.json, "dns", "dns")?
            .cloned()
            .unwrap_or_default();
        string(&dns, "domain", "a string").map_err(|error| CniError {
            msg: format!("dns.{}", error.msg),
            ..error
        })?;
        for name in ["nameservers", "search", "options"] {
            texts(&dns, name, &format!("dns.{name}"))?;
        }
        dns.retain(|_, value| !is_empty(value));
        Ok((!dns.is_empty()).then_some(dns))
    }

    /// The attachments that GC has to keep, as container id and interface name. None: GC has nothing to go by.
    pub(crate) fn valid_attachments(&self) -> Result<Option<Vec<(String, String)>>> {
        const KEY: &str = "cni.dev/valid-attachments";
        const ALLOWED: &str = "a list of {\"containerID\": \"…\", \"ifname\": \"…\"}";
        let Some(value) = self.json.get(KEY).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let refuse = || CniError::config(KEY, value, ALLOWED);
        let list = value.as_array().ok_or_else(refuse)?;
        list.iter()
            .map(|entry| {
                let text = |key| entry.get(key)?.as_str().map(str::to_owned);
                text("containerID").zip(text("ifname")).ok_or_else(refuse)
            })
            .collect::<Result<_>>()
            .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &Value) -> Result<Config> {
        Config::parse(json.to_string().into_bytes(), &mut Version::NEWEST.clone())
    }

    fn config(more: Value) -> Config {
        let mut json = json!({ "cniVersion": "1.0.0", "name": "net", "type": "kbp", "ipam": { "type": "host-local" } });
        let (Some(json_map), Value::Object(more)) = (json.as_object_mut(), more) else {
            unreachable!("objects")
        };
        json_map.extend(more);
        parse(&json).expect("valid")
    }

    #[test]
    fn the_smallest_config_has_the_documented_defaults() {
        let config = config(json!({ "prevResult": null, "dns": null, "x": {} }));
        assert_eq!(config.ipam_type().expect("valid"), "host-local");
        assert_eq!(
            config.ipam_timeout().expect("valid"),
            Duration::from_secs(60)
        );
        assert!(config.prev_result().expect("valid").is_none());
        assert!(config.dns().expect("valid").is_none());
        assert!(config.valid_attachments().expect("valid").is_none());
    }

    #[test]
    fn what_is_no_config_is_refused() {
        for (text, code, part) in [
            ("", Code::DECODE, "not JSON"),
            ("{", Code::DECODE, "not JSON"),
            ("[]", Code::DECODE, "object"),
            ("{}", Code::CONFIG, "name"),
            (r#"{"cniVersion":"9"}"#, Code::VERSION, "\"9\""),
            (r#"{"cniVersion":1}"#, Code::CONFIG, "cniVersion"),
            (r#"{"cniVersion":"1.0.0"}"#, Code::CONFIG, "name"),
            (
                r#"{"cniVersion":"1.0.0","name":"a/b"}"#,
                Code::CONFIG,
                "a/b",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":["x"]}"#,
                Code::CONFIG,
                "name",
            ),
        ] {
            let error = Config::parse(text.as_bytes().to_vec(), &mut Version::NEWEST.clone())
                .expect_err(text);
            assert_eq!(error.code, code, "{error}");
            assert!(error.msg.contains(part), "{error}");
        }
        let long = json!({ "cniVersion": "1.0.0", "name": "n".repeat(MAX_NETWORK + 1) });
        assert_eq!(parse(&long).expect_err("too long").code, Code::CONFIG);
    }

    #[test]
    fn the_ipam_section_is_checked_as_far_as_it_concerns_us() {
        for ipam in [
            json!(null),
            json!([]),
            json!({}),
            json!({ "type": "" }),
            json!({ "type": "../x" }),
            json!({ "type": 1 }),
        ] {
            let error = config(json!({ "ipam": ipam }))
                .ipam_type()
                .expect_err("refused");
            assert_eq!(error.code, Code::CONFIG, "{error}");
            assert!(error.msg.contains("ipam"), "{error}");
        }
        let config = config(json!({ "ipam": {
            "subnet": "10.1.2.3/24",
            "ranges": [[{ "subnet": "10.2.0.0/16" }, { "subnet": "nonsense" }], [{ "subnet": "fd00::1/64" }], "x"],
        } }));
        let expected: Vec<IpNet> = ["10.2.0.0/16", "fd00::/64", "10.1.2.0/24"]
            .iter()
            .map(|text| text.parse().expect("range"))
            .collect();
        assert_eq!(config.ipam_ranges(), expected);
    }

    #[test]
    fn dns_of_the_runtime_goes_before_the_config() {
        let both = json!({
            "dns": { "nameservers": ["10.0.0.1"], "domain": "", "search": [] },
            "runtimeConfig": { "dns": { "servers": ["10.0.0.2"], "searches": ["a.b"] } },
        });
        let expected = json!({ "nameservers": ["10.0.0.2"], "search": ["a.b"] });
        assert_eq!(
            config(both).dns().expect("valid").map(Value::Object),
            Some(expected)
        );
        let one = json!({ "dns": { "nameservers": ["10.0.0.1"], "domain": "", "search": [] } });
        let expected = json!({ "nameservers": ["10.0.0.1"] });
        assert_eq!(
            config(one).dns().expect("valid").map(Value::Object),
            Some(expected)
        );
    }

    #[test]
    fn dns_that_no_runtime_could_read_is_refused() {
        for (more, path) in [
            (
                json!({ "dns": { "nameservers": "10.0.0.1" } }),
                "dns.nameservers: ",
            ),
            (json!({ "dns": { "search": [1] } }), "dns.search: "),
            (json!({ "dns": { "domain": [] } }), "dns.domain: "),
            (
                json!({ "runtimeConfig": { "dns": { "servers": {} } } }),
                "runtimeConfig.dns.servers: ",
            ),
        ] {
            let error = config(more).dns().expect_err(path);
            assert_eq!(error.code, Code::CONFIG, "{error}");
            assert!(error.msg.starts_with(path), "{error}");
        }
    }

    #[test]
    fn verbs_need_their_version() {
        let config =
            |version: &str| parse(&json!({ "cniVersion": version, "name": "n" })).expect("valid");
        for (version, verb, works) in [
            ("0.1.0", Verb::Add, true),
            ("0.2.0", Verb::Del, true),
            ("0.2.0", Verb::Check, false),
            ("0.3.1", Verb::Check, false),
            ("0.4.0", Verb::Check, true),
            ("1.0.0", Verb::Gc, false),
            ("1.0.0", Verb::Status, false),
            ("1.1.0", Verb::Gc, true),
            ("1.1.0", Verb::Status, true),
        ] {
            let result = config(version).require_verb(verb);
            assert_eq!(result.is_ok(), works, "{version} {verb:?}");
            if let Err(error) = result {
                assert_eq!(error.code, Code::VERSION);
            }
        }
    }

    #[test]
    fn valid_attachments_are_read_or_refused() {
        let list = json!({ "cni.dev/valid-attachments": [{ "containerID": "a", "ifname": "eth0", "more": 1 }] });
        let expected = vec![("a".to_owned(), "eth0".to_owned())];
        assert_eq!(
            config(list).valid_attachments().expect("valid"),
            Some(expected)
        );
        for wrong in [json!("x"), json!([1]), json!([{ "containerID": "a" }])] {
            let error = config(json!({ "cni.dev/valid-attachments": wrong }))
                .valid_attachments()
                .expect_err("refused");
            assert_eq!(error.code, Code::CONFIG);
        }
    }
}
