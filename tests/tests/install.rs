//! A person follows the README: `make install`, a network config, `ctr run --cni`; then `make uninstall`. On a node whose `/usr/local`,
//! `/usr/lib`, `/opt`, `/etc` and `/var/lib` are its own.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kbp_tests::command::{self, Output};
use kbp_tests::lab::LIMIT;
use kbp_tests::{
    Containerd, Generation, Leftovers, Rootfs, Run, Runtime, Sandbox, Settings, Sockets, fixtures,
    wait_until,
};

const REFERENCE: &str = "docker.io/library/echo:test";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("workspace")
        .to_path_buf()
}

fn make(sandbox: &Sandbox, arguments: &[&str]) -> Output {
    let mut make = sandbox.command("make");
    make.arg("--directory").arg(repository()).args(arguments);
    command::run(make, LIMIT)
        .expect("make")
        .success()
        .expect("make")
}

/// Every file below a directory; not what says that a file of the machine's own is hidden there, where kbp is installed.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files(&entry.path())),
            Ok(kind) if kind.is_char_device() => {}
            _ => found.push(entry.path()),
        }
    }
    found
}

fn quick_start(generation: Generation, cni_bin_dir: &str) {
    if generation.is_wanting() {
        return;
    }
    let sandbox = Sandbox::new().expect("node");
    let changes: Vec<PathBuf> = ["/usr/local", "/usr/lib", "/opt", "/etc", "/var/lib"]
        .map(|d| sandbox.overlay(d).expect("overlay"))
        .to_vec();
    sandbox
        .run("mkdir", &["-p", cni_bin_dir])
        .expect("directory of plugins");
    if cni_bin_dir != "/usr/lib/cni" {
        sandbox
            .run("cp", &["-r", "/usr/lib/cni/.", cni_bin_dir])
            .expect("reference plugins");
        // Where kbp is installed on the machine.
        let kbp = format!("{cni_bin_dir}/kbp");
        sandbox.run("rm", &["--force", &kbp]).expect("no kbp");
    }
    let there = || {
        changes[..3]
            .iter()
            .flat_map(|dir| files(dir))
            .collect::<Vec<_>>()
    };
    let before_install = there();
    let install = format!("CNI_BIN_DIR={cni_bin_dir}");
    make(&sandbox, &["install", &install]);
    for file in [
        "/usr/local/bin/containerd-shim-kbp-v1",
        "/usr/local/bin/kbpctl",
        &format!("{cni_bin_dir}/kbp"),
    ] {
        assert!(sandbox.inside(file).is_file(), "{file} is not installed");
    }
    sandbox
        .run("mkdir", &["-p", "/etc/cni/net.d"])
        .expect("directory of network configs");
    sandbox
        .run(
            "cp",
            &[
                "/usr/local/share/kbp/config/cni/10-kbp.conflist",
                "/etc/cni/net.d/",
            ],
        )
        .expect("network config");

    let rootfs = Rootfs::busybox(&sandbox.dir().join("rootfs")).expect("rootfs");
    rootfs
        .binary(&fixtures::echo().expect("echo server"), "/usr/bin/server")
        .expect("copy");
    let settings = Settings {
        installed: true,
        ..Settings::default()
    };
    let containerd = Containerd::start_with(&sandbox, generation, settings).expect("containerd");
    let archive = rootfs
        .archive(
            REFERENCE,
            &["/usr/bin/server", "epoll", "7000"],
            sandbox.dir(),
        )
        .expect("archive");
    containerd.import(&archive).expect("import");
    let before = Leftovers::of(&sandbox).expect("before");

    let run = Run::image::<&str>("r1", REFERENCE, [])
        .runtime(Runtime::Kbp)
        .switch("--cni");
    let mut running = containerd.ctr_start(run.arguments()).expect("ctr run");
    // The network comes only after the task was created: kbp has to look again when it starts.
    let pid = wait_until(
        "a container in the network, with polling sockets",
        LIMIT,
        || {
            let pid = containerd
                .pid("r1")
                .map_err(|e| format!("{e}; {}", running.stderr()))?;
            let sockets = Sockets::of(pid).map_err(|e| e.to_string())?;
            let polls = sockets.inet.len() == 2 && !sockets.epoll.is_empty() && sockets.inet[0] > 0;
            if polls && sockets.all_poll_for(sockets.inet[0]) {
                Ok(pid)
            } else {
                Err(format!("{sockets:?}"))
            }
        },
    )
    .expect("container");
    let kbpctl = |arguments: &[&str]| {
        let mut kbpctl = containerd.command("kbpctl");
        kbpctl.args(arguments);
        command::run(kbpctl, LIMIT).expect("kbpctl")
    };
    let status = kbpctl(&["status"]).success().expect("status").stdout;
    assert!(status.contains("r1") && status.contains("eth0"), "{status}");
    let states = kbp_poller::state::read_all(&sandbox.dir().join("run/kbp")).expect("states");
    assert!(
        states.len() == 1 && states[0].worker.is_none() && states[0].degraded.is_empty(),
        "{states:#?}"
    );
    let doctor = kbpctl(&["doctor"]);
    assert!(doctor.text().contains("containerd"), "{doctor}");

    // It answers the node.
    let addresses =
        std::fs::read_to_string(format!("/proc/{pid}/net/fib_trie")).expect("addresses");
    let ip = addresses
        .lines()
        .filter_map(|l| l.trim().strip_prefix("|-- "))
        .find(|a| a.starts_with("10.88.") && !a.ends_with(".0"));
    let ip = ip
        .unwrap_or_else(|| panic!("no address of the network in\n{addresses}"))
        .to_owned();
    let echo = fixtures::echo().expect("echo client").display().to_string();
    let answered = sandbox
        .run(&echo, &["client", &ip, "7000", "20"])
        .expect("the pod answers the node")
        .stdout;
    assert!(answered.contains("answered 20"), "{answered}");

    containerd
        .tasks(["kill", "--signal", "SIGKILL", "r1"])
        .expect("kill");
    let output = running.wait(LIMIT).expect("end");
    assert_eq!(output.code, Some(137), "{output}");
    Leftovers::wait_until_clean(&sandbox, &before).expect("clean");

    make(&sandbox, &["uninstall", &install]);
    assert_eq!(there(), before_install, "uninstall leaves files");
}

