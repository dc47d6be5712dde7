//! The containers of a pod together, and what is said of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kbp_kernel::netns::Netns;
use kbp_poller::Error;
use kbp_poller::attach::AttachRequest;
use kbp_poller::policy::BusyPoll;
use kbp_poller::state::{Degraded, SocketCounters};
use kbp_poller::window::Window;

use super::adapt::{NEAR, Pace, rested};
use super::asked::Asked;
use super::container::Container;
use super::oci_runtime::OciRuntime;
use super::report::{Report, Share, Sockets};
use super::short_way::{self, ShortWay, Turn};
use super::treat::{self, Support};
use super::{Context, Refusal};
use crate::sockets::Notifier;

/// Looking at what other pods have takes reading their state files.
const FOLLOW_EVERY: Duration = Duration::from_secs(10);

/// Why a container's own network is left alone.
pub(super) const OWN_NETWORK: &str = "it has a network of its own, and kbp looks after that of the pod's first container; give it the first one's network, or a pod of its own";

/// What a pod has.
#[derive(Debug, Default)]
pub(super) struct Inner {
    /// Decided with the first container.
    pub(super) founded: Option<Founded>,
    pub(super) containers: BTreeMap<String, Container>,
    /// What the OCI runtimes of this pod can do, by their binary.
    pub(super) runtimes: BTreeMap<String, OciRuntime>,
    pub(super) notifier: Option<Notifier>,
    pub(super) report: Option<Report>,
    /// When the windows were last compared with what other pods have.
    pub(super) followed: Option<Instant>,
    pub(super) pace: Pace,
    pub(super) short_way: ShortWay,
}

/// What the first container decided for all.
#[derive(Debug)]
pub(super) struct Founded {
    pub(super) asked: Asked,
    /// The first container: its network is the pod's.
    pub(super) first: String,
    pub(super) support: Option<Support>,
}

impl Inner {
    /// Decides the windows anew where they depend on who else is there: of containers with a cpuset, which another pod may have
    /// come to share or left. It is called when calls were answered and while the pod does anything; whether any has changed.
    pub(super) fn follow(&mut self, context: &Context) -> bool {
        let (Some(founded), Some(notifier)) = (&self.founded, &self.notifier) else {
            return false;
        };
        let lately = |at: &Instant| at.elapsed() < FOLLOW_EVERY;
        if founded.asked.policy.busy_poll != BusyPoll::Auto
            || self.followed.as_ref().is_some_and(lately)
        {
            return false;
        }
        let now = Instant::now();
        self.followed = Some(now);
        let mut changed = false;
        for (id, container) in &mut self.containers {
            if container.treatment.is_none() || container.limits.cpus.is_none() {
                continue;
            }
            let window = treat::window(&founded.asked, &container.limits, context);
            changed |= container.decide(id, window, false, Some(notifier));
        }
        if changed {
            // What a new window does is looked at soon.
            self.pace.wake(now);
        }
        changed
    }

    /// Looks whether windows hurt; after how long to look again, None: when something happens.
    pub(super) fn adapt(&mut self, now: Instant) -> Option<Duration> {
        let (Some(founded), Some(notifier)) = (&self.founded, &self.notifier) else {
            return None;
        };
        if founded.asked.policy.busy_poll != BusyPoll::Auto {
            return None;
        }
        let begun = Instant::now();
        let widest = founded.asked.config.widest();
        for noted in notifier.noted() {
            if let Some(container) = self.containers.get_mut(noted.container()) {
                container.pollers.add(noted);
            }
        }
        let (mut cpus, mut slept, mut changed, mut any) = (0.0, 0.0, false, false);
        for (id, container) in &mut self.containers {
            if let Some(looked) = container.look(id, notifier, widest, now) {
                any = true;
                cpus += looked.cpus;
                slept += looked.slept;
                changed |= looked.changed;
            }
        }
        if changed {
            self.tell_sockets();
        }
        self.lead(cpus, slept, now);
        let tried = self.containers.values().any(|c| c.course.tries());
        let adaptive = self.containers.values().map(|c| c.course.adaptive());
        any.then(|| {
            let pause = self.pace.next(adaptive, cpus, now);
            let pause = if tried { pause.min(NEAR) } else { pause };
            rested(pause, begun.elapsed())
        })
    }

