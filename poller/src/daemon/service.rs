//! The methods of the API, and who holds what.
//!
//! An attachment is *bound* to the connection that asked for it, and ends with it: a shim's. Or it is *registered*: it lasts until
//! it is detached or its namespace vanishes: a CNI plugin's. Where both name the same namespace, the bound one holds it and the
//! registered one waits, since what is polled twice is polled worse.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kbp_kernel::fd::Peer;
use kbp_kernel::netns::{Netns, NetnsId};
use kbp_kernel::{CpuSet, Micros};
use nix::sys::eventfd::EventFd;
use prost::Message;

use super::connection::ConnectionId;
use super::registration::{self, Registration};
use super::{metrics, netns};
use crate::api::{
    self, AttachRequest, AttachResponse, Code, DetachRequest, DetachResponse, EventKind,
    ListRequest, ListResponse, Pod, Request, Response, Status, UpdateRequest, UpdateResponse,
    WatchEvent, WatchRequest,
};
use crate::attach::{self, Attachment, Outcome, Terms};
use crate::config::Config;
use crate::engine::Engine;
use crate::policy::{BusyPollMode, Layer, MAX_CPU_LATENCY, Policy, Profile, WorkerPolicy, choose};
use crate::state::SocketCounters;
use crate::uplink::Uplink;
use crate::window::Window;
use crate::{Error, state};

/// Most attachments: twice what the kubelet's largest nodes run, and far below what a filter of link events takes.
pub(super) const MAX_PODS: usize = 1000;

/// A pod's namespace and id.
type Name = (String, String);

/// What came of a request.
#[derive(Debug)]
pub(super) enum Answer {
    Done(Vec<u8>),
    Refused(Code, String),
    /// The stream stays open; these are its first messages.
    Watch(Vec<WatchEvent>),
}

impl Answer {
    pub(super) fn refused(code: Code, reason: impl Into<String>) -> Self {
        Self::Refused(code, reason.into())
    }

    /// The message that ends the stream.
    pub(super) fn encode(self) -> Vec<u8> {
        let response = match self {
            Self::Done(payload) => Response {
                status: None,
                payload,
            },
            Self::Refused(code, message) => Response {
                status: Some(Status {
                    code: code as i32,
                    message,
                }),
                payload: Vec::new(),
            },
            Self::Watch(_) => Response::default(),
        };
        response.encode_to_vec()
    }
}

type Result<T, E = Refusal> = std::result::Result<T, E>;

/// Why a request is not done.
#[derive(Debug)]
struct Refusal(Code, String);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::InvalidValue { .. } | Error::UnknownKey { .. } | Error::Config { .. } => {
                Code::InvalidArgument
            }
            Error::Required { .. } => Code::FailedPrecondition,
            Error::AlreadyAttached { .. } => Code::AlreadyExists,
            _ => Code::Internal,
        };
        Self(code, error.to_string())
    }
}

fn invalid(reason: impl Into<String>) -> Refusal {
    Refusal(Code::InvalidArgument, reason.into())
}

/// An attachment and whose it is.
#[derive(Debug)]
struct Held {
    netns: NetnsId,
    /// None: registered, and waiting for a bound one of the same namespace to end.
    attachment: Option<Attachment>,
    owner: Owner,
}

impl Held {
    /// What is true of it, but for its packets; None while it waits.
    fn pod(&self) -> Option<Pod> {
        let state = self.attachment.as_ref()?.state();
        Some(api::pod(&state, matches!(self.owner, Owner::Bound(_)), 0))
    }
}

#[derive(Debug)]
enum Owner {
    Bound(ConnectionId),
    Registered(Registration),
}

/// How often things happened, for the metrics.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    pub(super) attached: u64,
    pub(super) detached: u64,
    pub(super) refused: u64,
}

/// Everything the daemon holds.
#[derive(Debug)]
pub(super) struct Service {
    engine: Engine,
    uplinks: Vec<Uplink>,
    config: Config,
    held: BTreeMap<Name, Held>,
    /// What watchers have been told.
    told: BTreeMap<Name, Pod>,
    counts: Counts,
}

