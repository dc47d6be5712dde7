//! Where settings are written: annotations, the runtime's options, tables of TOML.

use std::collections::BTreeMap;
use std::fmt;

use kbp_kernel::Micros;

use super::{
    BusyPoll, BusyPollMode, Layer, MAX_CPU_LATENCY, MAX_WINDOW, PREFIX, Profile, WorkerPolicy,
    choose,
};
use crate::{Error, Result};

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
    use super::super::Policy;
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
