//! `kbpctl doctor` on nodes that lack things: it names exactly what is wrong, and nothing else changes.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use kbp_tests::binaries::kbp_binary;
use kbp_tests::command::{self, Output, Running};
use kbp_tests::lab::LIMIT;
use kbp_tests::{Containerd, Generation, Leftovers, Sandbox, Settings, fixtures};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const GOOD_NETWORK: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"kbp","ipam":{"type":"kbp-local","ranges":[[{"subnet":"10.88.0.0/24"}]]}}]}"#;
const HANDLER: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kbp]\nruntime_type = \"io.containerd.kbp.v1\"\n";

/// A node with a running containerd and one network.
struct Node<'s> {
    sandbox: &'s Sandbox,
    containerd: Containerd<'s>,
    networks: std::path::PathBuf,
}

impl<'s> Node<'s> {
    fn new(sandbox: &'s Sandbox, config: &str) -> Self {
        let settings = Settings {
            cri: true,
            config: config.to_owned(),
            ..Settings::default()
        };
        let containerd =
            Containerd::start_with(sandbox, Generation::Machine, settings).expect("containerd");
        let networks = sandbox.dir().join("net.d");
        std::fs::create_dir(&networks).expect("mkdir");
        std::fs::write(networks.join("10-n.conflist"), GOOD_NETWORK).expect("network");
        Self {
            sandbox,
            containerd,
            networks,
        }
    }

    /// `doctor` behind a launcher (`without` and its features, or none).
    fn doctor(&self, launcher: &[&str], change: impl FnOnce(&mut Command)) -> Verdicts {
        let kbpctl = kbp_binary("kbpctl").expect("kbpctl");
        let mut command = match launcher.split_first() {
            Some((program, arguments)) => {
                let mut command = self.containerd.command(program);
                command.args(arguments).arg(&kbpctl);
                command
            }
            None => self.containerd.command(&kbpctl),
        };
        let plugins = kbpctl.parent().expect("directory").display().to_string();
        command
            .args(["doctor", "--json"])
            .env("CNI_PATH", format!("{plugins}:/usr/lib/cni"))
            .env("NETCONFPATH", &self.networks);
        change(&mut command);
        Verdicts::of(&command::run(command, LIMIT).expect("kbpctl doctor"))
    }

    fn without(&self, feature: &str) -> Verdicts {
        let launcher = fixtures::without().expect("launcher").display().to_string();
        self.doctor(&[&launcher, feature, "--"], |_| {})
    }
}

/// The lines of a report.
struct Verdicts(BTreeMap<String, Value>);

impl Verdicts {
    fn of(output: &Output) -> Self {
        let report: Value =
            serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output}"));
        let status = match report["verdict"].as_str() {
            Some("ok") => 0,
            Some("degraded") => 1,
            _ => 2,
        };
        assert_eq!(output.code, Some(status), "{output}");
        let checks = report["checks"].as_array().expect("checks");
        for check in checks {
            let bad = check["verdict"] != "ok";
            let told = check["means"].is_string() && check["remedy"].is_string();
            assert!(!bad || told, "no meaning or remedy: {check}");
        }
        Self(
            checks
                .iter()
                .map(|c| (c["name"].as_str().expect("name").to_owned(), c.clone()))
                .collect(),
        )
    }

    fn found(&self, name: &str) -> &str {
        self.0[name]["found"].as_str().expect("found")
    }

    /// The names of the lines whose verdict differs.
    fn differ(&self, other: &Self) -> Vec<String> {
        let verdict = |of: &Self, name: &str| of.0.get(name).map(|c| c["verdict"].clone());
        let names: std::collections::BTreeSet<&String> =
            self.0.keys().chain(other.0.keys()).collect();
        names
            .into_iter()
            .filter(|n| verdict(self, n) != verdict(other, n))
            .cloned()
            .collect()
    }
}

