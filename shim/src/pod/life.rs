//! What a pod has, from its first container to its last.
//!
//! Every method may block, on files, the kernel or the lock, and belongs on a thread for that.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use kbp_kernel::process::PidFd;
use kbp_poller::Error;
use kbp_poller::config::Config;
use kbp_poller::polled::{PolledOutcome, attach};
use kbp_poller::state::{Degraded, Part};
use kbp_poller::window::Window;
use tokio::sync::mpsc;

use super::asked::{Asked, oci_runtime};
use super::container::{Container, Rest, described};
use super::course::Course;
use super::inner::{Founded, Inner, OWN_NETWORK, of_container};
use super::oci_runtime::OciRuntime;
use super::others::Others;
use super::report::{Bare, Report};
use super::treat::{self, HOST_NETWORK, Means, Support};
use super::{Context, Refusal};
use crate::sockets::{Event, Notifier, Pollers};
use crate::spec::{CpuLimits, Network, Spec};

const NO_INTERFACE: &str = "there is no interface in the pod's network namespace";

/// Its processes come back with the filters they had, or none.
const RESTORED: &str = "the container is restored from a checkpoint";

/// Reads the node's settings.
pub(super) type LoadConfig = Box<dyn Fn() -> kbp_poller::Result<Config> + Send + Sync>;

/// The pod of a shim.
pub(super) struct Pod {
    context: Context,
    events: mpsc::UnboundedSender<Event>,
    /// Whether an interface may still come before the first process starts.
    awaits_interface: AtomicBool,
    config: LoadConfig,
    /// Read where the lock may be held by work that hangs.
    required: AtomicBool,
    inner: Mutex<Inner>,
}

/// A container that may be created.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// Whether this pod keeps it: it has to be [forgotten](Pod::forget) when its creation fails.
    pub(super) kept: bool,
    /// The specification as it was, when it was edited.
    pub(super) edited: Option<Spec>,
}

impl Pod {
    pub(super) fn new(
        context: Context,
        config: LoadConfig,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        Self {
            context,
            config,
            events,
            awaits_interface: AtomicBool::new(false),
            required: AtomicBool::new(false),
            inner: Mutex::default(),
        }
    }

