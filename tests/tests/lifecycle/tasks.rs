//! What is said of a container and its processes, and how they go.

use kbp_tests::lab::{LIMIT, LINGER};
use kbp_tests::{Lab, wait_until};

kbp_tests::scenarios!(
    processes_and_metrics,
    deletion,
    many_containers_at_once,
    a_container_of_an_image,
    an_orphan_is_reaped,
);

fn processes_and_metrics(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.script("c", "sleep 1000 & sleep 1000 & wait"))
        .expect("start");
    let init = lab.containerd.pid("c").expect("pid");
    wait_until("three processes", LIMIT, || {
        let list = lab
            .containerd
            .ctr(["tasks", "ps", "c"])
            .map_err(|e| e.to_string())?
            .success()
            .map_err(|e| e.to_string())?
            .stdout;
        let pids: Vec<u32> = list
            .lines()
            .filter_map(|l| l.split_whitespace().next()?.parse().ok())
            .collect();
        if pids.len() == 3 && pids.contains(&init) {
            Ok(())
        } else {
            Err(list)
        }
    })
    .expect("ps");
    let metrics = lab.containerd.tasks(["metrics", "c"]).expect("metrics");
    let value = |name: &str| {
        let words = metrics.lines().find_map(|l| l.strip_prefix(name));
        words
            .and_then(|w| w.trim().parse::<f64>().ok())
            .unwrap_or_else(|| panic!("no {name} in\n{metrics}"))
    };
    // cgroup v1 and v2 have names of their own.
    let (memory, pids) = if metrics.contains("memory.usage_in_bytes") {
        assert!(value("cpuacct.usage ") > 0.0, "{metrics}");
        (value("memory.usage_in_bytes"), value("pids.current"))
    } else {
        assert!(value("cpu.usage_usec") > 0.0, "{metrics}");
        (value("memory.usage"), value("pids.current"))
    };
    assert!(memory > 0.0, "{metrics}");
    assert!((3.0..10.0).contains(&pids), "{metrics}");
    lab.containerd.remove("c").expect("remove");
}

fn deletion(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let refused = lab
        .containerd
        .ctr(["tasks", "delete", "c"])
        .expect("delete");
    assert_ne!(
        refused.code,
        Some(0),
        "a running task was deleted: {refused}"
    );
    assert_eq!(
        lab.containerd.task("c").expect("task").expect("task").0,
        "RUNNING"
    );
    let shim = lab.containerd.shim_pid("c").expect("shim");
    let output = lab
        .containerd
        .ctr(["tasks", "delete", "--force", "c"])
        .expect("delete");
    assert!([Some(137), Some(0)].contains(&output.code), "{output}");
    assert!(lab.containerd.task("c").expect("task").is_none());
    wait_until("end of the shim", LIMIT, || {
        let stat = std::fs::read_to_string(format!("/proc/{shim}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            Ok(())
        } else {
            Err(stat)
        }
    })
    .expect("the shim ends with its last task");
    // A container can be started again after its task was deleted.
    lab.containerd
        .tasks(["start", "--detach", "c"])
        .expect("start again");
    lab.containerd.remove("c").expect("remove");
}

fn many_containers_at_once(lab: &Lab<'_>) {
    std::thread::scope(|scope| {
        for n in 0..6 {
            scope.spawn(move || {
                let output = lab
                    .containerd
                    .run(&lab.script(&format!("c{n}"), &format!("echo {n}; {LINGER}; exit {n}")))
                    .expect("run");
                assert_eq!(
                    (output.code, output.stdout.as_str()),
                    (Some(n), format!("{n}\n").as_str()),
                    "{output}"
                );
            });
        }
    });
}

fn a_container_of_an_image(lab: &Lab<'_>) {
    let reference = "docker.io/library/test:1";
    let archive = lab
        .rootfs
        .archive(
            reference,
            &["sh", "-c", "echo image > /file; cat /file; sleep 0.1"],
            lab.sandbox.dir(),
        )
        .expect("archive");
    lab.containerd.import(&archive).expect("import");
    let run = lab.under(kbp_tests::Run::image::<&str>("c", reference, []));
    let output = lab
        .containerd
        .run(&run)
        .expect("run")
        .success()
        .expect("code");
    assert_eq!(output.stdout, "image\n");
}

fn an_orphan_is_reaped(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let shim = lab.containerd.shim_pid("c").expect("shim");
    // The exec's child outlives it, is given to the shim and ends there.
    lab.containerd
        .exec("c", ["sh", "-c", "sleep 0.2 & exit 0"])
        .expect("exec")
        .success()
        .expect("code");
    wait_until("the shim to reap it", LIMIT, || {
        let path = format!("/proc/{shim}/task/{shim}/children");
        let children = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
        let count = children.split_whitespace().count();
        if count == 1 {
            Ok(())
        } else {
            Err(format!("children of the shim: {children}"))
        }
    })
    .expect("no zombie");
    lab.containerd.remove("c").expect("remove");
}
