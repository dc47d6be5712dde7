//! Decides what a container's sockets are given, and edits its bundle for it.

use kbp_kernel::cpu::Topology;
use kbp_kernel::netns::Netns;
use kbp_kernel::{probe, syscalls};
use kbp_poller::config::{Config, Feature};
use kbp_poller::policy::BusyPoll;
use kbp_poller::state::{self, Degraded, Part};
use kbp_poller::window::{self, CpuSituation, Window};

use super::Context;
use super::asked::Asked;
use super::oci_runtime::OciRuntime;
use crate::sockets::{Notifier, Prefer, Treatment};
use crate::spec::seccomp::{self, EPOLL_CALLS, Listener, Merged, SOCKET_CALLS};
use crate::spec::{CpuLimits, Network, Spec};

/// Why nothing is touched for a container on the host's network.
pub(super) const HOST_NETWORK: &str = "the container uses the host's network, where kbp touches nothing; give the pod a network of its own";

/// `AUDIT_ARCH_*` of this build.
const ARCH: u32 = if cfg!(target_arch = "x86_64") {
    syscalls::ARCH_X86_64
} else if cfg!(target_arch = "aarch64") {
    syscalls::ARCH_AARCH64
} else {
    0
};

/// Whether the node can give sockets and epoll instances a window; the reason where it cannot.
#[derive(Debug, Clone)]
pub(super) struct Support {
    sockets: Result<(), String>,
    epoll: Result<(), String>,
}

impl Support {
    /// Tries on throw-away objects what the notifier will do.
    pub(super) fn probe(config: &Config) -> Self {
        let sockets = match config.switched_off(Feature::SeccompNotify) {
            Some(off) => Err(off),
            None => probe_sockets(),
        };
        let epoll = match (config.switched_off(Feature::EpollParams), &sockets) {
            (Some(off), _) => Err(off),
            (None, Err(reason)) => Err(reason.clone()),
            (None, Ok(())) => probe::epoll_busy_poll().map_err(|e| e.to_string()),
        };
        Self { sockets, epoll }
    }
}

fn probe_sockets() -> Result<(), String> {
    if syscalls::Syscall::Bind.number(ARCH).is_none() {
        return Err("kbp does not know the system calls of this architecture".to_owned());
    }
    probe::socket_busy_poll()
        .and_then(|()| probe::seccomp_notify())
        .and_then(|()| probe::pidfd_getfd())
        .map_err(|e| e.to_string())
}

/// Whether a container with this network shares the host's. A namespace that cannot be opened is the runtime's to refuse.
pub(super) fn is_host_network(network: &Network) -> bool {
    match network {
        Network::Host => true,
        Network::New => false,
        Network::Path(path) => Netns::current()
            .and_then(|host| Netns::open(path)?.is_same(&host))
            .unwrap_or(false),
    }
}

/// Decides the window of a container.
pub(super) fn window(asked: &Asked, limits: &CpuLimits, context: &Context) -> Window {
    let situation = Topology::read()
        .map_err(|e| e.to_string())
        .and_then(|topology| {
            let taken = state::taken_cpus(
                &asked.config.state_dir,
                &context.namespace,
                &context.pod_id,
                &topology.online,
            )
            .map_err(|e| e.to_string())?;
            Ok(CpuSituation {
                cpuset: limits.cpuset(),
                online: topology.online,
                taken,
                quota: limits.quota_cpus(),
            })
        });
    match situation {
        Ok(situation) => window::decide(asked.policy.busy_poll, &situation),
        Err(reason) => Window {
            micros: None,
            reason: format!("the CPUs of this container are not known: {reason}"),
        },
    }
}

/// What to install a listener with.
pub(super) struct Means<'a> {
    pub(super) support: &'a Support,
    pub(super) runtime: &'a OciRuntime,
    /// The notifier, or why there is none.
    pub(super) notifier: Result<&'a Notifier, String>,
}

/// What a container is given, and what of it is not to be had.
#[derive(Debug, Default)]
pub(super) struct Treated {
    /// None: no listener was installed.
    pub(super) treatment: Option<Treatment>,
    pub(super) degraded: Vec<Degraded>,
}

impl Treated {
    fn without(reason: &str) -> Self {
        Self {
            treatment: None,
            degraded: no_sockets(reason),
        }
    }
}

/// Installs the listener in the container's specification, which is edited but not written, where there is a window to give.
pub(super) fn install(
    spec: &mut Spec,
    asked: &Asked,
    window: &Window,
    means: &Means<'_>,
) -> Treated {
    if window.micros.is_none() {
        return Treated::default();
    }
    let usable = means
        .support
        .sockets
        .clone()
        .and_then(|()| match &means.runtime.unable {
            Some(reason) => Err(reason.clone()),
            None => means.notifier.clone(),
        });
    let notifier = match usable {
        Ok(notifier) => notifier,
        Err(reason) => return Treated::without(&reason),
    };
    let mut calls = SOCKET_CALLS.to_vec();
    let mut missing = Vec::new();
    match &means.support.epoll {
        Ok(()) => calls.extend(EPOLL_CALLS),
        Err(reason) => missing.push(Degraded {
            part: Part::EpollBusyPoll,
            reason: reason.clone(),
        }),
    }
    let listener = Listener {
        path: notifier.socket(),
        metadata: notifier.metadata(),
        flags: &means.runtime.flags,
        // crun waits under the filter for a helper process that sends the descriptor.
        runtime_needs: if means.runtime.is_runc {
            &[]
        } else {
            &["wait4"]
        },
    };
    let merged = match seccomp::trap(spec.value_mut(), &calls, &listener) {
        Ok(merged) => merged,
        Err(error) => return Treated::without(&error.to_string()),
    };
    missing.extend(conditions(&merged));
    let treatment = Treatment {
        window: window.micros,
        epoll: means.support.epoll.is_ok(),
        bounded: asked.policy.busy_poll == BusyPoll::Auto,
        prefer: prefer(asked),
    };
    Treated {
        treatment: (!merged.trapped.is_empty()).then_some(treatment),
        degraded: missing,
    }
}

/// Where the settings of NAPIs are not to be touched, nothing prefers to poll either.
fn prefer(asked: &Asked) -> Prefer {
    let policy = &asked.policy;
    let may = asked.config.switched_off(Feature::NapiSettings).is_none();
    Prefer {
        sockets: may && policy.prefer_busy_poll,
        epolls: may && policy.defers(),
    }
}

/// What the profile's conditions keep from being set up. Denied calls are nothing that is missing.
fn conditions(merged: &Merged) -> Vec<Degraded> {
    let kept = |calls: &[&str]| -> Vec<&str> {
        merged
            .kept
            .iter()
            .copied()
            .filter(|call| calls.contains(call))
            .collect()
    };
    [
        (Part::SocketBusyPoll, kept(&SOCKET_CALLS)),
        (Part::EpollBusyPoll, kept(&EPOLL_CALLS)),
    ]
    .into_iter()
    .filter(|(_, calls)| !calls.is_empty())
    .map(|(part, calls)| Degraded {
        part,
        reason: format!(
            "the seccomp profile puts conditions on {}, so kbp leaves it alone; allow it without conditions",
            calls.join(", ")
        ),
    })
    .collect()
}

/// Neither sockets nor epoll instances are given anything, for this reason.
pub(super) fn no_sockets(reason: &str) -> Vec<Degraded> {
    [Part::SocketBusyPoll, Part::EpollBusyPoll]
        .map(|part| Degraded {
            part,
            reason: reason.to_owned(),
        })
        .into()
}
