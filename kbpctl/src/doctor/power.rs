//! What the machine does to a CPU behind the scheduler's back: sleep states, throttling of realtime threads; and a bug of young kernels.

use std::path::Path;

use kbp_poller::config::{Config, Feature};

use super::Check;

/// A sleep state that takes longer to leave than this shows in a round trip, µs.
const DEEP_US: u32 = 10;

/// Every check of this file.
pub(super) fn checks(privileged: bool, config: Option<&Config>) -> Vec<Check> {
    vec![
        sleep_states(Path::new("/sys")),
        realtime(Path::new("/proc/sys/kernel/sched_rt_runtime_us")),
        threaded_busy_poll(privileged, config),
    ]
}

/// The deepest sleep state that an idle CPU may enter.
fn sleep_states(sys: &Path) -> Check {
    const NAME: &str = "c-states";
    let idle = sys.join("devices/system/cpu/cpuidle");
    let read = |path: &Path| Some(std::fs::read_to_string(path).ok()?.trim().to_owned());
    let driver = read(&idle.join("current_driver")).filter(|d| d != "none");
    let Some(driver) = driver else {
        return Check::ok(NAME, "no cpuidle driver: an idle CPU halts").meaning(
            "in a virtual machine a halted CPU has to be woken by the hypervisor, 20 to 50 µs; who polls does not halt",
        );
    };
    let mut deepest: Option<(u32, String, usize)> = None;
    for cpu in numbered(&sys.join("devices/system/cpu"), "cpu") {
        for state in numbered(&cpu.join("cpuidle"), "state") {
            if read(&state.join("disable")).as_deref() != Some("0") {
                continue;
            }
            let latency = read(&state.join("latency")).and_then(|l| l.parse().ok());
            let (Some(latency), Some(name)) = (latency, read(&state.join("name"))) else {
                continue;
            };
            match &mut deepest {
                Some((deep, _, cpus)) if *deep == latency => *cpus += 1,
                Some((deep, _, _)) if *deep > latency => {}
                _ => deepest = Some((latency, name, 1)),
            }
        }
    }
    match deepest {
        None => Check::ok(NAME, format!("driver {driver}, no sleep state is allowed")),
        Some((latency, name, _)) if latency <= DEEP_US => Check::ok(
            NAME,
            format!("driver {driver}; the deepest state {name} takes {latency} µs to leave"),
        ),
        Some((latency, name, cpus)) => Check::degraded(
            NAME,
            format!(
                "driver {driver}; {cpus} CPUs may sleep in {name}, which takes {latency} µs to leave"
            ),
            format!(
                "a request that comes after a pause longer than the busy-poll window waits up to {latency} µs more"
            ),
            format!("cpupower idle-set --disable-by-latency {DEEP_US} (costs power)"),
        ),
    }
}

/// Entries `PREFIX<number>` of a directory.
fn numbered(dir: &Path, prefix: &str) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| e.path())
        .filter(|p| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            name.strip_prefix(prefix)
                .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        })
        .collect()
}

/// kbp's own workers are not realtime; programs in pods may be.
fn realtime(path: &Path) -> Check {
    const NAME: &str = "rt-throttling";
    let text = std::fs::read_to_string(path).ok();
    match text.as_deref().map(str::trim) {
        None => Check::ok(
            NAME,
            "no sysctl kernel.sched_rt_runtime_us: the kernel has another way to share with realtime threads",
        ),
        Some("-1") => Check::degraded(
            NAME,
            "kernel.sched_rt_runtime_us = -1: realtime threads are never throttled",
            "a realtime program that busy-polls takes its CPU for good: other pods, kbp's workers and kernel threads there starve",
            "sysctl -w kernel.sched_rt_runtime_us=950000, unless every realtime program has CPUs of its own",
        ),
        Some("0") => Check::degraded(
            NAME,
            "kernel.sched_rt_runtime_us = 0: realtime threads do not run",
            "realtime programs in pods fail to start; kbp's workers are not realtime",
            "sysctl -w kernel.sched_rt_runtime_us=950000",
        ),
        Some(value) => Check::ok(NAME, format!("kernel.sched_rt_runtime_us = {value}")).meaning(
            "kbp's workers are not realtime and not throttled; a realtime program that busy-polls without end is, for the rest of each period",
        ),
    }
}

/// A thread of `threaded=busy-poll` on early 6.19 never reported to RCU-tasks, and everything that waits for that hung. Whether a kernel
/// has the mend cannot be tried without risking just that hang, so only what the kernel itself has said is looked at.
fn threaded_busy_poll(privileged: bool, config: Option<&Config>) -> Check {
    const NAME: &str = "threaded-busy-poll";
    if let Some(off) = config.and_then(|c| c.switched_off(Feature::Kthread)) {
        return Check::ok(NAME, off)
            .meaning("dedicated workers poll in another way; the bug of early 6.19 cannot strike");
    }
    if !privileged {
        return Check::ok(NAME, "not tried: it takes root").meaning(
            "kernels that can poll by a thread per NAPI (6.19) had a bug at first; run kbpctl doctor as root to see whether this one can",
        );
    }
    match kbp_kernel::probe::threaded_busy_poll() {
        Err(_) => Check::ok(
            NAME,
            "this kernel has no threaded busy polling, and so not the bug of its first version",
        )
        .meaning("dedicated workers poll by a ring or by sockets instead"),
        Ok(()) => judged(kernel_log().as_deref()),
    }
}

