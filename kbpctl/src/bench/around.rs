//! Processes of the node beside a measurement: spinners, hogs, and the programs of the arm without containers.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use kbp_kernel::CpuId;
use kbp_kernel::netns::Netns;

/// Processes of the node that belong to a measurement; killed when this is dropped, and by the kernel when this process dies.
#[derive(Default)]
pub(super) struct Around(Vec<Child>);

impl Around {
    /// A process that never sleeps on one CPU; in the idle class and that cgroup where one is given.
    pub(super) fn spin(&mut self, cpu: CpuId, idle_group: Option<&Path>) -> Result<()> {
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.args(["load", "spin", "--cpu", &cpu.to_string()]);
        if let Some(group) = idle_group {
            command.arg("--idle-group").arg(group);
        }
        self.spawn(command)
    }

    /// A process in a network namespace.
    pub(super) fn start(&mut self, netns: &Netns, command: &[String]) -> Result<()> {
        let Some((program, arguments)) = command.split_first() else {
            bail!("nothing to start");
        };
        let mut command = Command::new(program);
        command.args(arguments);
        // A child is born into the namespaces of the thread that starts it.
        netns.run(|| self.spawn(command))?
    }

    fn spawn(&mut self, mut command: Command) -> Result<()> {
        use std::os::unix::process::CommandExt;
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        self.0.push(child);
        Ok(())
    }
}

impl Drop for Around {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A cgroup at the top, beside the one of the containers and everything else, that is idle as a whole: a thread of the class SCHED_IDLE gives way within its own group
/// only, and against other groups it counts as much as any thread (kernel/sched/fair.c, find_matching_se).
pub(super) fn idle_group(name: &str) -> Result<PathBuf> {
    const ROOT: &str = "/sys/fs/cgroup";
    let v1 = ["cpu", "cpu,cpuacct"].map(|c| Path::new(ROOT).join(c));
    let root = v1.into_iter().find(|d| d.join("cgroup.procs").exists());
    let unified = root.is_none();
    let root = root.unwrap_or_else(|| PathBuf::from(ROOT));
    let group = root.join(super::keeper::idle_group(name));
    std::fs::create_dir_all(&group).with_context(|| format!("make cgroup {}", group.display()))?;
    if unified {
        // It may be on already, and then may not be written by everybody.
        let _ = std::fs::write(root.join("cgroup.subtree_control"), "+cpu");
    }
    let file = group.join("cpu.idle");
    std::fs::write(&file, "1").with_context(|| {
        format!(
            "write {}: the arm spinner wants Linux 5.15 or later with the cpu controller",
            file.display()
        )
    })?;
    Ok(group)
}
