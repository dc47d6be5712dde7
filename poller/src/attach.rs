//! Attach and detach of a pod.

mod leftovers;
mod parts;

use std::path::PathBuf;
use std::sync::Arc;

use kbp_kernel::CpuSet;
use kbp_kernel::netns::Netns;

use crate::config::{Config, Feature};
use crate::defer::Deferral;
use crate::endpoint::{self, Endpoint, Found};
use crate::engine::{Engine, PodKey};
use crate::place::Placing;
use crate::policy::Policy;
use crate::record::Record;
use crate::short_way::ShortWay;
use crate::state::{self, Degraded, Part, PodState, SocketCounters};
use crate::tune::{Offloads, Tuner};
use crate::window::Window;
use crate::worker::Sockets;
use crate::{Error, Result, originals};

pub use leftovers::clear_leftovers;
use parts::Parts;

/// What to attach.
#[derive(Debug)]
pub struct AttachRequest {
    /// Sandbox or container id.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// The pod's network namespace.
    pub netns: Netns,
    /// The pod's policy.
    pub policy: Policy,
    /// The pod's cpuset.
    pub cpuset: Option<CpuSet>,
    /// Window of the sockets, decided before (it goes into the state).
    pub window: Window,
    /// What the caller already knows to be missing (socket parts).
    pub degraded: Vec<Degraded>,
    /// The node's settings: CPU pool, state directory, features that are switched off.
    pub config: Config,
}

/// What else is to be known of an attach, by whom it matters to.
#[derive(Debug, Default)]
pub struct Terms {
    /// A process that had attached the pod and has let go of it: its state file is replaced.
    pub previous_owner: Option<u32>,
    /// Where the namespace was found. Once it is not there any more, the attachment lets go of it; else its own handle would
    /// keep it alive.
    pub path: Option<PathBuf>,
    /// Whether [`Attachment::detach_and_restore`] will be wanted, perhaps of another process, after a crash of this one.
    pub keep_originals: bool,
}

/// An attached pod. Dropping it detaches: worker, claim and state file go, the veth's features stay (they vanish with it).
#[derive(Debug)]
pub struct Attachment {
    engine: Engine,
    /// None where there is no veth to keep.
    key: Option<PodKey>,
    record: Arc<Record>,
    state_dir: PathBuf,
    namespace: String,
    id: String,
    before: Option<Before>,
    ended: bool,
}

/// What the veths were like, and how to reach them.
#[derive(Debug)]
struct Before {
    tuner: Tuner,
    veths: Vec<(Endpoint, Offloads)>,
}

/// What became of an attach.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "taken apart at once, once a pod")]
pub enum Outcome {
    /// Attached, perhaps with degraded parts: see [`Attachment::state`].
    Attached(Attachment),
    /// The namespace has only a loopback (yet): try again before the first process starts.
    NoInterface,
    /// Host network: nothing is touched.
    HostNetwork,
}

/// [`Engine::attach`] with an engine of its own.
///
/// # Errors
/// As there.
pub fn attach(request: AttachRequest) -> Result<Outcome> {
    Engine::start()?.attach(request, Terms::default())
}

