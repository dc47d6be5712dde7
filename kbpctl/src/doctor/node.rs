//! The node itself: privileges, config file, CPUs.

use kbp_kernel::cpu::Topology;
use kbp_kernel::{CpuSet, cpu};
use kbp_poller::config::Config;

use super::Check;

/// Whether everything can be tried.
pub(super) fn privileges(privileged: bool) -> Check {
    const NAME: &str = "privileges";
    if privileged {
        Check::ok(NAME, "running as root: everything can be tried")
    } else {
        Check::degraded(
            NAME,
            "not running as root",
            "some lines below could not be tried; shims run as root and may fare better",
            "run kbpctl doctor as root",
        )
    }
}

/// The config file, and what is wrong with it.
pub(super) fn config() -> (Option<Config>, Check) {
    const NAME: &str = "config";
    match Config::load() {
        Ok(config) => {
            let found = if config.path.exists() {
                format!("{} is read", config.path.display())
            } else {
                format!("no {}: defaults hold", config.path.display())
            };
            (Some(config), Check::ok(NAME, found))
        }
        Err(error) => (
            None,
            Check::broken(
                NAME,
                error.to_string(),
                "pods with the kbp runtime are refused until this is mended",
                "mend the file, or move it away: without it defaults hold",
            ),
        ),
    }
}

/// The CPU pool against the machine.
pub(super) fn checks(config: Option<&Config>) -> Vec<Check> {
    const NAME: &str = "cpu-pool";
    // Of a broken config enough has been said.
    let Some(config) = config else {
        return Vec::new();
    };
    let machine = Topology::read().and_then(|t| Ok((t, cpu::usable()?)));
    let check = match machine {
        Ok((topology, _)) if wants_isolated(config, &topology) => none_isolated(),
        Ok((topology, usable)) => pool(&config.cpus, &topology, &usable),
        Err(error) => Check::degraded(
            NAME,
            error.to_string(),
            "no worker can be placed",
            "mount sysfs at /sys",
        ),
    };
    vec![check]
}

/// The operator wants a pool of the CPUs that the kernel isolates, and it isolates none.
fn wants_isolated(config: &Config, topology: &Topology) -> bool {
    config.cpus_isolated && topology.isolated.is_empty()
}

fn none_isolated() -> Check {
    Check::degraded(
        "cpu-pool",
        "cpus = \"isolated\", but the kernel isolates no CPU: there is no pool",
        "only the sockets poll (kbp.io/worker: auto); dedicated and shared workers are not to be had",
        "isolcpus= on the kernel command line, or name the CPUs, such as cpus = \"2-3\"",
    )
}

fn pool(pool: &CpuSet, topology: &Topology, usable: &CpuSet) -> Check {
    const NAME: &str = "cpu-pool";
    let online = &topology.online;
    if pool.is_empty() {
        let isolated = if topology.isolated.is_empty() {
            String::new()
        } else {
            format!(
                "; the kernel isolates CPUs {}, which cpus = \"isolated\" would use",
                topology.isolated
            )
        };
        return Check::ok(NAME, format!("no pool; CPUs {online} are online{isolated}")).meaning(
            "only the sockets poll (kbp.io/worker: auto); dedicated and shared workers are not to be had",
        );
    }
    let offline: CpuSet = pool.iter().filter(|c| !online.contains(*c)).collect();
    if !offline.is_empty() {
        return Check::degraded(
            NAME,
            format!("CPUs {offline} of the pool {pool} are offline"),
            "fewer workers than the pool promises",
            format!(
                "bring them online (echo 1 > /sys/devices/system/cpu/cpuN/online), or take them out of cpus; online: {online}"
            ),
        );
    }
    let outside: CpuSet = pool.iter().filter(|c| !usable.contains(*c)).collect();
    if !outside.is_empty() {
        return Check::degraded(
            NAME,
            format!(
                "CPUs {outside} of the pool {pool} are outside the cpuset of this process ({usable})"
            ),
            "a shim with the same cpuset can put no worker there",
            "run containerd in a cgroup whose cpuset has the pool",
        );
    }
    if online.is_subset(pool) {
        return Check::degraded(
            NAME,
            format!("the pool {pool} is every CPU of this machine"),
            "polling workers fight the pods for every CPU",
            "leave CPUs for the pods: make cpus smaller",
        );
    }
    let check = Check::ok(NAME, format!("pool of CPUs: {pool}; online: {online}"));
    let shared: CpuSet = pool
        .iter()
        .filter(|c| !topology.isolated.contains(*c))
        .collect();
    if shared.is_empty() {
        check
    } else {
        check.meaning(format!(
            "other threads run on {shared} too and delay a worker; isolcpus={shared} on the kernel command line keeps them away"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn machine(online: &str, isolated: &str) -> Topology {
        let sys = tempfile::tempdir().expect("tempdir");
        let cpus = sys.path().join("devices/system/cpu");
        std::fs::create_dir_all(&cpus).expect("mkdir");
        std::fs::write(cpus.join("online"), online).expect("write");
        std::fs::write(cpus.join("isolated"), isolated).expect("write");
        Topology::read_from(sys.path()).expect("topology")
    }

    #[test]
    fn isolated_cpus_that_are_not_there_are_told() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), "cpus = \"isolated\"").expect("write");
        let config = Config::read(file.path()).expect("config");
        assert!(wants_isolated(&config, &machine("0-3", "")));
        assert!(!wants_isolated(&config, &machine("0-3", "2-3")));
        assert_eq!(none_isolated().verdict, Verdict::Degraded);
        std::fs::write(file.path(), "").expect("write");
        let config = Config::read(file.path()).expect("config");
        assert!(!wants_isolated(&config, &machine("0-3", "")));
    }

    #[test]
    fn the_pool_is_judged_against_the_machine() {
        for (cpus, online, isolated, usable, verdict, words) in [
            ("", "0-3", "", "0-3", Verdict::Ok, "no pool"),
            ("", "0-3", "2-3", "0-3", Verdict::Ok, "cpus = \"isolated\""),
            ("2-3", "0-3", "2-3", "0-3", Verdict::Ok, "pool of CPUs: 2-3"),
            ("2-3", "0-3", "", "0-3", Verdict::Ok, "pool of CPUs: 2-3"),
            (
                "2-3",
                "0-2",
                "",
                "0-2",
                Verdict::Degraded,
                "CPUs 3 of the pool 2-3 are offline",
            ),
            (
                "2-3",
                "0-3",
                "",
                "0-2",
                Verdict::Degraded,
                "outside the cpuset",
            ),
            ("0-3", "0-3", "", "0-3", Verdict::Degraded, "every CPU"),
        ] {
            let set = |text: &str| text.parse::<CpuSet>().expect("cpus");
            let check = pool(&set(cpus), &machine(online, isolated), &set(usable));
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.found.contains(words), "{check:?}");
        }
        let set = |text: &str| text.parse::<CpuSet>().expect("cpus");
        let check = pool(&set("2-3"), &machine("0-3", "2"), &set("0-3"));
        assert!(
            check
                .means
                .as_deref()
                .is_some_and(|m| m.contains("isolcpus=3")),
            "{check:?}"
        );
    }
}
