//! The kernel thread: where it runs, in which class, how long, and when it ends.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::ring::{PollRing, RingOptions};
use kbp_kernel::{CpuId, CpuSet, Error, NapiId};

use crate::{LIMIT, eventually, options, some_cpu};

/// A NAPI id that no device has: the kernel does not check, and the thread has something to look for.
const NOBODYS: NapiId = NapiId(4_000_000_000);

fn task(tid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/self/task/{tid}"))
}

fn cpu_time(ring: &PollRing) -> Duration {
    process::cpu_time(std::process::id(), ring.thread_id()).expect("CPU time")
}

/// Two looks some time apart find the same CPU time.
fn stands_still(ring: &PollRing) -> bool {
    let before = cpu_time(ring);
    std::thread::sleep(Duration::from_millis(30));
    cpu_time(ring) == before
}

#[test]
fn it_has_the_cpu_and_the_class_it_was_asked_for_and_sleeps_at_first() {
    for class in [Scheduling::Idle, Scheduling::Other(0)] {
        let caller = process::scheduling(0).expect("own class");
        // A lease that does not end while the test runs: awake, it would poll all the time.
        let ring = PollRing::new(&RingOptions {
            scheduling: class,
            ..options(60_000)
        })
        .expect("ring");
        let tid = ring.thread_id();
        let name = fs::read_to_string(task(tid).join("comm")).expect("name");
        assert!(name.starts_with("iou-sqp-"), "{name}");
        assert_eq!(process::scheduling(tid).expect("class"), class);
        assert_eq!(
            process::affinity(tid).expect("CPUs"),
            CpuSet::from_iter([some_cpu()])
        );
        assert_eq!(process::scheduling(0).expect("own class"), caller);
        assert!(ring.is_asleep());
        // It may still be on its way to sleep.
        eventually("nobody woke it", || stands_still(&ring));
    }
}

#[test]
fn the_class_of_its_maker_does_not_matter_and_stays() {
    std::thread::spawn(|| {
        for (maker, asked) in [
            (Scheduling::Other(7), Scheduling::Other(0)),
            (Scheduling::Fifo(1), Scheduling::Idle),
        ] {
            process::set_scheduling(0, maker).expect("own class");
            let ring = PollRing::new(&RingOptions {
                scheduling: asked,
                ..options(100)
            })
            .expect("ring");
            assert_eq!(process::scheduling(ring.thread_id()).expect("class"), asked);
            assert_eq!(process::scheduling(0).expect("own class"), maker);
        }
    })
    .join()
    .expect("maker");
}

#[test]
fn it_polls_for_one_lease_and_then_sleeps_although_a_napi_is_registered() {
    const LEASE: Duration = Duration::from_millis(200);
    let mut ring = PollRing::new(&options(200)).expect("ring");
    ring.add(NOBODYS).expect("add");
    for _ in 0..2 {
        assert!(ring.is_asleep());
        // On a drowned machine a lease may pass with hardly a turn on a CPU, and then says nothing.
        let mut woken = Instant::now();
        eventually("polling", || {
            woken = Instant::now();
            let before = cpu_time(&ring);
            ring.wake().expect("wake");
            eventually("awake", || !ring.is_asleep() || cpu_time(&ring) > before);
            eventually("asleep again", || ring.is_asleep());
            cpu_time(&ring) > before + Duration::from_millis(5)
        });
        // Jiffies are counted in whole ones, at 100 Hz in steps of 10 ms.
        assert!(
            woken.elapsed() >= LEASE - Duration::from_millis(10),
            "{:?}",
            woken.elapsed()
        );
        eventually("no CPU time while asleep", || stands_still(&ring));
    }
}

#[test]
fn waking_it_while_it_is_awake_starts_the_lease_anew() {
    const LEASE: Duration = Duration::from_millis(600);
    let ring = PollRing::new(&options(600)).expect("ring");
    ring.wake().expect("wake");
    eventually("awake", || !ring.is_asleep());
    let start = Instant::now();
    let mut looks = 0;
    while start.elapsed() < 3 * LEASE || looks <= 4 {
        assert!(start.elapsed() < LIMIT, "only {looks} looks in time");
        let was_awake = !ring.is_asleep();
        let woken = Instant::now();
        ring.wake().expect("wake");
        std::thread::sleep(LEASE / 4);
        let asleep = ring.is_asleep();
        // On a drowned machine this thread may itself come too late to tell.
        if was_awake && woken.elapsed() < LEASE / 2 {
            assert!(!asleep, "asleep {:?} after a wake-up", woken.elapsed());
            looks += 1;
        }
    }
    eventually("asleep when nobody wakes it", || ring.is_asleep());
}

