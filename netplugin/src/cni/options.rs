//! What a config and a call say about one attachment.

use kbp_kernel::link::VlanId;
use kbp_kernel::{MacAddr, Mtu};
use serde_json::{Map, Value, json};

use super::env::{Call, is_ifname};
use super::error::{CniError, Code, Result};
use super::ipam::{self, RouteConfig};
use super::json::{boolean, is_empty, number, object, string};
use crate::bridge::vlan::gateway_name;
use crate::poller::PollerOptions;
use crate::sysctl::PodSysctl;

/// Packets that a qdisc holds and the transmit queue length of both ends, unless the config says otherwise.
pub(crate) const DEFAULT_TX_QUEUE_LEN: u32 = 1000;
const MAX_TX_QUEUE_LEN: u32 = 1_000_000;
const MODES: &str = "\"routed\", \"bridge\", \"tune\"";
const DEFAULT_BRIDGE: &str = "kbp0";
/// The kernel allows 4096; a pod with more than one NAPI instance is hard enough to poll.
const MAX_QUEUES: u64 = 64;
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
const ANNOTATED_PROFILE: &str = "kbp.io/profile";
const ANNOTATED_WORKER: &str = "kbp.io/worker";
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

/// How a pod is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mode {
    /// By a host route of its own.
    Routed,
    /// By a port of a bridge.
    Bridge(BridgeOptions),
    /// By another plugin earlier in the chain, whose veth is made pollable.
    Tune,
}

/// What concerns mode `bridge` only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BridgeOptions {
    /// Name of the bridge.
    pub(crate) name: String,
    /// Whether the bridge has the gateways' addresses.
    pub(crate) is_gateway: bool,
    /// Whether a pod reaches itself through the bridge.
    pub(crate) hairpin: bool,
    /// The VLAN of the pod's port, untagged; None: the bridge's default.
    pub(crate) vlan: Option<VlanId>,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// See [`Mode`].
    pub(crate) mode: Mode,
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
    /// Queue pairs of each end.
    pub(crate) queues: u32,
    /// Routes for the pod beside IPAM's.
    pub(crate) routes: Vec<RouteConfig>,
    /// Kernel switches of the pod's namespace.
    pub(crate) sysctls: Vec<PodSysctl>,
    /// Whether an interface that cannot be polled is an error.
    pub(crate) required: bool,
    /// See [`PollerOptions`]; None: the node's poller is not told of the pod.
    pub(crate) poller: Option<PollerOptions>,
    /// The pod's wish for a worker (`kbp.io/worker`), which is the poller's to judge.
    pub(crate) worker: Option<String>,
}

impl Options {
    /// Reads a config; the runtime's wishes for one container go before what the config says for all.
    pub(crate) fn read(json: &Map<String, Value>, call: &Call) -> Result<Self> {
        let is_default_gateway = boolean(json, "isDefaultGateway")?;
        let mode = mode(json, is_default_gateway)?;
        let mtu = number(json, "mtu", 0, 65535, MTUS)?.unwrap_or(0);
        if (1..68).contains(&mtu) {
            return Err(CniError::config("mtu", &json!(mtu), MTUS));
        }
        let range = format!("1 to {MAX_TX_QUEUE_LEN}");
        let tx_queue_len = number(json, "txQueueLen", 1, MAX_TX_QUEUE_LEN.into(), &range)?;
        let range = format!("1 to {MAX_QUEUES}");
        let queues = number(json, "numQueues", 1, MAX_QUEUES, &range)?;
        Ok(Self {
            mode,
            mtu: u32::try_from(mtu).ok().filter(|mtu| *mtu > 0).map(Mtu),
            ip_masq: boolean(json, "ipMasq")?,
            mac: mac(json, call)?,
            profile: profile(json)?,
            tx_queue_len: tx_queue_len
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(DEFAULT_TX_QUEUE_LEN),
            is_default_gateway,
            queues: queues.and_then(|n| u32::try_from(n).ok()).unwrap_or(1),
            routes: routes(json)?,
            sysctls: sysctls(json, &call.ifname)?,
            required: boolean(json, "required")?,
            poller: PollerOptions::read(json)?,
            worker: worker(json)?,
        })
    }
}

