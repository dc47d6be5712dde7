//! nerdctl on kbp: run, ps, logs, exec, stats, and compose with two services that find each other by name. Built by
//! `tests/scripts/fetch-go-tools`; its own bridge network is left alone, the containers are in kbp's.

use std::path::Path;
use std::time::Duration;

use kbp_tests::binaries::{bin_dir, go_tool, reference_cni_dir};
use kbp_tests::lab::LIMIT;
use kbp_tests::{
    Arm, Containerd, Generation, Lab, Leftovers, Oci, Output, Rootfs, Runtime, Sandbox, command,
    not_tested, wait_until,
};

const IMAGE: &str = "docker.io/library/box:test";

/// Runs `test` on a node that is set up as nerdctl wants it, and expects that it leaves nothing there.
fn on_node(arm: Arm, test: impl FnOnce(&Lab<'_>, &dyn Fn(&[&str]) -> Output)) {
    let nerdctl = match go_tool("nerdctl") {
        Ok(nerdctl) if !arm.generation.is_wanting() => nerdctl,
        Ok(_) => return,
        Err(error) => return not_tested(&format!("nerdctl: {error}")),
    };
    let sandbox = Sandbox::new().expect("node");
    // Leases, and what libcni keeps.
    sandbox.overlay("/var/lib").expect("overlay");
    let dir = sandbox.dir();
    let (plugins, networks) = (dir.join("cni/bin"), dir.join("cni/net.d"));
    for dir in [&plugins, &networks] {
        std::fs::create_dir_all(dir).expect("directory");
    }
    let reference = reference_cni_dir().expect("reference plugins");
    let names = [
        "bridge",
        "firewall",
        "host-local",
        "loopback",
        "portmap",
        "tuning",
    ];
    let places = names.iter().map(|name| (reference.join(name), *name));
    let kbp = (bin_dir().expect("binaries").join("kbp"), "kbp");
    for (from, name) in places.chain([kbp]) {
        std::os::unix::fs::symlink(from, plugins.join(name)).expect("link");
    }
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/cni/10-kbp.conflist");
    std::fs::copy(config, networks.join("10-kbp.conflist")).expect("network");
    let toml = dir.join("nerdctl.toml");
    let settings = format!(
        "address = \"/run/containerd/containerd.sock\"\nnamespace = {:?}\ndata_root = {:?}\ncni_path = {plugins:?}\n\
         cni_netconfpath = {networks:?}\ncgroup_manager = \"cgroupfs\"\n",
        sandbox.name(),
        dir.join("nerdctl"),
    );
    std::fs::write(&toml, settings).expect("write");

    let rootfs = Rootfs::busybox(&dir.join("rootfs")).expect("rootfs");
    let containerd = Containerd::start(&sandbox, arm.generation).expect("containerd");
    let archive = rootfs
        .archive(IMAGE, &["sleep", "1000"], dir)
        .expect("archive");
    containerd.import(&archive).expect("import");
    let lab = Lab {
        sandbox: &sandbox,
        containerd,
        rootfs,
        arm,
    };
    let run = |arguments: &[&str]| {
        let mut command = lab.containerd.command(&nerdctl);
        command.env("NERDCTL_TOML", &toml).args(arguments);
        command::run(command, Duration::from_secs(60)).expect("nerdctl")
    };
    let before = Leftovers::of(&sandbox).expect("before");
    test(&lab, &run);
    // nerdctl leaves its own for containers in the foreground, under the stock shim too.
    let fifos = dir.join("run/containerd/fifo");
    if fifos.exists() {
        std::fs::remove_dir_all(fifos).expect("remove the client's fifos");
    }
    Leftovers::wait_until_clean(&sandbox, &before).expect("nothing left after the test");
}

fn containers(arm: Arm) {
    on_node(arm, |lab, nerdctl| {
        let ok = |arguments: &[&str]| nerdctl(arguments).success().expect("code").stdout;
        let runtime = arm.runtime.name();
        let run = [
            "run",
            "--runtime",
            runtime,
            "--pull",
            "never",
            "--network",
            "kbp",
        ];
        let with = |further: &[&str]| -> Vec<String> {
            run.iter().chain(further).map(|a| (*a).to_owned()).collect()
        };
        let ok_with = |further: &[&str]| {
            let arguments = with(further);
            ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        };
        // In the foreground, with the exit code.
        let said = ok_with(&[
            "--rm",
            IMAGE,
            "sh",
            "-c",
            "hostname >/dev/null && echo said",
        ]);
        assert_eq!(said, "said\n");
        let arguments = with(&["--rm", IMAGE, "sh", "-c", "exit 5"]);
        let failed = nerdctl(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(failed.code, Some(5), "{failed}");

        let script = "echo to stdout; echo to stderr >&2; exec sleep 1000";
        let id = ok_with(&[
            "--detach", "--name", "one", "--memory", "64m", IMAGE, "sh", "-c", script,
        ]);
        let id = id.trim();
        let listed = ok(&[
            "ps",
            "--no-trunc",
            "--format",
            "{{.ID}} {{.Names}} {{.Status}}",
        ]);
        assert_eq!(listed.trim(), format!("{id} one Up"));
        wait_until("the log", LIMIT, || {
            let logs = nerdctl(&["logs", "one"]);
            match (logs.stdout.as_str(), logs.stderr.contains("to stderr\n")) {
                ("to stdout\n", true) => Ok(()),
                _ => Err(logs.to_string()),
            }
        })
        .expect("logs");
        assert_eq!(
            ok(&["exec", "one", "sh", "-c", "ls -d /etc; sleep 0.1"]),
            "/etc\n"
        );
        // nerdctl says the code, and ends with its own.
        let failed = nerdctl(&["exec", "one", "sh", "-c", "exit 4"]);
        assert!(failed.text().contains("exit code 4"), "{failed}");

        let stats = ok(&[
            "stats",
            "--no-stream",
            "--format",
            "{{.Name}} {{.MemUsage}} {{.PIDs}}",
            "one",
        ]);
        assert!(
            stats.starts_with("one ") && stats.contains("/ 64MiB") && stats.trim().ends_with(" 1"),
            "{stats}"
        );
        let address = ok(&[
            "inspect",
            "--format",
            "{{.NetworkSettings.IPAddress}}",
            "one",
        ]);
        assert!(address.starts_with("10.88."), "{address}");
        if arm.runtime == Runtime::Kbp {
            let state = lab.state(id).expect("the pod's state");
            assert!(
                state.interfaces.len() == 1 && state.degraded.is_empty(),
                "{state:#?}"
            );
        }
        ok(&["pause", "one"]);
        ok(&["unpause", "one"]);
        ok(&["restart", "--time", "1", "one"]);
        ok(&["stop", "--time", "1", "one"]);
        assert_eq!(ok(&["ps", "--quiet"]), "");
        ok(&["rm", "--force", "one"]);
    });
}

fn compose(arm: Arm) {
    on_node(arm, |lab, nerdctl| {
        let file = lab.sandbox.dir().join("compose.yaml");
        let runtime = arm.runtime.name();
        let service = format!(
            "    image: {IMAGE}\n    runtime: {runtime}\n    pull_policy: never\n    networks: [default]\n"
        );
        let text = format!(
            "services:\n  web:\n{service}    command: [sh, -c, 'mkdir -p /www && echo page >/www/index.html && exec httpd -f -p 80 -h /www']\n  \
             user:\n{service}    command: [sleep, '1000']\n    depends_on: [web]\nnetworks:\n  default:\n    name: kbp\n    external: true\n"
        );
        std::fs::write(&file, text).expect("write");
        let file = file.display().to_string();
        let compose = |arguments: &[&str]| {
            let all: Vec<&str> = ["compose", "--project-name", "site", "--file", &file]
                .into_iter()
                .chain(arguments.iter().copied())
                .collect();
            nerdctl(&all)
        };
        compose(&["up", "--detach"]).success().expect("up");
        let listed = compose(&["ps"]).success().expect("ps").stdout;
        assert!(
            listed.contains("web") && listed.contains("user"),
            "{listed}"
        );
        wait_until("the page", LIMIT, || {
            let fetch = [
                "exec",
                "-T",
                "user",
                "sh",
                "-c",
                "wget -q -O- http://web/; sleep 0.1",
            ];
            let page = compose(&fetch);
            match page.stdout.contains("page\n") {
                true => Ok(()),
                false => Err(page.to_string()),
            }
        })
        .expect("one service finds the other");
        if arm.runtime == Runtime::Kbp {
            let states = kbp_poller::state::read_all(&lab.state_dir()).expect("states");
            assert!(
                states.len() == 2 && states.iter().all(|s| s.degraded.is_empty()),
                "{states:#?}"
            );
        }
        compose(&["down"]).success().expect("down");
    });
}

const fn arm(generation: Generation, runtime: Runtime) -> Arm {
    Arm {
        generation,
        runtime,
        oci: Oci::Runc,
    }
}

#[test]
fn containers_on_the_machine() {
    containers(Arm::KBP);
}

#[test]
fn containers_on_v1_7() {
    containers(arm(Generation::V1_7, Runtime::Kbp));
}

#[test]
fn containers_on_v2() {
    containers(Arm::KBP_V2);
}

#[test]
fn containers_of_stock_on_v2() {
    containers(arm(Generation::V2, Runtime::Stock));
}

#[test]
fn compose_on_v1_7() {
    compose(arm(Generation::V1_7, Runtime::Kbp));
}

#[test]
fn compose_on_v2() {
    compose(Arm::KBP_V2);
}

#[test]
fn compose_of_stock_on_v2() {
    compose(arm(Generation::V2, Runtime::Stock));
}
