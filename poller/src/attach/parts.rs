//! The steps of an attach, and what they have come to.

use std::sync::Arc;

use kbp_kernel::NapiId;
use kbp_kernel::link::LinkEvents;
use nix::sys::eventfd::EventFd;

use super::{AttachRequest, Terms, placing};
use crate::config::Feature;
use crate::endpoint::Endpoint;
use crate::engine::{Kept, Latency, Pod};
use crate::place::Placed;
use crate::record::{Findings, Napis, Record};
use crate::state::{self, Degraded, Part, PodState, SocketCounters};
use crate::tune::{Offloads, Tuner};
use crate::worker::Plan;
use crate::{Error, Result, originals};

/// What an attach has put together so far.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) veths: Vec<Endpoint>,
    pub(super) before: Vec<(Endpoint, Offloads)>,
    findings: Findings,
    pub(super) events: Option<LinkEvents>,
    /// Why there can be no worker, when that is known before one is looked for.
    unable: Option<String>,
    placed: Option<Placed>,
    polled: Napis,
}

impl Parts {
    pub(super) fn find_and_tune(
        request: &AttachRequest,
        terms: &Terms,
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
        match LinkEvents::subscribe(&tuner.pod) {
            Ok(events) => parts.events = Some(events),
            Err(error) => parts.unable = Some(error.to_string()),
        }
        for veth in &veths {
            // Nothing to put back where nothing can be read: tuning meets the same error and tells it.
            if let Ok(mut offloads) = tuner.offloads(veth) {
                if terms.keep_originals {
                    offloads = originals::of(&request.config.state_dir, tuner, veth, offloads);
                }
                parts.before.push((veth.clone(), offloads));
            }
        }
        parts.findings = Findings::gather(tuner, &veths, not_pollable);
        parts.veths = veths;
        parts
    }

    pub(super) fn choose_worker(
        &mut self,
        kept: &mut Kept,
        request: &AttachRequest,
        tuner: &Tuner,
        pods: &[PodState],
    ) {
        let placing = placing(request);
        let plan = if self.veths.is_empty() {
            Plan::none("no interface that can be polled")
        } else if let Some(why) = self.polled_already(request, pods) {
            Plan::none(why)
        } else if let Some(why) = placing.unwanted() {
            Plan::none(why)
        } else if let Some(unable) = self.unable.clone().or(self.findings.ids_unknown.clone()) {
            Plan::failed(unable)
        } else {
            placing.plan_among(pods, &kept.loads())
        };
        let placed = kept.workers.join(plan, &placing);
        if let Some((key, _)) = placed.worker
            && let wanted = kept.workers.wanted(key, &self.findings)
            && let Err(reason) = kept.workers.poll(key, &mut self.polled, &wanted, tuner)
        {
            // As at every later look at the links, which may find it mended.
            self.findings.degraded.push(Degraded {
                part: Part::Worker,
                reason,
            });
        }
        self.placed = Some(placed);
    }

    /// Who else polls a host end, under another name: two workers at one NAPI only hinder each other.
    fn polled_already(&self, request: &AttachRequest, pods: &[PodState]) -> Option<String> {
        let others = pods
            .iter()
            .filter(|pod| pod.worker.is_some() && !pod.is(&request.namespace, &request.id));
        let mut shared = others.flat_map(|pod| pod.interfaces.iter().map(move |i| (pod, i)));
        let napis = self.findings.host_napis();
        // By the NAPI, whose id is unique on the machine.
        let (pod, interface) = shared.find(|(_, interface)| {
            interface
                .host_napi
                .is_some_and(|napi| napis.contains_key(&NapiId(napi)))
        })?;
        Some(format!(
            "{} is polled already, for {}/{} by process {}",
            interface.host_interface, pod.namespace, pod.id, pod.owner_pid
        ))
    }

    /// Gives the worker back.
    pub(super) fn leave(&self, kept: &mut Kept) {
        if let Some((key, _)) = self.placed.as_ref().and_then(|p| p.worker.as_ref()) {
            kept.workers.leave(*key, &self.polled);
        }
    }

    pub(super) fn pod(
        &mut self,
        request: &AttachRequest,
        terms: &Terms,
        tuner: &Tuner,
        record: &Arc<Record>,
        events: LinkEvents,
    ) -> Result<Pod> {
        let mut pod = Pod::new(
            tuner.try_clone()?,
            std::mem::take(&mut self.veths),
            Arc::clone(record),
            placing(request),
            events,
        );
        pod.worker = self
            .placed
            .as_ref()
            .and_then(|p| p.worker.as_ref())
            .map(|(key, _)| *key);
        pod.polled.clone_from(&self.polled);
        pod.cpu_latency = request.policy.cpu_latency;
        if let Some(path) = &terms.path {
            pod.path = Some((path.clone(), request.netns.id()?));
        }
        Ok(pod)
    }

    /// What is missing for as long as the attachment lasts.
    fn lasting(&self, request: &AttachRequest) -> Vec<Degraded> {
        let told = |part| move |reason: String| Degraded { part, reason };
        let worker = self.placed.as_ref().and_then(|p| p.degraded.clone());
        let latency = request.policy.cpu_latency.and_then(Latency::probe);
        worker
            .map(told(Part::Worker))
            .into_iter()
            .chain(latency.map(told(Part::CpuLatency)))
            .chain(request.degraded.iter().cloned())
            .collect()
    }

    pub(super) fn refuse_degraded(&self, request: &AttachRequest) -> Result<()> {
        let lasting = self.lasting(request);
        match self.findings.degraded.iter().chain(&lasting).next() {
            Some(missing) if request.policy.required => Err(Error::Required {
                part: missing.part,
                reason: missing.reason.clone(),
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn record(&self, request: &AttachRequest, changed: Arc<EventFd>) -> Result<Record> {
        let owner_pid = std::process::id();
        let owner_start = state::start_time(owner_pid).ok_or_else(|| {
            let gone = std::io::ErrorKind::NotFound.into();
            Error::io(format!("read /proc/{owner_pid}/stat"), gone)
        })?;
        let placed = self.placed.as_ref();
        let state = PodState {
            id: request.id.clone(),
            namespace: request.namespace.clone(),
            owner_pid,
            owner_start,
            worker_policy: request.policy.worker,
            profile: request.policy.profile,
            interfaces: self.findings.interfaces.clone(),
            worker: placed.and_then(|p| p.worker.as_ref().map(|(_, state)| state.clone())),
            worker_reason: placed.map(|p| p.reason.clone()).unwrap_or_default(),
            busy_poll_us: request.window.micros.map(|m| m.0),
            busy_poll_reason: request.window.reason.clone(),
            busy_poll_mode: request.policy.busy_poll_mode,
            prefer_busy_poll: request.policy.prefer_busy_poll,
            sockets: SocketCounters::default(),
            cpuset: request.cpuset.as_ref().map(ToString::to_string),
            short_way: None,
            rests: false,
            degraded: self.lasting(request),
        };
        Ok(Record::new(
            request.config.state_dir.clone(),
            state,
            self.findings.degraded.clone(),
            changed,
        ))
    }
}
