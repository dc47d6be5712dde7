//! What containerd, its clients and the processes in a container see of the runtime besides the daily work: events, logs, limits,
//! restarts, the environment of a process. Every scenario runs under the stock shim too.

use std::collections::BTreeMap;

use kbp_tests::lab::{LIMIT, on};
use kbp_tests::{Arm, Events, Generation, Lab, Oci, Runtime, running, wait_until};

kbp_tests::scenarios!(
    events_are_in_order,
    output_goes_to_a_file,
    output_goes_to_a_logger,
    containers_outlive_containerd,
    an_exit_while_containerd_is_away,
    memory_ran_out,
    a_killed_shim_is_cleaned_up,
    limits_are_in_force,
);

fn events_are_in_order(lab: &Lab<'_>) {
    let mut events = Events::subscribe(lab);
    for round in 0..3 {
        let id = format!("c{round}");
        lab.containerd
            .start_container(lab.container(&id, ["sleep", "1000"]))
            .expect("start");
        lab.containerd
            .exec(&id, ["true"])
            .expect("exec")
            .success()
            .expect("exec");
        lab.containerd.tasks(["pause", &id]).expect("pause");
        lab.containerd.tasks(["resume", &id]).expect("resume");
        lab.containerd.remove(&id).expect("remove");
        let life = [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "paused",
            "resumed",
            "exit",
            "delete",
        ];
        events.expect(lab, &id, &life);

        // One that is gone at once.
        let id = format!("s{round}");
        lab.containerd.run(&lab.script(&id, "exit 3")).expect("run");
        events.expect(lab, &id, &["create", "start", "exit", "delete"]);
        let exit = events
            .of(&id)
            .into_iter()
            .find(|l| l.contains("/tasks/exit"));
        assert!(
            exit.as_ref()
                .is_some_and(|e| e.contains("\"exit_status\":3")),
            "{exit:?}"
        );
    }
}

fn output_goes_to_a_file(lab: &Lab<'_>) {
    let file = lab.sandbox.dir().join("logs/c.log");
    let uri = format!("file://{}", file.display());
    lab.containerd
        .start_container(
            lab.script("c", "echo out; echo err >&2; sleep 1000")
                .flag("--log-uri", uri),
        )
        .expect("start");
    wait_until("the log", LIMIT, || {
        let text = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
        if text.contains("out\n") && text.contains("err\n") {
            Ok(())
        } else {
            Err(text)
        }
    })
    .expect("log");
    lab.containerd.remove("c").expect("remove");
}

fn output_goes_to_a_logger(lab: &Lab<'_>) {
    // containerd's protocol: output on 3, errors on 4, and 5 is closed to say that the logger is ready. With the container's deletion
    // the pipes are closed and TERM is sent, which a logger is to survive until it has read them to the end.
    let logger = lab.sandbox.dir().join("logger");
    let file = lab.sandbox.dir().join("logger.out");
    let script = format!(
        "#!/bin/sh\ntrap '' TERM\nexec 5>&-\ncat <&3 >{0}.1 &\ncat <&4 >{0}.2\nwait\necho \"$CONTAINER_ID\" >{0}\n",
        file.display()
    );
    std::fs::write(&logger, script).expect("write");
    lab.sandbox
        .run("chmod", &["755", &logger.display().to_string()])
        .expect("chmod");
    let uri = format!("binary://{}", logger.display());
    lab.containerd
        .start_container(
            lab.script("c", "echo out; echo err >&2; exit 4")
                .flag("--log-uri", uri),
        )
        .expect("start");
    lab.containerd
        .wait_for_state("c", "STOPPED")
        .expect("stopped");
    lab.containerd.remove("c").expect("remove");
    wait_until("the logger's end", LIMIT, || {
        std::fs::read_to_string(&file).map_err(|e| e.to_string())
    })
    .expect("logger");
    let part = |n: u8| std::fs::read_to_string(format!("{}.{n}", file.display())).expect("part");
    assert_eq!((part(1).as_str(), part(2).as_str()), ("out\n", "err\n"));
    assert_eq!(std::fs::read_to_string(&file).expect("id").trim(), "c");
}