fn mode(json: &Map<String, Value>, is_default_gateway: bool) -> Result<Mode> {
    let unsupported = |msg| Err(CniError::new(Code::UNSUPPORTED, msg));
    match string(json, "mode", MODES)? {
        None | Some("routed") => Ok(Mode::Routed),
        Some("bridge") => {
            let vlan = number(json, "vlan", 0, 4094, "0 (none) to 4094")?;
            let vlan = vlan.and_then(|vlan| u16::try_from(vlan).ok());
            let vlan = vlan.filter(|vlan| *vlan > 0).map(VlanId);
            let is_gateway = is_default_gateway || boolean(json, "isGateway")?;
            const NAMES: &str =
                "the name of a bridge, 1 to 15 bytes without '/', ':', '%' and white space";
            let name = string(json, "bridge", NAMES)?.unwrap_or(DEFAULT_BRIDGE);
            if !is_ifname(name) {
                return Err(CniError::config("bridge", &json!(name), NAMES));
            }
            if let Some(vlan) = vlan.filter(|_| is_gateway) {
                let gateway = gateway_name(name, vlan);
                if !is_ifname(&gateway) {
                    let allowed = format!(
                        "a shorter name: with isGateway in VLAN {vlan} there is also {gateway}, which has to have at most 15 bytes"
                    );
                    return Err(CniError::config("bridge", &json!(name), &allowed));
                }
            }
            Ok(Mode::Bridge(BridgeOptions {
                name: name.to_owned(),
                is_gateway,
                hairpin: boolean(json, "hairpinMode")?,
                vlan,
            }))
        }
        Some("tune") => Ok(Mode::Tune),
        Some(other) => unsupported(format!(
            "mode: {other:?} is not supported; allowed: {MODES}"
        )),
    }
}

/// The pod's annotations, where the runtime gives them.
fn annotations(json: &Map<String, Value>) -> Result<Option<&Map<String, Value>>> {
    match object(json, "runtimeConfig", "runtimeConfig")? {
        Some(runtime) => object(runtime, ANNOTATIONS, ANNOTATIONS),
        None => Ok(None),
    }
}

fn worker(json: &Map<String, Value>) -> Result<Option<String>> {
    let Some(annotations) = annotations(json)? else {
        return Ok(None);
    };
    let worker = string(annotations, ANNOTATED_WORKER, "a string")?;
    Ok(worker.filter(|text| !text.is_empty()).map(str::to_owned))
}

/// The pod's annotation goes before the config, which is for all.
fn profile(json: &Map<String, Value>) -> Result<Profile> {
    let annotated = annotations(json)?.and_then(|all| all.get(ANNOTATED_PROFILE));
    let (key, value) = match annotated.filter(|value| !is_empty(value)) {
        Some(value) => (ANNOTATED_PROFILE, value),
        None => ("profile", json.get("profile").unwrap_or(&Value::Null)),
    };
    match value {
        Value::Null => Ok(Profile::Latency),
        Value::String(text) if text == "latency" => Ok(Profile::Latency),
        Value::String(text) if text == "throughput" => Ok(Profile::Throughput),
        other => Err(CniError::config(key, other, PROFILES)),
    }
}

fn routes(json: &Map<String, Value>) -> Result<Vec<RouteConfig>> {
    const ALLOWED: &str =
        "a list of {\"dst\": \"10.0.0.0/8\", \"gw\": \"10.88.0.9\"}, gw may be left out";
    ipam::routes(json).map_err(|_| {
        CniError::config(
            "routes",
            json.get("routes").unwrap_or(&Value::Null),
            ALLOWED,
        )
    })
}

