//! A process that wants its CPU all the time: a hog, or, in the idle class, what keeps a CPU from halting and does nothing else.

use anyhow::{Context, Result};
use kbp_kernel::process::{self, Scheduling};

use super::SpinArgs;

/// Until it is killed.
pub(super) fn run(args: &SpinArgs) -> Result<()> {
    args.place.take()?;
    if let Some(group) = &args.idle_group {
        let file = group.join("cgroup.procs");
        std::fs::write(&file, "0").with_context(|| format!("write {}", file.display()))?;
        process::set_scheduling(0, Scheduling::Idle)?;
    }
    loop {
        std::hint::spin_loop();
    }
}
