//! What goes wrong around a container: containerd and shims that are killed, runtimes that hang, disks that are full, clients that do
//! not read. Where the stock shim can take it, it shows that the scenario is right.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use kbp_tests::lab::LIMIT;
use kbp_tests::{Events, Generation, Lab, Run, Runtime, running, wait_until};

kbp_tests::scenarios!(on [stock_on_machine, kbp_on_machine, kbp_on_v1_7, kbp_on_v2]:
    a_killed_containerd,
    a_runtime_that_hangs,
    a_shim_that_is_killed_while_the_runtime_hangs,
);

/// What the stock shim cannot take, as its arm showed: its container hangs with the full disk, its creation until somebody reads, and
/// it leaves its socket when it is killed early enough.
mod beyond_stock {
    use super::*;

    kbp_tests::scenarios!(on [kbp_on_machine, kbp_on_v1_7, kbp_on_v2]:
        a_log_on_a_full_disk,
        output_that_nobody_reads,
        a_shim_that_is_killed_during_a_creation,
    );
}

/// containerd's limit for the answer to State; it takes a container for dead whose shim is later.
const STATE_LIMIT: Duration = Duration::from_secs(30);

/// A container whose OCI runtime is runc after some lines of a shell, in which `$here` is the sandbox's directory.
fn with_runtime(lab: &Lab<'_>, run: Run, prologue: &str) -> Run {
    let path = lab.sandbox.dir().join("runtime");
    let here = lab.sandbox.dir().display();
    let script = format!("#!/bin/sh\nhere={here}\n{prologue}\nexec runc \"$@\"\n");
    // Renamed into place: one that runs cannot be written to.
    let draft = path.with_extension("new");
    std::fs::write(&draft, script).expect("write the runtime");
    std::fs::set_permissions(&draft, PermissionsExt::from_mode(0o755)).expect("chmod");
    std::fs::rename(&draft, &path).expect("rename");
    match lab.arm.runtime {
        Runtime::Stock => run.flag("--runc-binary", path.display()),
        Runtime::Kbp => {
            let config = format!("runtime = {path:?}\n");
            lab.containerd.set_kbp_config(&config).expect("config");
            run
        }
    }
}

/// Hangs in these verbs of the container `slow` until the file `go` is there. Says its own process in the file `hanging`.
fn hang_in(verbs: &str) -> String {
    format!(
        "case \" $* \" in {verbs}) echo $$ >$here/hanging.new; mv $here/hanging.new $here/hanging; \
         until [ -e $here/go ]; do sleep 0.02; done;; esac"
    )
}

fn hanging(lab: &Lab<'_>) -> u32 {
    let path = lab.sandbox.dir().join("hanging");
    let pid = wait_until("the runtime to hang", LIMIT, || {
        let text = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
        text.trim().parse().map_err(|_| text)
    })
    .expect("it hangs");
    std::fs::remove_file(&path).expect("remove");
    pid
}

fn go(lab: &Lab<'_>, go: bool) {
    let path = lab.sandbox.dir().join("go");
    match go {
        true => std::fs::write(path, "").expect("write"),
        false => std::fs::remove_file(path).expect("remove"),
    }
}

fn parent_of(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("PPid:"));
    line.and_then(|p| p.trim().parse().ok()).expect("a parent")
}

fn wait_for_end(pid: u32) {
    wait_until(&format!("end of process {pid}"), LIMIT, || {
        if running(pid) {
            Err("it runs".to_owned())
        } else {
            Ok(())
        }
    })
    .expect("end");
}

fn expect_state(lab: &Lab<'_>, id: &str, state: &str) {
    let asked = Instant::now();
    let task = lab.containerd.task(id).expect("task").expect("a task");
    assert_eq!(task.0, state);
    assert!(asked.elapsed() < STATE_LIMIT, "{:?}", asked.elapsed());
}

/// The client's fifos, which it would remove with a task of its own.
fn remove_fifos(lab: &Lab<'_>) {
    let fifos = lab.sandbox.dir().join("run/containerd/fifo");
    if fifos.exists() {
        std::fs::remove_dir_all(fifos).expect("remove the client's fifos");
    }
}

