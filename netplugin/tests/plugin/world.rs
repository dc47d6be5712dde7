//! Namespaces, configs and calls. Nothing here has a name outside the test process: namespaces live by their
//! file descriptors, files in a temporary directory, and both are gone with the test, however it ends.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kbp_kernel::link::{Batch, Route, RouteSocket, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::{MacAddr, Mtu};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where Debian has the reference plugins.
pub(crate) const REFERENCE_PLUGINS: &str = "/usr/lib/cni";
/// Every version that the plugin claims.
pub(crate) const VERSIONS: [&str; 7] = [
    "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
];
/// Those whose results have `interfaces` and `ips`.
pub(crate) const LISTING_VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// MTU of the host's way out.
pub(crate) const UPLINK_MTU: u32 = 1400;

pub(crate) const HOST_V4: &str = "192.0.2.1";
pub(crate) const HOST_V6: &str = "2001:db8::1";
pub(crate) const OUTSIDE_V4: &str = "192.0.2.2";
pub(crate) const OUTSIDE_V6: &str = "2001:db8::2";

/// A host with a way out to a namespace that knows no route to any pod.
pub(crate) struct World {
    /// Where the plugin runs.
    pub(crate) host: Netns,
    /// The world beyond the host's uplink.
    pub(crate) outside: Netns,
    dir: TempDir,
}

/// A pod: a namespace and who it is.
pub(crate) struct Pod {
    pub(crate) netns: Netns,
    pub(crate) id: String,
}

