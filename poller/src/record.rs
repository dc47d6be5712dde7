//! What is known of an attached pod, shared between its owner and the engine's thread, and its copy in the state file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kbp_kernel::{CpuSet, NapiId};
use nix::sys::eventfd::EventFd;

use crate::Result;
use crate::endpoint::Endpoint;
use crate::place::Placed;
use crate::state::{self, Degraded, InterfaceState, Part, PodState, SocketCounters};
use crate::tune::{Tuned, Tuner};
use crate::window::Window;

/// What tuning a pod's veths came to.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) interfaces: Vec<InterfaceState>,
    pub(crate) degraded: Vec<Degraded>,
    /// Why NAPI ids are not known, where the kernel cannot tell them.
    pub(crate) ids_unknown: Option<String>,
    /// Whether what the pod sends passes by the NAPIs, since nobody polls them for now.
    pub(crate) rests: bool,
    host_napis: Napis,
    pod_napis: Napis,
}

/// NAPI instances that a worker is to poll, and whose they are.
pub(crate) type Napis = BTreeMap<NapiId, Instance>;

/// Whose a NAPI instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) veth: Endpoint,
    pub(crate) end: End,
}

/// An end of a veth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Receives what the pod sends.
    Host,
    /// Receives what the pod is sent.
    Pod,
}

impl Findings {
    /// Tunes every veth and gathers what came of it.
    pub(crate) fn gather(tuner: &Tuner, veths: &[Endpoint], not_pollable: Vec<String>) -> Self {
        let mut findings = Self::default();
        for veth in veths {
            findings.add(veth, tuner.tune(veth));
        }
        findings.add_not_pollable(not_pollable);
        findings
    }

    /// Notes the pod's other interfaces.
    pub(crate) fn add_not_pollable(&mut self, reasons: Vec<String>) {
        self.degraded
            .extend(reasons.into_iter().map(|reason| Degraded {
                part: Part::PollableVeth,
                reason,
            }));
    }

    /// NAPIs of the host ends, which every worker polls.
    pub(crate) fn host_napis(&self) -> Napis {
        self.host_napis.clone()
    }

    /// NAPIs of both ends.
    pub(crate) fn napis(&self) -> Napis {
        let both = self.host_napis.iter().chain(&self.pod_napis);
        both.map(|(napi, end)| (*napi, end.clone())).collect()
    }

    fn add(&mut self, veth: &Endpoint, tuned: Tuned) {
        self.interfaces.push(InterfaceState {
            pod_interface: veth.pod_name.clone(),
            host_interface: veth.host_name.clone(),
            host_ifindex: veth.host_index.0,
            host_napi: tuned.host_napis.first().map(|n| n.0),
            pod_napi: tuned.pod_napis.first().map(|n| n.0),
        });
        let instance = |end| Instance {
            veth: veth.clone(),
            end,
        };
        let napis = tuned.host_napis.into_iter();
        self.host_napis
            .extend(napis.map(|n| (n, instance(End::Host))));
        let napis = tuned.pod_napis.into_iter();
        self.pod_napis
            .extend(napis.map(|n| (n, instance(End::Pod))));
        if let Some(reason) = tuned.problem {
            self.degraded.push(Degraded {
                part: Part::PollableVeth,
                reason,
            });
        }
        if let Some(reason) = tuned.not_deferred {
            self.degraded.push(Degraded {
                part: Part::PreferBusyPoll,
                reason,
            });
        }
        self.rests |= tuned.rests;
        self.ids_unknown = self.ids_unknown.take().or(tuned.ids_unknown);
    }
}

/// The shared record.
#[derive(Debug)]
pub(crate) struct Record {
    state_dir: PathBuf,
    inner: Mutex<Inner>,
    /// Written to at every change.
    changed: Arc<EventFd>,
}

#[derive(Debug)]
struct Inner {
    /// Without its `degraded`.
    state: PodState,
    /// Found at the attach, or told by the owner: stays.
    lasting: Vec<Degraded>,
    /// Found by looking at the links: replaced at each look.
    links: Vec<Degraded>,
    /// Whether the interfaces are gone.
    gone: bool,
    /// Whether the namespace is gone.
    vanished: bool,
}

