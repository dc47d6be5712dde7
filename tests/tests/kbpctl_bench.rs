//! `kbpctl bench` on a private node: it measures every workload, leaves nothing however it ends, and two at once do not meet. The figures
//! of these short runs mean nothing and are not judged, but for what holds on any machine.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kbp_tests::binaries::{kbp_binary, program, reference_cni_dir};
use kbp_tests::command::{self, Output, Running, running};
use kbp_tests::{
    Containerd, Generation, Leftovers, Sandbox, Terminal, browser, not_tested, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Long enough for eight containers on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

struct Node<'s> {
    containerd: Containerd<'s>,
    before: Leftovers,
}

impl<'s> Node<'s> {
    fn new(sandbox: &'s Sandbox) -> Self {
        let containerd = Containerd::start(sandbox, Generation::Machine).expect("containerd");
        let before = Leftovers::of(sandbox).expect("before");
        Self { containerd, before }
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let kbpctl = kbp_binary("kbpctl").expect("kbpctl");
        let own = kbpctl.parent().expect("directory").to_owned();
        let mut command = self.containerd.command(&kbpctl);
        command.arg("bench").args(arguments);
        if arguments.first() != Some(&"compare") {
            command.arg("--cni-bin").arg(own);
            command
                .arg("--cni-bin")
                .arg(reference_cni_dir().expect("reference plugins"));
        }
        command
    }

    /// A bench of one short round.
    fn short(&self, arguments: &[&str]) -> Output {
        let short = ["--rounds", "1", "--seconds", "0.3", "--warm-up", "0.1"];
        let mut command = self.command(arguments);
        command.args(short);
        command::run(command, LIMIT).expect("kbpctl bench")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.short(&[arguments, &["--json"]].concat());
        serde_json::from_str(&output.success().expect("bench").stdout).expect("JSON")
    }

    /// No container, namespace, link, cgroup, process or file of a bench is left.
    fn is_clean(&self) {
        let sandbox = self.containerd.sandbox();
        Leftovers::wait_until_clean(sandbox, &self.before).expect("clean");
        let namespaces = self
            .containerd
            .ctr(["namespaces", "ls", "--quiet"])
            .expect("ctr");
        assert!(!namespaces.stdout.contains("kbp-bench"), "{namespaces}");
        let base = sandbox.inside("/run/kbp-bench");
        wait_until("no directory of a bench", LIMIT, || match base.exists() {
            false => Ok(()),
            true => Err(format!(
                "{:?}",
                std::fs::read_dir(&base)
                    .map(|d| d.flatten().map(|e| e.path()).collect::<Vec<PathBuf>>())
            )),
        })
        .expect("clean");
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null());
        Running::start(command).expect("start")
    }

    /// Waits until a bench has a container; the bench's name.
    fn wait_for_container(&self) -> String {
        wait_until("a container of the bench", LIMIT, || {
            let list = self
                .containerd
                .ctr(["namespaces", "ls", "--quiet"])
                .map_err(|e| e.to_string())?;
            for name in list.stdout.lines().filter(|n| n.starts_with("kbp-bench-")) {
                let tasks = self
                    .containerd
                    .ctr(["--namespace", name, "tasks", "ls", "--quiet"])
                    .map_err(|e| e.to_string())?;
                if !tasks.stdout.trim().is_empty() {
                    return Ok(name.to_owned());
                }
            }
            Err(list.stdout)
        })
        .expect("container")
    }
}

/// The cgroups of a bench, in whatever hierarchy.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    found.push(root.to_owned());
    let names = [name.to_owned(), format!("{name}-idle")];
    let mut found: Vec<PathBuf> = found
        .iter()
        .flat_map(|dir| names.iter().map(|n| dir.join(n)))
        .collect();
    found.retain(|path| path.exists());
    found
}

