//! The binary, as a person or a script runs it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kbp_poller::policy::{Profile, WorkerPolicy};
use kbp_poller::state::{self, Degraded, Part, PodState, SocketCounters};
use serde_json::Value;
use tempfile::TempDir;

const NOBODY: u32 = 65534;

/// A program that is being written cannot be run (ETXTBSY), and a forked child holds every open file until it has become
/// its own program: so the tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kbpctl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kbpctl"));
    command
        .args(args)
        .env("KBP_CONFIG", "/nonexistent/config.toml");
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("run kbpctl")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

/// A node's programs, as far as doctor looks at them.
fn programs() -> TempDir {
    let dir = tempfile::tempdir().expect("tempdir");
    for (name, script) in [
        (
            "containerd",
            "case $1 in --version) echo containerd x v2.1.9 y;; esac",
        ),
        (
            "runc",
            r#"case $1 in features) echo '{"linux":{"seccomp":{"enabled":true,"actions":["SCMP_ACT_NOTIFY"]}}}';; *) echo runc version 1.2;; esac"#,
        ),
        ("containerd-shim-kbp-v1", ""),
        ("kbp", r#"echo '{"supportedVersions":["1.0.0"]}'"#),
        ("host-local", ""),
    ] {
        let file = dir.path().join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("write");
        fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("chmod");
    }
    let list = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"kbp"}]}"#;
    fs::write(dir.path().join("10-kbp.conflist"), list).expect("write");
    dir
}

fn doctor(path: &Path, args: &[&str]) -> Command {
    let mut command = kbpctl(&[&["doctor"], args].concat());
    command
        .env("PATH", path)
        .env("CNI_PATH", path)
        .env("NETCONFPATH", path)
        .env("CONTAINERD_ADDRESS", path.join("containerd.sock"));
    command
}

fn checks(output: &Output) -> (String, Vec<Value>) {
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let verdict = report["verdict"].as_str().expect("verdict").to_owned();
    let checks = report["checks"].as_array().expect("checks").clone();
    (verdict, checks)
}

fn find<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    let check = checks.iter().find(|c| c["name"] == name);
    check.unwrap_or_else(|| panic!("no line {name}"))
}

#[test]
fn doctor_tries_the_kernel_and_its_status_is_the_worst_line() {
    let _turn = turn();
    let programs = programs();
    let output = run(&mut doctor(programs.path(), &["--json"]));
    let (verdict, checks) = checks(&output);
    let expected = match verdict.as_str() {
        "ok" => 0,
        "degraded" => 1,
        _ => 2,
    };
    assert_eq!(output.status.code(), Some(expected));
    for name in [
        "veth-napi",
        "netdev-family",
        "sqpoll-napi",
        "socket-busy-poll",
    ] {
        // Whatever this kernel can do, it was tried: the verdict is the probe's.
        let tried = find(&checks, name);
        assert!(
            !tried["found"]
                .as_str()
                .expect("found")
                .contains("not tried"),
            "{tried}"
        );
    }
    // It is there, but does not run.
    assert_eq!(find(&checks, "containerd")["verdict"], "degraded");
    for name in [
        "oci-runtime",
        "shim",
        "cni-plugin",
        "ipam-plugin",
        "cni-config",
        "config",
    ] {
        assert_eq!(find(&checks, name)["verdict"], "ok", "{name}");
    }
    for check in &checks {
        let bad = check["verdict"] != "ok";
        assert!(
            !bad || (check["means"].is_string() && check["remedy"].is_string()),
            "{check}"
        );
    }
}

#[test]
fn doctor_is_broken_where_there_is_nothing_and_says_what_to_do() {
    let _turn = turn();
    let empty = tempfile::tempdir().expect("tempdir");
    let output = run(&mut doctor(empty.path(), &[]));
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stdout);
    for part in [
        "broken    containerd ",
        "broken    shim ",
        "remedy: make install",
        " broken\n",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains('\x1b'), "no colours into a pipe");
}

