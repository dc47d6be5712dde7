//! Attach and detach of a pod.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kbp_kernel::cpu::{self, Topology};
use kbp_kernel::netns::Netns;
use kbp_kernel::{CpuSet, NapiId};

use crate::claim::{self, Site};
use crate::config::{Config, Feature};
use crate::endpoint::{self, Endpoint, Found};
use crate::keeper::{Job, Keeper, Watch, follow};
use crate::policy::Policy;
use crate::record::{Findings, Record};
use crate::state::{self, Degraded, Part, PodState, SocketCounters};
use crate::tune::{Offloads, Tuner};
use crate::window::Window;
use crate::worker::{self, Choice, Sockets};
use crate::{Error, Result};

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

/// An attached pod. Dropping it detaches: worker, claim and state file go, the veth's features stay (they vanish with it).
#[derive(Debug)]
pub struct Attachment {
    /// None where there is no veth to keep.
    keeper: Option<Keeper>,
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
pub enum Outcome {
    /// Attached, perhaps with degraded parts: see [`Attachment::state`].
    Attached(Attachment),
    /// The namespace has only a loopback (yet): try again before the first process starts.
    NoInterface,
    /// Host network: nothing is touched.
    HostNetwork,
}

/// Finds the pod's veths, makes them pollable, starts the worker, writes the state file. Undoes its own work on error.
/// Call it on a thread that is in the host's network namespace.
///
/// # Errors
/// Only for `required` policies ([`Error::Required`]), an id that cannot name a file or that another process has
/// attached, namespaces whose links cannot be read, and a state directory that cannot be used; everything else degrades.
pub fn attach(request: AttachRequest) -> Result<Outcome> {
    let host = Netns::current()?;
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
    if let Err(error) = clear_leftovers(state_dir) {
        // What others left is no reason to leave this pod without its share; doctor tells of it.
        tracing::warn!(%error, "what killed pods left could not be removed");
    }
    let tuner = Tuner {
        host,
        pod: request.netns.try_clone()?,
        profile: request.policy.profile,
    };
    let mut parts = Parts::find_and_tune(&request, &tuner, veths, not_pollable);
    // Placement looks at what the others hold and then writes what this one takes: one after the other, or two pods
    // that start together would both choose the same CPU.
    let lock = state::lock(state_dir);
    let pods = state::read_all(state_dir)?;
    refuse_second_owner(&request, &pods)?;
    parts.choose_worker(&request, &pods);
    parts.refuse_degraded(&request)?;
    let record = Arc::new(parts.record(&request)?);
    record.write()?;
    drop(lock);
    // From here on dropping it takes everything back.
    let mut attachment = Attachment {
        keeper: None,
        record: Arc::clone(&record),
        state_dir: state_dir.clone(),
        namespace: request.namespace.clone(),
        id: request.id.clone(),
        before: None,
        ended: false,
    };
    if let Some(watch) = parts.watch {
        let job = Job {
            tuner: tuner.try_clone()?,
            endpoints: parts.veths,
            worker: parts.choice.worker,
            polled: parts.polled,
            record: Arc::clone(&record),
        };
        match Keeper::start(job, watch) {
            Ok(keeper) => attachment.keeper = Some(keeper),
            Err(error) => {
                let reason = error.to_string();
                record.lost_worker(&reason);
                if request.policy.required {
                    let part = Part::Worker;
                    return Err(Error::Required { part, reason });
                }
            }
        }
    }
    attachment.before = Some(Before {
        tuner,
        veths: parts.before,
    });
    Ok(Outcome::Attached(attachment))
}

/// Two owners of one state file would each take away the other's.
fn refuse_second_owner(request: &AttachRequest, pods: &[PodState]) -> Result<()> {
    let here = std::process::id();
    let same = |pod: &&PodState| pod.is(&request.namespace, &request.id) && pod.owner_pid != here;
    match pods.iter().find(same) {
        Some(pod) => Err(Error::AlreadyAttached {
            id: request.id.clone(),
            owner: pod.owner_pid,
        }),
        None => Ok(()),
    }
}

/// Removes what killed owners left in the state directory: their state files and claim files.
///
/// # Errors
/// When the directory cannot be read or changed.
pub fn clear_leftovers(state_dir: &Path) -> Result<()> {
    // The lock would make it.
    if !state_dir.is_dir() {
        return Ok(());
    }
    let _lock = state::lock(state_dir);
    for stale in state::stale(state_dir)?
        .into_iter()
        .filter(|s| s.owner_gone)
    {
        tracing::info!(
            file = stale.file,
            reason = stale.reason,
            "removing a state file"
        );
        state::remove_stale(state_dir, &stale)?;
    }
    claim::sweep(state_dir)
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

/// What an attach has put together so far; dropping it takes the worker and the claim back.
#[derive(Default)]
struct Parts {
    veths: Vec<Endpoint>,
    before: Vec<(Endpoint, Offloads)>,
    findings: Findings,
    watch: Option<Watch>,
    choice: Choice,
    polled: BTreeSet<NapiId>,
}

impl Parts {
    fn find_and_tune(
        request: &AttachRequest,
        tuner: &Tuner,
        veths: Vec<Endpoint>,
        not_pollable: Vec<String>,
    ) -> Self {
        let mut parts = Self::default();
        if let Some(off) = request.config.switched_off(Feature::Napi) {
            parts.findings.add_not_pollable(vec![off]);
            return parts;
        }
        if veths.is_empty() {
            parts.findings.add_not_pollable(not_pollable);
            return parts;
        }
        // Before the first look, so that no change after it goes unseen.
        match Watch::subscribe(tuner, &veths) {
            Ok(watch) => parts.watch = Some(watch),
            Err(error) => parts.choice = Choice::failed(error.to_string()),
        }
        for veth in &veths {
            // Nothing to put back where nothing can be read: tuning meets the same error and tells it.
            if let Ok(offloads) = tuner.offloads(veth) {
                parts.before.push((veth.clone(), offloads));
            }
        }
        parts.findings = Findings::gather(tuner, &veths, not_pollable);
        parts.veths = veths;
        parts
    }

    fn choose_worker(&mut self, request: &AttachRequest, pods: &[PodState]) {
        if self.veths.is_empty() {
            self.choice = Choice::none("no interface that can be polled");
        } else if let Some(why) = worker::unwanted(
            request.policy.worker,
            &request.config.cpus,
            &request.sockets(),
        ) {
            self.choice = Choice::none(why);
        } else if let Some(off) = request.config.switched_off(Feature::Sqpoll) {
            self.choice = Choice::failed(off);
        } else if let Some(unknown) = &self.findings.ids_unknown {
            self.choice = Choice::failed(unknown.clone());
        } else if self.watch.is_some() {
            self.choice = place(request, pods).unwrap_or_else(|e| Choice::failed(e.to_string()));
        }
        let wanted = self.findings.host_napis();
        if let Some(worker) = &mut self.choice.worker
            && let Err(error) = follow(worker, &mut self.polled, &wanted)
        {
            // As at every later look at the links, which may find it mended.
            self.findings.degraded.push(Degraded {
                part: Part::Worker,
                reason: error.to_string(),
            });
        }
    }

    /// What is missing for as long as the attachment lasts.
    fn lasting(&self, request: &AttachRequest) -> Vec<Degraded> {
        let worker = self.choice.degraded.iter().map(|reason| Degraded {
            part: Part::Worker,
            reason: reason.clone(),
        });
        worker.chain(request.degraded.iter().cloned()).collect()
    }

    fn refuse_degraded(&self, request: &AttachRequest) -> Result<()> {
        let lasting = self.lasting(request);
        match self.findings.degraded.iter().chain(&lasting).next() {
            Some(missing) if request.policy.required => Err(Error::Required {
                part: missing.part,
                reason: missing.reason.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn record(&self, request: &AttachRequest) -> Result<Record> {
        let owner_pid = std::process::id();
        let owner_start = state::start_time(owner_pid).ok_or_else(|| {
            let gone = std::io::ErrorKind::NotFound.into();
            Error::io(format!("read /proc/{owner_pid}/stat"), gone)
        })?;
        let state = PodState {
            id: request.id.clone(),
            namespace: request.namespace.clone(),
            owner_pid,
            owner_start,
            worker_policy: request.policy.worker,
            profile: request.policy.profile,
            interfaces: self.findings.interfaces.clone(),
            worker: self.choice.worker.as_ref().map(|w| w.state.clone()),
            worker_reason: self.choice.reason.clone(),
            busy_poll_us: request.window.micros.map(|m| m.0),
            busy_poll_reason: request.window.reason.clone(),
            sockets: SocketCounters::default(),
            cpuset: request.cpuset.as_ref().map(ToString::to_string),
            degraded: self.lasting(request),
        };
        Ok(Record::new(
            request.config.state_dir.clone(),
            state,
            self.findings.degraded.clone(),
        ))
    }
}

/// Makes the worker on this machine.
fn place(request: &AttachRequest, pods: &[PodState]) -> Result<Choice> {
    let site = Site {
        state_dir: &request.config.state_dir,
        pool: &request.config.cpus,
        config: &request.config.path,
        topology: &Topology::read()?,
        usable: &cpu::usable()?,
        cpuset: request.cpuset.as_ref(),
        pods,
    };
    Ok(worker::choose(request.policy.worker, &site))
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
        let before = self.before.take();
        let mut outcome = self.end();
        if let Some(Before { tuner, veths }) = before {
            for (veth, offloads) in veths {
                let restored = tuner.restore(&veth, offloads).map_err(Error::from);
                outcome = outcome.and(restored);
            }
        }
        outcome
    }

    fn end(&mut self) -> Result<()> {
        // The worker and its claim live on the keeper's thread, and dropping it waits for that.
        self.keeper = None;
        self.ended = true;
        state::remove(&self.state_dir, &self.namespace, &self.id)
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
