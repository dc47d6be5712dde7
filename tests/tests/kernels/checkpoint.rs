//! There and back with criu, on a kernel that Debian 12's criu knows: 6.1. That it is told on others is for the shim's own tests.

use kbp_tests::lab::on_with;
use kbp_tests::{Arm, Run, Runtime, Settings, wait_until};

const IMAGE: &str = "docker.io/library/counts:test";
const CHECKPOINT: &str = "docker.io/library/counts:then";
const LIMIT: std::time::Duration = std::time::Duration::from_secs(90);

#[test]
#[ignore = "run in an emulated machine by bench_and_checkpoint_with_cgroup_v2"]
fn a_checkpoint_brings_a_container_back_on_cgroup_v2() {
    on_with(Arm::KBP, Settings::default(), |lab| {
        let count = "id=$(cat /proc/sys/kernel/random/uuid); n=0; while sleep 0.1; do n=$((n + 1)); echo $id $n >/tmp/n; done";
        let archive = lab
            .rootfs
            .archive(IMAGE, &["sh", "-c", count], lab.sandbox.dir());
        let archive = archive.expect("archive").display().to_string();
        let ctr = |arguments: &[&str]| {
            let output = lab.containerd.ctr(arguments).expect("ctr");
            output.success().expect("code").stdout
        };
        // The machine's files are on an overlay already.
        let native = ["--snapshotter", "native"];
        ctr(&[&["images", "import"], &native[..], &[&archive]].concat());
        let run = Run::image::<String>("counts", IMAGE, [])
            .runtime(Runtime::Kbp)
            .flag(native[0], native[1])
            .annotation("kbp.io/busy-poll", "off");
        lab.containerd.start_container(run).expect("start");
        // Who counts, and how far it is.
        let counted = |id: &str, least: u32| {
            wait_until("it to count", LIMIT, || {
                let output = lab.containerd.exec(id, ["cat", "/tmp/n"]);
                let text = output.map_err(|e| e.to_string())?.stdout;
                let (who, n) = text.trim().split_once(' ').ok_or(text.clone())?;
                match n.parse::<u32>() {
                    Ok(n) if n >= least => Ok((who.to_owned(), n)),
                    _ => Err(format!("{text:?}, not {least}")),
                }
            })
            .expect("it counts")
        };
        let (before, n) = counted("counts", 5);
        ctr(&["containers", "checkpoint", "--task", "counts", CHECKPOINT]);
        counted("counts", n + 1);
        lab.containerd.remove("counts").expect("remove");
        // `ctr` stays with the restored one.
        let restore = ["containers", "restore", "--live", "back", CHECKPOINT];
        let mut restored = lab.containerd.ctr_start(restore).expect("restore");
        let (after, _) = counted("back", n + 1);
        assert_eq!(after, before, "it was started anew");
        lab.containerd.remove("back").expect("remove");
        restored.wait(LIMIT).expect("the end of ctr");
        ctr(&["images", "remove", "--sync", IMAGE, CHECKPOINT]);
    });
}