fn sysctls(json: &Map<String, Value>, ifname: &str) -> Result<Vec<PodSysctl>> {
    let Some(all) = object(json, "sysctl", "sysctl")? else {
        return Ok(Vec::new());
    };
    all.iter()
        .map(|(key, value)| PodSysctl::read(key, value, ifname))
        .collect()
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
            mode: Mode::Routed,
            mtu: None,
            ip_masq: false,
            mac: None,
            profile: Profile::Latency,
            tx_queue_len: 1000,
            is_default_gateway: false,
            queues: 1,
            routes: Vec::new(),
            sysctls: Vec::new(),
            required: false,
            poller: None,
            worker: None,
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
                json!({ "mode": "ipvlan" }),
                Code::UNSUPPORTED,
                ["mode", "\"ipvlan\"", "\"routed\""],
            ),
            (
                json!({ "mode": "bridge", "bridge": "fourteen-bytes", "vlan": 7, "isGateway": true }),
                Code::CONFIG,
                ["bridge", "fourteen-bytes.7", "15 bytes"],
            ),
            (
                json!({ "mode": "bridge", "vlan": 4095 }),
                Code::CONFIG,
                ["vlan", "4095", "4094"],
            ),
            (
                json!({ "mode": "bridge", "bridge": "a/b" }),
                Code::CONFIG,
                ["bridge", "a/b", "15 bytes"],
            ),
            (
                json!({ "mode": "bridge", "hairpinMode": 1 }),
                Code::CONFIG,
                ["hairpinMode", "1", "true, false"],
            ),
            (
                json!({ "numQueues": 0 }),
                Code::CONFIG,
                ["numQueues", "0", "1 to 64"],
            ),
            (
                json!({ "routes": [{ "dst": "x" }] }),
                Code::CONFIG,
                ["routes", "\"x\"", "dst"],
            ),
            (
                json!({ "sysctl": { "kernel.msgmax": "1" } }),
                Code::CONFIG,
                ["sysctl", "kernel.msgmax", "net."],
            ),
            (
                json!({ "sysctl": { "net.ipv4/../../kernel/msgmax": "1" } }),
                Code::CONFIG,
                ["sysctl", "kernel/msgmax", "net."],
            ),
            (
                json!({ "sysctl": { "net.ipv4.ip_forward": 1 } }),
                Code::CONFIG,
                ["sysctl", "net.ipv4.ip_forward", "string"],
            ),
            (
                json!({ "runtimeConfig": { ANNOTATIONS: { ANNOTATED_PROFILE: "fast" } } }),
                Code::CONFIG,
                [ANNOTATED_PROFILE, "fast", "latency"],
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
    fn the_keys_of_mode_bridge_have_documented_defaults() {
        let mode = |more: Value| read(&more, "").expect("valid").mode;
        let bridge = |name: &str, is_gateway, hairpin| {
            Mode::Bridge(BridgeOptions {
                name: name.into(),
                is_gateway,
                hairpin,
                vlan: None,
            })
        };
        assert_eq!(
            mode(json!({ "mode": "bridge", "vlan": 0 })),
            bridge("kbp0", false, false)
        );
        let gateway = json!({ "mode": "bridge", "bridge": "br1", "isDefaultGateway": true, "hairpinMode": true });
        assert_eq!(mode(gateway), bridge("br1", true, true));
        let Mode::Bridge(in_vlan) = mode(json!({ "mode": "bridge", "vlan": 4094 })) else {
            panic!("another mode");
        };
        assert_eq!(in_vlan.vlan, Some(VlanId(4094)));
        assert_eq!(mode(json!({ "mode": "tune" })), Mode::Tune);
    }

    #[test]
    fn an_annotation_of_the_pod_goes_before_the_config() {
        let annotated = json!({
            "profile": "latency",
            "runtimeConfig": { ANNOTATIONS: { ANNOTATED_PROFILE: "throughput", "other": "x" } },
        });
        let profile = |json: &Value| read(json, "").expect("valid").profile;
        assert_eq!(profile(&annotated), Profile::Throughput);
        let other = json!({ "profile": "throughput", "runtimeConfig": { ANNOTATIONS: {} } });
        assert_eq!(profile(&other), Profile::Throughput);
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