impl Engine {
    /// Finds the pod's veths, makes them pollable, finds or makes a worker, writes the state file. Undoes its own work on error.
    ///
    /// # Errors
    /// Only for `required` policies ([`Error::Required`]), an id that cannot name a file or that another process has
    /// attached, namespaces whose links cannot be read, and a state directory that cannot be used; everything else degrades.
    pub fn attach(&self, request: AttachRequest, terms: Terms) -> Result<Outcome> {
        let host = self.host().try_clone()?;
        let (veths, not_pollable) = match endpoint::find(&host, &request.netns)? {
            Found::HostNetwork => return Ok(Outcome::HostNetwork),
            Found::Empty => return Ok(Outcome::NoInterface),
            Found::Endpoints {
                veths,
                not_pollable,
            } => (veths, not_pollable),
        };
        let state_dir = &request.config.state_dir;
        state::create_dir(state_dir)?;
        if self.may_clear()
            && let Err(error) = clear_leftovers(state_dir)
        {
            // What others left is no reason to leave this pod without its share; doctor tells of it.
            tracing::warn!(%error, "what killed pods left could not be removed");
        }
        let for_worker = placing(&request).unwanted().is_none();
        let deferral = Deferral::of(&request);
        let tuner = Tuner {
            host,
            pod: request.netns.try_clone()?,
            profile: request.policy.profile,
            for_worker,
            short_way: ShortWay::new(
                request.policy.profile,
                for_worker || deferral.is_wanted(),
                request.config.switched_off(Feature::ShortWay).is_some(),
            ),
            deferral,
            resting: Arc::default(),
        };
        let mut parts = Parts::find_and_tune(&request, &terms, &tuner, veths, not_pollable);
        // Placement looks at what the others hold and then writes what this one takes: one after the other, or two pods
        // that start together would both choose the same CPU.
        let lock = state::lock(state_dir);
        let mut kept = self.lock();
        let pods = state::read_all_beside(state_dir, kept.states(state_dir))?;
        refuse_second_owner(&request, &terms, &pods)?;
        parts.choose_worker(&mut kept, &request, &tuner, &pods);
        let written = parts
            .refuse_degraded(&request)
            .and_then(|()| parts.record(&request, self.changed_handle()))
            .and_then(|record| record.write().map(|()| Arc::new(record)));
        let record = match written {
            Ok(record) => record,
            Err(error) => {
                parts.leave(&mut kept);
                if tuner.deferral.is_wanted() {
                    parts.veths.iter().for_each(|veth| tuner.end_deferral(veth));
                }
                return Err(error);
            }
        };
        drop(lock);
        let key = match parts.events.take() {
            None => None,
            Some(events) => {
                let pod = parts.pod(&request, &terms, &tuner, &record, events);
                match pod.and_then(|pod| self.insert(&mut kept, pod)) {
                    Ok(key) => Some(key),
                    Err(error) => {
                        parts.leave(&mut kept);
                        state::remove(state_dir, &request.namespace, &request.id)?;
                        return Err(error);
                    }
                }
            }
        };
        drop(kept);
        let _ = self.changed().write(1);
        Ok(Outcome::Attached(Attachment {
            engine: self.clone(),
            key,
            record,
            state_dir: state_dir.clone(),
            namespace: request.namespace,
            id: request.id,
            before: Some(Before {
                tuner,
                veths: parts.before,
            }),
            ended: false,
        }))
    }
}

/// Two owners of one state file would each take away the other's.
fn refuse_second_owner(request: &AttachRequest, terms: &Terms, pods: &[PodState]) -> Result<()> {
    let here = std::process::id();
    let same = |pod: &&PodState| {
        pod.is(&request.namespace, &request.id)
            && pod.owner_pid != here
            && Some(pod.owner_pid) != terms.previous_owner
    };
    match pods.iter().find(same) {
        Some(pod) => Err(Error::AlreadyAttached {
            id: request.id.clone(),
            owner: pod.owner_pid,
        }),
        None => Ok(()),
    }
}

impl AttachRequest {
    /// Whether the pod's own sockets poll, as far as the caller knows by now.
    fn sockets(&self) -> Sockets {
        let missing = self
            .degraded
            .iter()
            .find(|d| d.part == Part::SocketBusyPoll);
        match (missing, self.window.micros) {
            (Some(missing), _) => Sockets::Sleep(missing.reason.clone()),
            (None, None) => Sockets::Sleep(self.window.reason.clone()),
            (None, Some(_)) => Sockets::Poll,
        }
    }
}

fn placing(request: &AttachRequest) -> Placing {
    Placing {
        asked: request.policy.worker,
        profile: request.policy.profile,
        cpuset: request.cpuset.clone(),
        sockets: request.sockets(),
        config: request.config.clone(),
    }
}