/// What the plugin answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) ok: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl World {
    pub(crate) fn new() -> Self {
        assert!(
            Path::new(REFERENCE_PLUGINS).join("host-local").exists(),
            "{REFERENCE_PLUGINS}/host-local is missing: apt install containernetworking-plugins",
        );
        let host = Netns::create().expect("create the host's namespace (needs root)");
        let outside = Netns::create().expect("create the outside namespace");
        connect(&host, &outside);
        let world = Self {
            host,
            outside,
            dir: TempDir::new().expect("temporary directory"),
        };
        // A new namespace inherits what the machine has; the plugin shall have something to switch on.
        world.set_sysctl("net/ipv4/ip_forward", "0");
        world.set_sysctl("net/ipv6/conf/all/forwarding", "0");
        world
    }

    /// A file or directory of this test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A config for dual stack with masquerade, and what `more` says.
    pub(crate) fn config(&self, version: &str, more: Value) -> Value {
        let mut config = json!({
            "cniVersion": version,
            "name": "kbptest",
            "type": "kbp",
            "ipMasq": true,
            "ipam": {
                "type": "host-local",
                "dataDir": self.path("leases"),
                "ranges": [[{ "subnet": "10.77.0.0/16" }], [{ "subnet": "fd77::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        });
        merge(&mut config, more);
        config
    }

    /// Calls the plugin for a pod.
    pub(crate) fn call(&self, verb: &str, pod: &Pod, config: &Value) -> Answer {
        self.call_with(
            &environment(verb, &pod.id, &pod.path(), &self.cni_path()),
            &config.to_string(),
        )
    }

    /// Calls the plugin with this environment and input.
    pub(crate) fn call_with(&self, environment: &BTreeMap<String, String>, input: &str) -> Answer {
        run(
            &self.host,
            Path::new(env!("CARGO_BIN_EXE_kbp")),
            environment,
            input,
        )
    }

    /// Own IPAM scripts first, then the reference plugins.
    pub(crate) fn cni_path(&self) -> String {
        format!("{}:{REFERENCE_PLUGINS}", self.dir.path().display())
    }

    /// ADD that has to succeed; its result.
    pub(crate) fn add(&self, pod: &Pod, config: &Value) -> Value {
        let answer = self.call("ADD", pod, config);
        assert!(answer.ok, "ADD failed: {answer:?}");
        serde_json::from_str(&answer.stdout)
            .unwrap_or_else(|error| panic!("ADD: {error} in {answer:?}"))
    }

    /// ADD whose result cannot be written, which has to fail; what it said on stderr.
    pub(crate) fn unread_add(&self, pod: &Pod, config: &Value) -> String {
        // Every write to it fails (ENOSPC).
        let full = fs::File::create("/dev/full").expect("open /dev/full");
        self.failing_add(Command::new(env!("CARGO_BIN_EXE_kbp")), full, pod, config)
    }

    /// ADD by `command`, with `stdout`, which has to fail by its exit status; what it said on stderr.
    pub(crate) fn failing_add(
        &self,
        mut command: Command,
        stdout: impl Into<Stdio>,
        pod: &Pod,
        config: &Value,
    ) -> String {
        let file = self.path("config.json");
        fs::write(&file, config.to_string()).expect("write the config");
        command
            .envs(environment("ADD", &pod.id, &pod.path(), &self.cni_path()))
            .stdin(fs::File::open(&file).expect("open the config"))
            .stdout(stdout);
        let output = self.host.run(|| command.output()).expect("enter");
        let output = output.expect("run the plugin");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    /// Switches forwarding on: the one thing of a failed ADD or of DEL that stays, for others may have come to need it.
    pub(crate) fn forward(&self) {
        self.set_sysctl("net/ipv4/ip_forward", "1");
        self.set_sysctl("net/ipv6/conf/all/forwarding", "1");
    }

    /// A call that has to succeed and to say nothing.
    pub(crate) fn quiet(&self, verb: &str, pod: &Pod, config: &Value) {
        let answer = self.call(verb, pod, config);
        assert!(answer.ok && answer.stdout.is_empty(), "{verb}: {answer:?}");
    }

    /// A shell script that can be named as IPAM plugin. It notes each verb in the file `calls`.
    pub(crate) fn ipam_script(&self, name: &str, body: &str) {
        let path = self.path(name);
        let calls = self.path("calls");
        let script = format!(
            "#!/bin/sh\necho \"$CNI_COMMAND\" >> {}\n{body}\n",
            calls.display()
        );
        fs::write(&path, script).expect("write the script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    }

    /// The verbs that IPAM scripts were called with.
    pub(crate) fn ipam_calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Addresses that host-local has leased.
    pub(crate) fn leases(&self) -> Vec<String> {
        let mut leases: Vec<_> = fs::read_dir(self.path("leases/kbptest"))
            .into_iter()
            .flatten()
            .map(|entry| {
                entry
                    .expect("directory entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .filter(|name| name.parse::<IpAddr>().is_ok())
            .collect();
        leases.sort();
        leases
    }

    /// Everything of the host that an attachment could leave something in.
    pub(crate) fn dump(&self) -> String {
        format!(
            "{}leases {:?}\n{}",
            dump(&self.host),
            self.leases(),
            self.nftables()
        )
    }

    /// The host's nftables rules as `nft` prints them.
    pub(crate) fn nftables(&self) -> String {
        self.host_command("nft", &["list", "ruleset"])
    }

    /// Runs a program in the host's namespace; what it printed.
    pub(crate) fn host_command(&self, program: &str, arguments: &[&str]) -> String {
        command(&self.host, program, arguments)
    }

    pub(crate) fn sysctl(&self, key: &str) -> String {
        sysctl(&self.host, key)
    }

    pub(crate) fn set_sysctl(&self, key: &str, value: &str) {
        set_sysctl(&self.host, key, value);
    }

    /// A socket to the host's routing.
    pub(crate) fn route(&self) -> RouteSocket {
        RouteSocket::open_in(&self.host).expect("open a socket in the host")
    }
}

impl Pod {
    pub(crate) fn new(id: &str) -> Self {
        let netns = Netns::create().expect("create the pod's namespace");
        up(&netns, "lo");
        Self {
            netns,
            id: id.to_owned(),
        }
    }

    /// A path that other processes can open.
    pub(crate) fn path(&self) -> String {
        path(&self.netns)
    }

    pub(crate) fn route(&self) -> RouteSocket {
        RouteSocket::open_in(&self.netns).expect("open a socket in the pod")
    }

    /// Runs a program in the pod's namespace.
    pub(crate) fn command(&self, program: &str, arguments: &[&str]) -> String {
        command(&self.netns, program, arguments)
    }

    /// What is in the pod.
    pub(crate) fn dump(&self) -> String {
        dump(&self.netns)
    }
}

impl Answer {
    /// The error that it has to be: code and message.
    pub(crate) fn error(&self) -> (u64, String, String) {
        assert!(!self.ok, "it should have failed: {self:?}");
        let error: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {self:?}"));
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        assert!(VERSIONS.contains(&text("cniVersion").as_str()), "{error}");
        (
            error["code"].as_u64().expect("a code"),
            text("msg"),
            text("details"),
        )
    }

    /// Asserts an error's code and parts of its message.
    pub(crate) fn assert_error(&self, code: u64, parts: &[&str]) {
        let (found, msg, details) = self.error();
        assert_eq!(found, code, "{msg} ({details})");
        for part in parts {
            assert!(msg.contains(part), "{part:?} is not in {msg:?} ({details})");
        }
    }
}

/// Gives this thread, and what it starts from now on, an empty file system in `dir` that vanishes with it.
pub(crate) fn empty_directory(dir: &str) {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (needs root)");
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).expect("keep mounts to itself");
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), none).expect("mount a tmpfs");
}

/// The n-th address of a result of any version, without its prefix length.
pub(crate) fn address(result: &Value, n: usize) -> IpAddr {
    let entry = match result.get("ips") {
        Some(ips) => &ips[n]["address"],
        None => &result[["ip4", "ip6"][n]]["ip"],
    };
    let text = entry
        .as_str()
        .unwrap_or_else(|| panic!("no address {n} in {result}"));
    let address = text.split('/').next().expect("an address");
    address.parse().expect("an address")
}

/// Whether a version has CHECK.
pub(crate) fn has_check(version: &str) -> bool {
    !["0.1.0", "0.2.0", "0.3.0", "0.3.1"].contains(&version)
}

/// The environment of a call.
pub(crate) fn environment(
    verb: &str,
    id: &str,
    netns: &str,
    path: &str,
) -> BTreeMap<String, String> {
    [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", id),
        ("CNI_NETNS", netns),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", path),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Runs a program in a namespace; what it printed.
pub(crate) fn command(netns: &Netns, program: &str, arguments: &[&str]) -> String {
    let output = netns
        .run(|| Command::new(program).args(arguments).output())
        .expect("enter");
    let output = output.unwrap_or_else(|error| panic!("run {program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).expect("text")
}

/// Runs a plugin in a namespace, with nothing in its environment but what is given.
pub(crate) fn run(
    netns: &Netns,
    plugin: &Path,
    environment: &BTreeMap<String, String>,
    input: &str,
) -> Answer {
    answer(start(netns, plugin, environment, input))
}

/// Starts a plugin as [`run`] does, and gives it its input.
pub(crate) fn start(
    netns: &Netns,
    plugin: &Path,
    environment: &BTreeMap<String, String>,
    input: &str,
) -> Child {
    let mut command = Command::new(plugin);
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(environment);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = netns
        .run(|| command.spawn())
        .expect("enter the namespace")
        .expect("start the plugin");
    // A plugin that refuses its environment never reads the input.
    let _ = child
        .stdin
        .take()
        .expect("piped")
        .write_all(input.as_bytes());
    child
}

/// Waits for a plugin and what it answers.
pub(crate) fn answer(child: Child) -> Answer {
    let output = child.wait_with_output().expect("wait for the plugin");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Answer {
        ok: output.status.success(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

pub(crate) fn path(netns: &Netns) -> String {
    format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        netns.as_fd().as_raw_fd()
    )
}

pub(crate) fn up(netns: &Netns, name: &str) {
    let mut route = RouteSocket::open_in(netns).expect("open a socket");
    let link = route
        .link_by_name(name)
        .expect("read the link")
        .expect("the link");
    route
        .execute(Batch::new().set_up(link.index))
        .expect("set it up");
}

pub(crate) fn sysctl(netns: &Netns, key: &str) -> String {
    let text = netns
        .run(|| fs::read_to_string(Path::new("/proc/sys").join(key)))
        .expect("enter");
    text.unwrap_or_else(|error| panic!("{key}: {error}"))
        .trim()
        .to_owned()
}

pub(crate) fn set_sysctl(netns: &Netns, key: &str, value: &str) {
    let written = netns
        .run(|| fs::write(Path::new("/proc/sys").join(key), value))
        .expect("enter");
    written.unwrap_or_else(|error| panic!("{key}: {error}"));
}

/// Links with addresses, permanent neighbours and routes, in words. What the kernel adds by itself and later
/// (link-local addresses and their routes) is left out.
fn dump(netns: &Netns) -> String {
    let mut route = RouteSocket::open_in(netns).expect("open a socket");
    let mut text = String::new();
    for link in route.links().expect("links") {
        let addresses = route.addresses(link.index).expect("addresses");
        let addresses: Vec<_> = addresses
            .iter()
            .filter(|a| !is_link_local(a.addr()))
            .map(ToString::to_string)
            .collect();
        let neighbours = route.permanent_neighbours(link.index).expect("neighbours");
        let _ = writeln!(
            text,
            "{} {:?} {:?} mtu {} up {} qdisc {:?} {addresses:?} {neighbours:?}",
            link.name, link.alias, link.kind, link.mtu, link.up, link.qdisc,
        );
    }
    for route in route
        .routes()
        .expect("routes")
        .iter()
        .filter(|r| !is_link_local(r.destination.addr()))
    {
        let _ = writeln!(text, "{route:?}");
    }
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        let _ = writeln!(text, "{key} {}", sysctl(netns, key));
    }
    text
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_multicast())
}

/// The uplink: a pair between host and outside, with the host's default routes over it.
fn connect(host: &Netns, outside: &Netns) {
    const HOST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
    const OUTSIDE_MAC: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
    up(host, "lo");
    up(outside, "lo");
    let mut here = RouteSocket::open_in(host).expect("open a socket");
    let mut there = RouteSocket::open_in(outside).expect("open a socket");
    here.execute(Batch::new().create_veth(&VethPair {
        host_name: "uplink",
        host_mac: HOST_MAC,
        pod_name: "world",
        pod_mac: OUTSIDE_MAC,
        pod_netns: outside,
        mtu: Mtu(UPLINK_MTU),
        tx_queue_len: 1000,
    }))
    .expect("create the uplink");
    let uplink = here
        .link_by_name("uplink")
        .expect("read")
        .expect("uplink")
        .index;
    let world = there
        .link_by_name("world")
        .expect("read")
        .expect("world")
        .index;
    let net = |address: &str, len: u8| format!("{address}/{len}").parse().expect("a range");
    let ip = |address: &str| address.parse::<IpAddr>().expect("an address");
    there
        .execute(
            Batch::new()
                .set_up(world)
                .add_address(world, net(OUTSIDE_V4, 24), false)
                .add_address(world, net(OUTSIDE_V6, 64), false)
                .add_neighbour(world, ip(HOST_V4), HOST_MAC)
                .add_neighbour(world, ip(HOST_V6), HOST_MAC),
        )
        .expect("set up the world");
    let default = |everything: &str, gateway: &str| Route {
        gateway: Some(ip(gateway)),
        ..Route::new(everything.parse().expect("a range"), uplink)
    };
    here.execute(
        Batch::new()
            .add_address(uplink, net(HOST_V4, 24), false)
            .add_address(uplink, net(HOST_V6, 64), false)
            .add_neighbour(uplink, ip(OUTSIDE_V4), OUTSIDE_MAC)
            .add_neighbour(uplink, ip(OUTSIDE_V6), OUTSIDE_MAC)
            .add_route(&default("0.0.0.0/0", OUTSIDE_V4))
            .add_route(&default("::/0", OUTSIDE_V6)),
    )
    .expect("set up the uplink");
    // Reading a link makes the kernel notice that it has a carrier.
    there.link_by_index(world).expect("read");
    here.link_by_index(uplink).expect("read");
    // And an IPv6 address takes its time.
    let deadline = Instant::now() + Duration::from_secs(20);
    for (socket, address) in [(&mut here, HOST_V6), (&mut there, OUTSIDE_V6)] {
        while !socket.is_local(ip(address)).expect("look up") {
            assert!(Instant::now() < deadline, "{address} does not come");
            std::thread::yield_now();
        }
    }
}

/// Puts the keys of `more` over those of `config`; null removes one.
fn merge(config: &mut Value, more: Value) {
    match (config, more) {
        (Value::Object(config), Value::Object(more)) => {
            for (key, value) in more {
                if value.is_null() {
                    config.remove(&key);
                } else {
                    merge(config.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (config, more) => *config = more,
    }
}
