//! Random changes of valid input, from a seed that is printed: `KBP_SEED=… cargo test --test hostile` repeats a run.

mod inputs;
#[path = "../random/mod.rs"]
mod random;

use std::time::{Duration, Instant};

use random::Random;

/// How long each kind of input is tried.
const TIME: Duration = Duration::from_secs(3);
/// Fewest inputs that this has to be enough for.
const FEWEST: u32 = 200;

const OPTIONS: &[&[u8]] = &[
    b"BinaryName = \"crun\"\nRoot = \"/run/x\"\nSystemdCgroup = true\nIoUid = 7\n[kbp]\nworker = \"none\"\nbusy-poll = 50\n",
    b"\x0a\x01t\x12\x05/none\x1a\x0dIoGid = 9\n#x\n",
    b"\x28\x01\x42\x04crun\x4a\x02/r",
];

const CONFIG: &[&[u8]] = &[
    br#"{"ociVersion":"1.0.2","annotations":{"kbp.io/worker":"none","x":1},"process":{"args":["a"]},"linux":{
        "namespaces":[{"type":"network","path":"/proc/1/ns/net"},{"type":"pid"}],"cgroupsPath":"a.slice:b:c",
        "resources":{"cpu":{"quota":50000,"period":100000,"cpus":"0-3,7"}},
        "seccomp":{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"architectures":["SCMP_ARCH_X86_64"],
        "syscalls":[{"names":["bind","connect","wait4","read"],"action":"SCMP_ACT_ALLOW"},
        {"names":["listen"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}]}}}"#,
    br#"{"linux":{"seccomp":null},"hooks":{}}"#,
    br#"{"annotations":{"run.oci.seccomp.receiver":"/x"},"linux":{"seccomp":{"listenerPath":"/y"}}}"#,
];

const PROCESS_STATE: &[&[u8]] = &[
    br#"{"ociVersion":"1.0.2-dev","fds":["seccompFd"],"pid":4711,"metadata":"kbp ns/pod",
        "state":{"ociVersion":"1.0.2-dev","id":"app","status":"creating","pid":4711,"bundle":"/b"}}"#,
    br#"{"fds":[],"state":{"id":""}}"#,
];

/// A valid input with some changes: bytes, pieces that go, come twice or come from another place, marks of the formats.
fn change(random: &mut Random, valid: &[&[u8]]) -> Vec<u8> {
    const MARKS: &[&str] = &[
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "null",
        "-1",
        "1e999",
        "18446744073709551616",
        "\\u0000",
        "\n",
        "=",
        "\u{fffd}",
    ];
    let mut bytes = valid[random.below(valid.len())].to_vec();
    for _ in 0..=random.below(5) {
        let at = random.below(bytes.len());
        let length = random.below(24).min(bytes.len().saturating_sub(at));
        match random.below(6) {
            0 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            1 => drop(bytes.drain(at..at + length)),
            2 => {
                let piece = bytes[at..at + length].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            3 => bytes.truncate(at),
            4 => {
                // Deeper than anybody nests.
                let mark = MARKS[random.below(MARKS.len())].repeat(1 + random.below(300));
                bytes.splice(at..at, mark.into_bytes());
            }
            _ => {
                let mark = MARKS[random.below(MARKS.len())];
                bytes.splice(at..at, mark.bytes());
            }
        }
    }
    bytes
}

fn hostile(what: &str, valid: &[&[u8]], input: fn(&[u8])) {
    let seed = match std::env::var("KBP_SEED") {
        Ok(seed) => seed.parse().expect("KBP_SEED is a number"),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |t| t.as_nanos() as u64 | 1),
    };
    println!("{what}: KBP_SEED={seed}");
    for valid in valid {
        input(valid);
    }
    let mut random = Random(seed);
    let begun = Instant::now();
    let mut tried = 0;
    while begun.elapsed() < TIME || tried < FEWEST {
        let bytes = change(&mut random, valid);
        let outcome = std::panic::catch_unwind(|| input(&bytes));
        assert!(
            outcome.is_ok(),
            "{what}: number {tried} of KBP_SEED={seed}: {:?}",
            String::from_utf8_lossy(&bytes)
        );
        tried += 1;
    }
    println!("{what}: {tried} inputs");
}

#[test]
fn runtime_options() {
    hostile("runtime options", OPTIONS, inputs::options);
}

#[test]
fn bundle_configurations() {
    hostile("config.json", CONFIG, inputs::config);
}

#[test]
fn process_states() {
    hostile(
        "container process state",
        PROCESS_STATE,
        inputs::process_state,
    );
}
