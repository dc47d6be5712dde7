//! Random input: whatever stdin and environment are, kbp answers with a valid error object, or does what it says.
//!
//! Two runs: many inputs that are read without a node, and some that the binary gets, in a mount namespace where it can
//! write nowhere that outlives the test. `fuzz/` has the same as a target of cargo-fuzz, which runs as long as it is let.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Output, Stdio};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::random::Random;
use crate::world::{Pod, VERSIONS, World, empty_directory};

const REHEARSALS: usize = 20_000;
const CALLS: usize = 400;
/// A directory that every system has and nothing uses.
const SCRATCH: &str = "/mnt";

type Environment = Vec<(&'static str, OsString)>;

/// How many inputs: a hundred times as many in a soak.
fn inputs(count: usize) -> usize {
    match std::env::var_os("KBP_SOAK") {
        Some(_) => 100 * count,
        None => count,
    }
}

/// Configs that are fine, with every key that kbp knows.
fn configs(leases: &str) -> Vec<Value> {
    let previous = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            { "name": "kbp0", "mac": "02:00:00:00:00:01", "mtu": 65535 },
            { "name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1500, "sandbox": "/proc/1/fd/3" },
        ],
        "ips": [
            { "address": "10.77.0.5/16", "gateway": "10.77.0.1", "interface": 1 },
            { "address": "fd77::5/64", "gateway": "fd77::1", "interface": 1 },
        ],
        "routes": [{ "dst": "0.0.0.0/0", "gw": "10.77.0.1", "mtu": 1400, "advmss": 1360, "priority": 5, "table": 7, "scope": 0 }],
        "dns": { "nameservers": ["10.77.0.1"] },
    });
    let whole = json!({
        "cniVersion": "1.1.0", "name": "fuzz", "type": "kbp", "mode": "routed", "profile": "latency",
        "ipMasq": true, "isDefaultGateway": true, "mtu": 1400, "mac": "02:00:00:00:00:09", "txQueueLen": 100, "numQueues": 2,
        "ipamTimeout": 5,
        "routes": [{ "dst": "10.9.0.0/16", "gw": "10.77.0.1", "mtu": 1300 }],
        "dns": { "nameservers": ["10.77.0.1"], "search": ["a.example"] },
        "sysctl": { "net.ipv4.conf.IFNAME.rp_filter": "2" },
        "runtimeConfig": {
            "ips": ["10.77.0.9/16"], "mac": "02:00:00:00:00:0a", "dns": { "servers": ["10.77.0.2"] },
            "io.kubernetes.cri.pod-annotations": { "kbp.io/profile": "throughput" },
        },
        "args": { "cni": { "ips": ["10.77.0.9"], "mac": "02:00:00:00:00:0b" } },
        "cni.dev/valid-attachments": [{ "containerID": "pod-a", "ifname": "eth0" }],
        "ipam": {
            "type": "kbp-local", "dataDir": leases, "routes": [{ "dst": "0.0.0.0/0" }],
            "ranges": [[{ "subnet": "10.77.0.0/16", "rangeStart": "10.77.0.5", "rangeEnd": "10.77.0.99", "gateway": "10.77.0.1" }],
                       [{ "subnet": "fd77::/64" }]],
        },
    });
    let small = json!({
        "cniVersion": "1.0.0", "name": "fuzz",
        "ipam": { "type": "kbp-local", "dataDir": leases, "subnet": "10.78.0.0/24" },
    });
    let bridge = json!({
        "cniVersion": "1.0.0", "name": "fuzz", "mode": "bridge", "bridge": "br0", "isGateway": true, "hairpinMode": true, "vlan": 0,
        "ipam": { "type": "kbp-local", "dataDir": leases, "subnet": "10.79.0.0/24" },
    });
    let tune = json!({ "cniVersion": "1.1.0", "name": "fuzz", "mode": "tune", "required": true, "prevResult": previous });
    let mut chained = whole.clone();
    chained["prevResult"] = previous;
    vec![whole, small, bridge, tune, chained]
}

