//! Under libcni itself, as cnitool uses it: lists, the cached result, a config that was changed between ADD and DEL.
//!
//! cnitool is built by the machine's Go, once, below target/. Without Go, or without a module proxy, these tests show
//! nothing: they say so on the terminal, and `make test` repeats it at its end. One that was built has to work.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use kbp_kernel::ethtool;
use kbp_tests::not_tested;
use serde_json::{Value, json};

use crate::traffic::{ip, udp_echo};
use crate::world::{HOST_V4, OUTSIDE_V4, Pod, REFERENCE_PLUGINS, World, empty_directory};

const MODULE: &str = "github.com/containernetworking/cni/cnitool";
/// The first version with drop-in files, GC and STATUS.
const VERSION: &str = "v1.3.0";
/// Seconds for fetching and building it.
const LIMIT: &str = "180";

/// Where cnitool is; None, and why is printed, where it cannot be had.
fn cnitool() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cnitool-{VERSION}"));
        let binary = dir.join("cnitool");
        if binary.is_file() {
            return Some(binary);
        }
        // All that Go writes stays below target/, where `cargo clean` finds it.
        let go = Command::new("timeout")
            .args([LIMIT, "go", "install", &format!("{MODULE}@{VERSION}")])
            .env("GOBIN", &dir)
            .env("GOPATH", dir.join("gopath"))
            .env("GOCACHE", dir.join("gocache"))
            .env("GOFLAGS", "-mod=mod -modcacherw")
            .stdin(Stdio::null())
            .output()
            .expect("run timeout");
        if go.status.success() {
            return Some(binary);
        }
        let why = String::from_utf8_lossy(&go.stderr);
        let why = why.lines().last().unwrap_or("no Go on this machine");
        not_tested(&format!(
            "kbp under cnitool: `go install {MODULE}@{VERSION}` failed: {why}"
        ));
        None
    });
    found.as_deref()
}

/// A node whose runtime is cnitool.
struct Node {
    world: World,
    cnitool: &'static Path,
}

impl Node {
    /// The thread gets a /var/lib of its own, for libcni caches its results below it.
    fn new() -> Option<Self> {
        let cnitool = cnitool()?;
        empty_directory("/var/lib");
        let world = World::new();
        symlink(env!("CARGO_BIN_EXE_kbp"), world.path("kbp")).expect("link the plugin");
        fs::create_dir(world.path("net.d")).expect("directory");
        Some(Self { world, cnitool })
    }

    fn list(&self, plugins: Value) {
        let list = json!({ "cniVersion": "1.1.0", "name": "kbptest", "plugins": plugins });
        let file = self.world.path("net.d/10-kbptest.conflist");
        fs::write(file, list.to_string()).expect("write the list");
    }

    fn run(&self, verb: &str, pod: &Pod) -> Output {
        let mut command = Command::new(self.cnitool);
        command
            .args([verb, "kbptest", &pod.path()])
            .env("NETCONFPATH", self.world.path("net.d"))
            .env("CNI_PATH", self.world.cni_path())
            .stdin(Stdio::null());
        let output = self.world.host.run(|| command.output()).expect("enter");
        output.expect("run cnitool")
    }

    /// A call that has to succeed; what it printed.
    fn call(&self, verb: &str, pod: &Pod) -> String {
        let output = self.run(verb, pod);
        assert!(output.status.success(), "{verb}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    fn add(&self, pod: &Pod) -> Value {
        serde_json::from_str(&self.call("add", pod)).expect("a result")
    }

    fn config(&self, more: Value) -> Value {
        let mut config = self.world.config("1.1.0", more);
        let keys = config.as_object_mut().expect("an object");
        // They are the list's.
        keys.remove("cniVersion");
        keys.remove("name");
        config
    }

    /// The whole life of two pods with this config, which becomes `changed` before they go.
    fn life(&self, config: Value, changed: Value) {
        self.world.forward();
        let (a, b) = (Pod::new("a"), Pod::new("b"));
        self.list(json!([config]));
        // The bridge, where there is one, stays.
        self.add(&a);
        self.call("del", &a);
        let before = (self.world.dump(), a.dump(), b.dump());
        self.call("status", &a);
        let results = [&a, &b].map(|pod| self.add(pod));
        for pod in [&a, &b] {
            self.call("check", pod);
        }
        let address = results[1]["ips"][0]["address"].as_str().expect("address");
        let address = ip(address.split('/').next().expect("an address"));
        udp_echo(&a.netns, &b.netns, address, 1000);
        let seen = udp_echo(&a.netns, &self.world.outside, ip(OUTSIDE_V4), 1000);
        assert_eq!(seen, ip(HOST_V4));
        // libcni gives DEL the config as it is now and the result as it was then.
        self.list(json!([changed]));
        self.call("del", &a);
        self.call("del", &a);
        self.call("gc", &b);
        assert_eq!((self.world.dump(), a.dump(), b.dump()), before);
        // With its old config and its cached result, of what is gone.
        self.list(json!([config]));
        self.call("del", &b);
        assert_eq!((self.world.dump(), a.dump(), b.dump()), before);
    }
}

#[test]
fn mode_routed_under_cnitool() {
    let Some(node) = Node::new() else { return };
    let changed = json!({ "ipMasq": false, "profile": "throughput", "mtu": 1300, "mac": "02:00:00:00:00:77" });
    node.life(node.config(json!({})), node.config(changed));
}

#[test]
fn mode_bridge_under_cnitool() {
    let Some(node) = Node::new() else { return };
    let bridge = json!({ "mode": "bridge", "bridge": "kbp7", "isDefaultGateway": true });
    let changed = json!({ "mode": "routed", "ipMasq": false });
    node.life(node.config(bridge), node.config(changed));
}

#[test]
fn mode_tune_under_cnitool_from_a_file_of_its_own() {
    let Some(node) = Node::new() else { return };
    let ptp = crate::matrix::reference_config(&node.world, "1.0.0", "ptp", false);
    let file = node.world.path("net.d/10-kbptest.conflist");
    let list = json!({
        "cniVersion": "1.0.0", "name": "kbptest",
        "plugins": [{ "type": "ptp", "ipMasq": false, "ipam": ptp["ipam"] }],
    });
    fs::write(&file, list.to_string()).expect("write the list");
    assert!(Path::new(REFERENCE_PLUGINS).join("ptp").exists());
    // libcni appends it, and the list stays as it is.
    let drop_in = node.world.path("net.d/kbptest");
    fs::create_dir(&drop_in).expect("directory");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/cni/drop-in/20-kbp.conf");
    fs::copy(example, drop_in.join("20-kbp.conf")).expect("copy the example");

    node.world.set_sysctl("net/ipv4/ip_forward", "1");
    let pod = Pod::new("a");
    let before = (node.world.dump(), pod.dump());
    let result = node.add(&pod);
    let host_end = result["interfaces"][0]["name"].as_str().expect("a name");
    for (netns, name, gro, tso) in [
        (&node.world.host, host_end, false, false),
        (&pod.netns, "eth0", true, true),
    ] {
        let features = ethtool::features(netns, name).expect("features");
        assert_eq!((features.gro, features.tso), (gro, tso), "{name}");
    }
    node.call("check", &pod);
    udp_echo(&node.world.host, &pod.netns, ip("10.77.0.2"), 1000);
    // Without it, check and del are those of ptp alone.
    fs::remove_dir_all(&drop_in).expect("take it away");
    node.call("check", &pod);
    node.call("del", &pod);
    assert_eq!((node.world.dump(), pod.dump()), before);
}
