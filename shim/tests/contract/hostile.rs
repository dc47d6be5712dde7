//! What others might send to the server, and what it could do with what it is allowed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api;

use crate::random::Random;
use crate::support::{Arm, Shim, World, arms};

arms!(
    [kbp kbp_with_crun]: [malformed_and_oversized_messages_disturb_nobody_else],
    [kbp]: [the_server_gives_up_capabilities_and_its_runtime_has_them],
);

fn set(pid: &str, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    u64::from_str_radix(line.expect("a line").trim(), 16).expect("a set")
}

/// Numbers of capabilities(7): module loading, raw I/O, reboot, clock, BPF; and what a mount or a socket of others takes.
async fn the_server_gives_up_capabilities_and_its_runtime_has_them(arm: Arm) {
    let mut world = World::new(arm).await;
    let script = world.path("runtime");
    let text = format!(
        "#!/bin/sh\ngrep Cap /proc/self/status >{}\nexec runc \"$@\"\n",
        world.path("capabilities").display()
    );
    std::fs::write(&script, text).expect("write");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("chmod");
    world.options.binary_name = script.display().to_string();
    let shim = world.created("c", &["true"]).await;
    let own = set("self", "CapEff:");
    let threads = std::fs::read_dir(format!("/proc/{}/task", shim.pid)).expect("threads");
    let mut launchers = 0;
    for thread in threads.flatten() {
        let thread = format!("{}/task/{}", shim.pid, thread.file_name().to_string_lossy());
        let (effective, permitted) = (set(&thread, "CapEff:"), set(&thread, "CapPrm:"));
        let name = std::fs::read_to_string(format!("/proc/{thread}/comm")).expect("a name");
        let launches = name == "launcher\n";
        launchers += u32::from(launches);
        for gone in [8, 13, 16, 17, 22, 25, 39] {
            let bit = 1 << gone;
            assert_eq!(effective & bit, 0, "capability {gone} of {thread}");
            let left = if launches { own & bit } else { 0 };
            assert_eq!(permitted & bit, left, "capability {gone} of {name}");
        }
        for kept in [0, 1, 12, 19, 21, 27, 31] {
            assert_eq!(effective & 1 << kept, own & 1 << kept, "capability {kept}");
        }
    }
    assert_eq!(launchers, 1);
    let seen = std::fs::read_to_string(world.path("capabilities")).expect("written");
    for name in ["CapEff:", "CapPrm:", "CapInh:", "CapBnd:"] {
        let line = seen.lines().find_map(|l| l.strip_prefix(name));
        let runtime = u64::from_str_radix(line.expect("a line").trim(), 16).expect("a set");
        assert_eq!(runtime, set("self", name), "{name}");
    }
}

/// One frame of ttrpc: the length of the data, the stream, type and flags, the data.
fn frame(length: u32, stream: u32, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(data);
    frame
}

async fn answers(shim: &Shim) {
    assert_eq!(shim.status("c", "").await, api::Status::CREATED);
}

async fn malformed_and_oversized_messages_disturb_nobody_else(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    let path = shim.address.trim_start_matches("unix://").to_owned();
    let send = |bytes: Vec<u8>| {
        let mut socket = UnixStream::connect(Path::new(&path)).expect("connect");
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .expect("limit");
        // It may hang up in the middle.
        let _ = socket.write_all(&bytes);
        let _ = socket.read(&mut [0; 64]);
    };
    let request = b"\x0a\x17containerd.task.v2.Task\x12\x05State\x1a\x03\x0a\x01c";
    let valid = frame(request.len() as u32, 1, 1, request);
    // Sizes that would fill the memory if they were believed, and data that does not come.
    for length in [u32::MAX, 1 << 31, 5 << 20, 100] {
        send(frame(length, 1, 1, b"abc"));
    }
    send(frame(4 << 20, 1, 1, &vec![0xff; 4 << 20]));
    for kind in [0, 2, 3, 77] {
        send(frame(request.len() as u32, 1, kind, request));
    }
    answers(&shim).await;
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |t| t.as_nanos() as u64 | 1);
    println!("seed {seed}");
    let mut random = Random(seed);
    for _ in 0..200 {
        let mut bytes = valid.clone();
        for _ in 0..=random.below(6) {
            let at = random.below(bytes.len());
            match random.below(3) {
                0 => bytes[at] = random.next() as u8,
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random.next() as u8),
            }
        }
        send(bytes);
    }
    answers(&shim).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", shim.pid)).expect("status");
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .and_then(|p| p.trim().trim_end_matches(" kB").parse().ok())
        .expect("peak");
    // A debug build with a message of the largest size in it.
    assert!(peak < 64 << 10, "{peak} kB");
}
