//! What a config and a call say about one attachment in mode `routed`.

use kbp_kernel::{MacAddr, Mtu};
use serde_json::{Map, Value, json};

use super::env::Call;
use super::error::{CniError, Code, Result};
use super::json::{boolean, is_empty, number, object, string};

/// Packets that a qdisc holds and the transmit queue length of both ends, unless the config says otherwise.
const DEFAULT_TX_QUEUE_LEN: u32 = 1000;
const MAX_TX_QUEUE_LEN: u32 = 1_000_000;
const MODES: &str = "\"routed\"";
const PROFILES: &str = "\"latency\", \"throughput\"";
const MACS: &str = "a unicast address of six hexadecimal bytes, e.g. \"02:00:5e:10:00:01\"";

const MTUS: &str = "0 (as the uplink) or 68 to 65535";

/// What TCP segmentation offload is set to: with it, TCP bypasses the NAPI instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// TSO off: every packet can be polled.
    Latency,
    /// TSO on: TCP is fast in bulk and not polled.
    Throughput,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Largest packet that leaves the node; None: as the uplink.
    pub(crate) mtu: Option<Mtu>,
    /// Whether traffic that leaves the node's pod ranges gets an address of the node.
    pub(crate) ip_masq: bool,
    /// MAC of the pod end; None: derived.
    pub(crate) mac: Option<MacAddr>,
    /// See [`Profile`].
    pub(crate) profile: Profile,
    /// Packets.
    pub(crate) tx_queue_len: u32,
    /// Whether the pod gets a default route even when IPAM gives none.
    pub(crate) is_default_gateway: bool,
}

impl Options {
    /// Reads a config; the runtime's wishes for one container go before what the config says for all.
    pub(crate) fn read(json: &Map<String, Value>, call: &Call) -> Result<Self> {
        check_mode(json)?;
        let mtu = number(json, "mtu", 0, 65535, MTUS)?.unwrap_or(0);
        if (1..68).contains(&mtu) {
            return Err(CniError::config("mtu", &json!(mtu), MTUS));
        }
        let range = format!("1 to {MAX_TX_QUEUE_LEN}");
        let tx_queue_len = number(json, "txQueueLen", 1, MAX_TX_QUEUE_LEN.into(), &range)?;
        Ok(Self {
            mtu: u32::try_from(mtu).ok().filter(|mtu| *mtu > 0).map(Mtu),
            ip_masq: boolean(json, "ipMasq")?,
            mac: mac(json, call)?,
            profile: profile(json)?,
            tx_queue_len: tx_queue_len
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(DEFAULT_TX_QUEUE_LEN),
            is_default_gateway: boolean(json, "isDefaultGateway")?,
        })
    }
}

fn check_mode(json: &Map<String, Value>) -> Result<()> {
    match string(json, "mode", MODES)? {
        None | Some("routed") => Ok(()),
        Some(other) => {
            let msg = format!("mode: {other:?} is not supported; allowed: {MODES}");
            Err(CniError::new(Code::UNSUPPORTED, msg))
        }
    }
}

fn profile(json: &Map<String, Value>) -> Result<Profile> {
    match string(json, "profile", PROFILES)? {
        None | Some("latency") => Ok(Profile::Latency),
        Some("throughput") => Ok(Profile::Throughput),
        Some(other) => Err(CniError::config("profile", &json!(other), PROFILES)),
    }
}

