//! The reaper. Alone in its process, because it takes every child there is.

use std::io::{self, Read};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kbp_shim::task::launcher::Launcher;
use kbp_shim::task::reaper::{ChildStdio, Exit, Reaper};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Forks a child that leaves another process behind, and tells that one's pid. The shell would reap what ends before
/// itself, so the one left behind begins when the shell is gone.
async fn leave_orphan(reaper: &Arc<Reaper>, script: &str) -> u32 {
    let (mut read, write) = std::io::pipe().expect("a pipe");
    let mut command = Command::new("/bin/sh");
    command.args([
        "-c",
        &format!("(while kill -0 $$ 2>/dev/null; do :; done; {script}) & echo $!"),
    ]);
    ChildStdio {
        stdout: Some(write.into()),
        ..Default::default()
    }
    .apply(&mut command);
    let child = reaper.spawn(command).await.expect("start sh");
    assert_eq!(ended(child.exit).await.status, 0);
    let mut text = [0; 32];
    let count = read.read(&mut text).expect("its output");
    let text = String::from_utf8_lossy(&text[..count]).into_owned();
    text.trim().parse().expect("a pid")
}

async fn ended(exit: oneshot::Receiver<Exit>) -> Exit {
    timeout(Duration::from_secs(30), exit)
        .await
        .expect("in time")
        .expect("reaped")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_and_orphans_are_reaped_by_whoever_asked_for_them() {
    let reaper = Reaper::start(Launcher::start(None).expect("a thread")).expect("a reaper");

    let mut children = Vec::new();
    for _ in 0..50 {
        let mut quick = Command::new("/bin/sh");
        quick.args(["-c", "exit 42"]);
        children.push(reaper.spawn(quick).await.expect("start sh"));
    }
    for child in children {
        let exit = ended(child.exit).await;
        assert_eq!((exit.pid, exit.status), (child.pid, 42));
        assert!(
            !reaper.signal(child.pid, 0).expect("no error"),
            "it is gone"
        );
    }

    let adoption = reaper.adopt();
    let early = leave_orphan(&reaper, "exit 3").await;
    let late = leave_orphan(&reaper, "exec sleep 1000").await;
    let early = ended(adoption.watch(early)).await;
    assert_eq!(early.status, 3);
    let exit = adoption.watch(late);
    drop(adoption);
    assert!(reaper.signal(late, 40).expect("a real-time signal"));
    assert_eq!(ended(exit).await.status, 128 + 40);

    // Nobody asked for this one: reaped all the same.
    let forgotten = leave_orphan(&reaper, "exit 0").await;
    let gone = async {
        while std::path::Path::new(&format!("/proc/{forgotten}")).exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), gone)
        .await
        .expect("no zombie is left");
    // std waits for what it could not execute: the reaper, which is woken by its end, is not to be faster.
    for _ in 0..200 {
        let mut command = Command::new("/nonexistent");
        kbp_kernel::process::end_with_parent(&mut command);
        let missing = reaper.spawn(command).await;
        assert_eq!(
            missing.expect_err("no such file").kind(),
            io::ErrorKind::NotFound
        );
    }
}
