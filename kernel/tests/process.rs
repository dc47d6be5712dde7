//! Handles on other processes and threads, and their scheduling.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kbp_kernel::process::{self, Descriptor, PidFd, Scheduling};
use kbp_kernel::{CpuId, CpuSet, Error, cpu, sockopt};

/// Longest wait for anything; generous, since other work may keep the CPUs.
const LIMIT: Duration = Duration::from_secs(60);

/// A child that does nothing until it is killed, at the latest when the test is over.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null());
        process::end_with_parent(&mut command);
        Self(command.spawn().expect("sleep"))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `work` with the thread id of another thread of this process that just waits.
fn with_thread<T>(work: impl FnOnce(u32) -> T) -> T {
    let (tell, told) = mpsc::channel();
    let (stop, stopped) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        tell.send(nix::unistd::gettid().as_raw() as u32)
            .expect("tell the id");
        let _ = stopped.recv();
    });
    let result = work(told.recv().expect("an id"));
    drop(stop);
    thread.join().expect("the thread");
    result
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_descriptor_of_another_process_is_copied() {
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    let mut child = Command::new("cat")
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .spawn()
        .expect("cat");
    let handle = PidFd::open(child.id()).expect("open");
    // Its standard input, from outside: what goes into our end comes out of the copy, if cat does not get it first.
    let copy = handle.get_fd(0).expect("copy");
    let copied = UnixStream::from(copy);
    (&copied)
        .write_all(b"backwards")
        .expect("write into the copy");
    let mut text = [0; 9];
    ours.read_exact(&mut text).expect("read");
    assert_eq!(&text, b"backwards");

    let error = handle.get_fd(987_654).expect_err("no such descriptor");
    assert_eq!(error.errno(), Some(libc::EBADF), "{error}");
    drop((ours, copied));
    assert!(child.wait().expect("wait").success());
    let error = handle.get_fd(0).expect_err("it is gone");
    assert_eq!(error.errno(), Some(libc::ESRCH), "{error}");
}

#[test]
fn a_thread_id_finds_the_descriptors_of_its_process() {
    let file = File::open("/dev/null").expect("/dev/null");
    with_thread(|tid| {
        assert_ne!(tid, std::process::id());
        let copy = PidFd::open_by_thread(tid).and_then(|p| p.get_fd(file.as_raw_fd()));
        let copy = copy.expect("by a thread that is not the main one");
        assert_ne!(copy.as_fd().as_raw_fd(), file.as_raw_fd());
        let error = PidFd::open(tid).expect_err("no process has that id");
        assert!(error.to_string().contains(&tid.to_string()), "{error}");
    });
    PidFd::open_by_thread(std::process::id()).expect("the main thread");
    let error = PidFd::open_by_thread(0x7fff_fff0).expect_err("no such thread");
    assert!(error.errno().is_some(), "{error}");
}