fn mac(json: &Map<String, Value>, call: &Call) -> Result<Option<MacAddr>> {
    let runtime = object(json, "runtimeConfig", "runtimeConfig")?;
    let args = match object(json, "args", "args")? {
        Some(args) => object(args, "cni", "args.cni")?,
        None => None,
    };
    let environment = call.arg("MAC").map(|mac| json!(mac));
    let found = [
        (
            "runtimeConfig.mac",
            runtime.and_then(|runtime| runtime.get("mac")),
        ),
        ("args.cni.mac", args.and_then(|args| args.get("mac"))),
        ("MAC of CNI_ARGS", environment.as_ref()),
        ("mac", json.get("mac")),
    ]
    .into_iter()
    .find_map(|(key, value)| Some((key, value.filter(|value| !is_empty(value))?)));
    let Some((key, value)) = found else {
        return Ok(None);
    };
    let mac = value
        .as_str()
        .and_then(|text| text.to_ascii_lowercase().parse::<MacAddr>().ok());
    mac.filter(|mac| mac.0[0] & 1 == 0 && *mac != MacAddr([0; 6]))
        .map(Some)
        .ok_or_else(|| CniError::config(key, value, MACS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &Value, args: &str) -> Result<Options> {
        Options::read(json.as_object().expect("an object"), &Call::for_test(args))
    }

    #[test]
    fn without_a_key_it_has_its_documented_default() {
        let defaults = Options {
            mtu: None,
            ip_masq: false,
            mac: None,
            profile: Profile::Latency,
            tx_queue_len: 1000,
            is_default_gateway: false,
        };
        for config in [
            json!({}),
            json!({ "mtu": 0, "mode": null, "mac": "", "hairpin": [1], "x": {} }),
        ] {
            assert_eq!(read(&config, "").expect("valid"), defaults, "{config}");
        }
    }

    #[test]
    fn malformed_values_are_refused_by_key_value_and_what_is_allowed() {
        for (more, code, parts) in [
            (
                json!({ "mode": "bridge" }),
                Code::UNSUPPORTED,
                ["mode", "\"bridge\"", "\"routed\""],
            ),
            (
                json!({ "mode": 1 }),
                Code::CONFIG,
                ["mode", "1", "\"routed\""],
            ),
            (
                json!({ "mtu": 67 }),
                Code::CONFIG,
                ["mtu", "67", "68 to 65535"],
            ),
            (
                json!({ "mtu": 65536 }),
                Code::CONFIG,
                ["mtu", "65536", "68 to 65535"],
            ),
            (
                json!({ "mtu": -1 }),
                Code::CONFIG,
                ["mtu", "-1", "68 to 65535"],
            ),
            (
                json!({ "mtu": 1500.5 }),
                Code::CONFIG,
                ["mtu", "1500.5", "68 to 65535"],
            ),
            (
                json!({ "mtu": "1500" }),
                Code::CONFIG,
                ["mtu", "\"1500\"", "68 to 65535"],
            ),
            (
                json!({ "ipMasq": "yes" }),
                Code::CONFIG,
                ["ipMasq", "\"yes\"", "true, false"],
            ),
            (
                json!({ "isDefaultGateway": 1 }),
                Code::CONFIG,
                ["isDefaultGateway", "1", "true, false"],
            ),
            (
                json!({ "profile": "fast" }),
                Code::CONFIG,
                ["profile", "\"fast\"", "throughput"],
            ),
            (
                json!({ "txQueueLen": 0 }),
                Code::CONFIG,
                ["txQueueLen", "0", "1 to"],
            ),
            (
                json!({ "mac": "02:00" }),
                Code::CONFIG,
                ["mac", "\"02:00\"", "unicast"],
            ),
            (
                json!({ "mac": "01:00:5e:00:00:01" }),
                Code::CONFIG,
                ["mac", "01:00:5e", "unicast"],
            ),
            (
                json!({ "mac": "00:00:00:00:00:00" }),
                Code::CONFIG,
                ["mac", "00:00:00", "unicast"],
            ),
            (
                json!({ "runtimeConfig": [] }),
                Code::CONFIG,
                ["runtimeConfig", "[]", "object"],
            ),
            (
                json!({ "runtimeConfig": { "mac": 5 } }),
                Code::CONFIG,
                ["runtimeConfig.mac", "5", "unicast"],
            ),
            (
                json!({ "args": { "cni": 5 } }),
                Code::CONFIG,
                ["args.cni", "5", "object"],
            ),
        ] {
            let error = read(&more, "").expect_err(parts[1]);
            assert_eq!(error.code, code, "{error}");
            for part in parts {
                assert!(error.msg.contains(part), "{part} in {error}");
            }
        }
    }

    #[test]
    fn the_runtime_beats_args_beat_the_environment_beats_the_config() {
        let mac = |n: u8| format!("02:00:00:00:00:0{n}");
        let all = json!({
            "runtimeConfig": { "mac": mac(1) }, "args": { "cni": { "mac": mac(2) } }, "mac": mac(4),
        });
        let mut args = format!("MAC={}", mac(3));
        let mut json = all;
        for (expected, remove) in [(1, "runtimeConfig"), (2, "args"), (3, "MAC"), (4, "mac")] {
            let found = read(&json, &args).expect("valid").mac;
            assert_eq!(found.map(|found| found.to_string()), Some(mac(expected)));
            if remove == "MAC" {
                args.clear();
            } else if let Some(map) = json.as_object_mut() {
                map.remove(remove);
            }
        }
        assert_eq!(read(&json, &args).expect("valid").mac, None);
    }
}