/// Values that have broken other programs.
fn odd_value(random: &mut Random) -> Value {
    let odd = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(u64::MAX),
        json!(1e308),
        json!(65536),
        json!(""),
        json!("\u{0}"),
        json!("../.."),
        json!("0.0.0.0/0"),
        json!("::/0"),
        json!("255.255.255.255/32"),
        json!("10.77.0.1/33"),
        json!("fe80::1%eth0"),
        json!("::ffff:10.77.0.1/128"),
        json!("ff:ff:ff:ff:ff:ff"),
        json!("x".repeat(300)),
        json!("\u{1f4a5}\u{202e}"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([null]),
        json!({ "": {} }),
        json!("kbp-local"),
        json!("bridge"),
        json!("tune"),
        json!("0.1.0"),
        json!("0.3.1"),
        json!("1.1.0"),
    ];
    random.one_of(&odd).clone()
}

/// Changes one value somewhere in a tree: for an odd one, for another of the tree's, or for none.
fn change_value(random: &mut Random, value: &mut Value) {
    let down = random.below(4) > 0;
    match value {
        Value::Object(map) if down && !map.is_empty() => {
            let n = random.index(map.len());
            let key = map.keys().nth(n).expect("as many keys").clone();
            if random.below(8) == 0 {
                map.remove(&key);
            } else {
                change_value(random, &mut map[&key]);
            }
        }
        Value::Array(list) if down && !list.is_empty() => {
            let n = random.index(list.len());
            match random.below(8) {
                0 => drop(list.remove(n)),
                1 => list.push(list[n].clone()),
                _ => change_value(random, &mut list[n]),
            }
        }
        value => *value = odd_value(random),
    }
}

/// Changes some bytes.
fn change_bytes(random: &mut Random, bytes: &mut Vec<u8>) {
    const ODD: [&[u8]; 10] = [
        b"\"",
        b"{",
        b"]",
        b"\\u0000",
        b"\\ud800",
        b"\xff\xfe",
        b"0",
        b"-",
        b"/",
        b"\0",
    ];
    for _ in 0..=random.below(3) {
        let at = random.index(bytes.len() + 1);
        match random.below(4) {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..at, random.one_of(&ODD).iter().copied())),
            _ if at == bytes.len() => {}
            2 => bytes[at] ^= 1 << random.below(8),
            _ => drop(bytes.remove(at)),
        }
    }
}

/// An input near one that is fine.
fn input(random: &mut Random, configs: &[Value]) -> Vec<u8> {
    let mut config = random.one_of(configs).clone();
    for _ in 0..random.below(4) {
        change_value(random, &mut config);
    }
    let mut bytes = config.to_string().into_bytes();
    if random.below(4) == 0 {
        change_bytes(random, &mut bytes);
    }
    bytes
}

/// An environment near one that is fine.
fn environment(random: &mut Random, netns: &str) -> Environment {
    let verb = *random.one_of(&["ADD", "ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]);
    let mut environment: Environment = vec![
        ("CNI_COMMAND", verb.into()),
        ("CNI_CONTAINERID", "pod-a".into()),
        ("CNI_NETNS", netns.into()),
        ("CNI_IFNAME", "eth0".into()),
        ("CNI_PATH", "/usr/lib/cni".into()),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;IP=10.77.0.7;MAC=02:00:00:00:00:0c".into(),
        ),
    ];
    for _ in 0..random.below(3).saturating_sub(1) {
        let n = random.index(environment.len());
        match random.below(3) {
            0 => drop(environment.remove(n)),
            1 => {
                let text = odd_value(random);
                environment[n].1 = text.as_str().unwrap_or("=;=").replace('\0', "").into();
            }
            _ => {
                let mut bytes = environment[n].1.as_bytes().to_vec();
                change_bytes(random, &mut bytes);
                bytes.retain(|byte| *byte != 0);
                environment[n].1 = OsString::from_vec(bytes);
            }
        }
    }
    environment
}

fn variable<'a>(environment: &'a Environment, name: &str) -> Option<&'a OsStr> {
    let found = environment.iter().find(|(key, _)| *key == name);
    found.map(|(_, value)| value.as_os_str())
}

/// Says what the input was, should the test fail with it.
struct Shown<'a>(&'a Environment, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{:?}\n{}", self.0, String::from_utf8_lossy(self.1));
        }
    }
}

/// Asserts that it is an error object of the specification and nothing else.
fn assert_error(error: &Value) {
    let object = error.as_object().unwrap_or_else(|| panic!("{error}"));
    let text = |key: &str| object.get(key).and_then(Value::as_str);
    assert!(
        VERSIONS.contains(&text("cniVersion").expect("a version")),
        "{error}"
    );
    assert!(
        object["code"].as_u64().is_some_and(|code| code > 0),
        "{error}"
    );
    assert!(text("msg").is_some_and(|msg| !msg.is_empty()), "{error}");
    let known = ["cniVersion", "code", "msg", "details"];
    assert!(
        object.keys().all(|key| known.contains(&key.as_str())),
        "{error}"
    );
}