fn a_killed_containerd(lab: &Lab<'_>) {
    let wait_and_end = "until [ -e /tmp/go ]; do sleep 0.02; done; exit 6";
    lab.containerd
        .start_container(lab.container("stays", ["sleep", "1000"]))
        .expect("start");
    lab.containerd
        .start_container(lab.script("ends", wait_and_end))
        .expect("start");
    let [stays, ends] = ["stays", "ends"].map(|id| lab.containerd.pid(id).expect("pid"));
    lab.containerd.kill();
    std::fs::write(lab.rootfs.dir().join("tmp/go"), "").expect("write");
    wait_for_end(ends);
    lab.containerd.restart().expect("restart");

    // One that runs on, and all that happens to it from now on.
    let mut events = Events::subscribe(lab);
    assert_eq!(
        lab.containerd.task("stays").expect("task"),
        Some(("RUNNING".to_owned(), stays))
    );
    lab.answers("stays");
    lab.containerd.remove("stays").expect("remove");
    let rest = ["exec-added", "exec-started", "exit", "exit", "delete"];
    events.expect(lab, "stays", &rest);

    // One that ended meanwhile. containerd 1.7 and 2 delete a task without processes themselves when they start.
    let ended = wait_until("containerd to know", LIMIT, || {
        match lab.containerd.task("ends") {
            Ok(Some((state, _))) if state == "RUNNING" => Err(state),
            other => Ok(other.expect("task")),
        }
    });
    if ended.expect("stopped or gone").is_some() {
        let deleted = lab.containerd.ctr(["tasks", "delete", "ends"]);
        let deleted = deleted.expect("delete");
        assert!(
            deleted.code == Some(6) || deleted.text().contains("code 6"),
            "the exit code is lost: {deleted}"
        );
    } else {
        assert_ne!(lab.arm.generation, Generation::Machine);
    }
    let told = events.topics("ends");
    // The subscription may have come too late for one of them.
    let order = ["/tasks/exit", "/tasks/delete"].map(str::to_owned);
    assert!(
        order.ends_with(&told) || order.starts_with(&told),
        "{told:?}"
    );
    lab.containerd.remove("ends").expect("remove");
    remove_fifos(lab);
}

fn a_log_on_a_full_disk(lab: &Lab<'_>) {
    let disk = lab.sandbox.dir().join("disk");
    std::fs::create_dir(&disk).expect("directory");
    let disk_name = disk.display().to_string();
    let mount = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", &disk_name];
    lab.sandbox.run("mount", &mount).expect("a small disk");
    let log = disk.join("c.log");
    // What it writes does not fit. It goes on as if it did.
    let script = "head -c 3000000 /dev/zero | tr '\\0' o; echo written >/tmp/written; \
        until [ -e /tmp/go ]; do sleep 0.02; done; exit 7";
    let uri = format!("file://{}", log.display());
    lab.containerd
        .start_container(lab.script("c", script).flag("--log-uri", uri))
        .expect("start");
    let written = lab.rootfs.dir().join("tmp/written");
    wait_until("the container to go on", LIMIT, || match written.exists() {
        true => Ok(()),
        false => Err("it has not".to_owned()),
    })
    .expect("its output is taken");
    let size = lab
        .sandbox
        .run("stat", &["-c", "%s", &log.display().to_string()]);
    let size: u64 = size.expect("stat").stdout.trim().parse().expect("a size");
    assert!((1..=64 << 10).contains(&size), "{size}");
    expect_state(lab, "c", "RUNNING");
    lab.answers("c");
    std::fs::write(lab.rootfs.dir().join("tmp/go"), "").expect("write");
    lab.containerd.wait_for_state("c", "STOPPED").expect("end");
    let deleted = lab
        .containerd
        .ctr(["tasks", "delete", "c"])
        .expect("delete");
    assert!(
        deleted.code == Some(7) || deleted.text().contains("code 7"),
        "{deleted}"
    );
    lab.containerd.remove("c").expect("remove");
    lab.sandbox.run("umount", &[&disk_name]).expect("umount");
}

fn output_that_nobody_reads(lab: &Lab<'_>) {
    let fifo = lab.sandbox.dir().join("output");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("fifo");
    // It waits for a reader, as it would in a pipe of a shell.
    let script =
        "echo begun >/tmp/begun; head -c 3000000 /dev/zero | tr '\\0' o; echo done >/tmp/done";
    lab.containerd
        .start_container(lab.script("c", script).flag("--log-uri", fifo.display()))
        .expect("start");
    let begun = lab.rootfs.dir().join("tmp/begun");
    wait_until("the container", LIMIT, || match begun.exists() {
        true => Ok(()),
        false => Err("it has not begun".to_owned()),
    })
    .expect("begun");
    // Meanwhile nothing else waits.
    expect_state(lab, "c", "RUNNING");
    lab.answers("c");
    assert!(!lab.rootfs.dir().join("tmp/done").exists());
    let started = Instant::now();
    lab.containerd.remove("c").expect("remove");
    assert!(
        started.elapsed() < Duration::from_secs(25),
        "{:?}",
        started.elapsed()
    );
}