fn arm<'a>(bench: &'a Value, name: &str) -> &'a Value {
    let arms = bench["arms"].as_array().expect("arms");
    let arm = arms.iter().find(|a| a["name"] == name);
    arm.unwrap_or_else(|| panic!("no arm {name} in {bench}"))
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn round_trips_of_every_kind_of_arm_with_every_file() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    let out = sandbox.dir().join("out");
    let arms = "stock,veth,kbp,spinner,spin-floor,loopback";
    let output = node
        .short(&["rtt", "--arms", arms, "--out", &out.display().to_string()])
        .success()
        .expect("bench");
    for name in arms.split(',') {
        assert!(output.stdout.contains(&format!("\n{name} ")), "{output}");
    }
    let text = std::fs::read_to_string(out.join("result.json")).expect("result.json");
    let bench: Value = serde_json::from_str(&text).expect("JSON");
    for name in arms.split(',') {
        let round = &arm(&bench, name)["rounds"][0];
        assert!(number(&round["samples"]) > 0.0, "{name}: {round}");
        assert!(number(&round["p50_us"]) > 0.5, "{name}: {round}");
        assert!(
            number(&round["max_us"]) >= number(&round["p50_us"]),
            "{name}: {round}"
        );
        assert!(
            number(&round["cost"]["cpu_seconds"]) > 0.0,
            "{name}: {round}"
        );
    }
    assert_eq!(arm(&bench, "kbp")["inactive"], serde_json::json!([]));
    let html = std::fs::read_to_string(out.join("report.html")).expect("report.html");
    assert!(html.contains("<polyline") && html.contains("spin-floor"));
    // On a busy machine an arm may have too few samples for a curve.
    let enough = |name: &&str| number(&arm(&bench, name)["rounds"][0]["samples"]) >= 100.0;
    let curves = 2 * arms.split(',').filter(enough).count();
    opens_in_a_browser(&out.join("report.html"), curves);
    let png = std::fs::read(out.join("latency.png")).expect("latency.png");
    assert!(png.starts_with(b"\x89PNG"));
    assert!(out.join("latency.svg").is_file());

    let file = out.join("result.json").display().to_string();
    let compared = command::run(node.command(&["compare", &file, &file]), LIMIT);
    let compared = compared
        .expect("compare")
        .success()
        .expect("compare")
        .stdout;
    assert!(
        compared.contains("1.00×") && compared.contains("may be chance"),
        "{compared}"
    );
    node.is_clean();
}

/// A desktop in daylight, and a phone in the dark: no word on the console, curves are seen, nothing is wider than the screen.
fn opens_in_a_browser(report: &Path, curves: usize) {
    let Some(chromium) = browser::browser() else {
        return not_tested("the report of kbpctl bench in a browser: apt-get install chromium");
    };
    for (width, dark) in [(1200, false), (390, true)] {
        let seen = browser::look(&chromium, report, width, dark, None).expect("a browser");
        assert_eq!(seen.console, Vec::<String>::new());
        assert_eq!(seen.title, "kbpctl bench rtt");
        assert_eq!((seen.width, seen.dark), (width, dark));
        assert!(seen.needed <= width, "{seen:?}");
        // A percentile curve and a distribution of each arm.
        assert!(curves >= 2 && seen.visible >= curves, "{curves}: {seen:?}");
        let drawn = |colour: &String| colour.starts_with("rgb(") && *colour != seen.paper;
        assert!(seen.strokes.iter().all(drawn), "{seen:?}");
        let distance = brightness(&seen.ink) - brightness(&seen.paper);
        assert_eq!(distance > 0, dark, "{seen:?}");
        assert!(distance.abs() > 150, "{seen:?}");
    }
}

/// Of `rgb(r, g, b)`, 0 to 255.
fn brightness(colour: &str) -> i32 {
    let inner = colour.trim_start_matches("rgb(").trim_end_matches(')');
    let parts = inner.split(", ").map(|n| n.parse::<i32>());
    let parts: Vec<i32> = parts.map(|n| n.expect("a number")).collect();
    parts.iter().sum::<i32>() / 3
}