fn assert_result(result: &Value) {
    assert!(
        VERSIONS.contains(&result["cniVersion"].as_str().expect("a version")),
        "{result}"
    );
    let interfaces = result["interfaces"].as_array().map_or(0, Vec::len);
    for ip in result["ips"].as_array().into_iter().flatten() {
        let Some(index) = ip["interface"].as_u64() else {
            continue;
        };
        assert!((index as usize) < interfaces, "{result}");
    }
}

#[test]
fn every_input_is_read_or_refused() {
    let mut random = Random::new();
    let configs = configs("/nowhere");
    let (mut read, mut refused) = (0, 0);
    for _ in 0..inputs(REHEARSALS) {
        let input = input(&mut random, &configs);
        let environment = environment(&mut random, "/proc/1/fd/3");
        let _shown = Shown(&environment, &input);
        let answer = kbp_netplugin::rehearse(
            |name| variable(&environment, name).map(OsStr::to_owned),
            &input,
        );
        match answer {
            Err(error) => {
                assert_error(&error);
                refused += 1;
            }
            Ok(result) => {
                if result.is_object() && !has_foreign_ips(&input) {
                    assert_result(&result);
                }
                read += 1;
            }
        }
    }
    println!("{read} inputs were read, {refused} refused");
    // Inputs that are all refused for the same reason would show nothing.
    assert!(read > REHEARSALS / 20 && refused > REHEARSALS / 20);
}

/// A prevResult is passed on as it came, with the indices that its plugin gave.
fn has_foreign_ips(input: &[u8]) -> bool {
    let input: Value = serde_json::from_slice(input).unwrap_or_default();
    !input["prevResult"]["ips"].is_null()
}

/// From now on this thread, and what it starts, writes to a file system that vanishes with it: an input can name any
/// directory for its leases.
fn write_nowhere() {
    empty_directory(SCRATCH);
    let none: Option<&str> = None;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).expect("make / read-only");
}

fn call(world: &World, environment: &Environment, input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kbp"));
    command
        .env_clear()
        .envs(environment.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = world.host.run(|| command.spawn()).expect("enter");
    let mut child = child.expect("start the plugin");
    // One that refuses its environment never reads it.
    let _ = child.stdin.take().expect("piped").write_all(input);
    child.wait_with_output().expect("wait for the plugin")
}

#[test]
fn every_call_is_answered_as_the_specification_wants_it() {
    let mut random = Random::new();
    let world = World::new();
    let pod = Pod::new("pod-a");
    write_nowhere();
    let configs = configs(&format!("{SCRATCH}/leases"));
    let (mut done, mut refused) = (0, 0);
    for _ in 0..inputs(CALLS) {
        let input = input(&mut random, &configs);
        let environment = environment(&mut random, &pod.path());
        let _shown = Shown(&environment, &input);
        let output = call(&world, &environment, &input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked"), "{stderr}");
        let answer = || -> Value {
            let json = serde_json::from_slice(&output.stdout);
            json.unwrap_or_else(|error| panic!("{error} in {output:?}"))
        };
        match (output.status.code(), variable(&environment, "CNI_COMMAND")) {
            (Some(1), _) => {
                assert_error(&answer());
                refused += 1;
            }
            (Some(0), Some(verb)) => {
                done += 1;
                if verb == "ADD" {
                    assert_eq!(answer()["code"], Value::Null);
                    let mut environment = environment.clone();
                    environment[0].1 = "DEL".into();
                    let del = call(&world, &environment, &input);
                    assert!(del.status.success() && del.stdout.is_empty(), "{del:?}");
                } else if verb == "VERSION" {
                    assert!(answer()["supportedVersions"].is_array());
                } else {
                    assert!(output.stdout.is_empty(), "{output:?}");
                }
            }
            (Some(0), None) => assert!(!output.stdout.is_empty()),
            _ => panic!("it broke: {output:?}"),
        }
    }
    println!("{done} calls were carried out, {refused} refused");
    assert!(done > CALLS / 20 && refused > CALLS / 20);
}
