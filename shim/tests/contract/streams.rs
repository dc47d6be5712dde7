//! Standard streams: fifos, files, terminals, logging binaries.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api;

use crate::support::{
    Arm, Shim, World, arms, exec_request, open_writer, read_fifo, refused, until, within,
};

arms!(
    [kbp kbp_with_crun stock_1 stock_2]: [
        fifos_carry_everything_and_stdin_ends_when_it_is_closed,
        an_exec_s_output_is_complete_however_fast_it_ends,
        a_terminal_has_a_size_and_an_input,
        files_take_both_outputs_and_are_appended_to,
        logging_binaries_get_the_output,
    ],
    // crun leaves the pipes' owners alone.
    [kbp stock_1 stock_2]: [pipes_belong_to_the_group_that_the_options_name],
    // The stock shims do not come to an end there in time, and do not wait for a logging binary.
    [kbp kbp_with_crun]: [
        a_stdin_that_is_closed_before_the_start_ends_too,
        nobody_reads_and_nothing_hangs,
        logging_binaries_have_time_and_a_second_version,
        a_program_that_hangs_at_its_start_keeps_nobody_waiting,
    ],
);

const SIZE: usize = 3_000_000;

async fn close_stdin(shim: &Shim, exec_id: &str) {
    let request = api::CloseIORequest {
        id: "c".to_owned(),
        exec_id: exec_id.to_owned(),
        stdin: true,
        ..Default::default()
    };
    shim.close_io(&request).await.expect("close stdin");
}

/// A shim whose container runs and does nothing.
async fn running(world: &World) -> Shim {
    let shim = world.created("c", &["sleep", "1000"]).await;
    shim.start_init("c").await;
    shim
}

async fn fifos_carry_everything_and_stdin_ends_when_it_is_closed(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["sh", "-c", "cat; echo over >&2"]);
    let shim = world.start_shim("c").await;
    let mut request = world.create_request("c");
    request.stdin = world.fifo("in");
    request.stdout = world.fifo("out");
    if arm.is_kbp() {
        request.stdout.insert_str(0, "fifo://");
    }
    request.stderr = world.fifo("err");
    let (out, err) = (
        read_fifo(world.path("out").to_str().expect("text")),
        read_fifo(&request.stderr),
    );
    shim.create(&request).await.expect("create");
    shim.start_init("c").await;

    // A client may go and another one come: the stream ends when it is closed, not before.
    let first = open_writer(&request.stdin);
    (&first).write_all(b"first ").expect("write");
    drop(first);
    let last = open_writer(&request.stdin);
    let text = vec![b'x'; SIZE];
    let sent = text.clone();
    let writer = tokio::task::spawn_blocking(move || {
        nix::fcntl::fcntl(
            &last,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )
        .expect("block");
        (&last).write_all(&sent).expect("write");
    });
    within(writer).await.expect("the writer");
    close_stdin(&shim, "").await;
    assert_eq!(shim.exit_status("c", "").await, 0);
    let out = within(out).await.expect("the reader");
    assert_eq!(out.len(), 6 + SIZE);
    assert!(out.starts_with(b"first ") && out.ends_with(b"xxx"));
    assert_eq!(within(err).await.expect("the reader"), b"over\n");
    shim.remove("c", "").await.expect("delete");
}

/// A client that has sent all of its input closes it, and the process may not have been started by then.
async fn a_stdin_that_is_closed_before_the_start_ends_too(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    let mut request = exec_request("c", "x", &["sh", "-c", "test \"$(cat)\" = input"]);
    request.stdin = world.fifo("in");
    (request.stdout, request.stderr) = (world.fifo("out"), world.fifo("err"));
    read_fifo(&request.stdout);
    read_fifo(&request.stderr);
    let writer = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&request.stdin)
        .expect("open");
    (&writer).write_all(b"input").expect("write");
    shim.exec(&request).await.expect("exec");
    close_stdin(&shim, "x").await;
    shim.start_exec("c", "x").await.expect("start");
    drop(writer);
    assert_eq!(shim.exit_status("c", "x").await, 0);
}

async fn an_exec_s_output_is_complete_however_fast_it_ends(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    for terminal in [false, true] {
        for round in 0..5 {
            let id = format!("x{terminal}{round}");
            let script = format!("yes 123456789 | head -c {SIZE}");
            let mut request = exec_request("c", &id, &["sh", "-c", &script]);
            request.stdout = world.fifo(&id);
            request.terminal = terminal;
            let out = read_fifo(&request.stdout);
            if !terminal {
                request.stderr = world.fifo(&format!("{id}.err"));
                read_fifo(&request.stderr);
            }
            shim.exec(&request).await.expect("exec");
            shim.start_exec("c", &id).await.expect("start");
            assert_eq!(shim.exit_status("c", &id).await, 0);
            let out = within(out).await.expect("the reader");
            let newlines = out.iter().filter(|&&byte| byte == b'\n').count();
            // A terminal writes two characters for each newline.
            assert_eq!(
                out.len(),
                SIZE + if terminal { newlines } else { 0 },
                "{id}"
            );
            shim.remove("c", &id).await.expect("delete");
        }
    }
}