#[test]
fn ids_that_mean_a_group_or_everybody_are_refused() {
    for pid in [0, u32::MAX, 1 << 31] {
        for error in [
            PidFd::open(pid).err(),
            PidFd::open_by_thread(pid).err(),
            process::kill(pid, 0).err(),
            process::consume(pid).err(),
        ] {
            let error = error.unwrap_or_else(|| panic!("{pid} was accepted"));
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }
}

#[test]
fn signals_end_a_process_and_its_end_is_seen() {
    let mut sleeper = Sleeper::start();
    let pid = sleeper.0.id();
    let handle = PidFd::open(pid).expect("open");
    assert!(handle.signal(0).expect("check"));
    assert!(process::kill(pid, 0).expect("check"));
    assert!(
        !handle.wait_end(Duration::from_millis(20)).expect("wait"),
        "it still runs"
    );
    assert!(!process::is_zombie(pid).expect("look"));

    assert!(handle.signal(libc::SIGTERM).expect("signal"));
    assert!(handle.wait_end(LIMIT).expect("wait"));
    eventually("a zombie", || process::is_zombie(pid).expect("look"));
    sleeper.0.wait().expect("reap");
    assert!(!process::is_zombie(pid).expect("look"));
    assert!(
        !handle.signal(libc::SIGTERM).expect("signal"),
        "nobody is there"
    );
    assert!(!process::kill(pid, 0).expect("check"));
    let error = process::kill(std::process::id(), 1000).expect_err("no such signal");
    assert_eq!(error.errno(), Some(libc::EINVAL), "{error}");
}

#[test]
fn scheduling_classes_are_set_and_read() {
    with_thread(|tid| {
        for class in [
            Scheduling::Other(5),
            Scheduling::Fifo(3),
            Scheduling::Idle,
            Scheduling::Other(-4),
            Scheduling::Other(0),
        ] {
            process::set_scheduling(tid, class).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(process::scheduling(tid).expect("read"), class);
        }
        let error = process::set_scheduling(tid, Scheduling::Unknown(7)).expect_err("unknown");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    });
    // 0 is the calling thread, and only it.
    thread::spawn(|| {
        process::set_scheduling(0, Scheduling::Idle).expect("set");
        assert_eq!(process::scheduling(0).expect("read"), Scheduling::Idle);
    })
    .join()
    .expect("thread");
    assert_eq!(process::scheduling(0).expect("read"), Scheduling::Other(0));
    let error = process::scheduling(0x7fff_fff0).expect_err("no such thread");
    assert_eq!(error.errno(), Some(libc::ESRCH), "{error}");
}

#[test]
fn a_class_without_a_name_here_is_read_by_number() {
    let mut child = Command::new("chrt")
        .args(["--batch", "0", "sleep", "600"])
        .spawn()
        .expect("chrt");
    let pid = child.id();
    let batch = Scheduling::Unknown(libc::SCHED_BATCH as u32);
    eventually("SCHED_BATCH", || {
        process::scheduling(pid).is_ok_and(|class| class == batch)
    });
    child.kill().expect("kill");
    child.wait().expect("reap");
}

#[test]
fn threads_are_pinned() {
    let all = cpu::allowed().expect("allowed");
    let one = all.iter().last().expect("a CPU");
    with_thread(|tid| {
        process::set_affinity(tid, &CpuSet::from_iter([one])).expect("pin");
        assert_eq!(
            process::affinity(tid)
                .expect("read")
                .iter()
                .collect::<Vec<_>>(),
            [one]
        );
    });
    assert_eq!(
        process::affinity(0).expect("read"),
        all,
        "the caller stays where it was"
    );

    thread::spawn(move || {
        process::set_affinity(0, &CpuSet::from_iter([one])).expect("pin");
        let tid = nix::unistd::gettid().as_raw() as u32;
        let pid = std::process::id();
        assert_eq!(process::last_cpu(pid, tid).expect("last CPU"), one);
        let before = process::cpu_time(pid, tid).expect("time");
        let until = Instant::now() + Duration::from_millis(30);
        while Instant::now() < until {}
        assert!(process::cpu_time(pid, tid).expect("time") > before);
    })
    .join()
    .expect("thread");

    let nowhere = CpuSet::from_iter([CpuId(8191)]);
    let error = process::set_affinity(0, &nowhere).expect_err("no such CPU");
    assert!(error.to_string().contains("8191"), "{error}");
    assert!(
        process::set_affinity(0, &CpuSet::default()).is_err(),
        "nowhere to run"
    );
}

#[test]
fn a_thread_whose_id_nobody_knows_is_pinned() {
    for cpu in cpu::allowed().expect("allowed").iter() {
        let (go_on, awaited) = mpsc::channel();
        let thread = thread::spawn(move || {
            awaited.recv().expect("told to go on");
            (process::affinity(0), process::current_cpu())
        });
        let one = CpuSet::from_iter([cpu]);
        process::set_affinity_of(&thread, &one).expect("pin");
        go_on.send(()).expect("it waits");
        let (may, is) = thread.join().expect("thread");
        assert_eq!((may.expect("read"), is.expect("ask")), (one, cpu));
    }
    let thread = thread::spawn(|| ());
    let nowhere = CpuSet::from_iter([CpuId(8191)]);
    let error = process::set_affinity_of(&thread, &nowhere).expect_err("no such CPU");
    assert!(error.to_string().contains("8191"), "{error}");
    thread.join().expect("thread");
}

#[test]
fn memory_of_another_process_is_read() {
    let text = *b"in the stack of this thread";
    let mut copy = [0; 27];
    let address = &raw const text as usize as u64;
    process::read_memory(std::process::id(), address, &mut copy).expect("read");
    assert_eq!(copy, text);
    let error = process::read_memory(std::process::id(), 8, &mut copy).expect_err("unmapped");
    assert_eq!(error.errno(), Some(libc::EFAULT), "{error}");
}

#[test]
fn brackets_and_blanks_in_a_thread_name_do_not_confuse() {
    // The second field of /proc/PID/stat is the command, which may contain what separates fields.
    thread::Builder::new()
        .name("a) R 1 (b".to_owned())
        .spawn(|| {
            let one = cpu::allowed()
                .expect("allowed")
                .iter()
                .next()
                .expect("a CPU");
            process::set_affinity(0, &CpuSet::from_iter([one])).expect("pin");
            let tid = nix::unistd::gettid().as_raw() as u32;
            assert_eq!(
                process::last_cpu(std::process::id(), tid).expect("last CPU"),
                one
            );
        })
        .expect("thread")
        .join()
        .expect("joined");
}

/// A thread starts a process that is to end with it, and ends: the process is killed, and says so to its parent.
#[test]
fn a_process_ends_with_the_thread_that_started_it() {
    let start = |bound: bool| {
        thread::spawn(move || {
            let mut command = Command::new("sleep");
            command.arg("600").stdin(Stdio::null());
            if bound {
                process::end_with_parent(&mut command);
            }
            Sleeper(command.spawn().expect("sleep"))
        })
        .join()
        .expect("the thread")
    };
    let (mut bound, mut free) = (start(true), start(false));
    let status = std::cell::Cell::new(None);
    eventually("the end of the bound one", || {
        status.set(bound.0.try_wait().expect("wait"));
        status.get().is_some()
    });
    let signal = std::os::unix::process::ExitStatusExt::signal;
    assert_eq!(status.get().and_then(|s| signal(&s)), Some(9));
    assert!(free.0.try_wait().expect("wait").is_none(), "it lives on");
}

#[test]
fn turns_and_switches_of_a_thread_are_counted() {
    let (tell, told) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        tell.send(nix::unistd::gettid().as_raw() as u32)
            .expect("tell the id");
        while gone.recv().is_ok() {}
    });
    let pid = std::process::id();
    let tid = told.recv().expect("an id");
    let read = || {
        (
            process::turns(pid, tid).expect("turns"),
            process::switches(pid, tid).expect("switches"),
        )
    };
    let before = read();
    // Each message is one for which it has to be woken, unless it has not slept yet.
    eventually("it sleeps and runs in turns", || {
        go.send(()).expect("wake it");
        let now = read();
        now.0.count > before.0.count
            && now.0.ran > before.0.ran
            && now.1.voluntary > before.1.voluntary
    });
    assert!(process::cpu_time(pid, tid).expect("time") >= before.0.ran);
    drop(go);
    thread.join().expect("thread");
    let error = process::switches(pid, tid).expect_err("it is gone");
    assert!(error.to_string().contains("status"), "{error}");
}