#[test]
fn a_round_is_timed_while_it_is_awake_and_takes_longer_over_more_instances() {
    const LIMIT: Duration = Duration::from_millis(2);
    let mut ring = PollRing::new(&options(200)).expect("ring");
    assert_eq!(ring.round_time(LIMIT), None, "it sleeps");
    // Others may have its CPU, or this thread may be there itself: the shortest of many.
    let shortest = |ring: &PollRing| {
        let mut times = Vec::new();
        eventually("rounds to be timed", || {
            ring.wake().expect("wake");
            times.extend(ring.round_time(LIMIT));
            times.len() == 20
        });
        times.into_iter().min().expect("a time")
    };
    let none = shortest(&ring);
    assert!(none > Duration::ZERO);
    // Nobody has these ids: they are looked for all the same.
    for number in 0..500 {
        ring.add(NapiId(1_000_000_000 + number)).expect("add");
    }
    let many = shortest(&ring);
    assert!(many > 2 * none, "{none:?} {many:?}");
    eventually("the lease to end", || ring.is_asleep());
    assert_eq!(ring.round_time(LIMIT), None);
}

#[test]
fn it_outlives_the_thread_that_made_it() {
    let made = std::thread::spawn(|| {
        let tid = nix::unistd::gettid().as_raw() as u32;
        (tid, PollRing::new(&options(100)).expect("ring"))
    });
    let (maker, ring) = made.join().expect("maker");
    eventually("the maker is gone", || !task(maker).exists());
    for _ in 0..2 {
        ring.wake().expect("wake");
        eventually("awake", || !ring.is_asleep());
        eventually("asleep", || ring.is_asleep());
    }
}

#[test]
fn it_is_gone_when_the_ring_is_dropped_awake_or_asleep() {
    for awake in [false, true] {
        let ring = PollRing::new(&options(60_000)).expect("ring");
        let tid = ring.thread_id();
        if awake {
            ring.wake().expect("wake");
            eventually("awake", || !ring.is_asleep());
        }
        assert!(task(tid).exists());
        drop(ring);
        eventually("gone", || !task(tid).exists());
    }
}

#[test]
#[ignore = "the process that a_killed_owner_takes_its_thread_along kills"]
fn owner_of_a_ring() {
    let ring = PollRing::new(&options(60_000)).expect("ring");
    ring.wake().expect("wake");
    eventually("awake", || !ring.is_asleep());
    println!("polling thread {}", ring.thread_id());
    // Ends also when the test that started this is gone.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn a_killed_owner_takes_its_thread_along() {
    let mut owner = Command::new(std::env::current_exe().expect("own path"))
        .args([
            "--exact",
            "thread::owner_of_a_ring",
            "--ignored",
            "--nocapture",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("owner");
    let lines = BufReader::new(owner.stdout.take().expect("its output")).lines();
    let tid: u32 = lines
        .map(|line| line.expect("a line"))
        .find_map(|line| line.split_once("polling thread ")?.1.parse().ok())
        .expect("the id of its thread");
    // /proc/TID is there for threads too, if one knows the number.
    let thread = PathBuf::from(format!("/proc/{tid}"));
    assert!(thread.exists(), "a minute of lease is left");
    owner.kill().expect("kill");
    owner.wait().expect("reap");
    eventually("the thread went with its process", || !thread.exists());
}

#[test]
fn an_instance_may_be_added_twice_and_removed_twice() {
    let mut ring = PollRing::new(&options(100)).expect("ring");
    for _ in 0..2 {
        ring.add(NOBODYS).expect("add");
        ring.add(NapiId(NOBODYS.0 + 1)).expect("add another");
    }
    for _ in 0..2 {
        ring.remove(NOBODYS).expect("remove");
    }
    // Numbers below are no NAPI ids: sockets keep CPU numbers there.
    for id in [0, 1] {
        for answer in [ring.add(NapiId(id)), ring.remove(NapiId(id))] {
            let error = answer.expect_err("not an id");
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }
}

#[test]
fn a_cpu_or_lease_that_cannot_be_is_refused_by_name() {
    let missing = RingOptions {
        cpu: CpuId(8000),
        ..options(100)
    };
    let error = PollRing::new(&missing)
        .expect_err("no such CPU")
        .to_string();
    assert!(
        error.contains("\"8000\"") && error.contains("online CPU"),
        "{error}"
    );
    for lease in [Duration::ZERO, Duration::from_micros(999), Duration::MAX] {
        let error = PollRing::new(&RingOptions {
            lease,
            ..options(100)
        })
        .expect_err("lease");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
}

/// As one of this process, except for whose it is.
#[test]
fn one_beside_this_process_polls_parks_and_ends_with_the_ring() {
    let mut ring = PollRing::beside(&options(200)).expect("ring");
    let tid = ring.thread_id();
    let process = process::process_of(tid).expect("alive");
    assert_ne!(process, std::process::id());
    let used = || process::cpu_time(tid, tid).expect("CPU time");
    ring.add(NOBODYS).expect("add");
    assert!(ring.is_asleep());
    let before = used();
    ring.wake().expect("wake");
    eventually("it polls", || used() > before);
    eventually("it parks", || ring.is_asleep());
    drop(ring);
    eventually("both end", || {
        [tid, process]
            .iter()
            .all(|id| !PathBuf::from(format!("/proc/{id}")).exists())
    });
}