fn a_runtime_that_hangs(lab: &Lab<'_>) {
    // Two containers in one shim.
    let group = |run: Run| run.annotation("io.containerd.runc.v2.group", "g");
    let hang = hang_in("*' create '*' slow '*|*' kill '*'slow '*");
    let quick = with_runtime(lab, group(lab.container("quick", ["sleep", "1000"])), &hang);
    lab.containerd.start_container(quick).expect("start");
    let slow = with_runtime(lab, group(lab.container("slow", ["sleep", "1000"])), &hang);
    // The stock shim holds a lock of the whole shim while it creates, and one of the container while it kills.
    let is_kbp = lab.arm.runtime == Runtime::Kbp;
    let mut creation = lab
        .containerd
        .ctr_start(slow.detached().arguments())
        .expect("run");
    hanging(lab);
    if is_kbp {
        expect_state(lab, "quick", "RUNNING");
        lab.answers("quick");
    }
    go(lab, true);
    let created = creation.wait(LIMIT).expect("it goes on");
    created.success().expect("created");
    go(lab, false);

    let shims = ["quick", "slow"].map(|id| lab.containerd.shim_pid(id).expect("shim"));
    assert_eq!(shims[0], shims[1]);
    let kill = ["tasks", "kill", "--signal", "SIGKILL", "slow"];
    let mut killing = lab.containerd.ctr_start(kill).expect("kill");
    hanging(lab);
    if is_kbp {
        // Both are asked for.
        expect_state(lab, "quick", "RUNNING");
        expect_state(lab, "slow", "RUNNING");
    }
    lab.answers("quick");
    go(lab, true);
    killing
        .wait(LIMIT)
        .expect("it goes on")
        .success()
        .expect("killed");
    lab.containerd
        .wait_for_state("slow", "STOPPED")
        .expect("stopped");
    lab.containerd.remove("slow").expect("remove");
    lab.containerd.remove("quick").expect("remove");
}

fn a_shim_that_is_killed_while_the_runtime_hangs(lab: &Lab<'_>) {
    let hang = hang_in("*' create '*' slow '*");
    let slow = with_runtime(lab, lab.container("slow", ["sleep", "1000"]), &hang);
    let mut creation = lab
        .containerd
        .ctr_start(slow.detached().arguments())
        .expect("run");
    let runtime = hanging(lab);
    let shim = parent_of(runtime);
    lab.sandbox
        .run("kill", &["-9", &shim.to_string()])
        .expect("kill the shim");
    wait_for_end(runtime);
    let created = creation.wait(LIMIT).expect("the creation ends");
    assert_ne!(created.code, Some(0), "{created}");
    assert!(lab.containerd.task("slow").expect("task").is_none());
    lab.containerd.remove("slow").expect("remove");
    remove_fifos(lab);
    // The name is free.
    go(lab, true);
    lab.containerd
        .run(&with_runtime(lab, lab.script("slow", "true"), &hang))
        .expect("run")
        .success()
        .expect("again");
}

/// Wherever the runtime is in its work.
fn a_shim_that_is_killed_during_a_creation(lab: &Lab<'_>) {
    for delay in ["0", "0.005", "0.01", "0.02", "0.03", "0.05"] {
        let kill = format!(
            "case \" $* \" in *' create '*) shim=$PPID; (sleep {delay}; kill -9 $shim) >/dev/null 2>&1 </dev/null & ;; esac"
        );
        let run = with_runtime(lab, lab.container("c", ["sleep", "1000"]), &kill);
        // It may be just done, and then has a task that goes.
        let mut creation = lab
            .containerd
            .ctr_start(run.detached().arguments())
            .expect("run");
        creation.wait(LIMIT).expect("the creation ends");
        wait_until("the task to be gone", LIMIT, || {
            match lab.containerd.task("c") {
                Ok(None) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .expect("no task");
        wait_until("the container to be gone", LIMIT, || {
            lab.containerd.remove("c").map_err(|e| e.to_string())
        })
        .expect("remove");
        remove_fifos(lab);
    }
}