#[test]
fn doctor_reports_a_config_that_refuses_pods_and_one_that_switches_things_off() {
    let _turn = turn();
    let programs = programs();
    let file = programs.path().join("config.toml");
    fs::write(&file, "workers = 3\n").expect("write");
    let output = run(doctor(programs.path(), &["--json"]).env("KBP_CONFIG", &file));
    assert_eq!(output.status.code(), Some(2));
    let (_, broken) = checks(&output);
    let found = find(&broken, "config")["found"].as_str().expect("found");
    assert!(
        found.contains("workers is not a kbp setting") && found.contains("config.toml"),
        "{found}"
    );

    fs::write(&file, "disable = [\"sqpoll\"]\n").expect("write");
    let output = run(doctor(programs.path(), &["--json"]).env("KBP_CONFIG", &file));
    let (_, off) = checks(&output);
    let line = find(&off, "sqpoll-napi");
    assert_eq!(line["verdict"], "degraded");
    let found = line["found"].as_str().expect("found");
    assert!(found.contains("switched off by disable"), "{found}");
}

/// A copy of the binary where every user can run it.
fn for_everybody() -> (TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).expect("chmod");
    let binary = dir.path().join("kbpctl");
    fs::copy(env!("CARGO_BIN_EXE_kbpctl"), &binary).expect("copy");
    (dir, binary)
}

#[test]
fn an_unprivileged_doctor_says_what_it_could_not_try() {
    let _turn = turn();
    let (_dir, binary) = for_everybody();
    let mut command = Command::new(binary);
    command
        .args(["doctor", "--json"])
        .env("KBP_CONFIG", "/nonexistent/config.toml")
        .uid(NOBODY)
        .gid(NOBODY);
    let (_, checks) = checks(&run(&mut command));
    let line = find(&checks, "privileges");
    assert_eq!(line["verdict"], "degraded");
    assert!(line["remedy"].as_str().expect("remedy").contains("as root"));
    let line = find(&checks, "veth-napi");
    assert_eq!(line["verdict"], "degraded");
    assert!(
        line["found"]
            .as_str()
            .expect("found")
            .starts_with("not tried")
    );
}

#[test]
fn an_unprivileged_status_says_who_may_read() {
    let _turn = turn();
    let (dir, binary) = for_everybody();
    let private = dir.path().join("state");
    fs::create_dir(&private).expect("mkdir");
    fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).expect("chmod");
    let mut command = Command::new(binary);
    command
        .args(["status", "--state-dir"])
        .arg(&private)
        .uid(NOBODY)
        .gid(NOBODY);
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("run as root"), "{said}");
    assert_eq!(said.matches("Permission denied").count(), 1, "{said}");
}