#[test]
fn programs_begin_with_the_limit_of_open_files_that_was_raised_for_the_one_who_starts_them() {
    let limits = || {
        let limits = std::fs::read_to_string("/proc/self/limits").expect("limits");
        let line = limits
            .lines()
            .find_map(|l| l.strip_prefix("Max open files"));
        let mut values = line.expect("a line").split_whitespace().map(str::to_owned);
        (values.next().expect("soft"), values.next().expect("hard"))
    };
    let own = std::process::id().to_string();
    let lowered = Command::new("prlimit")
        .args(["--pid", &own, "--nofile=700:"])
        .status();
    assert!(lowered.expect("prlimit").success());
    assert_eq!(limits().0, "700");
    let files = process::OpenFiles::raise().expect("raise");
    assert_eq!(limits().0, limits().1);
    let started = |restored: bool| {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -Sn"]);
        if restored {
            files.restore_in(&mut command);
        }
        let output = command.output().expect("sh");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(started(true), "700");
    assert_ne!(started(false), "700");
}

#[test]
fn descriptors_are_told_apart_by_their_links() {
    let own = std::process::id();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let epoll = sockopt::epoll_create().expect("epoll instance");
    let file = std::fs::File::open("/proc/self/status").expect("open");
    let of = |fd: &dyn AsRawFd| process::descriptor(own, fd.as_raw_fd());
    assert_eq!(of(&socket), Some(Descriptor::Socket));
    assert_eq!(of(&epoll), Some(Descriptor::Epoll));
    assert_eq!(of(&file), Some(Descriptor::Other));
    assert_eq!(process::descriptor(own, 1_000_000), None);
    assert_eq!(process::descriptor(u32::MAX, i32::MAX), None);
}
