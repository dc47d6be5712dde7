//! What a pod asked for: annotations, else the runtime's options, else the config file, else the default.

mod read;

use std::fmt;

use kbp_kernel::Micros;
use serde::{Deserialize, Serialize};

pub(crate) use read::toml_reason;

/// Prefix of every annotation of kbp.
pub const PREFIX: &str = "kbp.io/";

/// Longest window that may be asked for.
///
/// A spinner is not preempted by the wake-up of a thread that waits for its CPU, so a window is time that a
/// neighbour may have to wait. The scheduler takes the CPU away after a slice of about 3 to 4 ms anyway; a longer
/// window does not hold on to the CPU any better, it only burns more of it. 10 ms spans the gaps between requests down
/// to 100 a second, and whoever waits longer than that does not notice the 50 µs of a wake-up.
pub const MAX_WINDOW: Micros = Micros(10_000);

/// Longest exit latency that may be asked for: above that no sleep state of any CPU is ruled out.
pub const MAX_CPU_LATENCY: Micros = Micros(10_000);

/// `kbp.io/worker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerPolicy {
    /// kbp decides.
    Auto,
    /// A core of its own.
    Dedicated,
    /// A core of the pool, many pods.
    Shared,
    /// SCHED_IDLE: only cycles nobody else wants.
    Idle,
    /// No worker.
    None,
}

impl WorkerPolicy {
    pub(crate) const ALL: [Self; 5] = [
        Self::Auto,
        Self::Dedicated,
        Self::Shared,
        Self::Idle,
        Self::None,
    ];
}

impl fmt::Display for WorkerPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Dedicated => "dedicated",
            Self::Shared => "shared",
            Self::Idle => "idle",
            Self::None => "none",
        })
    }
}

/// `kbp.io/busy-poll`: the window of the pod's sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BusyPoll {
    /// kbp decides: [`crate::window`].
    Auto,
    /// That long: 1 µs to [`MAX_WINDOW`].
    Window(Micros),
    /// Not at all, and the pod's sockets are left alone; written `off`, or `0` as the kernel's own option has it.
    Off,
}

/// `kbp.io/busy-poll-mode`: who takes packets that come while a program with an epoll instance works.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BusyPollMode {
    /// Softirq, on the CPU of whoever sends; the program polls only while it waits.
    #[default]
    Spin,
    /// Nobody: they wait until the program polls again, or for a timer (IRQ suspension, 6.13+).
    Suspend,
}

impl BusyPollMode {
    pub(crate) const ALL: [Self; 2] = [Self::Spin, Self::Suspend];
}

impl fmt::Display for BusyPollMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Spin => "spin",
            Self::Suspend => "suspend",
        })
    }
}

/// `kbp.io/profile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// GRO on, TSO off: every packet passes the NAPI.
    Latency,
    /// TSO on: TCP is not polled.
    Throughput,
}

impl Profile {
    pub(crate) const ALL: [Self; 2] = [Self::Latency, Self::Throughput];
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Latency => "latency",
            Self::Throughput => "throughput",
        })
    }
}

/// One source of settings; None where it is silent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layer {
    /// `worker`.
    pub worker: Option<WorkerPolicy>,
    /// `busy-poll`.
    pub busy_poll: Option<BusyPoll>,
    /// `profile`.
    pub profile: Option<Profile>,
    /// `required`.
    pub required: Option<bool>,
    /// `cpu-latency`; Some(None): said to be off.
    pub cpu_latency: Option<Option<Micros>>,
    /// `prefer-busy-poll`.
    pub prefer_busy_poll: Option<bool>,
    /// `busy-poll-mode`.
    pub busy_poll_mode: Option<BusyPollMode>,
}

/// What holds for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// See [`WorkerPolicy`]; default `auto`.
    pub worker: WorkerPolicy,
    /// See [`BusyPoll`]; default `auto`.
    pub busy_poll: BusyPoll,
    /// See [`Profile`]; default `latency`.
    pub profile: Profile,
    /// Fail the pod rather than run it degraded; default false.
    pub required: bool,
    /// Longest exit latency of the CPUs' sleep states while the pod runs, at most [`MAX_CPU_LATENCY`]; default: none is asked for.
    pub cpu_latency: Option<Micros>,
    /// Whether packets wait a moment for whoever polls, instead of being handled on the CPU of their sender; default false.
    pub prefer_busy_poll: bool,
    /// See [`BusyPollMode`]; default `spin`.
    pub busy_poll_mode: BusyPollMode,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            worker: WorkerPolicy::Auto,
            busy_poll: BusyPoll::Auto,
            profile: Profile::Latency,
            required: false,
            cpu_latency: None,
            prefer_busy_poll: false,
            busy_poll_mode: BusyPollMode::Spin,
        }
    }
}

impl Policy {
    /// Whether packets are to wait for whoever polls.
    pub fn defers(&self) -> bool {
        self.prefer_busy_poll || self.busy_poll_mode == BusyPollMode::Suspend
    }

    /// The first layer that speaks wins; the default where none does.
    pub fn resolve(layers: &[Layer]) -> Self {
        let default = Self::default();
        Self {
            worker: layers
                .iter()
                .find_map(|l| l.worker)
                .unwrap_or(default.worker),
            busy_poll: layers
                .iter()
                .find_map(|l| l.busy_poll)
                .unwrap_or(default.busy_poll),
            profile: layers
                .iter()
                .find_map(|l| l.profile)
                .unwrap_or(default.profile),
            required: layers
                .iter()
                .find_map(|l| l.required)
                .unwrap_or(default.required),
            cpu_latency: layers
                .iter()
                .find_map(|l| l.cpu_latency)
                .unwrap_or(default.cpu_latency),
            prefer_busy_poll: layers
                .iter()
                .find_map(|l| l.prefer_busy_poll)
                .unwrap_or(default.prefer_busy_poll),
            busy_poll_mode: layers
                .iter()
                .find_map(|l| l.busy_poll_mode)
                .unwrap_or(default.busy_poll_mode),
        }
    }
}

/// The choice that `value` names; on error the list of what is allowed.
pub(crate) fn choose<T: fmt::Display + Copy>(text: &str, choices: &[T]) -> Result<T, String> {
    choices
        .iter()
        .copied()
        .find(|choice| choice.to_string() == text)
        .ok_or_else(|| {
            choices
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        })
}