/// Whether the two agree is for a quiet machine to say; here both are asked in the same containers.
#[test]
fn sockperf_is_asked_beside() {
    program("sockperf", "sockperf").expect("sockperf");
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    let output = node.short(&["rtt", "--arms", "stock,kbp", "--sockperf"]);
    let said = output.success().expect("bench").stdout;
    let words = "ratio to stock";
    assert!(
        said.contains("sockperf in the same containers") && said.contains(words),
        "{said}"
    );
    node.is_clean();
}

#[test]
fn an_open_loop_keeps_its_rate_and_counts_from_when_requests_were_due() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    for (talk, warm) in [(&["rtt"][..], "udp"), (&["rtt", "--tcp"], "tcp")] {
        let bench = node.json(&[talk, &["--rate", "500", "--arms", "stock,kbp"]].concat());
        for name in ["stock", "kbp"] {
            let round = &arm(&bench, name)["rounds"][0];
            // 0.3 s at 500 a second, whatever the answers took.
            assert!(
                (number(&round["offered"]) - 150.0).abs() <= 1.0,
                "{warm} {name}: {round}"
            );
            assert!(number(&round["samples"]) > 0.0, "{warm} {name}: {round}");
        }
    }
    node.is_clean();
}

#[test]
fn packets_streams_and_programs_of_the_machine() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    let bench = node.json(&["pps", "--arms", "stock,kbp"]);
    for name in ["stock", "kbp"] {
        let round = &arm(&bench, name)["rounds"][0];
        assert!(number(&round["achieved"]) > 0.0, "{name}: {round}");
        assert!(
            number(&round["achieved"]) <= number(&round["offered"]),
            "{name}: {round}"
        );
    }
    let bench = node.json(&["bulk", "--arms", "stock,kbp"]);
    for name in ["stock", "kbp"] {
        let round = &arm(&bench, name)["rounds"][0];
        assert!(number(&round["bytes"]) > 1e6, "{name}: {round}");
    }
    program("redis-server", "redis-server").expect("redis");
    program("memcached", "memcached").expect("memcached");
    program("nginx", "nginx-light").expect("nginx");
    for app in ["redis", "memcached", "nginx"] {
        let bench = node.json(&["app", app, "--arms", "stock,kbp"]);
        for name in ["stock", "kbp"] {
            let round = &arm(&bench, name)["rounds"][0];
            assert!(number(&round["samples"]) > 0.0, "{app} {name}: {round}");
        }
    }
    node.is_clean();
}

#[test]
fn a_noisy_neighbour_and_a_hog_are_there_while_it_measures() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    let bench = node.json(&["rtt", "--arms", "stock", "--flood", "2000", "--hog"]);
    assert!(number(&arm(&bench, "stock")["rounds"][0]["samples"]) > 0.0);
    // Both CPUs of the pair never idle beside the hogs.
    let round = &arm(&bench, "stock")["rounds"][0];
    let busy = number(&round["cost"]["cpu_seconds"]) / number(&round["seconds"]);
    assert!(busy > 0.5, "{round}");
    node.is_clean();
}

#[test]
fn nothing_is_left_however_a_bench_ends() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    for (signal, code) in [
        (Signal::SIGINT, Some(130)),
        (Signal::SIGTERM, Some(130)),
        (Signal::SIGKILL, None),
    ] {
        let mut bench = node.start(&["rtt", "--seconds", "60", "--arms", "spinner,kbp"]);
        let name = node.wait_for_container();
        assert!(
            !cgroups(&name).is_empty(),
            "{name} has cgroups while it runs"
        );
        // nsenter has become kbpctl.
        kill(
            Pid::from_raw(i32::try_from(bench.pid()).expect("pid")),
            signal,
        )
        .expect("kill");
        let output = bench.wait(LIMIT).expect("end");
        assert_eq!(output.code, code, "{signal}: {output}");
        if code.is_some() {
            assert!(
                output
                    .stderr
                    .contains("interrupted; everything that was made is removed"),
                "{output}"
            );
            // At once, not some time later.
            assert!(!sandbox.inside("/run/kbp-bench").exists());
        }
        node.is_clean();
        assert_eq!(cgroups(&name), Vec::<PathBuf>::new());
        assert!(!running(bench.pid()));
    }
}

