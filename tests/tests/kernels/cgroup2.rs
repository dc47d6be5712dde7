//! The whole way on a machine with cgroup v2 only: containerd, the shim, runc. The development machine has v1.

use std::path::Path;

use kbp_tests::command::Running;
use kbp_tests::lab::on_with;
use kbp_tests::{Arm, Lab, Run, Settings, wait_until};

use crate::known::Known;

/// Longest wait for anything: the CPUs are emulated, on a machine that may be busy.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(90);

/// Memory of a container, in bytes.
pub(crate) const LIMITED: u64 = 64 << 20;

/// Describes a container `id` that runs a shell script and has [`LIMITED`] bytes of memory.
type Limited<'a> = &'a dyn Fn(&str, &str) -> Run;

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn run_exec_oom_stats_and_delete_in_a_guest() {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    assert!(
        controllers.expect("cgroup v2").contains("memory"),
        "the memory controller is on v2's side"
    );
    on_with(Arm::KBP, Settings::default(), |lab| {
        all(lab, &|id, script| {
            lab.script(id, script).flag("--memory-limit", LIMITED)
        });
        polls_in_idle_cycles(lab);
    });
}

/// The shim's own idle worker is in the idle cgroup, or the pod's state says why not; with the container it goes.
fn polls_in_idle_cycles(lab: &Lab<'_>) {
    let pod = lab.pod("pod");
    let container = lab
        .script("idles", "while :; do sleep 0.2; done")
        .netns(&pod.netns.path())
        .annotation("kbp.io/worker", "idle");
    lab.containerd.start_container(container).expect("start");
    let state = wait_until("the state of the pod", LIMIT, || {
        let state = lab.state("idles").filter(|s| s.worker.is_some());
        state.ok_or_else(|| format!("{:?}\n{}", lab.state("idles"), lab.containerd.log()))
    });
    let state = state.expect("a worker");
    let tid = state.worker.expect("a worker").tid;
    let group = Path::new("/sys/fs/cgroup/kbp-idle");
    let read = |path: &str| std::fs::read_to_string(path).expect("a file of the kernel");
    let own = read(&format!("/proc/{tid}/task/{tid}/cgroup"));
    let is_idle = own == "0::/kbp-idle\n";
    // Where sessions are no groups (as in Linux 6.1 of Debian), a thread of the root competes for itself.
    let competes_alone =
        own == "0::/\n" && read("/proc/sys/kernel/sched_autogroup_enabled") == "0\n";
    let reason = state.worker_reason;
    assert!(
        is_idle || competes_alone || !Known::here().sqpoll,
        "{own}: {reason}"
    );
    assert_eq!(
        reason.contains("warning"),
        !is_idle && !competes_alone,
        "{own}: {reason}"
    );
    lab.containerd.remove("idles").expect("remove");
    wait_until("the end of the worker", LIMIT, || {
        let left = [group.to_owned(), format!("/proc/{tid}").into()];
        let left: Vec<_> = left.iter().filter(|path| path.exists()).collect();
        match left.is_empty() {
            true => Ok(()),
            false => Err(format!("{left:?}")),
        }
    })
    .expect("gone");
}

/// Run, exec, stats, delete, and memory that runs out; the cgroup that it was in.
pub(crate) fn all(lab: &Lab<'_>, limited: Limited<'_>) -> String {
    let cgroup = lives(lab, limited);
    runs_out_of_memory(lab, limited);
    dies_of_it(lab, limited);
    cgroup
}

