//! What every client of containerd expects of a runtime: exit codes, input and output, terminals, exec, signals, pause, deletion.
//! Every scenario runs under the stock shim too: where that one passes, kbp must.

use std::io::Write;
use std::time::Duration;

use kbp_tests::lab::{LIMIT, LINGER};
use kbp_tests::{Lab, Terminal, wait_until};

kbp_tests::scenarios!(
    exit_codes,
    a_command_that_does_not_exist,
    standard_input_reaches_its_end,
    output_goes_to_both_streams,
    output_is_complete,
    terminal_of_run,
    exec_codes_input_and_output,
    exec_of_a_command_that_does_not_exist,
    terminal_of_exec,
    output_of_a_terminal_of_exec_is_complete,
    many_execs_at_once,
    signals,
    signals_to_execs_and_to_all,
    pause_and_resume,
    processes_and_metrics,
    deletion,
    many_containers_at_once,
    a_container_of_an_image,
    a_short_life_is_reported,
    an_orphan_is_reaped,
);

fn exit_codes(lab: &Lab<'_>) {
    for code in [0, 1, 42, 255] {
        let output = lab
            .containerd
            .run(&lab.script("c", &format!("exit {code}")))
            .expect("run");
        assert_eq!(output.code, Some(code), "{output}");
    }
    let output = lab
        .containerd
        .run(&lab.script("c", "kill -SEGV $$"))
        .expect("run");
    // The init of a pid namespace ignores signals from inside without a handler: it ends by itself.
    assert_eq!(output.code, Some(0), "{output}");
    let output = lab
        .containerd
        .run(&lab.script("c", "sh -c 'kill -SEGV $$'; exit $?"))
        .expect("run");
    assert_eq!(output.code, Some(139), "{output}");
}

fn a_command_that_does_not_exist(lab: &Lab<'_>) {
    let output = lab
        .containerd
        .run(&lab.container("c", ["/no/such/command"]))
        .expect("run");
    assert_ne!(output.code, Some(0));
    assert!(
        output.stderr.contains("no such file") || output.stderr.contains("No such file"),
        "the reason is lost: {output}"
    );
    // The name is free again.
    lab.containerd
        .run(&lab.script("c", "true"))
        .expect("run")
        .success()
        .expect("second try");
}

fn standard_input_reaches_its_end(lab: &Lab<'_>) {
    let run = lab.container("c", ["sh", "-c", "wc -c; sleep 0.1"]);
    let output = lab
        .containerd
        .ctr_with_input(run.arguments(), &[b'x'; 200_000])
        .expect("run")
        .success()
        .expect("code");
    assert_eq!(output.stdout.trim(), "200000");
    // One line there and back while the input stays open; then its end. (An input that ends before the container runs is lost on
    // `ctr` itself: it closes only what it already knows.)
    let mut cat = lab
        .containerd
        .ctr_start(lab.container("c", ["cat"]).arguments())
        .expect("run");
    let mut input = cat.take_stdin().expect("pipe");
    input.write_all(b"a line\n").expect("write");
    wait_until("the line", LIMIT, || {
        if cat.stdout() == "a line\n" {
            Ok(())
        } else {
            Err(cat.stderr().to_owned())
        }
    })
    .expect("echo");
    drop(input);
    assert_eq!(
        cat.wait(LIMIT).expect("it ends with its input").code,
        Some(0)
    );
}

fn output_goes_to_both_streams(lab: &Lab<'_>) {
    let output = lab
        .containerd
        .run(&lab.script("c", &format!("echo out; echo err >&2; {LINGER}")))
        .expect("run");
    let output = output.success().expect("code");
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\n", "err\n")
    );
}

fn output_is_complete(lab: &Lab<'_>) {
    // More than all pipes hold together, and the process is gone while the last of it is on its way. `ctr` itself closes its end
    // early when the machine is busy, so a fifo is read here without it.
    let fifo = lab.sandbox.dir().join("output");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("fifo");
    let path = fifo.clone();
    let reader = std::thread::spawn(move || std::fs::read(path));
    let script = "dd if=/dev/zero bs=1024 count=3000 2>/dev/null | tr '\\0' o; \
                  dd if=/dev/zero bs=1024 count=300 2>/dev/null | tr '\\0' e >&2";
    // Without a scheme it is a fifo to every shim.
    let uri = fifo.display();
    lab.containerd
        .start_container(lab.script("c", script).flag("--log-uri", uri))
        .expect("start");
    lab.containerd.wait_for_state("c", "STOPPED").expect("end");
    lab.containerd.remove("c").expect("remove");
    let bytes = reader.join().expect("reader").expect("read");
    let count = |which: u8| bytes.iter().filter(|b| **b == which).count();
    assert_eq!(
        (count(b'o'), count(b'e'), bytes.len()),
        (3000 * 1024, 300 * 1024, 3300 * 1024)
    );
}

