//! What a process prints and reads, and the code with which it ends.

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
    a_short_life_is_reported,
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