    /// Whether [`Pod::attach`] is to be called again before the first process starts.
    pub(super) fn awaits_interface(&self) -> bool {
        self.awaits_interface.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing between two statements that could panic leaves it half-changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a container is created: decides what it is given and edits its bundle. On a refusal nothing is left.
    pub(super) fn prepare(&self, request: &api::CreateTaskRequest) -> Result<Prepared, Refusal> {
        let mut inner = self.lock();
        if inner.containers.contains_key(&request.id) {
            // The plain service will refuse it, and what is there is the other one's.
            return Ok(Prepared::default());
        }
        let spec = match Spec::read(Path::new(&request.bundle)) {
            Ok(spec) => spec,
            Err(error) => {
                // Nothing can be said about this container but what the runtime will say.
                tracing::warn!("kbp leaves container {} alone: {error}", request.id);
                return Ok(Prepared::default());
            }
        };
        let prepared = self.prepare_spec(&mut inner, spec, request);
        if prepared.is_err() && inner.containers.is_empty() {
            self.end_locked(&mut inner);
        }
        prepared
    }

    fn prepare_spec(
        &self,
        inner: &mut Inner,
        mut spec: Spec,
        request: &api::CreateTaskRequest,
    ) -> Result<Prepared, Refusal> {
        let founded = match inner.founded.take() {
            Some(founded) => {
                let founded = inner.founded.insert(founded);
                // They decide nothing any more, but a mistake in them should not go unseen.
                Asked::check(&spec)?;
                founded
            }
            None => inner.founded.insert(Founded {
                asked: Asked::of(&spec, request.options.as_ref(), (self.config)()?)?,
                first: request.id.clone(),
                support: None,
            }),
        };
        let is_first = founded.first == request.id;
        let required = founded.asked.policy.required;
        self.required.store(required, Ordering::Release);
        let limits = spec.cpu_limits();
        let sandbox = spec.value()["annotations"]["io.kubernetes.cri.container-type"] == "sandbox";
        let host_network = treat::is_host_network(&spec.network());
        if host_network && required {
            return Err(required_missing(Part::PollableVeth, HOST_NETWORK));
        }
        let mut container = Container {
            sandbox,
            course: no_window(HOST_NETWORK),
            watch: None,
            rest: Rest::default(),
            others: Others::default(),
            pollers: Pollers::default(),
            process: None,
            limits,
            treatment: None,
            host_network,
            degraded: Vec::new(),
        };
        let mut edited = None;
        if !request.checkpoint.is_empty() {
            container.course = no_window(RESTORED);
            container.degraded = treat::no_sockets(RESTORED);
            if required {
                return Err(required_missing(Part::SocketBusyPoll, RESTORED));
            }
        } else if !host_network {
            let window = treat::window(&founded.asked, &container.limits, &self.context);
            container.course = Course::new(window);
            edited = self.install(inner, &mut spec, &mut container, request);
            if !is_first && spec.network() == Network::New {
                container.degraded.push(Degraded {
                    part: Part::PollableVeth,
                    reason: OWN_NETWORK.to_owned(),
                });
            }
            if required && let Some(missing) = container.degraded.first() {
                if let Some(notifier) = &inner.notifier {
                    notifier.dismiss(&request.id);
                }
                restore(edited.as_ref());
                return Err(required_missing(missing.part, &missing.reason));
            }
        }
        self.add(inner, &request.id, container);
        Ok(Prepared { kept: true, edited })
    }

    /// Installs the listener where the container has a window; the specification, when it was edited.
    fn install(
        &self,
        inner: &mut Inner,
        spec: &mut Spec,
        container: &mut Container,
        request: &api::CreateTaskRequest,
    ) -> Option<Spec> {
        let founded = inner.founded.as_mut()?;
        container.course.window().micros?;
        let config = &founded.asked.config;
        let support = founded
            .support
            .get_or_insert_with(|| Support::probe(config));
        let binary = oci_runtime(request.options.as_ref(), config);
        let runtime = inner
            .runtimes
            .entry(binary.clone())
            .or_insert_with(|| OciRuntime::ask(&binary, &config.state_dir));
        let notifier = match inner.notifier.take() {
            Some(notifier) => Ok(inner.notifier.insert(notifier)),
            None => self
                .start_notifier(&config.state_dir)
                .map(|notifier| inner.notifier.insert(notifier)),
        };
        let mut node_wide = Ok(());
        let notifier = notifier.map(|notifier| {
            if let Some(window) = config.node_busy_poll {
                node_wide = notifier.set_node_wide(&config.state_dir, window);
            }
            &*notifier
        });
        let means = Means {
            support,
            runtime,
            notifier: notifier.clone(),
        };
        let treated = treat::install(spec, &founded.asked, container.course.window(), &means);
        container.degraded = treated.degraded;
        if let Err(error) = node_wide {
            container.degraded.push(Degraded {
                part: Part::SocketBusyPoll,
                reason: format!("node-busy-poll, for programs in poll and select: {error}"),
            });
        }
        let (treatment, notifier) = (treated.treatment?, notifier.ok()?);
        // The runtime may connect as soon as it can read the file.
        notifier.admit(&request.id, treatment);
        if let Err(error) = spec.write() {
            notifier.dismiss(&request.id);
            container.degraded = treat::no_sockets(&error.to_string());
            return None;
        }
        container.treatment = Some(treatment);
        Some(spec.clone())
    }

    fn start_notifier(&self, state_dir: &Path) -> Result<Notifier, String> {
        let events = self.events.clone();
        // Nobody listens any more when the shim ends.
        let tell = move |event| drop(events.send(event));
        Notifier::start(
            state_dir,
            &self.context.namespace,
            &self.context.pod_id,
            tell,
        )
        .map_err(|e| e.to_string())
    }

    fn add(&self, inner: &mut Inner, id: &str, container: Container) {
        for degraded in &container.degraded {
            tracing::warn!(
                "container {id}: {} is not active: {}",
                degraded.part,
                degraded.reason
            );
            if let Some(report) = &mut inner.report {
                report.degrade(of_container(id, degraded));
            }
        }
        tracing::info!(
            "container {id}: busy-poll window {}",
            described(container.course.window())
        );
        let host_network = container.host_network;
        inner.containers.insert(id.to_owned(), container);
        if host_network && inner.report.is_none() {
            self.report_bare(inner, HOST_NETWORK);
        }
        inner.tell_sockets();
    }

    /// After a container was created: finds the pod's veth and has it polled. `last`: nothing can come any more.
    ///
    /// A failure undoes nothing but itself.
    pub(super) fn attach(&self, id: &str, pid: u32, last: bool) -> Result<(), Refusal> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if let Some(container) = inner.containers.get_mut(id) {
            container.process = PidFd::open(pid).ok().map(|handle| (pid, handle));
        }
        let Some(founded) = &inner.founded else {
            return Ok(());
        };
        let attached = matches!(inner.report, Some(Report::Attached(_)));
        let host_network = inner.containers.get(id).is_none_or(|c| c.host_network);
        if founded.first != id || attached || host_network {
            return Ok(());
        }
        let required = founded.asked.policy.required;
        let request = inner.request(&self.context, pid);
        // What was said until now removes its file when it goes, which must not be the new one.
        inner.report = None;
        let outcome = request.and_then(|request| Ok(attach(request)?));
        self.awaits_interface.store(false, Ordering::Release);
        let missing = match outcome {
            Ok(PolledOutcome::Attached(polled)) => {
                inner.report = Some(Report::Attached(polled));
                inner.tell_sockets();
                return Ok(());
            }
            Ok(PolledOutcome::NoInterface) if !last => {
                self.awaits_interface.store(true, Ordering::Release);
                self.report_bare(inner, NO_INTERFACE);
                return Ok(());
            }
            Ok(PolledOutcome::NoInterface) => NO_INTERFACE.to_owned(),
            Ok(PolledOutcome::HostNetwork) => HOST_NETWORK.to_owned(),
            Err(refusal) if required => return Err(refusal),
            Err(refusal) => refusal.to_string(),
        };
        if required {
            return Err(required_missing(Part::PollableVeth, &missing));
        }
        tracing::info!("pod {}: {missing}", self.context.pod_id);
        self.report_bare(inner, &missing);
        Ok(())
    }