impl Attachment {
    /// What is true now.
    pub fn state(&self) -> PodState {
        self.record.state()
    }

    /// Adds a degraded part that was found out later (a seccomp listener that could not be installed) and rewrites the state file.
    pub fn degrade(&self, degraded: Degraded) {
        self.record.degrade(degraded);
    }

    /// What holds for the pod's sockets from now on, and what was done to them so far; rewrites the state file when
    /// anything of it is new. The cpuset is what other pods take as this one's.
    pub fn set_sockets(&self, window: &Window, cpuset: Option<&CpuSet>, counters: SocketCounters) {
        self.record.set_sockets(window, cpuset, counters);
        if let (Some(before), Some(key)) = (&self.before, self.key)
            && before
                .tuner
                .deferral
                .set_sockets_poll(window.micros.is_some())
        {
            self.engine.refresh_soon(key);
        }
    }

    /// Has packets for the pod pass by its NAPI, for this reason, or not any more. Nothing happens where a worker polls it, where packets
    /// wait for its sockets, in the profile `throughput`, and where the operator has switched it off.
    pub fn set_short_way(&self, why: Option<&str>) {
        let (Some(before), Some(key)) = (&self.before, self.key) else {
            return;
        };
        let Some(changed) = before.tuner.short_way.set(why.is_some()) else {
            return;
        };
        match why {
            // Said before it is done and until it is undone: who comes after a kill has to know.
            Some(_) => {
                self.record.set_short_way(why);
                if changed {
                    self.engine.refresh_soon(key);
                }
            }
            None if changed => self.end_short_way(),
            None => {}
        }
    }

    /// Whether the namespace is gone from where it was found ([`Terms::path`]).
    pub fn has_vanished(&self) -> bool {
        self.record.has_vanished()
    }

    /// Lets go of the pod for another process: nothing polls it when this returns, and only the state file stays, for the
    /// other one to replace ([`Terms::previous_owner`]).
    pub fn hand_over(mut self) {
        self.stop();
        self.ended = true;
    }

    /// Detaches; the same as dropping it, but tells errors.
    ///
    /// # Errors
    /// When the state file could not be removed. The worker and the claim are gone all the same.
    pub fn detach(mut self) -> Result<()> {
        self.end()
    }

    /// Detaches and sets the offloads of the veths back to what they were: for a pod that lives on. A qdisc that was
    /// added stays; it does no harm.
    ///
    /// # Errors
    /// The first of what could not be undone; the rest is undone all the same.
    pub fn detach_and_restore(mut self) -> Result<()> {
        let mut outcome = self.end();
        if let Some(Before { tuner, veths }) = self.before.take() {
            for (veth, offloads) in veths {
                let restored = tuner.restore(&veth, offloads).map_err(Error::from);
                if restored.is_ok() {
                    originals::forget(&self.state_dir, &veth);
                }
                outcome = outcome.and(restored);
            }
        }
        outcome
    }

    /// Called when the engine does not look at the veths any more.
    fn end_deferral(&self) {
        if let Some(Before { tuner, veths }) = &self.before
            && tuner.deferral.is_wanted()
        {
            for (veth, _) in veths {
                tuner.end_deferral(veth);
            }
        }
    }

    fn end_short_way(&self) {
        let Some(Before { tuner, veths }) = &self.before else {
            return;
        };
        for (veth, _) in veths {
            if let Err(error) = tuner.end_short_way(veth) {
                tracing::warn!("packets still pass by the NAPI: {error}");
            }
        }
        self.record.set_short_way(None);
    }

    fn end(&mut self) -> Result<()> {
        self.stop();
        self.end_deferral();
        if self.record.state().short_way.is_some() {
            self.end_short_way();
        }
        self.ended = true;
        state::remove_own(&self.state_dir, &self.namespace, &self.id)
    }

    fn stop(&mut self) {
        if let Some(key) = self.key.take() {
            self.engine.remove(key);
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = self.end()
        {
            tracing::warn!(%error, "a state file stays behind");
        }
    }
}
