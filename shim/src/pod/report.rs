//! What the state file says of a pod: kept by its attachment, or, where nothing could be attached, here.

use std::path::PathBuf;

use kbp_kernel::CpuSet;
use kbp_poller::polled::Polled;
use kbp_poller::state::{self, Degraded, PodState, SocketCounters};
use kbp_poller::window::Window;

use super::Context;
use super::asked::Asked;

/// What holds for the sockets of a pod as a whole.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sockets {
    pub(super) window: Window,
    pub(super) cpuset: Option<CpuSet>,
}

/// A container's share in [`Sockets`].
#[derive(Debug, Clone)]
pub(super) struct Share<'a> {
    pub(super) id: &'a str,
    /// Whether it only holds the pod's namespaces.
    pub(super) sandbox: bool,
    pub(super) window: &'a Window,
    pub(super) cpuset: Option<CpuSet>,
}

impl Sockets {
    /// Sums the containers of a pod up. The sandbox container counts only while it is alone: it serves nobody, and has
    /// none of the limits that the others have.
    pub(super) fn of(shares: &[Share<'_>]) -> Self {
        let served: Vec<&Share<'_>> = shares.iter().filter(|s| !s.sandbox).collect();
        let counted = if served.is_empty() {
            shares.iter().collect()
        } else {
            served
        };
        // Without a cpuset a container may run everywhere, and so may its pod.
        let cpusets: Option<Vec<&CpuSet>> = counted.iter().map(|s| s.cpuset.as_ref()).collect();
        let cpuset = cpusets
            .filter(|sets| !sets.is_empty())
            .map(|sets| sets.into_iter().flat_map(CpuSet::iter).collect());
        Self {
            window: sum_up(&counted),
            cpuset,
        }
    }
}

fn sum_up(shares: &[&Share<'_>]) -> Window {
    match shares {
        [] => Window {
            micros: None,
            reason: "no container".to_owned(),
        },
        [first, rest @ ..] if rest.iter().all(|s| s.window == first.window) => first.window.clone(),
        shares => {
            let each = shares.iter().map(|s| match s.window.micros {
                Some(micros) => format!("{}: {micros} µs ({})", s.id, s.window.reason),
                None => format!("{}: off ({})", s.id, s.window.reason),
            });
            Window {
                micros: shares.iter().filter_map(|s| s.window.micros).max(),
                reason: each.collect::<Vec<_>>().join("; "),
            }
        }
    }
}

/// Whoever keeps the pod's state file.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a shim has one")]
pub(super) enum Report {
    /// The pod's veth is attached, here or at the node's daemon.
    Attached(Polled),
    /// Nothing is attached.
    Bare(Bare),
}

/// The state of a pod of which nothing is attached; the file goes when this is dropped.
#[derive(Debug)]
pub(super) struct Bare {
    dir: PathBuf,
    state: PodState,
}

impl Bare {
    /// Writes the state file of a pod that has no worker, for this reason.
    pub(super) fn new(
        context: &Context,
        asked: &Asked,
        reason: &str,
        sockets: &Sockets,
        degraded: Vec<Degraded>,
    ) -> Self {
        let owner_pid = std::process::id();
        let bare = Self {
            dir: asked.config.state_dir.clone(),
            state: PodState {
                id: context.pod_id.clone(),
                namespace: context.namespace.clone(),
                owner_pid,
                owner_start: state::start_time(owner_pid).unwrap_or_default(),
                worker_policy: asked.policy.worker,
                profile: asked.policy.profile,
                interfaces: Vec::new(),
                worker: None,
                worker_reason: reason.to_owned(),
                busy_poll_us: sockets.window.micros.map(|m| m.0),
                busy_poll_reason: sockets.window.reason.clone(),
                busy_poll_mode: asked.policy.busy_poll_mode,
                prefer_busy_poll: asked.policy.prefer_busy_poll,
                sockets: SocketCounters::default(),
                cpuset: sockets.cpuset.as_ref().map(ToString::to_string),
                short_way: None,
                rests: false,
                degraded,
            },
        };
        bare.write();
        bare
    }

    fn change(&mut self, change: impl FnOnce(&mut PodState)) {
        let before = self.state.clone();
        change(&mut self.state);
        if self.state != before {
            self.write();
        }
    }

    fn write(&self) {
        if let Err(error) = state::write(&self.dir, &self.state) {
            tracing::warn!("{error}");
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Err(error) = state::remove(&self.dir, &self.state.namespace, &self.state.id) {
            tracing::warn!("{error}");
        }
    }
}

impl Report {
    /// Says what holds for the sockets now.
    pub(super) fn set_sockets(&mut self, sockets: &Sockets, counters: SocketCounters) {
        match self {
            Self::Attached(polled) => {
                polled.set_sockets(&sockets.window, sockets.cpuset.as_ref(), counters);
            }
            Self::Bare(bare) => bare.change(|state| {
                state.busy_poll_us = sockets.window.micros.map(|m| m.0);
                state.busy_poll_reason.clone_from(&sockets.window.reason);
                state.cpuset = sockets.cpuset.as_ref().map(ToString::to_string);
                state.sockets = counters;
            }),
        }
    }

    /// Has packets for the pod pass by its NAPI, for this reason, or not any more; where nothing is attached, they do in any case.
    pub(super) fn set_short_way(&self, why: Option<&str>) {
        if let Self::Attached(polled) = self {
            polled.set_short_way(why);
        }
    }

    /// Adds something that is not active.
    pub(super) fn degrade(&mut self, degraded: Degraded) {
        match self {
            Self::Attached(polled) => polled.degrade(degraded),
            Self::Bare(bare) => bare.change(|state| {
                if !state.degraded.contains(&degraded) {
                    state.degraded.push(degraded);
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use kbp_kernel::Micros;

    use super::*;

    fn window(micros: Option<u32>) -> Window {
        Window {
            micros: micros.map(Micros),
            reason: format!("{micros:?}"),
        }
    }

    fn share<'a>(id: &'a str, window: &'a Window, cpuset: Option<&str>) -> Share<'a> {
        Share {
            id,
            sandbox: id == "pause",
            window,
            cpuset: cpuset.map(|c| c.parse().expect("cpuset")),
        }
    }

    #[test]
    fn the_sandbox_counts_only_while_it_is_alone() {
        let (short, long) = (window(Some(20)), window(Some(100)));
        let alone = Sockets::of(&[share("pause", &short, None)]);
        assert_eq!((alone.window, alone.cpuset), (short.clone(), None));
        let with_app = Sockets::of(&[
            share("app", &long, Some("2-3")),
            share("pause", &short, None),
        ]);
        assert_eq!(with_app.window, long);
        assert_eq!(
            with_app.cpuset.map(|c| c.to_string()),
            Some("2-3".to_owned())
        );
    }

    #[test]
    fn containers_that_differ_are_named() {
        let (off, long) = (window(None), window(Some(100)));
        let both = Sockets::of(&[share("a", &long, Some("2")), share("b", &off, Some("4"))]);
        assert_eq!(both.window.micros, Some(Micros(100)));
        assert!(both.window.reason.contains("a: 100 µs") && both.window.reason.contains("b: off"));
        assert_eq!(both.cpuset.map(|c| c.to_string()), Some("2,4".to_owned()));
        // One that may run everywhere.
        let wide = Sockets::of(&[share("a", &long, Some("2")), share("b", &long, None)]);
        assert_eq!((wide.window, wide.cpuset), (long, None));
    }
}