#[test]
fn a_kernel_that_lacks_a_call_is_told_by_that_call() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, "");
    let whole = node.doctor(&[], |_| {});
    for (feature, lines) in [
        ("io_uring", &["sqpoll-napi"][..]),
        ("pidfd_getfd", &["pidfd-getfd"]),
        (
            "seccomp-notify",
            &["seccomp-notify", "seccomp-sync-wake-up"],
        ),
    ] {
        let lacks = node.without(feature);
        assert_eq!(whole.differ(&lacks), lines, "without {feature}");
    }
}

#[test]
fn a_containerd_that_does_not_run_and_a_shim_that_it_cannot_see_are_told() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, "");
    let whole = node.doctor(&[], |_| {});
    assert!(
        whole
            .found("containerd")
            .contains("listens on /run/containerd/containerd.sock"),
        "{}",
        whole.found("containerd")
    );
    assert!(
        whole.found("shim").contains("found in containerd's PATH"),
        "{}",
        whole.found("shim")
    );
    let gone = node.doctor(&[], |command| {
        command.env("CONTAINERD_ADDRESS", "/run/nobody.sock");
    });
    assert_eq!(whole.differ(&gone), ["containerd"]);
    assert!(
        gone.found("containerd")
            .contains("nothing listens on /run/nobody.sock"),
        "{}",
        gone.found("containerd")
    );
}

#[test]
fn faults_of_the_network_configuration_are_named() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, "");
    let whole = node.doctor(&[], |_| {});
    assert!(
        whole.found("cni-config").contains("network \"n\""),
        "{}",
        whole.found("cni-config")
    );
    let file = node.networks.join("10-n.conflist");
    for (text, words) in [
        (
            GOOD_NETWORK.replace("\"kbp\"", "\"kpb\""),
            "no plugin \"kpb\" in",
        ),
        (
            GOOD_NETWORK.replace("kbp-local", "host-locl"),
            "no plugin \"host-locl\" in",
        ),
        (
            GOOD_NETWORK.replace("1.0.0", "7.0.0"),
            "cniVersion 7.0.0 is not known to",
        ),
        // Only the plugin itself knows its options.
        (
            GOOD_NETWORK.replace("\"ipam\"", "\"mtu\":\"big\",\"ipam\""),
            "plugin kbp says",
        ),
        (GOOD_NETWORK.replace("]}", ""), "no JSON"),
    ] {
        std::fs::write(&file, &text).expect("network");
        let wrong = node.doctor(&[], |_| {});
        assert_eq!(whole.differ(&wrong), ["cni-config"], "{text}");
        let found = wrong.found("cni-config");
        assert!(
            found.contains(words) && found.contains("10-n.conflist"),
            "{text}: {found}"
        );
    }
}

#[test]
fn a_pool_whose_cpus_are_offline_or_do_not_exist_is_told() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, "");
    let whole = node.doctor(&[], |_| {});
    let last = kbp_kernel::cpu::Topology::read()
        .expect("topology")
        .online
        .iter()
        .last()
        .expect("a CPU");
    node.containerd
        .set_kbp_config(&format!("cpus = \"{last},999\"\n"))
        .expect("config");
    let wrong = node.doctor(&[], |_| {});
    assert!(wrong.differ(&whole).contains(&"config".to_owned()));
    assert!(
        wrong.found("config").contains("CPU 999 does not exist"),
        "{}",
        wrong.found("config")
    );

    // The node's own view of which CPUs are online.
    let online = sandbox.dir().join("online");
    std::fs::write(&online, "0\n").expect("write");
    let online = online.display().to_string();
    node.sandbox
        .run(
            "mount",
            &["--bind", &online, "/sys/devices/system/cpu/online"],
        )
        .expect("mount");
    node.containerd
        .set_kbp_config(&format!("cpus = \"{last}\"\n"))
        .expect("config");
    let offline = node.doctor(&[], |_| {});
    assert_eq!(whole.differ(&offline), ["cpu-pool"]);
    let words = format!("CPUs {last} of the pool {last} are offline");
    assert!(
        offline.found("cpu-pool").contains(&words),
        "{}",
        offline.found("cpu-pool")
    );
}

