//! The control arm: threads in the idle class that do nothing but keep their CPUs from halting.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::{CpuId, CpuSet};

/// A cgroup that competes for CPUs; removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

impl Group {
    /// Makes one below the root; `idle` as a whole, or of ordinary weight.
    pub(crate) fn new(name: &str, idle: bool) -> Result<Self> {
        let roots = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];
        let Some(root) = roots.into_iter().map(Path::new).find(|r| r.is_dir()) else {
            bail!(
                "threads can be moved alone in the cgroup v1 controller cpu only, which is not mounted"
            );
        };
        let group = Self(root.join(name));
        std::fs::create_dir(&group.0).with_context(|| format!("create {}", group.0.display()))?;
        if idle {
            let file = group.0.join("cpu.idle");
            std::fs::write(&file, "1").with_context(|| format!("write {}", file.display()))?;
        }
        Ok(group)
    }

    /// Moves one thread of any process into it.
    pub(crate) fn take(&self, tid: u32) -> Result<()> {
        let file = self.0.join("tasks");
        std::fs::write(&file, tid.to_string())
            .with_context(|| format!("move thread {tid} to {}", self.0.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let until = Instant::now() + Duration::from_secs(5);
        // Busy for as long as the last thread takes to go.
        while std::fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// One spinner a CPU, until it is dropped.
#[derive(Debug)]
pub(crate) struct Spinners {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    _group: Arc<Group>,
}

impl Spinners {
    pub(crate) fn start(cpus: &CpuSet, name: &str) -> Result<Self> {
        let group = Arc::new(Group::new(name, true)?);
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |cpu: CpuId| {
            let (stop, group) = (Arc::clone(&stop), Arc::clone(&group));
            std::thread::spawn(move || {
                process::set_affinity(0, &[cpu].into_iter().collect())?;
                process::set_scheduling(0, Scheduling::Idle)?;
                group.take(nix::unistd::gettid().as_raw().unsigned_abs())?;
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                Ok(())
            })
        };
        let threads = cpus.iter().map(spawn).collect();
        Ok(Self {
            stop,
            threads,
            _group: group,
        })
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("a spinner: {error:#}"),
                Err(_) => eprintln!("a spinner panicked"),
            }
        }
    }
}