async fn a_terminal_has_a_size_and_an_input(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    let script =
        "read line; stty size; echo \"got $line\"; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && exit 6";
    let mut request = exec_request("c", "x", &["sh", "-c", script]);
    request.terminal = true;
    request.stdin = world.fifo("in");
    request.stdout = world.fifo("out");
    let out = read_fifo(&request.stdout);
    shim.exec(&request).await.expect("exec");
    shim.start_exec("c", "x").await.expect("start");
    let size = api::ResizePtyRequest {
        id: "c".to_owned(),
        exec_id: "x".to_owned(),
        width: 123,
        height: 45,
        ..Default::default()
    };
    shim.resize_pty(&size).await.expect("resize");
    open_writer(&request.stdin)
        .write_all(b"hello\n")
        .expect("write");
    assert_eq!(shim.exit_status("c", "x").await, 6);
    let out = String::from_utf8(within(out).await.expect("the reader")).expect("text");
    assert_eq!(out.replace('\r', ""), "hello\n45 123\ngot hello\n");
    shim.remove("c", "x").await.expect("delete");
}

async fn nobody_reads_and_nothing_hangs(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    // Less than a fifo holds: the process is not held up.
    let mut request = exec_request("c", "little", &["echo", "hello"]);
    request.stdout = world.fifo("little");
    request.stdin = world.fifo("never");
    shim.exec(&request).await.expect("exec");
    shim.start_exec("c", "little").await.expect("start");
    assert_eq!(shim.exit_status("c", "little").await, 0);
    let asked = Instant::now();
    shim.remove("c", "little").await.expect("delete");
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );

    // More: the process waits, and can be killed.
    let mut request = exec_request("c", "much", &["yes"]);
    request.stdout = world.fifo("much");
    shim.exec(&request).await.expect("exec");
    shim.start_exec("c", "much").await.expect("start");
    assert_eq!(shim.status("c", "much").await, api::Status::RUNNING);
    shim.signal("c", "much", 9).await.expect("kill");
    assert_eq!(shim.exit_status("c", "much").await, 137);
    // The drain limit.
    let asked = Instant::now();
    shim.remove("c", "much").await.expect("delete");
    assert!(
        asked.elapsed() < Duration::from_secs(15),
        "{:?}",
        asked.elapsed()
    );
}

async fn files_take_both_outputs_and_are_appended_to(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    let log = world.path("logs/deep/a b.log");
    let uri = format!("file://{}", log.display().to_string().replace(' ', "%20"));
    // The stock shims lose the second output at times: that of 1.6 may have closed the file, that of 2.1.9 overwrites.
    let (script, errors) = match arm {
        Arm::Stock1 | Arm::Stock2 => ("echo out", 0),
        _ => ("echo out; echo err >&2", 2),
    };
    for round in 0..2 {
        let id = format!("x{round}");
        let mut request = exec_request("c", &id, &["sh", "-c", script]);
        (request.stdout, request.stderr) = (uri.clone(), uri.clone());
        shim.exec(&request).await.expect("exec");
        shim.start_exec("c", &id).await.expect("start");
        shim.exit_status("c", &id).await;
        shim.remove("c", &id).await.expect("delete");
    }
    let text = fs::read_to_string(&log).expect("the log");
    assert_eq!(text.matches("out\n").count(), 2, "{text}");
    assert_eq!(text.matches("err\n").count(), errors, "{text}");

    let mut request = exec_request("c", "y", &["true"]);
    request.stdout = "syslog://host/x".to_owned();
    shim.exec(&request).await.expect("exec");
    let (_, message) = refused(shim.start_exec("c", "y").await);
    assert!(message.contains("syslog"), "{message}");
}

/// A logging binary that writes what it is given to the file `log`, after `prologue`; the argument says what else it does.
fn add_logger(world: &World, prologue: &str) -> (PathBuf, PathBuf) {
    let (logger, log) = (world.path("logger"), world.path("log"));
    let script = format!(
        "#!/bin/sh\n{prologue}\nexec >> {log}\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\"\n[ \"$1\" = v2 ] && printf x >&5\n\
         [ \"$1\" = dies ] && exit 1\nexec 5>&-\n/bin/cat <&3\n/bin/cat <&4\necho end\n",
        log = log.display()
    );
    fs::write(&logger, script).expect("write");
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).expect("make it executable");
    (logger, log)
}

/// Runs a command that writes to both outputs, with a logger, to the deletion.
async fn run_logged(shim: &Shim, id: &str, uri: String, terminal: bool) {
    let mut request = exec_request("c", id, &["sh", "-c", "echo out; echo err >&2"]);
    request.terminal = terminal;
    request.stdout = uri;
    shim.exec(&request).await.expect("exec");
    shim.start_exec("c", id).await.expect("start");
    shim.exit_status("c", id).await;
    shim.remove("c", id).await.expect("delete");
}