#[test]
fn containerds_configuration_is_judged_as_it_loads() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, HANDLER);
    let silent = node.doctor(&[], |_| {});
    assert!(
        silent
            .found("containerd-config")
            .contains("handler \"kbp\" passes no kbp.io/ annotations"),
        "{}",
        silent.found("containerd-config")
    );
    // What the file says now does not hold before a restart; and what containerd cannot read, it does not start with.
    let file = sandbox.dir().join("containerd.toml");
    let text = std::fs::read_to_string(&file).expect("config");
    std::fs::write(&file, format!("{text}pod_annotations = [\"kbp.io/*\"]\n")).expect("write");
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    std::fs::File::options()
        .write(true)
        .open(&file)
        .and_then(|f| f.set_modified(later))
        .expect("touch");
    let mended = node.doctor(&[], |_| {});
    assert_eq!(
        silent.differ(&mended),
        ["containerd-config", "containerd-restart"]
    );
    std::fs::write(&file, "version = [").expect("write");
    let broken = node.doctor(&[], |_| {});
    assert_eq!(broken.0["containerd-config"]["verdict"], "broken");
    assert!(
        broken
            .found("containerd-config")
            .contains("containerd.toml"),
        "{}",
        broken.found("containerd-config")
    );
}

#[test]
fn an_unprivileged_person_is_told_what_could_not_be_tried() {
    const NOBODY: u32 = 65534;
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, "");
    // Where everybody may run it.
    let copy = std::env::temp_dir().join(format!("kbpctl-{}", std::process::id()));
    std::fs::copy(kbp_binary("kbpctl").expect("kbpctl"), &copy).expect("copy");
    let _remove = Remove(copy.clone());
    let mut command = Command::new(&copy);
    command
        .args(["doctor", "--json", "--address"])
        .arg(sandbox.inside("/run/containerd/containerd.sock"))
        .env("KBP_CONFIG", "/nonexistent")
        .uid(NOBODY)
        .gid(NOBODY);
    let said = Verdicts::of(&command::run(command, LIMIT).expect("kbpctl doctor"));
    assert!(said.found("privileges").contains("not running as root"));
    assert!(said.found("veth-napi").starts_with("not tried"));
    drop(node);
}

/// It makes a veth pair, rings and filters to try them; what it does between the moments is not known, so there are several.
#[test]
fn nothing_is_left_of_what_it_tries_whenever_it_is_ended() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox, "");
    let before = Leftovers::of(&sandbox).expect("before");
    let kbpctl = kbp_binary("kbpctl").expect("kbpctl");
    let out = sandbox.dir().join("report.tar");
    for arguments in [
        &["doctor"][..],
        &["report", "--out", &out.display().to_string()],
    ] {
        for (signal, after) in [
            (Signal::SIGINT, 20),
            (Signal::SIGINT, 60),
            (Signal::SIGTERM, 100),
            (Signal::SIGKILL, 40),
            (Signal::SIGKILL, 150),
        ] {
            let mut command = node.containerd.command(&kbpctl);
            command.args(arguments).env("NETCONFPATH", &node.networks);
            let mut running = Running::start(command).expect("start");
            // Nothing is awaited: it is the moment that the test is about.
            std::thread::sleep(std::time::Duration::from_millis(after));
            let pid = Pid::from_raw(i32::try_from(running.pid()).expect("pid"));
            let _ = kill(pid, signal);
            running.wait(LIMIT).expect("end");
            Leftovers::wait_until_clean(&sandbox, &before).expect("clean");
            // Whole, with the two empty blocks at its end, or not at all.
            if let Ok(archive) = std::fs::read(&out) {
                assert!(archive.len() > 1024 && archive.ends_with(&[0; 1024]));
                std::fs::remove_file(&out).expect("remove");
            }
        }
    }
}

struct Remove(std::path::PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
