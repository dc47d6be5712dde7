//! What a pod asked for: annotations, else the runtime's options, else the config file, else the default.

use std::collections::BTreeMap;
use std::fmt;

use kbp_kernel::Micros;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Prefix of every annotation of kbp.
pub const PREFIX: &str = "kbp.io/";

/// Longest window that may be asked for.
///
/// A spinner is not preempted by the wake-up of a thread that waits for its CPU, so a window is time that a
/// neighbour may have to wait. The scheduler takes the CPU away after a slice of about 3 to 4 ms anyway; a longer
/// window does not hold on to the CPU any better, it only burns more of it. 10 ms spans the gaps between requests down
/// to 100 a second, and whoever waits longer than that does not notice the 50 µs of a wake-up.
pub const MAX_WINDOW: Micros = Micros(10_000);

/// The keys of a policy, without [`PREFIX`].
const KEYS: [&str; 7] = [
    "worker",
    "busy-poll",
    "profile",
    "required",
    "cpu-latency",
    "prefer-busy-poll",
    "busy-poll-mode",
];

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

impl Layer {
    /// Reads the `kbp.io/` annotations; others are ignored, an unknown `kbp.io/` key is refused by name.
    pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Self> {
        const ORIGIN: &str = "annotation";
        let mut layer = Self::default();
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(PREFIX) else {
                continue;
            };
            if !layer.set(ORIGIN, key, name, Value::Text(value))? {
                return Err(Error::UnknownKey {
                    origin: ORIGIN.to_owned(),
                    key: name.clone(),
                    known: KEYS.map(|k| format!("{PREFIX}{k}")).join(", "),
                });
            }
        }
        Ok(layer)
    }

    /// Reads the TOML of CRI's `config_body` (the keys without prefix, in a table `[kbp]`; other tables are not ours).
    pub fn from_runtime_options(toml: &str) -> Result<Self> {
        const ORIGIN: &str = "runtime options";
        let options: toml::Table = toml.parse().map_err(|e| Error::Config {
            path: ORIGIN.to_owned(),
            reason: toml_reason(&e),
        })?;
        let mut layer = Self::default();
        let Some(table) = options.get("kbp") else {
            return Ok(layer);
        };
        let table = table.as_table().ok_or_else(|| Error::InvalidValue {
            origin: ORIGIN.to_owned(),
            key: "kbp".to_owned(),
            value: table.to_string(),
            allowed: format!("a table with {}", KEYS.join(", ")),
        })?;
        for (key, value) in table {
            if !layer.set_toml(ORIGIN, key, &format!("kbp.{key}"), value)? {
                return Err(Error::UnknownKey {
                    origin: ORIGIN.to_owned(),
                    key: format!("kbp.{key}"),
                    known: KEYS.map(|k| format!("kbp.{k}")).join(", "),
                });
            }
        }
        Ok(layer)
    }

    /// Takes one key of a TOML table; false when it is not a policy key. `name` is how errors call it.
    pub(crate) fn set_toml(
        &mut self,
        origin: &str,
        key: &str,
        name: &str,
        value: &toml::Value,
    ) -> Result<bool> {
        let written = match value {
            toml::Value::String(text) => Value::Text(text),
            toml::Value::Boolean(flag) => Value::Flag(*flag),
            toml::Value::Integer(number) => Value::Number(*number),
            other => Value::Other(other.to_string()),
        };
        self.set(origin, key, name, written)
    }

    fn set(&mut self, origin: &str, key: &str, name: &str, value: Value<'_>) -> Result<bool> {
        let refuse = |allowed: String| Error::InvalidValue {
            origin: origin.to_owned(),
            key: name.to_owned(),
            value: value.to_string(),
            allowed,
        };
        match key {
            "worker" => self.worker = Some(one_of(&value, &WorkerPolicy::ALL).map_err(refuse)?),
            "busy-poll" => self.busy_poll = Some(busy_poll(&value).map_err(refuse)?),
            "profile" => self.profile = Some(one_of(&value, &Profile::ALL).map_err(refuse)?),
            "required" => self.required = Some(flag(&value).map_err(refuse)?),
            "prefer-busy-poll" => self.prefer_busy_poll = Some(flag(&value).map_err(refuse)?),
            "busy-poll-mode" => {
                self.busy_poll_mode = Some(one_of(&value, &BusyPollMode::ALL).map_err(refuse)?);
            }
            "cpu-latency" => self.cpu_latency = Some(cpu_latency(&value).map_err(refuse)?),
            _ => return Ok(false),
        }
        Ok(true)
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

/// A value as it was written; annotations only know text.
enum Value<'a> {
    Text(&'a str),
    Flag(bool),
    Number(i64),
    Other(String),
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Flag(flag) => flag.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Other(text) => f.write_str(text),
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

fn one_of<T: fmt::Display + Copy>(value: &Value<'_>, choices: &[T]) -> Result<T, String> {
    // Text only: `worker = true` is not the word "true".
    let text = if let Value::Text(text) = value {
        text
    } else {
        ""
    };
    choose(text, choices)
}

fn flag(value: &Value<'_>) -> Result<bool, String> {
    match value {
        Value::Flag(flag) => Ok(*flag),
        _ => one_of(value, &[true, false]),
    }
}

fn whole_number(value: &Value<'_>) -> Option<u32> {
    match value {
        // `parse` alone would take "+5".
        Value::Text(text) if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        Value::Number(number) => u32::try_from(*number).ok(),
        _ => None,
    }
}

fn cpu_latency(value: &Value<'_>) -> Result<Option<Micros>, String> {
    if matches!(value, Value::Text("off")) {
        return Ok(None);
    }
    match whole_number(value) {
        Some(n) if n <= MAX_CPU_LATENCY.0 => Ok(Some(Micros(n))),
        _ => Err(format!(
            "off, or whole microseconds from 0 to {MAX_CPU_LATENCY}"
        )),
    }
}

fn busy_poll(value: &Value<'_>) -> Result<BusyPoll, String> {
    match value {
        Value::Text("auto") => return Ok(BusyPoll::Auto),
        Value::Text("off") => return Ok(BusyPoll::Off),
        _ => {}
    }
    match whole_number(value) {
        Some(0) => Ok(BusyPoll::Off),
        Some(n) if n <= MAX_WINDOW.0 => Ok(BusyPoll::Window(Micros(n))),
        _ => Err(format!(
            "auto, off (or 0), or whole microseconds from 1 to {MAX_WINDOW}"
        )),
    }
}

/// A TOML error on one line: where and what, without the excerpt that the parser draws.
pub(crate) fn toml_reason(error: &toml::de::Error) -> String {
    let drawn = error.to_string();
    match drawn.lines().next().filter(|l| l.contains("line ")) {
        Some(place) => format!("{place}: {}", error.message()),
        None => error.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn every_key_is_read_from_annotations_and_foreign_ones_are_ignored() {
        let layer = Layer::from_annotations(&annotations(&[
            ("kbp.io/worker", "dedicated"),
            ("kbp.io/busy-poll", "50"),
            ("kbp.io/profile", "throughput"),
            ("kbp.io/required", "true"),
            ("kbp.io/cpu-latency", "0"),
            ("kbp.io/prefer-busy-poll", "true"),
            ("kbp.io/busy-poll-mode", "suspend"),
            ("io.kubernetes.cri.sandbox-id", "x"),
        ]))
        .expect("valid");
        assert_eq!(
            layer,
            Layer {
                worker: Some(WorkerPolicy::Dedicated),
                busy_poll: Some(BusyPoll::Window(Micros(50))),
                profile: Some(Profile::Throughput),
                required: Some(true),
                cpu_latency: Some(Some(Micros(0))),
                prefer_busy_poll: Some(true),
                busy_poll_mode: Some(BusyPollMode::Suspend),
            }
        );
    }

    #[test]
    fn a_bad_annotation_is_refused_with_key_value_and_what_is_allowed() {
        for (key, value, allowed) in [
            (
                "kbp.io/worker",
                "fast",
                "auto, dedicated, shared, idle, none",
            ),
            (
                "kbp.io/worker",
                "Idle",
                "auto, dedicated, shared, idle, none",
            ),
            ("kbp.io/busy-poll", "10001", "1 to 10000"),
            ("kbp.io/busy-poll", "-1", "auto, off (or 0)"),
            ("kbp.io/busy-poll", "+5", "auto, off (or 0)"),
            ("kbp.io/busy-poll", "50us", "auto, off (or 0)"),
            (
                "kbp.io/busy-poll",
                "99999999999999999999",
                "auto, off (or 0)",
            ),
            ("kbp.io/busy-poll", "", "auto, off (or 0)"),
            ("kbp.io/profile", "fastest", "latency, throughput"),
            ("kbp.io/required", "yes", "true, false"),
            ("kbp.io/prefer-busy-poll", "1", "true, false"),
            ("kbp.io/busy-poll-mode", "sleep", "spin, suspend"),
            ("kbp.io/busy-poll-mode", "Suspend", "spin, suspend"),
        ] {
            let error = Layer::from_annotations(&annotations(&[(key, value)]))
                .expect_err(key)
                .to_string();
            assert!(error.starts_with("annotation: "), "{error}");
            assert!(error.contains(&format!("{key} = {value:?}")), "{error}");
            assert!(error.contains(allowed), "{error}");
        }
    }

    #[test]
    fn an_unknown_annotation_is_refused_by_name() {
        let error = Layer::from_annotations(&annotations(&[("kbp.io/wroker", "idle")]))
            .expect_err("unknown")
            .to_string();
        assert!(error.contains("kbp.io/wroker"), "{error}");
        assert!(
            error.contains("kbp.io/worker, kbp.io/busy-poll, kbp.io/profile, kbp.io/required, kbp.io/cpu-latency, kbp.io/prefer-busy-poll, kbp.io/busy-poll-mode"),
            "{error}"
        );
    }

    #[test]
    fn zero_means_off() {
        for text in ["0", "off"] {
            let layer =
                Layer::from_annotations(&annotations(&[("kbp.io/busy-poll", text)])).expect("off");
            assert_eq!(layer.busy_poll, Some(BusyPoll::Off));
        }
    }

    #[test]
    fn runtime_options_are_read_from_their_own_table_only() {
        let layer = Layer::from_runtime_options(
            "BinaryName = \"crun\"\n[other]\nworker = 3\n[kbp]\nworker = \"idle\"\nbusy-poll = 30\nrequired = true\n",
        )
        .expect("valid");
        assert_eq!(layer.worker, Some(WorkerPolicy::Idle));
        assert_eq!(layer.busy_poll, Some(BusyPoll::Window(Micros(30))));
        assert_eq!(layer.required, Some(true));
        assert_eq!(layer.profile, None);
        assert_eq!(
            Layer::from_runtime_options("").expect("empty"),
            Layer::default()
        );
    }

    #[test]
    fn bad_runtime_options_are_refused_by_name() {
        for (toml, part) in [
            ("[kbp]\nworker = true", "kbp.worker = \"true\""),
            ("[kbp]\nspeed = 1", "kbp.speed is not a kbp setting"),
            ("[kbp]\nbusy-poll = 1.5", "kbp.busy-poll = \"1.5\""),
            ("[kbp]\nrequired = 1", "allowed: true, false"),
            ("[kbp]\nprefer-busy-poll = 1", "allowed: true, false"),
            (
                "[kbp]\nbusy-poll-mode = true",
                "kbp.busy-poll-mode = \"true\"",
            ),
            ("kbp = 1", "a table with worker"),
            ("[kbp\n", "line 1"),
        ] {
            let error = Layer::from_runtime_options(toml)
                .expect_err(toml)
                .to_string();
            assert!(error.contains(part), "{toml}: {error}");
            assert!(error.contains("runtime options"), "{error}");
        }
    }

    #[test]
    fn the_first_layer_that_speaks_wins_key_by_key() {
        let pod = Layer {
            worker: Some(WorkerPolicy::None),
            ..Layer::default()
        };
        let node = Layer {
            worker: Some(WorkerPolicy::Idle),
            busy_poll: Some(BusyPoll::Off),
            ..Layer::default()
        };
        assert_eq!(
            Policy::resolve(&[pod, Layer::default(), node]),
            Policy {
                worker: WorkerPolicy::None,
                busy_poll: BusyPoll::Off,
                ..Policy::default()
            }
        );
        assert_eq!(Policy::resolve(&[]), Policy::default());
    }
}
