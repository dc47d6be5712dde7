//! What a request says, in the library's own types.

use kbp_kernel::netns::Netns;
use kbp_kernel::{CpuSet, Micros};
use prost::Message;

use super::Service;
use super::answer::{Result, invalid};
use crate::api::{self, AttachRequest};
use crate::attach;
use crate::policy::{BusyPollMode, Layer, MAX_CPU_LATENCY, Policy, Profile, WorkerPolicy, choose};
use crate::state::SocketCounters;
use crate::window::Window;

impl Service {
    pub(super) fn attach_request(
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
}

pub(super) fn decode<M: Message + Default>(payload: &[u8]) -> Result<M> {
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

pub(super) fn read_cpuset(text: &str) -> Result<Option<CpuSet>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|e: kbp_kernel::Error| invalid(format!("cpuset: {e}")))
}