fn containers_outlive_containerd(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let pid = lab.containerd.pid("c").expect("pid");
    lab.containerd.restart().expect("restart");
    assert_eq!(
        lab.containerd.task("c").expect("task"),
        Some(("RUNNING".to_owned(), pid))
    );
    lab.answers("c");
    lab.containerd
        .tasks(["kill", "--signal", "SIGKILL", "c"])
        .expect("kill");
    lab.containerd
        .wait_for_state("c", "STOPPED")
        .expect("stopped");
    lab.containerd.remove("c").expect("remove");
}

fn an_exit_while_containerd_is_away(lab: &Lab<'_>) {
    let go = lab.rootfs.dir().join("tmp/go");
    lab.containerd
        .start_container(lab.script("c", "until [ -e /tmp/go ]; do sleep 0.02; done; exit 6"))
        .expect("start");
    let pid = lab.containerd.pid("c").expect("pid");
    lab.containerd.stop();
    std::fs::write(&go, "").expect("write");
    wait_until("end of the container", LIMIT, || {
        if running(pid) {
            Err("it runs".to_owned())
        } else {
            Ok(())
        }
    })
    .expect("end");
    lab.containerd.restart().expect("restart");
    let task = wait_until("containerd to know", LIMIT, || {
        match lab.containerd.task("c") {
            Ok(Some((state, _))) if state == "RUNNING" => Err(state),
            other => Ok(other.expect("task")),
        }
    });
    // containerd 1.7 and 2 delete a task without processes themselves when they start.
    if task.expect("stopped or gone").is_none() {
        assert_ne!(
            lab.arm.generation,
            Generation::Machine,
            "the task is gone with its exit code"
        );
        std::fs::remove_dir_all(lab.sandbox.dir().join("run/containerd/fifo"))
            .expect("remove the client's fifos");
        return lab.containerd.remove("c").expect("remove");
    }
    let output = lab
        .containerd
        .ctr(["tasks", "delete", "c"])
        .expect("delete");
    assert!(
        output.code == Some(6) || output.text().contains("code 6"),
        "the exit code is lost: {output}"
    );
    lab.containerd.remove("c").expect("remove");
}

fn memory_ran_out(lab: &Lab<'_>) {
    let mut events = Events::subscribe(lab);
    // A shim looks for this only from the start on, so it comes later. What is killed is a child: the container goes on.
    let script = "until [ -e /tmp/go ]; do sleep 0.05; done; head -c 200000000 /dev/zero | tail -c 100000000 | wc -c; sleep 1000";
    lab.containerd
        .start_container(lab.script("c", script).flag("--memory-limit", 16 << 20))
        .expect("start");
    std::fs::write(lab.rootfs.dir().join("tmp/go"), "").expect("write");
    wait_until("the event", LIMIT, || {
        let seen = events.topics("c");
        if seen.iter().any(|t| t == "/tasks/oom") {
            Ok(())
        } else {
            Err(format!("{seen:?}"))
        }
    })
    .expect("an oom event");
    lab.containerd.remove("c").expect("remove");
}