fn lives(lab: &Lab<'_>, limited: Limited<'_>) -> String {
    let output = lab
        .containerd
        .run(&lab.script("hello", "echo hello; exit 7"));
    let output = output.expect("run");
    assert_eq!((output.code, output.stdout.as_str()), (Some(7), "hello\n"));

    let container = limited("lives", "while :; do sleep 0.2; done");
    lab.containerd.start_container(container).expect("start");
    lab.answers("lives");
    let pid = lab.containerd.pid("lives").expect("pid");
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    let path = cgroup.trim().strip_prefix("0::").expect("v2 only");
    let limit = std::fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.max"));
    assert_eq!(limit.expect("memory.max").trim(), LIMITED.to_string());

    let metrics = lab
        .containerd
        .ctr(["tasks", "metrics", "--format=json", "lives"]);
    let metrics = metrics.expect("metrics").success().expect("metrics").stdout;
    let metrics: serde_json::Value = serde_json::from_str(&metrics).expect("JSON");
    assert_eq!(metrics["memory"]["usage_limit"], LIMITED, "{metrics}");
    assert!(metrics["memory"]["usage"].as_u64() > Some(0), "{metrics}");
    assert!(metrics["cpu"]["usage_usec"].as_u64() > Some(0), "{metrics}");
    assert!(metrics["pids"]["current"].as_u64() > Some(0), "{metrics}");

    lab.containerd.remove("lives").expect("remove");
    wait_until("the end of its cgroup", LIMIT, || {
        if std::path::Path::new(&format!("/sys/fs/cgroup{path}")).exists() {
            Err(path.to_owned())
        } else {
            Ok(())
        }
    })
    .expect("gone");
    path.to_owned()
}

/// A subscription to containerd's events. `ctr` does not say when it has subscribed: events are made until one is seen.
fn subscribe(lab: &Lab<'_>) -> Running {
    let mut events = lab.containerd.ctr_start(["events"]).expect("events");
    wait_until("a first event", LIMIT, || {
        let label = ["namespaces", "label", lab.sandbox.name(), "seen=no"];
        lab.containerd.ctr(label).map_err(|e| e.to_string())?;
        match events.stdout() {
            "" => Err("none".to_owned()),
            _ => Ok(()),
        }
    })
    .expect("subscribed");
    events
}

/// The kernel kills what has no memory left, and the shim tells; the container goes on.
fn runs_out_of_memory(lab: &Lab<'_>, limited: Limited<'_>) {
    let mut events = subscribe(lab);
    // A shim looks for it from the start on, so it comes later. What was killed may not have given its memory back when the kernel
    // looks for the next one to kill: all that the first process starts comes before it, and it asks for no memory itself by then.
    let script = "(echo 1000 >/proc/self/oom_score_adj; until [ -e /tmp/go ]; do sleep 0.05; done; \
                  head -c 200000000 /dev/zero | tail -c 100000000 | wc -c) & exec sleep 1000";
    let container = limited("eats", script);
    lab.containerd.start_container(container).expect("start");
    std::fs::write(lab.rootfs.dir().join("tmp/go"), "").expect("write");
    wait_until("the event", LIMIT, || {
        let seen = events.stdout();
        if seen.lines().any(|l| l.contains("/tasks/oom")) {
            Ok(())
        } else {
            Err(seen.to_owned())
        }
    })
    .expect("an event of memory that ran out");
    let task = lab.containerd.task("eats").expect("task");
    assert!(
        task.is_some_and(|(state, _)| state == "RUNNING"),
        "{}",
        lab.containerd.ctr(["tasks", "ls"]).expect("ls")
    );
    lab.answers("eats");
    lab.containerd.remove("eats").expect("remove");
}

/// The init itself has no memory left: that is told before its end.
fn dies_of_it(lab: &Lab<'_>, limited: Limited<'_>) {
    let mut events = subscribe(lab);
    let script =
        "until [ -e /tmp/die ]; do sleep 0.05; done; exec tail -c 100000000 /dev/zero >/dev/null";
    let container = limited("dies", script);
    lab.containerd.start_container(container).expect("start");
    std::fs::write(lab.rootfs.dir().join("tmp/die"), "").expect("write");
    let told = wait_until("the exit", LIMIT, || {
        let seen = events.stdout();
        let of_it = seen
            .lines()
            .filter(|l| l.contains("\"container_id\":\"dies\""));
        let told: Vec<String> = of_it.map(str::to_owned).collect();
        match told.iter().position(|l| l.contains(" /tasks/exit ")) {
            Some(exit) => Ok((told[..exit].to_vec(), told[exit].clone())),
            None => Err(seen.to_owned()),
        }
    });
    let (before, exit) = told.expect("an exit");
    assert!(exit.contains("\"exit_status\":137"), "{exit}");
    let topic = |l: &String| {
        l.split_whitespace()
            .find(|w| w.starts_with("/tasks/"))
            .map(str::to_owned)
    };
    let mut topics: Vec<String> = before.iter().filter_map(topic).collect();
    // More than one attempt to get memory may be counted.
    topics.dedup();
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/oom"]);
    lab.containerd.remove("dies").expect("remove");
}