fn terminal_of_run(lab: &Lab<'_>) {
    let script = "trap 'stty size' WINCH; tty; stty size; echo ready; while [ -z \"$line\" ]; do read line; done; echo \"got $line\"; exit 5";
    let command = lab
        .containerd
        .ctr_command(lab.script("c", script).tty().arguments());
    let mut terminal = Terminal::start(&command).expect("terminal");
    let shown = terminal.expect("ready", LIMIT).expect("start");
    assert!(shown.contains("/dev/pts/0"), "{shown:?}");
    // `ctr` follows the size only some time after the container's first words: resize until it has seen one.
    let mut columns = 100;
    wait_until("a new size", LIMIT, || {
        columns += 1;
        terminal.resize(40, columns).map_err(|e| e.to_string())?;
        let pid = lab.containerd.pid("c").map_err(|e| e.to_string())?;
        let stty = lab
            .sandbox
            .run("stty", &["-F", &format!("/proc/{pid}/fd/0"), "size"]);
        let size = stty.map_err(|e| e.to_string())?.stdout;
        if size.starts_with("40 ") {
            Ok(())
        } else {
            Err(size)
        }
    })
    .expect("resize");
    // A late change of the size interrupts the shell in the middle of its line, and it forgets what it had: say it again.
    wait_until("an answer", LIMIT, || {
        terminal.type_text("hello\n").map_err(|e| e.to_string())?;
        terminal
            .expect("got hello", Duration::from_secs(1))
            .map_err(|e| e.to_string())
    })
    .expect("answer");
    let output = terminal.wait(LIMIT).expect("end");
    assert_eq!(output.code, Some(5), "{output}");
}

fn exec_codes_input_and_output(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    for code in [0, 3] {
        let output = lab
            .containerd
            .exec(
                "c",
                [
                    "sh",
                    "-c",
                    &format!("echo out; echo err >&2; {LINGER}; exit {code}"),
                ],
            )
            .expect("exec");
        assert_eq!(
            (output.code, output.stdout.as_str()),
            (Some(code), "out\n"),
            "{output}"
        );
        assert!(output.stderr.starts_with("err\n"), "{output}");
    }
    let arguments = [
        "tasks",
        "exec",
        "--exec-id",
        "in",
        "c",
        "sh",
        "-c",
        "wc -c; sleep 0.1",
    ];
    let output = lab
        .containerd
        .ctr_with_input(arguments, &[b'x'; 100_000])
        .expect("exec")
        .success()
        .expect("code");
    assert_eq!(output.stdout.trim(), "100000");
    let output = lab.containerd.exec(
        "c",
        [
            "sh",
            "-c",
            "dd if=/dev/zero bs=1024 count=2000 2>/dev/null | tr '\\0' o; sleep 0.1",
        ],
    );
    assert_eq!(
        output.expect("exec").success().expect("code").stdout.len(),
        2000 * 1024
    );
    lab.containerd.remove("c").expect("remove");
}

fn exec_of_a_command_that_does_not_exist(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let output = lab
        .containerd
        .exec("c", ["/no/such/command"])
        .expect("exec");
    assert_ne!(output.code, Some(0));
    assert!(
        output.stderr.contains("no such file") || output.stderr.contains("No such file"),
        "the reason is lost: {output}"
    );
    lab.answers("c");
    lab.containerd.remove("c").expect("remove");
}

fn terminal_of_exec(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let command =
        lab.containerd
            .ctr_command(["tasks", "exec", "--tty", "--exec-id", "t", "c", "sh"]);
    let mut terminal = Terminal::start(&command).expect("terminal");
    terminal.type_text("tty; echo $((6 * 7))\n").expect("type");
    terminal.expect("42", LIMIT).expect("answer");
    terminal
        .type_text("seq 1 20000; echo 'the'' end'\n")
        .expect("type");
    let shown = terminal.expect("the end", LIMIT).expect("all of it");
    let numbers = shown
        .split_whitespace()
        .filter_map(|w| w.parse::<u32>().ok())
        .filter(|n| *n > 100)
        .collect::<Vec<_>>();
    assert_eq!(
        numbers[numbers.len() - 19_900..],
        (101..=20_000).collect::<Vec<_>>()[..],
        "lines are missing"
    );
    terminal.type_text("exit 9\n").expect("type");
    let output = terminal.wait(LIMIT).expect("end");
    assert_eq!(output.code, Some(9), "{output}");
    lab.containerd.remove("c").expect("remove");
}