fn a_killed_shim_is_cleaned_up(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let pid = lab.containerd.pid("c").expect("pid");
    let shim = lab.containerd.shim_pid("c").expect("shim");
    lab.sandbox
        .run("kill", &["-9", &shim.to_string()])
        .expect("kill");
    wait_until("end of the container", LIMIT, || {
        if running(pid) {
            Err("it runs".to_owned())
        } else {
            Ok(())
        }
    })
    .expect("containerd ends what the shim left");
    wait_until("the task to be gone", LIMIT, || {
        match lab.containerd.task("c") {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .expect("no task");
    lab.containerd.remove("c").expect("remove");
    // They are the client's, which would remove them with a task of its own.
    std::fs::remove_dir_all(lab.sandbox.dir().join("run/containerd/fifo"))
        .expect("remove the client's fifos");
    // The name is free, and the next one works.
    wait_until("a next one of the name", LIMIT, || {
        let output = lab
            .containerd
            .run(&lab.script("c", "true"))
            .map_err(|e| e.to_string())?;
        output.success().map_err(|e| e.to_string())
    })
    .expect("again");
}

fn limits_are_in_force(lab: &Lab<'_>) {
    let run = lab
        .container("c", ["sleep", "1000"])
        .flag("--memory-limit", 64 << 20)
        .flag("--cpus", "0.5");
    lab.containerd.start_container(run).expect("start");
    let group = format!("{}/c", lab.sandbox.name());
    let read = |v1: &str, v2: &str| {
        let paths = [
            format!("/sys/fs/cgroup/{v1}"),
            format!("/sys/fs/cgroup/{group}/{v2}"),
        ];
        let text = paths.iter().find_map(|p| std::fs::read_to_string(p).ok());
        text.unwrap_or_else(|| panic!("neither of {paths:?}"))
            .trim()
            .to_owned()
    };
    assert_eq!(
        read(
            &format!("memory/{group}/memory.limit_in_bytes"),
            "memory.max"
        ),
        (64 << 20).to_string()
    );
    let quota = read(&format!("cpu/{group}/cpu.cfs_quota_us"), "cpu.max");
    assert!(
        ["50000", "50000 100000"].contains(&quota.as_str()),
        "{quota}"
    );
    lab.containerd.remove("c").expect("remove");
}

/// What a process finds out about itself, by name.
fn self_portrait(
    generation: Generation,
    runtime: Runtime,
    oci: Oci,
    exec: bool,
) -> BTreeMap<String, String> {
    const SCRIPT: &str = "cat /proc/self/status; cat /proc/self/limits; echo oom_score_adj: $(cat /proc/self/oom_score_adj); \
        echo fds: $(ls /proc/self/fd | tr '\\n' ' '); env | sort | sed 's/^/env /'; echo cwd: $(pwd); echo umask: $(umask); \
        echo sched: $(cut -d' ' -f 18,19,40,41 /proc/self/stat); sed 's/^/mount /; s#/tmp/kbp-t[^ ]*#DIR#g' /proc/self/mounts | sort; \
        echo hostname: $(hostname); ls -l /proc/self/ns | sed 's/.* \\(.*\\) -> .*/ns \\1: here/'; ls -ld /dev/* | awk '{print \"dev \" $NF \": \" $1}'; sleep 0.1";
    let mut portrait = BTreeMap::new();
    on(
        Arm {
            generation,
            runtime,
            oci,
        },
        |lab| {
            let output = if exec {
                lab.containerd
                    .start_container(lab.container("c", ["sleep", "1000"]).seccomp())
                    .expect("start");
                let output = lab
                    .containerd
                    .exec("c", ["sh", "-c", SCRIPT])
                    .expect("exec");
                lab.containerd.remove("c").expect("remove");
                output
            } else {
                lab.containerd
                    .run(&lab.script("c", SCRIPT).seccomp())
                    .expect("run")
            };
            let output = output.success().expect("code");
            for line in output.stdout.replace(lab.sandbox.name(), "NAME").lines() {
                let (name, value) = line.split_once([':', '=']).unwrap_or((line, ""));
                portrait.insert(
                    name.trim().to_owned(),
                    value.split_whitespace().collect::<Vec<_>>().join(" "),
                );
            }
        },
    );
    // Changes from run to run, or must differ: kbp's own filter on top.
    let differs = |name: &str| {
        name.starts_with("Vm") || name.starts_with("Rss") || name.contains("ctxt_switches")
    };
    portrait.retain(|name, _| {
        !differs(name)
            && ![
                "Pid",
                "PPid",
                "Tgid",
                "Ngid",
                "NSpid",
                "NStgid",
                "NSpgid",
                "NSsid",
                "SigQ",
                "Seccomp_filters",
            ]
            .contains(&name.as_str())
    });
    // Signals 32 and 33 are the C library's own; what a Go shim makes of them when they come ignored depends on how it was built.
    if let Some(ignored) = portrait.get_mut("SigIgn") {
        let bits = u64::from_str_radix(ignored, 16).expect("signal mask");
        *ignored = format!("{:x}", bits & !(0b11 << 31));
    }
    portrait
}

fn a_process_cannot_tell(generation: Generation, oci: Oci, exec: bool) {
    if generation.is_wanting() {
        return;
    }
    let stock = self_portrait(generation, Runtime::Stock, oci, exec);
    let kbp = self_portrait(generation, Runtime::Kbp, oci, exec);
    assert!(stock.len() > 60, "{stock:#?}");
    let differences: Vec<String> = stock
        .keys()
        .chain(kbp.keys())
        .filter(|name| stock.get(*name) != kbp.get(*name))
        .map(|name| {
            format!(
                "{name}: stock {:?}, kbp {:?}",
                stock.get(name),
                kbp.get(name)
            )
        })
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Signal masks, affinity, limits, file descriptors, capabilities, mounts: nothing of the shim's own shows in its containers.
#[test]
fn a_process_cannot_tell_which_shim_started_it() {
    a_process_cannot_tell(Generation::Machine, Oci::Runc, false);
}

#[test]
fn a_process_cannot_tell_which_shim_started_it_with_crun() {
    a_process_cannot_tell(Generation::Machine, Oci::Crun, false);
}

#[test]
fn an_exec_cannot_tell_which_shim_started_it() {
    a_process_cannot_tell(Generation::V2, Oci::Runc, true);
}

/// containerd takes a runtime by the path of its shim, and then any name of the binary will do.
#[test]
fn the_shim_runs_by_its_path() {
    for generation in [Generation::Machine, Generation::V1_7, Generation::V2] {
        let arm = Arm {
            generation,
            ..Arm::KBP
        };
        on(arm, |lab| {
            let shim = kbp_tests::binaries::kbp_binary("containerd-shim-kbp-v1").expect("shim");
            let run = kbp_tests::Run::new("c", &lab.rootfs, ["sh", "-c", "exit 8"])
                .runtime_named(&shim.display().to_string());
            let output = lab.containerd.run(&run).expect("run");
            assert_eq!(output.code, Some(8), "{generation:?}: {output}");
        });
    }
}

/// State must answer while another call on the same shim takes its time.
#[test]
fn the_state_is_told_while_a_container_is_busy() {
    on(Arm::KBP, |lab| {
        lab.containerd
            .start_container(lab.container("c", ["sleep", "1000"]))
            .expect("start");
        let [begun, go] = ["tmp/begun", "tmp/go"].map(|path| lab.rootfs.dir().join(path));
        let until_told = "echo >/tmp/begun; until [ -e /tmp/go ]; do sleep 0.05; done";
        std::thread::scope(|scope| {
            let busy = scope.spawn(|| lab.containerd.exec("c", ["sh", "-c", until_told]));
            let asked = wait_until("the exec", LIMIT, || match begun.exists() {
                true => Ok(()),
                false => Err("it has not begun".to_owned()),
            })
            .map(|()| {
                (0..10)
                    .map(|_| lab.containerd.task("c"))
                    .collect::<Vec<_>>()
            });
            // Only now: a call that waits for the other would not have come back.
            std::fs::write(&go, "").expect("write");
            busy.join()
                .expect("no panic")
                .expect("exec")
                .success()
                .expect("exec");
            for task in asked.expect("begun") {
                assert!(task.expect("task").is_some());
            }
        });
        lab.containerd.remove("c").expect("remove");
    });
}

/// A container with users of its own, as `ctr` makes one: its root is nobody outside, and owns the image's files.
mod users {
    use super::*;

    kbp_tests::scenarios!(on [stock_on_machine, stock_on_v1_7, stock_on_v2, kbp_on_machine, kbp_on_v1_7, kbp_on_v2]: users_of_its_own);

    fn users_of_its_own(lab: &Lab<'_>) {
        let reference = "docker.io/library/test:1";
        let archive = lab.rootfs.archive(reference, &["sh"], lab.sandbox.dir());
        lab.containerd
            .import(&archive.expect("archive"))
            .expect("import");
        let script = "echo $(cat /proc/self/uid_map); echo $(cat /proc/self/gid_map); stat -c %u:%g /bin/busybox; \
                      echo x >/new; stat -c %u:%g /new; sleep 0.1";
        let run = kbp_tests::Run::image("c", reference, ["sh", "-c", script])
            .flag("--uidmap", "0:300000:65536")
            .flag("--gidmap", "0:400000:65536");
        let output = lab.containerd.run(&lab.under(run)).expect("run");
        assert_eq!(
            output.success().expect("code").stdout,
            "0 300000 65536\n0 400000 65536\n0:0\n0:0\n"
        );
    }
}
