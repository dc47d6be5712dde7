//! Where a pod's worker goes on this node: what the machine is, who holds what, and who else was given CPUs.

use std::collections::BTreeMap;

use kbp_kernel::cpu::{self, Topology};
use kbp_kernel::{CpuId, CpuSet};

use crate::Result;
use crate::claim::{self, Site};
use crate::config::Config;
use crate::engine::WorkerKey;
use crate::kubelet;
use crate::policy::{Profile, WorkerPolicy};
use crate::state::{self, PodState, WorkerState};
use crate::worker::{self, Plan, Sockets};

/// What decides a pod's placement; kept, since it is decided anew when its interfaces come back or a core gets hot.
#[derive(Debug, Clone)]
pub(crate) struct Placing {
    pub(crate) asked: WorkerPolicy,
    pub(crate) profile: Profile,
    pub(crate) cpuset: Option<CpuSet>,
    pub(crate) sockets: Sockets,
    pub(crate) config: Config,
}

/// What a plan came to.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) worker: Option<(WorkerKey, WorkerState)>,
    /// Why this one, or none.
    pub(crate) reason: String,
    /// Why it is not what was asked for, where it is not.
    pub(crate) degraded: Option<String>,
}

impl Placed {
    pub(crate) fn none(reason: String) -> Self {
        Self {
            worker: None,
            reason,
            degraded: None,
        }
    }

    pub(crate) fn failed(reason: String) -> Self {
        Self {
            worker: None,
            reason: reason.clone(),
            degraded: Some(reason),
        }
    }
}

impl Placing {
    /// Why no worker is wanted, where none is.
    pub(crate) fn unwanted(&self) -> Option<String> {
        worker::unwanted(self.asked, &self.config.cpus, &self.sockets)
    }

    /// Decides, given `load` in packets a second of this process' workers on each CPU.
    pub(crate) fn plan(&self, load: &BTreeMap<CpuId, u64>) -> Plan {
        // Without the lock of the state directory: who attaches holds that and waits for the engine, whose thread this is.
        // The claims are locked one by one all the same.
        match state::read_all(&self.config.state_dir) {
            Ok(pods) => self.plan_among(&pods, load),
            Err(error) => Plan::failed(error.to_string()),
        }
    }

    /// Decides among these pods.
    pub(crate) fn plan_among(&self, pods: &[PodState], load: &BTreeMap<CpuId, u64>) -> Plan {
        if let Some(why) = self.unwanted() {
            return Plan::none(why);
        }
        self.at_site(pods, load, |site| worker::plan(self.asked, site))
            .unwrap_or_else(|e| Plan::failed(e.to_string()))
    }

    /// A shared worker on this very CPU.
    pub(crate) fn plan_on(&self, cpu: CpuId, load: &BTreeMap<CpuId, u64>) -> Plan {
        let claimed = state::read_all(&self.config.state_dir)
            .and_then(|pods| self.at_site(&pods, load, |site| claim::shared_on(site, cpu))?);
        match claimed {
            Ok(claim) => Plan::On {
                policy: WorkerPolicy::Shared,
                cpu,
                claim: Some(claim),
                reason: format!(
                    "moved to CPU {cpu} of the pool {} from one with more load",
                    self.config.cpus
                ),
            },
            Err(error) => Plan::failed(error.to_string()),
        }
    }

    fn at_site<T>(
        &self,
        pods: &[PodState],
        load: &BTreeMap<CpuId, u64>,
        decide: impl FnOnce(&Site<'_>) -> T,
    ) -> Result<T> {
        let reserved = kubelet::assigned(&self.config.kubelet_state)?;
        let site = Site {
            state_dir: &self.config.state_dir,
            pool: &self.config.cpus,
            config: &self.config.path,
            topology: &Topology::read()?,
            usable: &cpu::usable()?,
            cpuset: self.cpuset.as_ref(),
            pods,
            reserved: &reserved,
            load,
        };
        Ok(decide(&site))
    }
}