#[test]
fn a_terminal_shows_the_time_left_and_its_ctrl_c_removes_everything() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    let bench = node.command(&["rtt", "--seconds", "60", "--arms", "stock"]);
    let mut words = bench.get_args().map(|a| a.to_string_lossy().into_owned());
    // What stands behind nsenter's own arguments.
    let own = words.by_ref().skip_while(|w| !w.ends_with("/kbpctl"));
    let own: Vec<String> = own.collect();
    let mut shell = node.containerd.command("sh");
    let script = format!(
        "trap : INT; {}; echo status $?; echo the end",
        own.join(" ")
    );
    shell.args(["-c", &script]).env("TERM", "xterm");
    let mut terminal = Terminal::start(&shell).expect("terminal");
    terminal.resize(30, 180).expect("resize");
    terminal
        .expect("round 1 of 5, stock, about ", LIMIT)
        .expect("a bar");
    terminal.expect(" s left", LIMIT).expect("the time left");
    terminal.type_text("\x03").expect("Ctrl-C");
    let shown = terminal.expect("the end", LIMIT).expect("end");
    assert!(
        shown.contains("status 130") && shown.contains("everything that was made is removed"),
        "{shown}"
    );
    node.is_clean();
}

#[test]
fn two_at_once_do_not_meet() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    let arguments = [
        "rtt",
        "--rounds",
        "2",
        "--seconds",
        "0.5",
        "--arms",
        "stock,kbp",
        "--json",
    ];
    let mut both = [node.start(&arguments), node.start(&arguments)];
    for bench in &mut both {
        let output = bench.wait(LIMIT).expect("end").success().expect("bench");
        let bench: Value = serde_json::from_str(&output.stdout).expect("JSON");
        for name in ["stock", "kbp"] {
            assert_eq!(
                arm(&bench, name)["rounds"].as_array().map(Vec::len),
                Some(2)
            );
        }
    }
    node.is_clean();
}

#[test]
fn what_is_missing_is_told_before_anything_is_made() {
    let sandbox = Sandbox::new().expect("node");
    let node = Node::new(&sandbox);
    for (arguments, words) in [
        (
            &["rtt", "--address", "/run/nobody.sock"][..],
            "containerd does not answer on /run/nobody.sock",
        ),
        (&["rtt", "--arms", "stock,stock"], "named twice"),
        (&["rtt", "--rate", "0.5"], "no request is due in 0.3 s"),
        (
            &["rtt", "--ctr", "/nonexistent"],
            "name one by --ctr, such as --ctr /usr/bin/ctr",
        ),
        (&["rtt", "--arms", "kpb"], "no arm \"kpb\""),
        (&["rtt", "--cpus", "0,999"], "CPU 999 is not online"),
        (&["app", "redis", "--arms", "loopback"], "goes with rtt"),
        (&["rtt", "--stock-cni", "/nonexistent/x"], "/nonexistent/x"),
        (
            &[
                "rtt",
                "--arms",
                "stock",
                "--stock-runtime",
                "io.containerd.nothing.v1",
            ],
            "start a container with the runtime io.containerd.nothing.v1",
        ),
    ] {
        let output = node.short(arguments);
        assert_ne!(output.code, Some(0), "{arguments:?}: {output}");
        assert!(output.stderr.contains(words), "{arguments:?}: {output}");
    }
    node.is_clean();
}
