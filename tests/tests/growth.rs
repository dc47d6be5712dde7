//! Containers and execs by the hundred: none fails, and a shim that has had them all is as large as before. `make soak` does ten
//! times as much, and load for ten minutes more.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kbp_tests::lab::LIMIT;
use kbp_tests::{Lab, Pod, Runtime, Tasks, wait_until};

kbp_tests::scenarios!(on [stock_on_machine, stock_on_v2, kbp_on_machine, kbp_on_v2]: one_shim_for_all, load);

/// What the first rounds bring may stay: buffers, threads, the allocator's arenas.
const FIRST: u32 = 50;
/// Threads for blocking work, which live for a second after it; the shim looks at its pod now and then. A thread left by each life would be dozens.
const PASSING_THREADS: usize = 3;
/// By how much the resident set may differ afterwards, in KiB: single pages come and go with what ran last.
const TOLERANCE_KIB: u64 = 512;
/// The same after many at a time, which leave a hole here and there in the heap.
const BURST_TOLERANCE_KIB: u64 = 1024;
/// Callers at a time in the load.
const CALLERS: u32 = 4;

fn is_soak() -> bool {
    std::env::var_os("KBP_SOAK").is_some()
}

/// What must not grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    fds: usize,
    threads: usize,
    rss_kib: u64,
}

impl Size {
    fn of(pid: u32) -> Self {
        let count = |name: &str| {
            let entries = std::fs::read_dir(format!("/proc/{pid}/{name}"));
            entries.expect("the shim").count()
        };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the shim");
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let rss = rss.and_then(|r| r.trim().trim_end_matches(" kB").parse().ok());
        Self {
            fds: count("fd"),
            threads: count("task"),
            rss_kib: rss.expect("resident set"),
        }
    }

    /// Once nothing is going on: threads for blocking work stay for a second, and so does memory.
    fn at_rest(pid: u32) -> Self {
        let mut last = Self::of(pid);
        let mut since = Instant::now();
        wait_until("the shim to come to rest", 3 * LIMIT, || {
            let now = Self::of(pid);
            if now != last {
                last = now;
                since = Instant::now();
            }
            match since.elapsed() > Duration::from_millis(2500) {
                true => Ok(now),
                false => Err(format!("{now:?}")),
            }
        })
        .expect("rest")
    }
}

/// Makes a container without a task, in a shim of its group.
fn make(lab: &Lab<'_>, pod: &Pod<'_>, id: &str, group: &str) {
    let run = lab
        .container(id, ["sleep", "1000"])
        .netns(&pod.netns.path())
        .seccomp()
        .annotation("io.containerd.runc.v2.group", group);
    let made = lab.containerd.ctr(run.create_arguments()).expect("create");
    made.success().expect("create");
}

/// One task of a container with an exec in it.
fn life(tasks: &Tasks, id: &str) -> kbp_tests::Result<()> {
    tasks.create(id)?;
    tasks.start(id)?;
    let status = tasks.exec(id, "e", &["sh", "-c", "exit 3"])?;
    assert_eq!(status, 3, "{id}");
    tasks.kill(id)?;
    tasks.delete(id)
}

fn remove(lab: &Lab<'_>, ids: impl IntoIterator<Item = String>) {
    let delete = ["containers", "delete"].into_iter().map(str::to_owned);
    let deleted = lab.containerd.ctr(delete.chain(ids)).expect("delete");
    deleted.success().expect("delete");
}

fn one_shim_for_all(lab: &Lab<'_>) {
    let (sequential, at_once) = if is_soak() { (500, 100) } else { (50, 10) };
    let tasks = Tasks::of(&lab.containerd);
    let pod = lab.pod("pod");
    // It keeps the shim.
    make(lab, &pod, "stays", "g");
    tasks.create("stays").expect("create");
    tasks.start("stays").expect("start");
    let shim = lab.containerd.shim_pid("stays").expect("shim");
    for n in 0..at_once {
        make(lab, &pod, &format!("c{n}"), "g");
    }
    let together = || {
        std::thread::scope(|scope| {
            for n in 0..at_once {
                let tasks = &tasks;
                scope.spawn(move || life(tasks, &format!("c{n}")).expect("a life"));
            }
        });
    };
    let first = FIRST.min(sequential / 2);
    for _ in 0..first {
        life(&tasks, "c0").expect("a life");
    }
    let before = Size::at_rest(shim);
    for _ in first..sequential {
        life(&tasks, "c0").expect("a life");
    }
    let after = Size::at_rest(shim);
    together();
    let once = Size::at_rest(shim);
    together();
    let twice = Size::at_rest(shim);
    println!("one after the other: {before:?}, {after:?}; at once: {once:?}, {twice:?}");
    // The stock shim shows that nothing fails that must not; how it grows is not ours.
    if lab.arm.runtime == Runtime::Kbp {
        for now in [after, once, twice] {
            assert!(
                now.fds <= before.fds && now.threads <= before.threads + PASSING_THREADS,
                "before {before:?}, now {now:?}"
            );
        }
        assert!(
            after.rss_kib <= before.rss_kib + TOLERANCE_KIB,
            "before {before:?}, after {after:?}"
        );
        for now in [once, twice] {
            assert!(
                now.rss_kib <= before.rss_kib + BURST_TOLERANCE_KIB,
                "before {before:?}, now {now:?}"
            );
        }
        let state = lab.state("stays").expect("the pod's state");
        assert!(state.degraded.is_empty(), "{state:#?}");
    }
    tasks.kill("stays").expect("kill");
    tasks.delete("stays").expect("delete");
    remove(
        lab,
        (0..at_once)
            .map(|n| format!("c{n}"))
            .chain(["stays".to_owned()]),
    );
    wait_until("the shim's end", LIMIT, || {
        match Path::new(&format!("/proc/{shim}/exe")).exists() {
            false => Ok(()),
            true => Err("it runs".to_owned()),
        }
    })
    .expect("it ends with its last task");
}

/// Shims come and go as fast as they can, with a few callers at a time.
fn load(lab: &Lab<'_>) {
    let time = Duration::from_secs(match (is_soak(), lab.arm.runtime) {
        (true, Runtime::Kbp) => 600,
        // For comparison.
        (true, Runtime::Stock) => 60,
        (false, _) => 3,
    });
    let tasks = Tasks::of(&lab.containerd);
    let pod = lab.pod("pod");
    for n in 0..CALLERS {
        let id = format!("c{n}");
        make(lab, &pod, &id, &id);
    }
    let until = Instant::now() + time;
    let lives = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for n in 0..CALLERS {
            let (tasks, lives) = (&tasks, &lives);
            scope.spawn(move || {
                while Instant::now() < until {
                    life(tasks, &format!("c{n}")).expect("a life");
                    lives.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    println!("{} lives", lives.into_inner());
    remove(lab, (0..CALLERS).map(|n| format!("c{n}")));
}
