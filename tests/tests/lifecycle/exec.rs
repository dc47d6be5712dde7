//! Further processes in a running container.

use kbp_tests::lab::{LIMIT, LINGER};
use kbp_tests::{Lab, Terminal, wait_until};

kbp_tests::scenarios!(
    exec_codes_input_and_output,
    exec_of_a_command_that_does_not_exist,
    terminal_of_exec,
    output_of_a_terminal_of_exec_is_complete,
    many_execs_at_once,
);

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
