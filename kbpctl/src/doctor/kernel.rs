//! What the running kernel can do, by trying it.

use std::path::Path;

use kbp_kernel::probe;
use kbp_poller::config::{Config, Feature};

use super::{Check, Verdict};

/// One kernel feature.
struct Probe {
    name: &'static str,
    /// The switch of the config file that turns it off.
    switch: Option<Feature>,
    needs_root: bool,
    run: fn() -> kbp_kernel::Result<()>,
    /// What is there when it works.
    works: &'static str,
    /// How bad it is when it does not.
    otherwise: Verdict,
    means: &'static str,
    remedy: &'static str,
}

const PROBES: [Probe; 8] = [
    Probe {
        name: "veth-napi",
        switch: Some(Feature::Napi),
        needs_root: true,
        run: veth_napi,
        works: "a veth end with GRO on has a NAPI instance, so it can be polled",
        otherwise: Verdict::Broken,
        means: "no packet of a pod can be polled; pods are as fast as under runc",
        remedy: "Linux 5.13 or later, with the veth driver",
    },
    Probe {
        name: "netdev-family",
        switch: Some(Feature::Napi),
        needs_root: true,
        run: probe::netdev_family,
        works: "the kernel tells NAPI ids (netdev napi-get)",
        otherwise: Verdict::Degraded,
        means: "workers learn what to poll from a packet that kbp sends from the pod to the node",
        remedy: "Linux 6.8 or later",
    },
    Probe {
        name: "sqpoll-napi",
        switch: Some(Feature::Sqpoll),
        needs_root: false,
        run: probe::sqpoll_napi,
        works: "an io_uring kernel thread can poll NAPI instances",
        otherwise: Verdict::Degraded,
        means: "workers poll through sockets instead, with a system call for each round",
        remedy: "Linux 6.13 or later, io_uring allowed (sysctl kernel.io_uring_disabled=0, no seccomp filter against it)",
    },
    Probe {
        name: "socket-busy-poll",
        switch: None,
        needs_root: false,
        run: probe::socket_busy_poll,
        works: "SO_BUSY_POLL can be set",
        otherwise: Verdict::Broken,
        means: "no socket busy-polls: every receive pays a wake-up",
        remedy: "a kernel with CONFIG_NET_RX_BUSY_POLL",
    },
    Probe {
        name: "epoll-busy-poll",
        switch: Some(Feature::EpollParams),
        needs_root: false,
        run: probe::epoll_busy_poll,
        works: "epoll instances can be told to busy-poll (EPIOCSPARAMS)",
        otherwise: Verdict::Degraded,
        means: "servers on epoll sleep in epoll_wait: about 30 instead of 13 µs for a round trip",
        remedy: "Linux 6.9 or later",
    },
    Probe {
        name: "seccomp-notify",
        switch: Some(Feature::SeccompNotify),
        needs_root: false,
        run: probe::seccomp_notify,
        works: "a seccomp listener can answer bind, connect, listen and epoll_create",
        otherwise: Verdict::Degraded,
        means: "the sockets of unmodified programs get no busy-poll window, which is most of the gain",
        remedy: "Linux 5.14 or later with CONFIG_SECCOMP_FILTER; run outside of a container that has a listener itself",
    },
    Probe {
        name: "seccomp-sync-wake-up",
        switch: Some(Feature::SeccompNotify),
        needs_root: false,
        run: probe::seccomp_sync_wake_up,
        works: "the listener answers on the caller's CPU",
        otherwise: Verdict::Degraded,
        means: "each new connection costs up to 50 instead of 10 µs, once; packets cost the same",
        remedy: "Linux 6.6 or later",
    },
    Probe {
        name: "pidfd-getfd",
        switch: Some(Feature::SeccompNotify),
        needs_root: false,
        run: probe::pidfd_getfd,
        works: "the shim can reach the sockets of a container",
        otherwise: Verdict::Degraded,
        means: "the sockets of unmodified programs get no busy-poll window, which is most of the gain",
        remedy: "Linux 5.6 or later, and no security module that forbids ptrace to root",
    },
];