    /// Looks whether polling brings the pod anything, and has its packets pass by the NAPI while it does not.
    fn lead(&mut self, cpus: f64, slept: f64, now: Instant) {
        let Some(report @ Report::Attached(_)) = &self.report else {
            return;
        };
        if cpus < short_way::BUSY && !self.short_way.is_taken() {
            return;
        }
        let of_pod = |c: &&Container| !c.degraded.iter().any(|d| d.reason == OWN_NETWORK);
        let alive = |c: &Container| {
            let (pid, handle) = c.process.as_ref()?;
            handle.signal(0).unwrap_or(false).then_some(*pid)
        };
        let Some(pid) = self.containers.values().filter(of_pod).find_map(alive) else {
            return;
        };
        match self.short_way.look(pid, slept, now) {
            Turn::Stay => {}
            Turn::Take(why) => {
                tracing::info!("packets take the short way: {why}");
                report.set_short_way(Some(&why));
            }
            Turn::Leave => {
                tracing::info!("packets pass the NAPI again");
                report.set_short_way(None);
            }
        }
    }

    /// Has another container stand for the pod's network in place of `gone`, unless the pod is attached already.
    pub(super) fn replace_first(&mut self, gone: &str) -> Option<String> {
        let founded = self.founded.as_mut()?;
        if founded.first != gone || matches!(self.report, Some(Report::Attached(_))) {
            return None;
        }
        // One that was given a network of its own only when there is no other: that is the pod's now.
        let is_apart = |c: &Container| c.degraded.iter().any(|d| d.reason == OWN_NETWORK);
        let (id, container) = self
            .containers
            .iter_mut()
            .filter(|(_, c)| !c.host_network)
            .min_by_key(|(_, c)| is_apart(c))?;
        container.degraded.retain(|d| d.reason != OWN_NETWORK);
        founded.first.clone_from(id);
        Some(id.clone())
    }

    pub(super) fn sockets(&self) -> Sockets {
        let windows: Vec<Window> = self.containers.values().map(Container::shown).collect();
        let shares: Vec<Share<'_>> = self
            .containers
            .iter()
            .zip(&windows)
            .map(|((id, c), window)| Share {
                id,
                sandbox: c.sandbox,
                window,
                cpuset: c.limits.cpuset(),
            })
            .collect();
        Sockets::of(&shares)
    }

    pub(super) fn degraded(&self) -> Vec<Degraded> {
        self.containers
            .iter()
            .flat_map(|(id, c)| c.degraded.iter().map(|d| of_container(id, d)))
            .collect()
    }

    pub(super) fn tell_sockets(&mut self) {
        let sockets = self.sockets();
        let counters = self
            .notifier
            .as_ref()
            .map_or_else(SocketCounters::default, Notifier::counters);
        if let Some(report) = &mut self.report {
            report.set_sockets(&sockets, counters);
        }
    }

    pub(super) fn request(&self, context: &Context, pid: u32) -> Result<AttachRequest, Refusal> {
        let founded = self
            .founded
            .as_ref()
            .ok_or_else(|| Refusal::Failed("kbp: no container".to_owned()))?;
        let sockets = self.sockets();
        Ok(AttachRequest {
            id: context.pod_id.clone(),
            namespace: context.namespace.clone(),
            netns: Netns::of_process(pid).map_err(Error::from)?,
            policy: founded.asked.policy,
            cpuset: sockets.cpuset,
            window: sockets.window,
            degraded: self.degraded(),
            config: founded.asked.config.clone(),
        })
    }
}

pub(super) fn of_container(id: &str, degraded: &Degraded) -> Degraded {
    Degraded {
        part: degraded.part,
        reason: format!("container {id}: {}", degraded.reason),
    }
}