impl Service {
    pub(super) fn new(engine: Engine, uplinks: Vec<Uplink>, config: Config) -> Self {
        Self {
            engine,
            uplinks,
            config,
            held: BTreeMap::new(),
            told: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    /// Takes up what was registered with a daemon before this one.
    pub(super) fn take_up(&mut self) {
        for registration in registration::read_all(&self.config.state_dir) {
            let request = registration.request();
            let still_there = netns::open(&request.netns)
                .ok()
                .and_then(|netns| netns.id().ok())
                .is_some_and(|id| (id.dev, id.ino) == registration.netns_id);
            if !still_there {
                registration.remove(&self.config.state_dir);
                continue;
            }
            if let Err(Refusal(_, reason)) = self.register(&request) {
                tracing::warn!(
                    "{}/{} is not attached again: {reason}",
                    registration.namespace,
                    registration.id
                );
            }
        }
    }

    /// Readable when a pod has changed.
    pub(super) fn changed(&self) -> &EventFd {
        self.engine.changed()
    }

    /// Returns only when the engine works.
    pub(super) fn touch(&self) {
        self.engine.touch();
    }

    /// Detaches everything.
    pub(super) fn end(&mut self) {
        self.held.clear();
        self.uplinks.clear();
    }

    /// A connection is gone, and what was bound to it goes.
    pub(super) fn closed(&mut self, id: ConnectionId) {
        let names: Vec<Name> = self
            .held
            .iter()
            .filter(|(_, held)| matches!(held.owner, Owner::Bound(owner) if owner == id))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            self.release(&name, false);
        }
    }

    /// Does what the request says.
    pub(super) fn call(&mut self, request: &[u8], id: ConnectionId, peer: Peer) -> Answer {
        let answer = Request::decode(request)
            .map_err(|e| invalid(format!("not a ttrpc request: {e}")))
            .and_then(|request| self.dispatch(&request, id, peer));
        answer.unwrap_or_else(|Refusal(code, reason)| {
            self.counts.refused += 1;
            tracing::info!("refused process {}: {reason}", peer.pid);
            Answer::Refused(code, reason)
        })
    }

    fn dispatch(&mut self, request: &Request, id: ConnectionId, peer: Peer) -> Result<Answer> {
        if request.service != api::SERVICE {
            return Err(Refusal(
                Code::Unimplemented,
                format!(
                    "no service {:?} here; {} it is",
                    request.service,
                    api::SERVICE
                ),
            ));
        }
        let payload = request.payload.as_slice();
        let done = match request.method.as_str() {
            "Attach" => self.attach(&decode(payload)?, id, peer)?.encode_to_vec(),
            "Detach" => self.detach(&decode(payload)?, id)?.encode_to_vec(),
            "Update" => self.update(&decode(payload)?, id)?.encode_to_vec(),
            "List" => {
                let ListRequest {} = decode(payload)?;
                let pods = self.counted_pods();
                let uplink = |u: &Uplink| api::uplink(&u.state(), u.packets());
                let uplinks = self.uplinks.iter().map(uplink).collect();
                ListResponse { pods, uplinks }.encode_to_vec()
            }
            "Watch" => {
                let WatchRequest {} = decode(payload)?;
                // What has happened up to now is in the first messages, and not told twice.
                drop(self.changes());
                let attached = |pod| event(EventKind::Attached, pod);
                return Ok(Answer::Watch(
                    self.told.values().cloned().map(attached).collect(),
                ));
            }
            method => {
                return Err(Refusal(
                    Code::Unimplemented,
                    format!(
                        "no method {method:?}; there are Attach, Detach, Update, List and Watch"
                    ),
                ));
            }
        };
        Ok(Answer::Done(done))
    }

    fn attach(
        &mut self,
        request: &AttachRequest,
        id: ConnectionId,
        peer: Peer,
    ) -> Result<AttachResponse> {
        let name = (request.namespace.clone(), request.id.clone());
        let outcome = if request.bound {
            self.bind(request, id, peer)?
        } else {
            self.register(request)?
        };
        let outcome = match outcome {
            Kept::Attached => api::Outcome::Attached,
            Kept::NoInterface => api::Outcome::NoInterface,
            Kept::HostNetwork => api::Outcome::HostNetwork,
        };
        let pod = match outcome {
            api::Outcome::Attached => self.held.get(&name).and_then(Held::pod),
            _ => None,
        };
        Ok(AttachResponse {
            outcome: outcome.into(),
            pod,
        })
    }

    fn bind(&mut self, request: &AttachRequest, id: ConnectionId, peer: Peer) -> Result<Kept> {
        let name = (request.namespace.clone(), request.id.clone());
        let netns = netns::open(&request.netns).map_err(invalid)?;
        let netns_id = netns.id().map_err(Error::from)?;
        self.make_room(&name, Some(id))?;
        // Registered ones of the namespace wait; also when this one fails, they go on afterwards.
        self.pause(netns_id);
        let terms = Terms {
            previous_owner: (peer.pid != 0).then_some(peer.pid),
            ..Terms::default()
        };
        let outcome = self
            .attach_request(request, netns)
            .and_then(|asked| Ok(self.engine.attach(asked, terms)?));
        let kept = match outcome {
            Ok(Outcome::Attached(attachment)) => {
                let held = Held {
                    netns: netns_id,
                    attachment: Some(attachment),
                    owner: Owner::Bound(id),
                };
                self.held.insert(name, held);
                self.counts.attached += 1;
                return Ok(Kept::Attached);
            }
            Ok(Outcome::NoInterface) => Ok(Kept::NoInterface),
            Ok(Outcome::HostNetwork) => Ok(Kept::HostNetwork),
            Err(refusal) => Err(refusal),
        };
        self.resume(netns_id);
        kept
    }

    fn register(&mut self, request: &AttachRequest) -> Result<Kept> {
        let name = (request.namespace.clone(), request.id.clone());
        if request.netns.starts_with("/proc/") {
            return Err(invalid(format!(
                "{:?} is not a path that lasts: name one like /run/netns/NAME, or bind the attachment to the connection",
                request.netns
            )));
        }
        let netns = netns::open(&request.netns).map_err(invalid)?;
        let netns_id = netns.id().map_err(Error::from)?;
        self.make_room(&name, None)?;
        let registration = Registration::new(request, netns_id);
        let is_held = self
            .held
            .values()
            .any(|h| h.netns == netns_id && matches!(h.owner, Owner::Bound(_)));
        let mut held = Held {
            netns: netns_id,
            attachment: None,
            owner: Owner::Registered(registration.clone()),
        };
        // Fit for a file name, and everything else that could be refused.
        let asked = self.attach_request(request, netns)?;
        state::check_names(&request.namespace, &request.id)?;
        if !is_held {
            let terms = Terms {
                previous_owner: None,
                path: Some(PathBuf::from(&request.netns)),
                keep_originals: true,
            };
            match self.engine.attach(asked, terms)? {
                Outcome::Attached(attachment) => held.attachment = Some(attachment),
                Outcome::NoInterface => return Ok(Kept::NoInterface),
                Outcome::HostNetwork => return Ok(Kept::HostNetwork),
            }
        }
        registration.write(&self.config.state_dir)?;
        self.held.insert(name, held);
        self.counts.attached += 1;
        Ok(Kept::Attached)
    }

    /// Takes away what this name stood for, where the caller may.
    fn make_room(&mut self, name: &Name, id: Option<ConnectionId>) -> Result<()> {
        match self.held.get(name).map(|held| &held.owner) {
            Some(Owner::Bound(owner)) if Some(*owner) != id => Err(Refusal(
                Code::AlreadyExists,
                format!(
                    "{}/{} is attached already, by another connection: end that first, or choose another id",
                    name.0, name.1
                ),
            )),
            Some(_) => {
                self.release(name, false);
                Ok(())
            }
            None if self.held.len() >= MAX_PODS => Err(Refusal(
                Code::ResourceExhausted,
                format!("{MAX_PODS} pods are attached, which is all there may be: detach some"),
            )),
            None => Ok(()),
        }
    }

    fn attach_request(
        &self,
        request: &AttachRequest,
        netns: Netns,
    ) -> Result<attach::AttachRequest> {
        let sockets = request.sockets.as_ref().map(api::read_sockets);
        let (window, _) = sockets.unwrap_or_else(|| {
            let reason = "the sockets of the pod are not touched".to_owned();
            let window = Window {
                micros: None,
                reason,
            };
            (window, SocketCounters::default())
        });
        Ok(attach::AttachRequest {
            id: request.id.clone(),
            namespace: request.namespace.clone(),
            netns,
            policy: self.policy(request)?,
            cpuset: read_cpuset(&request.cpuset)?,
            window,
            degraded: api::read_degraded(&request.degraded).map_err(invalid)?,
            config: self.config.clone(),
        })
    }

    fn policy(&self, request: &AttachRequest) -> Result<Policy> {
        let worker = one_of("worker", &request.worker, &WorkerPolicy::ALL)?;
        let profile = one_of("profile", &request.profile, &Profile::ALL)?;
        let latency = request.cpu_latency_us.map(Micros);
        if latency.is_some_and(|l| l > MAX_CPU_LATENCY) {
            return Err(invalid(format!(
                "cpu_latency_us is at most {MAX_CPU_LATENCY}"
            )));
        }
        let mode = one_of(
            "busy_poll_mode",
            &request.busy_poll_mode,
            &BusyPollMode::ALL,
        )?;
        let asked = Layer {
            worker,
            profile,
            prefer_busy_poll: Some(request.prefer_busy_poll),
            busy_poll_mode: mode,
            required: Some(request.required),
            cpu_latency: Some(latency),
            ..Layer::default()
        };
        Ok(Policy::resolve(&[asked, self.config.policy]))
    }

    fn detach(&mut self, request: &DetachRequest, id: ConnectionId) -> Result<DetachResponse> {
        let name = (request.namespace.clone(), request.id.clone());
        let was_attached = match self.held.get(&name).map(|held| &held.owner) {
            None => false,
            Some(Owner::Bound(owner)) if *owner != id => {
                return Err(Refusal(
                    Code::FailedPrecondition,
                    format!(
                        "{}/{} belongs to another connection, and ends with it: end that process",
                        name.0, name.1
                    ),
                ));
            }
            Some(_) => {
                self.release(&name, request.restore);
                true
            }
        };
        Ok(DetachResponse { was_attached })
    }

    fn update(&mut self, request: &UpdateRequest, id: ConnectionId) -> Result<UpdateResponse> {
        let name = (request.namespace.clone(), request.id.clone());
        let held = self.held.get(&name);
        let attachment = held
            .filter(|held| matches!(held.owner, Owner::Bound(owner) if owner == id))
            .and_then(|held| held.attachment.as_ref())
            .ok_or_else(|| {
                Refusal(
                    Code::NotFound,
                    format!(
                        "{}/{} is not attached by this connection: attach it first",
                        name.0, name.1
                    ),
                )
            })?;
        for degraded in api::read_degraded(&request.degraded).map_err(invalid)? {
            attachment.degrade(degraded);
        }
        if let Some(sockets) = &request.sockets {
            let (window, counters) = api::read_sockets(sockets);
            let cpuset = read_cpuset(&request.cpuset)?;
            attachment.set_sockets(&window, cpuset.as_ref(), counters);
        }
        Ok(UpdateResponse {})
    }

    /// Ends an attachment, and gives way to one that has waited.
    fn release(&mut self, name: &Name, restore: bool) {
        let Some(held) = self.held.remove(name) else {
            return;
        };
        self.counts.detached += 1;
        if let Some(attachment) = held.attachment {
            let outcome = if restore {
                attachment.detach_and_restore()
            } else {
                attachment.detach()
            };
            if let Err(error) = outcome {
                tracing::warn!(%error, "detaching {}/{} left something behind", name.0, name.1);
            }
        }
        match held.owner {
            Owner::Registered(registration) => registration.remove(&self.config.state_dir),
            Owner::Bound(_) => self.resume(held.netns),
        }
    }

    /// Has registered attachments of a namespace wait.
    fn pause(&mut self, netns: NetnsId) {
        for held in self.held.values_mut() {
            if held.netns == netns && matches!(held.owner, Owner::Registered(_)) {
                held.attachment = None;
            }
        }
    }

    /// Has those that have waited go on, where no other holds the namespace.
    fn resume(&mut self, netns: NetnsId) {
        let of_it = |held: &&Held| held.netns == netns;
        if self
            .held
            .values()
            .filter(of_it)
            .any(|h| h.attachment.is_some())
        {
            return;
        }
        let waiting = self
            .held
            .values()
            .filter(of_it)
            .find_map(|held| match &held.owner {
                Owner::Registered(registration) => Some(registration.clone()),
                Owner::Bound(_) => None,
            });
        if let Some(registration) = waiting
            && let Err(Refusal(_, reason)) = self.register(&registration.request())
        {
            tracing::info!(
                "{}/{} is not attached any more: {reason}",
                registration.namespace,
                registration.id
            );
            self.release(
                &(registration.namespace.clone(), registration.id.clone()),
                false,
            );
        }
    }

    /// What has changed since the last call, and what follows from it.
    pub(super) fn changes(&mut self) -> Vec<WatchEvent> {
        // Empty: it was read by another call.
        let _ = self.engine.changed().read();
        let vanished: Vec<Name> = self
            .held
            .iter()
            .filter(|(_, held)| {
                held.attachment
                    .as_ref()
                    .is_some_and(Attachment::has_vanished)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in &vanished {
            tracing::info!("{}/{}: its namespace is gone", name.0, name.1);
            self.release(name, false);
        }
        let now = self.pods();
        let mut events = Vec::new();
        for (name, pod) in &self.told {
            if !now.contains_key(name) {
                events.push(event(EventKind::Detached, pod.clone()));
            }
        }
        for (name, pod) in &now {
            match self.told.get(name) {
                None => events.push(event(EventKind::Attached, pod.clone())),
                Some(told) if told != pod => {
                    events.push(event(EventKind::Changed, pod.clone()));
                }
                Some(_) => {}
            }
        }
        self.told = now;
        events
    }

    /// Every attachment, without its packets: to read the counters of all takes longer than all the rest.
    fn pods(&self) -> BTreeMap<Name, Pod> {
        self.held
            .iter()
            .filter_map(|(name, held)| Some((name.clone(), held.pod()?)))
            .collect()
    }

    fn counted_pods(&self) -> Vec<Pod> {
        let mut pods = self.pods();
        for counted in self.engine.snapshot().pods {
            let name = (counted.state.namespace, counted.state.id);
            if let Some(pod) = pods.get_mut(&name) {
                pod.packets = counted.packets;
            }
        }
        pods.into_values().collect()
    }

    /// The metrics as text.
    pub(super) fn metrics(&self) -> String {
        metrics::Source {
            snapshot: &self.engine.snapshot(),
            busy_polled: self.engine.busy_polled(),
            uplinks: &self.uplinks,
            counts: self.counts,
            held: self.held.len(),
        }
        .text()
    }
}

enum Kept {
    Attached,
    NoInterface,
    HostNetwork,
}

fn event(kind: EventKind, pod: Pod) -> WatchEvent {
    WatchEvent {
        kind: kind.into(),
        pod: Some(pod),
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M> {
    M::decode(payload).map_err(|e| invalid(format!("not the request of this method: {e}")))
}

fn one_of<T: std::fmt::Display + Copy>(key: &str, text: &str, all: &[T]) -> Result<Option<T>> {
    if text.is_empty() {
        return Ok(None);
    }
    choose(text, all)
        .map(Some)
        .map_err(|known| invalid(format!("{key} = {text:?} is not valid; allowed: {known}")))
}

fn read_cpuset(text: &str) -> Result<Option<CpuSet>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|e: kbp_kernel::Error| invalid(format!("cpuset: {e}")))
}