fn judged(log: Option<&str>) -> Check {
    const NAME: &str = "threaded-busy-poll";
    let stalled = log
        .into_iter()
        .flat_map(str::lines)
        .find(|l| l.contains("rcu_tasks") && l.contains("stall"));
    match (stalled, log) {
        (Some(line), _) => Check::broken(
            NAME,
            format!("the kernel log says: {}", line.trim()),
            "something keeps RCU-tasks waiting: tracing, BPF and module unloading hang; early 6.19 does so while a NAPI thread busy-polls",
            "a kernel with commit 1a86a1f7d889; until then disable = [\"kthread\"] in kbp's config file",
        ),
        (None, Some(_)) => Check::ok(NAME, "threaded busy polling is there; no stall of rcu_tasks in the kernel log")
            .meaning("early 6.19 kernels stall rcu_tasks while such a thread polls (mended by commit 1a86a1f7d889); that cannot be tried without risking the stall"),
        (None, None) => Check::degraded(
            NAME,
            "threaded busy polling is there; the kernel log cannot be read",
            "whether this kernel stalls rcu_tasks, as early 6.19 does, is not known",
            "dmesg | grep rcu_tasks while such workers run; a kernel with commit 1a86a1f7d889 is safe",
        ),
    }
}

/// What the kernel's log holds now.
pub(crate) fn kernel_log() -> Option<String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::File::options()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open("/dev/kmsg")
        .ok()?;
    let mut log = String::new();
    let mut record = [0; 8192];
    loop {
        match file.read(&mut record) {
            Ok(0) => return Some(log),
            Ok(n) => log.push_str(&String::from_utf8_lossy(&record[..n])),
            // The record was overwritten while it was looked for; the next one is there.
            Err(e) if e.raw_os_error() == Some(nix::errno::Errno::EPIPE as i32) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Some(log),
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn machine(states: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let sys = tempfile::tempdir().expect("tempdir");
        let cpus = sys.path().join("devices/system/cpu");
        std::fs::create_dir_all(cpus.join("cpuidle")).expect("mkdir");
        std::fs::write(cpus.join("cpuidle/current_driver"), "intel_idle\n").expect("write");
        for cpu in ["cpu0", "cpu1"] {
            for (n, (name, latency, disable)) in states.iter().enumerate() {
                let dir = cpus.join(format!("{cpu}/cpuidle/state{n}"));
                std::fs::create_dir_all(&dir).expect("mkdir");
                for (file, text) in [("name", name), ("latency", latency), ("disable", disable)] {
                    std::fs::write(dir.join(file), format!("{text}\n")).expect("write");
                }
            }
        }
        sys
    }

    #[test]
    fn deep_sleep_is_told_with_its_price() {
        let deep = [("POLL", "0", "0"), ("C1", "2", "0"), ("C6", "133", "0")];
        let check = sleep_states(machine(&deep).path());
        assert_eq!(check.verdict, Verdict::Degraded);
        assert!(
            check.found.contains("2 CPUs may sleep in C6") && check.found.contains("133 µs"),
            "{check:?}"
        );
        let shallow = [("POLL", "0", "0"), ("C1", "2", "0"), ("C6", "133", "1")];
        let check = sleep_states(machine(&shallow).path());
        assert_eq!(check.verdict, Verdict::Ok);
        assert!(check.found.contains("C1 takes 2 µs"), "{check:?}");
        let none = tempfile::tempdir().expect("tempdir");
        assert_eq!(sleep_states(none.path()).verdict, Verdict::Ok);
    }

    #[test]
    fn realtime_without_bounds_is_told() {
        let file = tempfile::NamedTempFile::new().expect("file");
        for (value, verdict) in [
            ("950000\n", Verdict::Ok),
            ("-1\n", Verdict::Degraded),
            ("0\n", Verdict::Degraded),
        ] {
            std::fs::write(file.path(), value).expect("write");
            assert_eq!(realtime(file.path()).verdict, verdict, "{value}");
        }
        assert_eq!(realtime(Path::new("/nonexistent")).verdict, Verdict::Ok);
    }

    #[test]
    fn a_stall_in_the_kernel_log_is_found() {
        let stalled = "6,1,2,-;usb 1\n3,9,9,-;INFO: rcu_tasks detected stalls on tasks:\n";
        let check = judged(Some(stalled));
        assert_eq!(check.verdict, Verdict::Broken);
        assert!(check.found.contains("detected stalls"), "{check:?}");
        assert_eq!(judged(Some("6,1,2,-;usb 1\n")).verdict, Verdict::Ok);
        assert_eq!(judged(None).verdict, Verdict::Degraded);
    }
}