    fn report_bare(&self, inner: &mut Inner, reason: &str) {
        let Some(founded) = &inner.founded else {
            return;
        };
        let mut degraded = vec![Degraded {
            part: Part::PollableVeth,
            reason: reason.to_owned(),
        }];
        degraded.extend(inner.degraded());
        // Before the new one writes its file, which has the same name.
        inner.report = None;
        let bare = Bare::new(
            &self.context,
            &founded.asked,
            reason,
            &inner.sockets(),
            degraded,
        );
        inner.report = Some(Report::Bare(bare));
        inner.tell_sockets();
    }

    /// After a container's limits have changed: its sockets get the window that fits them, also those that are there.
    pub(super) fn update(&self, id: &str, change: &CpuLimits) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let (Some(founded), Some(container)) = (&inner.founded, inner.containers.get_mut(id))
        else {
            return;
        };
        container.limits = container.limits.updated(change);
        if container.host_network {
            return;
        }
        let mut window = treat::window(&founded.asked, &container.limits, &self.context);
        // A filter is installed with the process or never.
        if container.treatment.is_none() && window.micros.is_some() {
            window.micros = None;
            window
                .reason
                .push_str(", but the container was created without a listener");
        }
        container.decide(id, window, true, inner.notifier.as_ref());
        inner.tell_sockets();
        // While no container has a window nobody looks. Nobody listens any more when the shim ends.
        drop(self.events.send(Event::Active));
    }

    /// After a container is gone, or its creation failed. With the last one everything goes.
    ///
    /// Some: the pod's network was to be found by that container and has not been, and this other one stands in for it:
    /// [attach](Self::attach) it, if it is there already.
    pub(super) fn forget(&self, id: &str) -> Option<String> {
        let mut inner = self.lock();
        inner.containers.remove(id)?;
        if inner.containers.is_empty() {
            self.end_locked(&mut inner);
            return None;
        }
        if let Some(notifier) = &inner.notifier {
            notifier.dismiss(id);
        }
        let heir = inner.replace_first(id);
        inner.tell_sockets();
        heir
    }

    /// The pod could not be attached although it has to be: it is tried again, and refused, before the next process starts.
    pub(super) fn attach_later(&self) {
        self.awaits_interface.store(true, Ordering::Release);
    }

    /// Whether the pod's policy says `required`; false before its first container.
    pub(super) fn is_required(&self) -> bool {
        self.required.load(Ordering::Acquire)
    }

    /// Whether there is no container.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().containers.is_empty()
    }

    /// Detaches and ends the notifier, whoever may be left.
    pub(super) fn end(&self) {
        self.end_locked(&mut self.lock());
    }

    fn end_locked(&self, inner: &mut Inner) {
        self.awaits_interface.store(false, Ordering::Release);
        *inner = Inner::default();
    }

    /// Something did not work for a socket.
    pub(super) fn degrade(&self, degraded: Degraded) {
        if let Some(report) = &mut self.lock().report {
            report.degrade(degraded);
        }
    }

    /// Looks whether windows hurt, and takes them away or gives them back; after how long to look again, None: when something
    /// happens. `by_event`: something has.
    pub(super) fn adapt(&self, by_event: bool) -> Option<Duration> {
        let mut inner = self.lock();
        let now = Instant::now();
        if by_event {
            inner.pace.wake(now);
        }
        // Other pods come and go without any call of this one.
        if inner.pace.is_awake() && inner.follow(&self.context) {
            inner.tell_sockets();
        }
        inner.adapt(now)
    }

    /// Brings the counters of the state file up to date.
    pub(super) fn count(&self) {
        let mut inner = self.lock();
        inner.follow(&self.context);
        inner.tell_sockets();
    }
}

/// Puts a bundle back as it was.
pub(super) fn restore(edited: Option<&Spec>) {
    if let Some(spec) = edited
        && let Err(error) = spec.restore()
    {
        // Of a container that was refused, the bundle goes next.
        tracing::debug!("{error}");
    }
}

/// Of a container that gets no window, for this reason.
fn no_window(reason: &str) -> Course {
    Course::new(Window {
        micros: None,
        reason: reason.to_owned(),
    })
}

fn required_missing(part: Part, reason: &str) -> Refusal {
    Error::Required {
        part,
        reason: reason.to_owned(),
    }
    .into()
}
