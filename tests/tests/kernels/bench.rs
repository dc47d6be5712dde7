//! `kbpctl bench` on a machine with cgroup v2 only: the control arm's spinners are in a cgroup that is idle as a whole there too.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kbp_tests::binaries::{kbp_binary, reference_cni_dir};
use kbp_tests::command::Running;
use kbp_tests::{Containerd, Generation, Sandbox, wait_until};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// The cgroups of benches.
fn groups() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/fs/cgroup").expect("cgroups");
    let paths = entries.flatten().map(|e| e.path());
    let of_a_bench = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("kbp-bench-")
    };
    paths.filter(of_a_bench).collect()
}

fn read(group: &Path, file: &str) -> String {
    let text = std::fs::read_to_string(group.join(file)).unwrap_or_default();
    text.trim().to_owned()
}

#[test]
#[ignore = "run in an emulated machine by bench_and_checkpoint_with_cgroup_v2"]
fn spinners_are_in_an_idle_cgroup_while_it_measures_on_cgroup_v2() {
    let sandbox = Sandbox::new().expect("node");
    let containerd = Containerd::start(&sandbox, Generation::Machine).expect("containerd");
    let kbpctl = kbp_binary("kbpctl").expect("kbpctl");
    let mut bench = containerd.command(&kbpctl);
    bench
        .args(["bench", "rtt", "--json", "--arms", "spinner"])
        .args(["--rounds", "1", "--seconds", "1", "--warm-up", "0.1"])
        .arg("--cni-bin")
        .arg(reference_cni_dir().expect("reference plugins"));
    let mut bench = Running::start(bench).expect("start");
    wait_until("two spinners in an idle cgroup", LIMIT, || {
        let groups = groups();
        let idle = groups.iter().find(|g| {
            let spinners = read(g, "cgroup.procs").lines().count();
            g.to_string_lossy().ends_with("-idle") && read(g, "cpu.idle") == "1" && spinners == 2
        });
        idle.map(drop).ok_or(format!("{groups:?}"))
    })
    .expect("they are there");
    let output = bench.wait(LIMIT).expect("end").success().expect("bench");
    let bench: Value = serde_json::from_str(&output.stdout).expect("JSON");
    let samples = &bench["arms"][0]["rounds"][0]["samples"];
    assert!(samples.as_u64() > Some(0), "{output}");
    assert_eq!(groups(), Vec::<PathBuf>::new());
}