/// Every check of the kernel.
pub(super) fn checks(privileged: bool, config: Option<&Config>) -> Vec<Check> {
    let mut checks: Vec<Check> = PROBES.iter().map(|p| p.check(privileged, config)).collect();
    let net = Path::new("/proc/sys/net/core");
    checks.push(io_uring(Path::new("/proc/sys/kernel/io_uring_disabled")));
    checks.push(busy_read(&net.join("busy_read")));
    checks.push(busy_poll(&net.join("busy_poll")));
    checks.push(napi_settings(privileged, config));
    checks
}

/// Not a defect when it is missing: a pod has to ask for what it is good for.
fn napi_settings(privileged: bool, config: Option<&Config>) -> Check {
    const NAME: &str = "napi-settings";
    const WITHOUT: &str = "pods that ask for kbp.io/busy-poll-mode: suspend or kbp.io/prefer-busy-poll spin as by default, or are refused where they require it";
    if let Some(off) = config.and_then(|c| c.switched_off(Feature::NapiSettings)) {
        return Check::ok(NAME, off).meaning(WITHOUT);
    }
    if !privileged {
        return Check::ok(NAME, "not tried: it takes root").meaning(
            "run kbpctl doctor as root to see whether kbp.io/busy-poll-mode: suspend is to be had",
        );
    }
    match probe::napi_settings() {
        Ok(()) => Check::ok(
            NAME,
            "packets can wait for whoever polls (netdev napi-set), for pods that ask for it",
        ),
        Err(error) => Check::ok(NAME, error.to_string()).meaning(WITHOUT),
    }
}

/// Asks the kernel for the instance; one that lists none is asked by a packet.
fn veth_napi() -> kbp_kernel::Result<()> {
    match probe::netdev_family() {
        Ok(()) => probe::veth_napi(),
        Err(_) => probe::veth_packet(),
    }
}

impl Probe {
    fn check(&self, privileged: bool, config: Option<&Config>) -> Check {
        let off = self
            .switch
            .and_then(|feature| config?.switched_off(feature));
        if let Some(off) = off {
            return Check {
                verdict: self.otherwise,
                ..Check::degraded(
                    self.name,
                    off,
                    self.means,
                    "take it out of `disable` once this kernel is trusted with it again",
                )
            };
        }
        if self.needs_root && !privileged {
            return Check::degraded(
                self.name,
                "not tried: it takes a network namespace of its own, and that takes root",
                "nothing is known of it",
                "run kbpctl doctor as root",
            );
        }
        match (self.run)() {
            Ok(()) => Check::ok(self.name, self.works),
            Err(error) => Check {
                verdict: self.otherwise,
                ..Check::degraded(self.name, error.to_string(), self.means, self.remedy)
            },
        }
    }
}

/// The sysctl on its own, because it is the usual reason for a failed probe, and because it says who is let in.
fn io_uring(path: &Path) -> Check {
    const NAME: &str = "io-uring-sysctl";
    let meaning = "workers poll through sockets instead, with a system call for each round";
    let remedy = "sysctl -w kernel.io_uring_disabled=0, and a file in /etc/sysctl.d to keep it";
    match read(path).as_deref() {
        // Before 6.6 there is no such sysctl: nothing is switched off.
        None => Check::ok(
            NAME,
            "io_uring is not switched off (there is no sysctl for it)",
        ),
        Some("0") => Check::ok(NAME, "kernel.io_uring_disabled = 0"),
        Some("1") => Check::ok(
            NAME,
            "kernel.io_uring_disabled = 1: for privileged processes only",
        )
        .meaning("shims run as root and are let in"),
        Some(value) => Check::degraded(
            NAME,
            format!("kernel.io_uring_disabled = {value}"),
            meaning,
            remedy,
        ),
    }
}

