//! The methods of the API.

mod answer;
mod hold;
mod request;

use std::collections::BTreeMap;

use kbp_kernel::fd::Peer;
use nix::sys::eventfd::EventFd;
use prost::Message;

use super::connection::ConnectionId;
use super::metrics;
use crate::api::{
    self, Code, EventKind, ListRequest, ListResponse, Pod, Request, UpdateRequest, UpdateResponse,
    WatchEvent, WatchRequest,
};
use crate::attach::Attachment;
use crate::config::Config;
use crate::engine::Engine;
use crate::uplink::Uplink;

pub(super) use answer::Answer;
use answer::{Refusal, Result, invalid};
use hold::{Held, Owner};
use request::{decode, read_cpuset};

/// Most attachments: twice what the kubelet's largest nodes run, and far below what a filter of link events takes.
pub(super) const MAX_PODS: usize = 1000;

/// A pod's namespace and id.
type Name = (String, String);

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
            let why = Some(sockets.short_way.as_str()).filter(|why| !why.is_empty());
            attachment.set_short_way(why);
        }
        Ok(UpdateResponse {})
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
            round_times: &self.engine.round_times(),
            uplinks: &self.uplinks,
            counts: self.counts,
            held: self.held.len(),
        }
        .text()
    }
}

fn event(kind: EventKind, pod: Pod) -> WatchEvent {
    WatchEvent {
        kind: kind.into(),
        pod: Some(pod),
    }
}
