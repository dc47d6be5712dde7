//! Descriptors that are passed between processes.

use std::io::{Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use kbp_kernel::{Error, fd};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

fn pair() -> (UnixStream, UnixStream) {
    let (a, b) = UnixStream::pair().expect("a pair");
    for end in [&a, &b] {
        end.set_read_timeout(Some(Duration::from_secs(60)))
            .expect("timeout");
    }
    (a, b)
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("list descriptors")
        .count()
}

#[test]
fn descriptors_arrive_in_order_and_close_on_exec() {
    let (ours, theirs) = pair();
    let (reader, mut writer) = pipe().expect("pipe");
    let null = std::fs::File::open("/dev/null").expect("/dev/null");
    assert_eq!(
        fd::send(ours.as_fd(), b"two", &[reader.as_fd(), null.as_fd()]).expect("send"),
        3
    );

    let message = fd::receive(theirs.as_fd(), 64, 2).expect("receive");
    assert_eq!(message.data, b"two");
    assert_eq!(message.fds.len(), 2);
    for fd in &message.fds {
        let flags = fcntl(fd, FcntlArg::F_GETFD).expect("flags");
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
    }
    writer.write_all(b"through the copy").expect("write");
    drop(writer);
    let mut text = String::new();
    let copy = message.fds.into_iter().next().expect("the first");
    std::fs::File::from(copy)
        .read_to_string(&mut text)
        .expect("read");
    assert_eq!(text, "through the copy");
}

#[test]
fn a_message_without_descriptors_and_the_end_are_told() {
    let (ours, theirs) = pair();
    fd::send(ours.as_fd(), b"plain", &[]).expect("send");
    let message = fd::receive(theirs.as_fd(), 64, 4).expect("receive");
    assert_eq!(
        (message.data.as_slice(), message.fds.len()),
        (&b"plain"[..], 0)
    );
    drop(ours);
    let message = fd::receive(theirs.as_fd(), 64, 4).expect("receive");
    assert!(message.data.is_empty(), "the end");
    let error = fd::send(theirs.as_fd(), b"x", &[]).expect_err("nobody listens");
    assert_eq!(error.errno(), Some(libc::EPIPE), "{error}");
}

// In one test, since it counts the descriptors of the process.
#[test]
#[ignore = "run alone by more_descriptors_than_wanted_are_refused_and_closed"]
fn alone_more_descriptors_than_wanted() {
    let (ours, theirs) = pair();
    let null = std::fs::File::open("/dev/null").expect("/dev/null");
    let before = open_descriptors();
    for sent in [2, 5, fd::MAX_FDS] {
        let many: Vec<_> = std::iter::repeat_n(null.as_fd(), sent).collect();
        fd::send(ours.as_fd(), b"x", &many).expect("send");
        let error = fd::receive(theirs.as_fd(), 64, 1).expect_err("one is enough");
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
        assert_eq!(open_descriptors(), before, "{sent} sent");
    }
    let many: Vec<_> = std::iter::repeat_n(null.as_fd(), fd::MAX_FDS + 1).collect();
    let error = fd::send(ours.as_fd(), b"x", &many).expect_err("too many");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[test]
fn more_descriptors_than_wanted_are_refused_and_closed() {
    let me = std::env::current_exe().expect("own path");
    let output = Command::new(me)
        .args(["--exact", "alone_more_descriptors_than_wanted", "--ignored"])
        .output()
        .expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
fn the_peer_of_a_pair_is_this_process() {
    let (ours, _theirs) = pair();
    let peer = fd::peer(&ours).expect("peer");
    assert_eq!(peer.pid, std::process::id());
    assert_eq!(peer.uid, nix::unistd::getuid().as_raw());
    assert_eq!(peer.gid, nix::unistd::getgid().as_raw());
}

#[test]
fn what_this_process_opened_itself_is_not_inherited() {
    let (ours, _theirs) = pair();
    for number in [0, 2, -1, ours.as_raw_fd()] {
        let error = fd::take_inherited(number).expect_err("not inherited");
        assert!(matches!(error, Error::Invalid { .. }), "{number}: {error}");
    }
    let error = fd::take_inherited(1_000_000).expect_err("not open");
    assert_eq!(error.errno(), Some(libc::EBADF), "{error}");
}

#[test]
#[ignore = "run with descriptor 9 open by a_descriptor_left_open_by_the_parent_is_taken_once"]
fn with_descriptor_nine() {
    let taken = fd::take_inherited(9).expect("take");
    let flags = fcntl(&taken, FcntlArg::F_GETFD).expect("flags");
    assert!(
        FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC),
        "not for our children"
    );
    let error = fd::take_inherited(9).expect_err("it has an owner");
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let mut text = String::new();
    std::fs::File::from(taken)
        .read_to_string(&mut text)
        .expect("read");
    assert_eq!(text, "from the parent\n");
    let error = fd::take_inherited(9).expect_err("closed with its owner");
    assert_eq!(error.errno(), Some(libc::EBADF), "{error}");
}

#[test]
fn a_descriptor_left_open_by_the_parent_is_taken_once() {
    // A shell is the simplest parent that leaves a chosen number open over exec.
    let output = Command::new("sh")
        .arg("-c")
        .arg("echo from the parent | { exec \"$0\" --exact with_descriptor_nine --ignored 9<&0; }")
        .arg(std::env::current_exe().expect("own path"))
        .output()
        .expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
fn passed_descriptors_are_counted_from_three() {
    // A process that runs for a while has the low numbers in use.
    let low: Vec<_> = (0..8)
        .map(|_| std::fs::File::open("/dev/null").expect("open"))
        .collect();
    let (mut out, to_out) = pipe().expect("a pipe");
    let (mut err, to_err) = pipe().expect("a pipe");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo three >&3; echo four >&4"]);
    fd::pass(&mut command, vec![to_err.into(), to_out.into()]);
    let status = command.status().expect("run sh");
    assert!(status.success(), "{status}");
    drop((command, low));
    let (mut three, mut four) = (String::new(), String::new());
    err.read_to_string(&mut three).expect("read");
    out.read_to_string(&mut four).expect("read");
    assert_eq!((three.as_str(), four.as_str()), ("three\n", "four\n"));
}