/// kbp sets the window on each socket of its own pods; the node-wide default makes every other socket spin as well.
fn busy_read(path: &Path) -> Check {
    const NAME: &str = "net-core-busy-read";
    match read(path).as_deref() {
        None => Check::degraded(
            NAME,
            format!("{} cannot be read", path.display()),
            "a node-wide default for SO_BUSY_POLL would go unseen",
            "run kbpctl doctor in the host's network namespace",
        ),
        Some("0") => Check::ok(
            NAME,
            "net.core.busy_read = 0: only sockets of kbp pods busy-poll",
        ),
        Some(value) => Check::degraded(
            NAME,
            format!("net.core.busy_read = {value}"),
            format!(
                "every new socket on this node spins for up to {value} µs, those of other pods too"
            ),
            "sysctl -w net.core.busy_read=0: kbp sets the window socket by socket",
        ),
    }
}

/// Not a defect when it is 0: a node-wide knob is for the operator to turn.
fn busy_poll(path: &Path) -> Check {
    const NAME: &str = "net-core-busy-poll";
    match read(path).as_deref() {
        None => Check::degraded(
            NAME,
            format!("{} cannot be read", path.display()),
            "whether poll(2) and select(2) can busy-poll is not known",
            "run kbpctl doctor in the host's network namespace",
        ),
        Some("0") => Check::ok(NAME, "net.core.busy_poll = 0").meaning(
            "programs that wait in poll(2) or select(2) do not busy-poll; with node-busy-poll = 50 in /etc/kbp/config.toml those of kbp pods would",
        ),
        Some(value) => Check::ok(
            NAME,
            format!("net.core.busy_poll = {value}: poll(2) and select(2) busy-poll on sockets of kbp pods"),
        ),
    }
}

fn read(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), content).expect("write");
        file
    }

    #[test]
    fn sysctls_are_judged() {
        for (check, content, verdict) in [
            (io_uring as fn(&Path) -> Check, "0\n", Verdict::Ok),
            (io_uring, "1\n", Verdict::Ok),
            (io_uring, "2\n", Verdict::Degraded),
            (busy_read, "0\n", Verdict::Ok),
            (busy_read, "50\n", Verdict::Degraded),
            (busy_poll, "0\n", Verdict::Ok),
            (busy_poll, "50\n", Verdict::Ok),
        ] {
            let found = check(file(content).path());
            assert_eq!(found.verdict, verdict, "{content}: {found:?}");
            assert!(found.found.contains(content.trim()), "{found:?}");
        }
        let none = Path::new("/nonexistent");
        assert_eq!(io_uring(none).verdict, Verdict::Ok);
        assert_eq!(busy_read(none).verdict, Verdict::Degraded);
        assert_eq!(busy_poll(none).verdict, Verdict::Degraded);
    }

    fn probe(run: fn() -> kbp_kernel::Result<()>) -> Probe {
        Probe {
            name: "x",
            switch: Some(Feature::Sqpoll),
            needs_root: true,
            run,
            works: "it works",
            otherwise: Verdict::Broken,
            means: "slow",
            remedy: "a new kernel",
        }
    }

    fn refused() -> kbp_kernel::Result<()> {
        Err(kbp_kernel::Error::NotFound {
            what: "the feature".to_owned(),
        })
    }

    #[test]
    fn a_probe_says_what_it_found_and_what_to_do() {
        let good = probe(|| Ok(())).check(true, None);
        assert_eq!(good, Check::ok("x", "it works"));
        let bad = probe(refused).check(true, None);
        assert_eq!(
            bad,
            Check::broken("x", "the feature not found", "slow", "a new kernel")
        );
    }

    #[test]
    fn what_needs_root_is_not_guessed_without_it() {
        let check = probe(|| Ok(())).check(false, None);
        assert_eq!(check.verdict, Verdict::Degraded);
        assert!(check.found.contains("not tried"), "{check:?}");
    }

    #[test]
    fn a_switched_off_feature_is_reported_with_the_file_that_says_so() {
        let config = file("disable = [\"sqpoll\"]");
        let config = Config::read(config.path()).expect("config");
        let check = probe(|| Ok(())).check(true, Some(&config));
        assert_eq!(check.verdict, Verdict::Broken);
        assert!(
            check.found.contains(&config.path.display().to_string()),
            "{check:?}"
        );
    }
}