/// Debian's `ctr` looks for plugins where Debian's package puts them.
#[test]
fn the_quick_start_on_the_machine() {
    quick_start(Generation::Machine, "/usr/lib/cni");
}

/// Others look where upstream puts them.
#[test]
fn the_quick_start_on_v2() {
    quick_start(Generation::V2, "/opt/cni/bin");
}

/// Below DESTDIR nothing else is touched, for packagers.
#[test]
fn an_installation_below_destdir() {
    let sandbox = Sandbox::new().expect("node");
    let root = sandbox.dir().join("package");
    let destdir = format!("DESTDIR={}", root.display());
    make(&sandbox, &["install", "PREFIX=/usr", &destdir]);
    let installed = files(&root);
    for file in [
        "usr/bin/containerd-shim-kbp-v1",
        "usr/bin/kbpctl",
        "opt/cni/bin/kbp",
        "usr/share/kbp/config/config.toml",
        "usr/share/man/man1/kbpctl-bench-rtt.1",
        "usr/share/bash-completion/completions/kbpctl",
        "usr/share/zsh/site-functions/_kbpctl",
        "usr/share/fish/vendor_completions.d/kbpctl.fish",
    ] {
        assert!(
            installed.contains(&root.join(file)),
            "{file} is not in {installed:#?}"
        );
    }
    make(&sandbox, &["uninstall", "PREFIX=/usr", &destdir]);
    assert_eq!(files(&root), Vec::<PathBuf>::new());
}
