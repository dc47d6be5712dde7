//! How many processes of a pod may poll in epoll.
//!
//! A process that polls holds its CPU for its window, while others of the pod wait for that CPU: with more of them than CPUs each
//! waits for the windows of all before it. A server that forks a process for each connection (PostgreSQL) falls to a fraction of
//! its throughput by that. So under `auto` as many processes as the caller may use CPUs are given epoll instances with a window,
//! in the order in which they come, and the others sleep as they always did.

use std::sync::{Mutex, PoisonError};

use kbp_kernel::process;

/// The processes of a pod that have epoll instances with a window.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    processes: Mutex<Vec<u32>>,
}

impl Crowd {
    /// Whether thread `tid`, which makes an epoll instance, is to have a window: counts its process from then on. A thread that
    /// cannot be asked for its process or its CPUs is gone, or will be let poll.
    pub(super) fn admits(&self, tid: u32) -> bool {
        let Ok(process) = process::process_of(tid) else {
            return true;
        };
        // A list of numbers is whole between any two operations on it.
        let mut processes = self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if processes.contains(&process) {
            return true;
        }
        let Ok(cpus) = process::affinity_count(tid) else {
            return true;
        };
        if processes.len() >= cpus {
            // Signal 0 only asks. A number that is another's by now counts one too many.
            processes.retain(|pid| process::kill(*pid, 0).unwrap_or(true));
        }
        let room = processes.len() < cpus;
        if room {
            processes.push(process);
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use kbp_kernel::{CpuId, CpuSet};

    use super::*;

    struct Sleeper(Child);

    impl Sleeper {
        fn new(cpus: &CpuSet) -> Self {
            let child = Command::new("sleep").arg("60").spawn().expect("sleep");
            process::set_affinity(child.id(), cpus).expect("affinity");
            Self(child)
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn as_many_processes_as_cpus_are_admitted_and_the_dead_make_room() {
        let mut usable = kbp_kernel::cpu::usable()
            .expect("cpus")
            .iter()
            .collect::<Vec<CpuId>>();
        usable.truncate(1);
        let one: CpuSet = usable.into_iter().collect();
        let crowd = Crowd::default();
        let first = Sleeper::new(&one);
        let second = Sleeper::new(&one);
        assert!(crowd.admits(first.0.id()));
        assert!(!crowd.admits(second.0.id()));
        // The same process may have as many as it likes.
        assert!(crowd.admits(first.0.id()));
        drop(first);
        assert!(crowd.admits(second.0.id()));
        let third = Sleeper::new(&one);
        assert!(!crowd.admits(third.0.id()));
    }
}
