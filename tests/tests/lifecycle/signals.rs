//! Signals, and pause, which is one of a kind.

use kbp_tests::lab::LIMIT;
use kbp_tests::{Lab, wait_until};

kbp_tests::scenarios!(signals, signals_to_execs_and_to_all, pause_and_resume,);

/// A shell that says when it is ready, obeys TERM and has a code of its own.
const OBEDIENT: &str = "trap 'exit 33' TERM; touch /tmp/ready; while :; do sleep 0.05; done";

fn wait_for_file(lab: &Lab<'_>, name: &str) {
    let path = lab.rootfs.dir().join(name);
    wait_until(name, LIMIT, || {
        if path.exists() {
            Ok(())
        } else {
            Err("not there".to_owned())
        }
    })
    .expect("file of the container");
    std::fs::remove_file(&path).expect("remove file");
}

fn signals(lab: &Lab<'_>) {
    let run = lab.script("c", OBEDIENT);
    let mut foreground = lab.containerd.ctr_start(run.arguments()).expect("run");
    wait_for_file(lab, "tmp/ready");
    lab.containerd
        .tasks(["kill", "--signal", "SIGTERM", "c"])
        .expect("kill");
    let output = foreground.wait(LIMIT).expect("it ends");
    assert_eq!(output.code, Some(33), "{output}");

    lab.containerd
        .start_container(lab.script(
            "c",
            "trap '' TERM; touch /tmp/ready; while :; do sleep 0.05; done",
        ))
        .expect("start");
    wait_for_file(lab, "tmp/ready");
    lab.containerd.tasks(["kill", "c"]).expect("kill");
    assert_eq!(
        lab.containerd.task("c").expect("task").expect("task").0,
        "RUNNING",
        "TERM is ignored"
    );
    lab.containerd
        .tasks(["kill", "--signal", "SIGKILL", "c"])
        .expect("kill");
    lab.containerd
        .wait_for_state("c", "STOPPED")
        .expect("stopped");
    let again = lab
        .containerd
        .ctr(["tasks", "kill", "--signal", "SIGKILL", "c"])
        .expect("kill");
    assert!(
        again.code != Some(0)
            && (again.stderr.contains("not found") || again.stderr.contains("already finished")),
        "a second kill: {again}"
    );
    let output = lab
        .containerd
        .ctr(["tasks", "delete", "c"])
        .expect("delete");
    assert!(
        output.text().contains("137"),
        "the exit code is lost: {output}"
    );
    lab.containerd.remove("c").expect("remove");
}

fn signals_to_execs_and_to_all(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let mut exec = lab
        .containerd
        .ctr_start([
            "tasks",
            "exec",
            "--exec-id",
            "victim",
            "c",
            "sh",
            "-c",
            OBEDIENT,
        ])
        .expect("exec");
    wait_for_file(lab, "tmp/ready");
    let kill = [
        "tasks",
        "kill",
        "--signal",
        "SIGTERM",
        "--exec-id",
        "victim",
        "c",
    ];
    lab.containerd
        .ctr(kill)
        .expect("kill")
        .success()
        .expect("kill");
    assert_eq!(exec.wait(LIMIT).expect("it ends").code, Some(33));
    assert_eq!(
        lab.containerd.task("c").expect("task").expect("task").0,
        "RUNNING"
    );

    let mut exec = lab
        .containerd
        .ctr_start(["tasks", "exec", "--exec-id", "other", "c", "sleep", "1000"])
        .expect("exec");
    wait_until("the exec", LIMIT, || {
        let processes = lab
            .containerd
            .ctr(["tasks", "ps", "c"])
            .map_err(|e| e.to_string())?
            .stdout;
        if processes.contains("other") {
            Ok(())
        } else {
            Err(processes)
        }
    })
    .expect("exec");
    lab.containerd
        .tasks(["kill", "--all", "--signal", "SIGKILL", "c"])
        .expect("kill");
    assert_eq!(exec.wait(LIMIT).expect("it ends").code, Some(137));
    lab.containerd
        .wait_for_state("c", "STOPPED")
        .expect("stopped");
    lab.containerd.remove("c").expect("remove");
}

fn pause_and_resume(lab: &Lab<'_>) {
    let counter = lab.rootfs.dir().join("tmp/counter");
    lab.containerd
        .start_container(lab.script("c", "while :; do echo >> /tmp/counter; sleep 0.01; done"))
        .expect("start");
    let length = || std::fs::metadata(&counter).map_or(0, |m| m.len());
    let grows = |from: u64| {
        wait_until("growth", LIMIT, || {
            if length() > from + 3 {
                Ok(())
            } else {
                Err(length().to_string())
            }
        })
    };
    grows(0).expect("it runs");
    lab.containerd.tasks(["pause", "c"]).expect("pause");
    lab.containerd
        .wait_for_state("c", "PAUSED")
        .expect("paused");
    let at_pause = length();
    // Each call takes long enough for several rounds of the loop.
    for _ in 0..3 {
        assert_eq!(
            lab.containerd.task("c").expect("task").expect("task").0,
            "PAUSED"
        );
    }
    assert_eq!(length(), at_pause, "it ran while it was paused");
    lab.containerd.tasks(["resume", "c"]).expect("resume");
    lab.containerd
        .wait_for_state("c", "RUNNING")
        .expect("running");
    grows(at_pause).expect("it goes on");
    // A paused container can be killed and removed.
    lab.containerd.tasks(["pause", "c"]).expect("pause");
    lab.containerd.remove("c").expect("remove");
}