fn output_of_a_terminal_of_exec_is_complete(lab: &Lab<'_>) {
    // Hundreds of times what a terminal holds, written by a process that then ends by itself.
    const LINES: u32 = 200_000;
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    let script = format!("seq 1 {LINES}; {LINGER}; exit 9");
    let exec = [
        "tasks",
        "exec",
        "--tty",
        "--exec-id",
        "t",
        "c",
        "sh",
        "-c",
        &script,
    ];
    let command = lab.containerd.ctr_command(exec);
    let mut terminal = Terminal::start(&command).expect("terminal");
    let output = terminal.wait(LIMIT).expect("end");
    assert_eq!(output.code, Some(9), "{} bytes", output.stdout.len());
    let lines: String = (1..=LINES).map(|n| format!("{n}\n")).collect();
    // `ctr` has written all of it when it ends; the last of it may still be on its way through this side's terminal.
    wait_until("all of it", LIMIT, || {
        // Each of the two terminals puts a carriage return before the end of a line.
        let shown = terminal.screen().replace('\r', "");
        if shown == lines {
            return Ok(());
        }
        let same = shown.bytes().zip(lines.bytes()).take_while(|(a, b)| a == b);
        Err(format!(
            "{} bytes of {}, the first {} as they should be",
            shown.len(),
            lines.len(),
            same.count()
        ))
    })
    .expect("complete");
    lab.containerd.remove("c").expect("remove");
}

fn many_execs_at_once(lab: &Lab<'_>) {
    lab.containerd
        .start_container(lab.container("c", ["sleep", "1000"]))
        .expect("start");
    std::thread::scope(|scope| {
        for n in 0..8 {
            scope.spawn(move || {
                let output = lab
                    .containerd
                    .exec("c", ["sh", "-c", &format!("echo {n}; {LINGER}; exit {n}")])
                    .expect("exec");
                assert_eq!((output.code, output.stdout), (Some(n), format!("{n}\n")));
            });
        }
    });
    lab.containerd.remove("c").expect("remove");
}

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
        .ctr(["tasks", "kill", "--signal", "SIGTERM", "c"])
        .expect("kill")
        .success()
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
    lab.containerd
        .ctr(["tasks", "kill", "c"])
        .expect("kill")
        .success()
        .expect("kill");
    assert_eq!(
        lab.containerd.task("c").expect("task").expect("task").0,
        "RUNNING",
        "TERM is ignored"
    );
    lab.containerd
        .ctr(["tasks", "kill", "--signal", "SIGKILL", "c"])
        .expect("kill")
        .success()
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
        .ctr(["tasks", "kill", "--all", "--signal", "SIGKILL", "c"])
        .expect("kill")
        .success()
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
    lab.containerd
        .ctr(["tasks", "pause", "c"])
        .expect("pause")
        .success()
        .expect("pause");
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
    lab.containerd
        .ctr(["tasks", "resume", "c"])
        .expect("resume")
        .success()
        .expect("resume");
    lab.containerd
        .wait_for_state("c", "RUNNING")
        .expect("running");
    grows(at_pause).expect("it goes on");
    // A paused container can be killed and removed.
    lab.containerd
        .ctr(["tasks", "pause", "c"])
        .expect("pause")
        .success()
        .expect("pause");
    lab.containerd.remove("c").expect("remove");
}

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
    let metrics = lab
        .containerd
        .ctr(["tasks", "metrics", "c"])
        .expect("metrics")
        .success()
        .expect("metrics")
        .stdout;
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
        .ctr(["tasks", "start", "--detach", "c"])
        .expect("start")
        .success()
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

fn a_short_life_is_reported(lab: &Lab<'_>) {
    // The init may be gone before start has returned.
    for code in 0..6 {
        let output = lab
            .containerd
            .run(&lab.container("c", ["sh", "-c", &format!("exit {code}")]))
            .expect("run");
        assert_eq!(output.code, Some(code), "{output}");
    }
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