impl Inner {
    fn whole(&self) -> PodState {
        let mut state = self.state.clone();
        state.degraded = self.links.iter().chain(&self.lasting).cloned().collect();
        state
    }
}

impl Record {
    /// A record of `state`, whose own `degraded` lasts; `links` is what the first look at the links found missing.
    pub(crate) fn new(
        state_dir: PathBuf,
        mut state: PodState,
        links: Vec<Degraded>,
        changed: Arc<EventFd>,
    ) -> Self {
        let lasting = std::mem::take(&mut state.degraded);
        Self {
            state_dir,
            inner: Mutex::new(Inner {
                state,
                lasting,
                links,
                gone: false,
                vanished: false,
            }),
            changed,
        }
    }

    /// What is true now.
    pub(crate) fn state(&self) -> PodState {
        self.lock().whole()
    }

    /// Writes the state file.
    pub(crate) fn write(&self) -> Result<()> {
        let inner = self.lock();
        // Written under the lock, or an older state could overtake a newer one.
        state::write(&self.state_dir, &inner.whole())
    }

    /// Adds a lasting degraded part.
    pub(crate) fn degrade(&self, degraded: Degraded) {
        self.change(|inner| {
            if !inner.lasting.contains(&degraded) {
                inner.lasting.push(degraded);
            }
        });
    }

    /// What holds for the sockets.
    pub(crate) fn set_sockets(
        &self,
        window: &Window,
        cpuset: Option<&CpuSet>,
        counters: SocketCounters,
    ) {
        self.change(|inner| {
            inner.state.busy_poll_us = window.micros.map(|m| m.0);
            inner.state.busy_poll_reason.clone_from(&window.reason);
            inner.state.cpuset = cpuset.map(ToString::to_string);
            inner.state.sockets = counters;
        });
    }

    /// Why packets pass by the pod's NAPI, if they do.
    pub(crate) fn set_short_way(&self, why: Option<&str>) {
        self.change(|inner| inner.state.short_way = why.map(str::to_owned));
    }

    /// Takes a new look at the links.
    pub(crate) fn found(
        &self,
        interfaces: Vec<InterfaceState>,
        rests: bool,
        degraded: Vec<Degraded>,
    ) {
        self.change(|inner| {
            inner.state.rests = rests;
            inner.state.interfaces = interfaces;
            inner.links = degraded;
        });
    }

    /// Another worker polls the pod, or none can.
    pub(crate) fn placed(&self, placed: &Placed) {
        self.change(|inner| {
            inner.gone = false;
            inner.state.worker = placed.worker.as_ref().map(|(_, state)| state.clone());
            inner.state.worker_reason.clone_from(&placed.reason);
            inner.lasting.retain(|d| d.part != Part::Worker);
            inner
                .lasting
                .extend(placed.degraded.iter().map(|reason| Degraded {
                    part: Part::Worker,
                    reason: reason.clone(),
                }));
        });
    }

    /// The pod's interfaces are gone, and its worker with them.
    pub(crate) fn gone(&self) {
        self.nothing_left("the pod's interfaces are gone");
    }

    /// The pod's namespace is gone from where it was found.
    pub(crate) fn vanished(&self) {
        self.lock().vanished = true;
        self.nothing_left("the pod's network namespace is gone");
    }

    /// Whether its interfaces are gone, and none has come since.
    pub(crate) fn is_gone(&self) -> bool {
        self.lock().gone
    }

    /// Whether its namespace is gone.
    pub(crate) fn has_vanished(&self) -> bool {
        self.lock().vanished
    }

    fn nothing_left(&self, reason: &str) {
        self.change(|inner| {
            inner.gone = true;
            inner.state.interfaces.clear();
            inner.state.rests = false;
            inner.links = vec![Degraded {
                part: Part::PollableVeth,
                reason: reason.to_owned(),
            }];
            inner.state.worker = None;
            reason.clone_into(&mut inner.state.worker_reason);
        });
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        let before = inner.whole();
        change(&mut inner);
        let after = inner.whole();
        if after == before {
            return;
        }
        if let Err(error) = state::write(&self.state_dir, &after) {
            tracing::warn!(%error, "the state file no longer tells what is true");
        }
        // Refused only when nobody has read it for very long.
        let _ = self.changed.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while it was held leaves a whole record behind: every change is a plain assignment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