async fn logging_binaries_get_the_output(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    // The stock shims do not wait for it, but send SIGTERM.
    let (logger, log) = add_logger(&world, "trap '' TERM");
    for (id, terminal) in [("a", false), ("b", true)] {
        let _ = fs::remove_file(&log);
        let uri = format!("binary://{}?v1=a%20b", logger.display());
        run_logged(&shim, id, uri, terminal).await;
        let read = || fs::read_to_string(&log).unwrap_or_default();
        until("the log's end", || read().ends_with("end\n")).await;
        let text = read().replace('\r', "");
        assert_eq!(text, format!("test {id} v1 a b\nout\nerr\nend\n"));
    }
    let mut request = exec_request("c", "f", &["true"]);
    request.stdout = "binary:///nonexistent".to_owned();
    shim.exec(&request).await.expect("exec");
    let (_, message) = refused(shim.start_exec("c", "f").await);
    assert!(message.contains("/nonexistent"), "{message}");
}

async fn logging_binaries_have_time_and_a_second_version(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    let (logger, log) = add_logger(&world, "");
    for (id, scheme, argument, terminal) in [
        ("a", "binary", "v1", false),
        ("b", "binary-v2", "v2", false),
        ("c", "binary", "v1", true),
    ] {
        let _ = fs::remove_file(&log);
        let uri = format!("{scheme}://{}?{argument}=a%20b", logger.display());
        run_logged(&shim, id, uri, terminal).await;
        let text = fs::read_to_string(&log).expect("the log").replace('\r', "");
        assert_eq!(text, format!("test {id} {argument} a b\nout\nerr\nend\n"));
    }
    for (id, scheme, fails) in [("d", "binary-v2", true), ("e", "binary", false)] {
        let mut request = exec_request("c", id, &["true"]);
        request.stdout = format!("{scheme}://{}?dies", logger.display());
        shim.exec(&request).await.expect("exec");
        let started = shim.start_exec("c", id).await;
        assert_eq!(started.is_err(), fails, "{started:?}");
    }
}

/// Holds a lease on a file (F_SETLEASE, F_WRLCK), tells when somebody wants to open it, and gives it back when its input ends.
const LEASE: &str = "$| = 1; open(my $file, '<', $ARGV[0]) or die; $SIG{IO} = sub { print qq(wanted\\n) }; \
    fcntl($file, 1024, 1) or die; print qq(held\\n); while (1) { last if defined(sysread(STDIN, my $byte, 1)) }";

/// As on a file system that does not answer: the kernel lets nobody execute the program for now.
async fn a_program_that_hangs_at_its_start_keeps_nobody_waiting(arm: Arm) {
    let world = World::new(arm).await;
    let shim = running(&world).await;
    shim.add_exec("c", "x", &["sleep", "1000"])
        .await
        .expect("exec");
    let other = shim.start_exec("c", "x").await.expect("start");
    let (logger, _) = add_logger(&world, "");
    let mut holder = Command::new("perl")
        .args(["-e", LEASE])
        .arg(&logger)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("perl");
    let lines = BufReader::new(holder.stdout.take().expect("a pipe")).lines();
    let mut lines = lines.map(|line| line.expect("a line"));
    assert_eq!(lines.next().as_deref(), Some("held"));

    let mut request = exec_request("c", "f", &["true"]);
    request.stdout = format!("binary://{}?v1", logger.display());
    shim.exec(&request).await.expect("exec");
    let second = world.connect(&shim.address).await;
    let start = tokio::spawn(async move { second.start_exec("c", "f").await });
    let wanted = tokio::task::spawn_blocking(move || lines.next());
    assert_eq!(
        within(wanted).await.expect("no panic").as_deref(),
        Some("wanted")
    );

    assert!(kbp_kernel::process::kill(other, 9).expect("kill"));
    assert_eq!(shim.exit_status("c", "x").await, 128 + 9);
    assert_eq!(shim.status("c", "").await, api::Status::RUNNING);
    assert_eq!(shim.status("c", "f").await, api::Status::CREATED);
    assert!(!start.is_finished(), "nothing hung");

    drop(holder.stdin.take());
    assert!(holder.wait().expect("wait").success());
    within(start).await.expect("no panic").expect("start");
    assert_eq!(shim.exit_status("c", "f").await, 0);
}

async fn pipes_belong_to_the_group_that_the_options_name(arm: Arm) {
    let mut world = World::new(arm).await;
    (world.options.io_uid, world.options.io_gid) = (1234, 2345);
    world.add_bundle("c", &["sleep", "1000"]);
    let shim = world.start_shim("c").await;
    let mut request = world.create_request("c");
    (request.stdout, request.stderr) = (world.fifo("out"), world.fifo("err"));
    read_fifo(&request.stdout);
    read_fifo(&request.stderr);
    shim.create(&request).await.expect("create");
    let init = shim.start_init("c").await;
    let pipe = fs::metadata(format!("/proc/{init}/fd/1")).expect("its standard output");
    // runc itself gives the pipe to the process' user, and leaves the group alone.
    assert_eq!(pipe.gid(), 2345);
}