#[test]
fn status_lists_the_pods_that_live_and_names_the_files_that_do_not() {
    let _turn = turn();
    let dir = tempfile::tempdir().expect("tempdir");
    let state_dir = dir.path().to_str().expect("path");
    let output = run(&mut kbpctl(&["status", "--state-dir", state_dir]));
    assert!(output.status.success());
    assert!(text(&output.stdout).starts_with("no pod is attached"));
    // A name that was mistyped is not taken for a node without pods.
    let missing = dir.path().join("missing");
    let missing = missing.to_str().expect("path");
    let output = run(&mut kbpctl(&["status", "--state-dir", missing]));
    assert!(text(&output.stdout).contains("which is not there"));
    let output = run(&mut kbpctl(&["status", "--state-dir", "/dev/null"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/dev/null is no directory: --state-dir"));

    let mut pod = PodState {
        id: "alive".to_owned(),
        namespace: "default".to_owned(),
        owner_pid: std::process::id(),
        owner_start: state::start_time(std::process::id()).expect("start"),
        worker_policy: WorkerPolicy::Auto,
        profile: Profile::Latency,
        interfaces: Vec::new(),
        worker: None,
        worker_reason: "no interface".to_owned(),
        busy_poll_us: Some(20),
        busy_poll_reason: "auto".to_owned(),
        busy_poll_mode: Default::default(),
        prefer_busy_poll: false,
        sockets: SocketCounters::default(),
        cpuset: None,
        short_way: Some("many packets".to_owned()),
        rests: true,
        degraded: vec![Degraded {
            part: Part::PollableVeth,
            reason: "eth0 is a netkit".to_owned(),
        }],
    };
    state::write(dir.path(), &pod).expect("write");
    pod.id = "dead".to_owned();
    pod.owner_start += 1;
    state::write(dir.path(), &pod).expect("write");

    let output = run(&mut kbpctl(&["status", "--state-dir", state_dir]));
    let said = text(&output.stdout);
    for part in [
        "default/alive",
        "20 µs",
        "missing pollable-veth: eth0 is a netkit",
        "pods/dead@default.json: its owner",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }

    let output = run(&mut kbpctl(&["status", "--json", "--state-dir", state_dir]));
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(status["pods"][0]["id"], "alive");
    assert_eq!(status["pods"].as_array().map(Vec::len), Some(1));
    assert_eq!(status["stale"][0]["file"], "dead@default.json");
}

#[test]
fn wrong_usage_is_not_taken_for_a_verdict() {
    let _turn = turn();
    for (args, status) in [
        (&["bogus"][..], 64),
        (&["doctor", "--fast"], 64),
        (&[], 64),
        (&["--help"], 0),
        (&["--version"], 0),
    ] {
        let output = run(&mut kbpctl(args));
        assert_eq!(output.status.code(), Some(status), "{args:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let _turn = turn();
    let full = fs::File::create("/dev/full").expect("open /dev/full");
    let output = run(kbpctl(&["status", "--state-dir", "/nonexistent"]).stdout(full));
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("write to stdout"), "{said}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let _turn = turn();
    let mut command = kbpctl(&["doctor"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start kbpctl");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("wait");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn the_manual_describes_every_command_and_is_installed_whole() {
    let _turn = turn();
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().to_str().expect("path");
    let written = run(&mut kbpctl(&["man", path]));
    assert!(written.status.success(), "{}", text(&written.stderr));
    let mut pages: Vec<&str> = text(&written.stdout)
        .lines()
        .map(|page| page.strip_suffix(".1").expect("section 1"))
        .collect();
    pages.sort_unstable();
    let makefile = include_str!("../../Makefile").replace("\\\n", " ");
    let list = makefile
        .lines()
        .find_map(|l| l.strip_prefix("MAN_PAGES :="))
        .expect("MAN_PAGES");
    let mut installed: Vec<&str> = list.split_whitespace().collect();
    installed.sort_unstable();
    assert_eq!(pages, installed);
    let page = fs::read_to_string(dir.path().join("kbpctl-doctor.1")).expect("page");
    assert!(page.contains("Exit status"), "{page}");
    for (shell, words) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef kbpctl"),
        ("fish", "complete -c kbpctl"),
    ] {
        let script = run(&mut kbpctl(&["completions", shell]));
        let script = text(&script.stdout);
        assert!(
            script.contains(words) && script.contains("doctor"),
            "{script}"
        );
        assert!(!script.contains("bench-keeper"), "{script}");
    }
}

#[test]
fn the_archive_of_a_report_is_private_and_never_replaces_a_file() {
    let _turn = turn();
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("r.tar");
    let report = || {
        let mut command = kbpctl(&["report", "--address", "/nonexistent", "--out"]);
        command.arg(&out);
        run(&mut command)
    };
    let output = report();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mode = fs::metadata(&out).expect("archive").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = report();
    assert_eq!(again.status.code(), Some(1));
    assert!(
        text(&again.stderr).contains("--out"),
        "{}",
        text(&again.stderr)
    );
}
