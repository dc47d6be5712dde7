//! Merges kbp's listener into a container's seccomp profile.
//!
//! The rule that everything here follows: the merged profile lets a call through only where the original one did. So a
//! call is handed to the listener only when the profile allows it by name and without conditions (a notified call ends as
//! if it had been allowed); what the profile denies stays denied, and a call with conditions, or with an action that
//! leaves a trace, keeps exactly its entries. Entries for other calls are never touched.

#[cfg(test)]
mod model;

use serde_json::{Map, Value, json};

use super::{Error, Result};

/// Calls that make a socket known to the listener.
pub const SOCKET_CALLS: [&str; 3] = ["bind", "connect", "listen"];

/// Calls that make an epoll instance; `epoll_create` exists on older architectures only.
pub const EPOLL_CALLS: [&str; 2] = ["epoll_create", "epoll_create1"];

const ALLOW: &str = "SCMP_ACT_ALLOW";
const NOTIFY: &str = "SCMP_ACT_NOTIFY";
/// Actions that keep a call from being carried out.
const DENY: [&str; 5] = [
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
];

/// Annotations of crun that replace the profile or its listener.
const CRUN_OVERRIDES: [&str; 2] = ["run.oci.seccomp.receiver", "run.oci.seccomp_bpf_data"];

/// Architectures of a profile of our own. A call by an architecture that a profile does not list kills the caller, so all
/// that the kernel may run have to be there.
const ARCHITECTURES: &[&str] = if cfg!(target_arch = "x86_64") {
    &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
} else if cfg!(target_arch = "aarch64") {
    &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
} else {
    // Nothing is trapped on an architecture whose call numbers the notifier does not know: see `crate::sockets`.
    &[]
};

/// Where the runtime sends the filter's descriptor, and with which flags it loads the filter.
#[derive(Debug, Clone)]
pub struct Listener<'a> {
    /// Path of the unix socket.
    pub path: &'a str,
    /// Text that the runtime sends along.
    pub metadata: &'a str,
    /// Flags (`SECCOMP_FILTER_FLAG_…`) that both the runtime and the kernel know.
    pub flags: &'a [String],
    /// Calls that the runtime makes under the filter in order to send its descriptor. A profile that does not allow them
    /// cannot have a listener.
    pub runtime_needs: &'a [&'static str],
}

/// What became of the calls that were to be trapped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Merged {
    /// Go to the listener.
    pub trapped: Vec<&'static str>,
    /// Denied by the profile: nobody can make them, so there is nothing to set up.
    pub denied: Vec<&'static str>,
    /// Left as they are, because the profile attaches conditions or traces to them.
    pub kept: Vec<&'static str>,
}

/// What a profile says about one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Denied,
    Neither,
}

/// Hands `calls` to the listener, as far as the profile of `config` (a whole `config.json`) allows them.
/// A container without a profile gets one that allows everything else. When nothing is trapped, or on an error,
/// `config` is as it was.
pub fn trap(config: &mut Value, calls: &[&'static str], listener: &Listener<'_>) -> Result<Merged> {
    for name in CRUN_OVERRIDES {
        if config["annotations"].get(name).is_some() {
            return Err(Error::Conflict(format!("annotation {name}")));
        }
    }
    let Some(linux) = config.get_mut("linux").and_then(Value::as_object_mut) else {
        return Err(malformed("linux", "an object"));
    };
    let mut profile = match linux.get("seccomp") {
        None | Some(Value::Null) => own_profile(listener),
        Some(Value::Object(profile)) if is_empty(profile) => own_profile(listener),
        Some(Value::Object(profile)) => profile.clone(),
        Some(_) => return Err(malformed("linux.seccomp", "an object")),
    };
    let merged = merge(&mut profile, calls, listener)?;
    if !merged.trapped.is_empty() {
        linux.insert("seccomp".to_owned(), Value::Object(profile));
    }
    Ok(merged)
}

/// A profile without action and rules is none: the runtimes install no filter for it.
fn is_empty(profile: &Map<String, Value>) -> bool {
    let silent = |key| match profile.get(key) {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    };
    [
        "defaultAction",
        "syscalls",
        "listenerPath",
        "listenerMetadata",
    ]
    .into_iter()
    .all(silent)
}

fn own_profile(listener: &Listener<'_>) -> Map<String, Value> {
    let mut profile = Map::new();
    profile.insert("defaultAction".to_owned(), json!(ALLOW));
    profile.insert("architectures".to_owned(), json!(ARCHITECTURES));
    if !listener.flags.is_empty() {
        profile.insert("flags".to_owned(), json!([]));
    }
    profile
}

fn merge(
    profile: &mut Map<String, Value>,
    calls: &[&'static str],
    listener: &Listener<'_>,
) -> Result<Merged> {
    for key in ["listenerPath", "listenerMetadata"] {
        if let Some(other) = profile
            .get(key)
            .and_then(Value::as_str)
            .filter(|p| !p.is_empty())
        {
            return Err(Error::Conflict(format!("linux.seccomp.{key} {other:?}")));
        }
    }
    let default = profile
        .get("defaultAction")
        .and_then(Value::as_str)
        .ok_or_else(|| malformed("linux.seccomp.defaultAction", "a string"))?
        .to_owned();
    let mut entries = Entries::read(profile)?;
    if entries.0.iter().any(|e| e.action == NOTIFY) {
        return Err(Error::Conflict(
            "an SCMP_ACT_NOTIFY rule of its own".to_owned(),
        ));
    }

    for call in listener.runtime_needs {
        if entries.verdict(call, &default) != Verdict::Allowed {
            return Err(Error::RuntimeNeeds(call));
        }
    }
    let mut merged = Merged::default();
    for call in calls {
        match entries.verdict(call, &default) {
            Verdict::Allowed => merged.trapped.push(*call),
            Verdict::Denied => merged.denied.push(*call),
            Verdict::Neither => merged.kept.push(*call),
        }
    }
    if merged.trapped.is_empty() {
        return Ok(merged);
    }
    entries.take_out(&merged.trapped);
    let mut syscalls = entries.into_values();
    syscalls.push(json!({"names": merged.trapped, "action": NOTIFY}));
    profile.insert("syscalls".to_owned(), Value::Array(syscalls));
    profile.insert("listenerPath".to_owned(), json!(listener.path));
    profile.insert("listenerMetadata".to_owned(), json!(listener.metadata));
    add_flags(profile, listener.flags)?;
    Ok(merged)
}

fn add_flags(profile: &mut Map<String, Value>, flags: &[String]) -> Result<()> {
    if flags.is_empty() {
        return Ok(());
    }
    let list = profile.entry("flags").or_insert_with(|| json!([]));
    if list.is_null() {
        *list = json!([]);
    }
    let list = list
        .as_array_mut()
        .ok_or_else(|| malformed("linux.seccomp.flags", "an array"))?;
    for flag in flags {
        if !list.iter().any(|f| f == flag) {
            list.push(json!(flag));
        }
    }
    Ok(())
}

/// The entries of `syscalls`: the parts that matter, each beside its JSON.
struct Entries(Vec<Entry>);

struct Entry {
    value: Value,
    names: Vec<String>,
    action: String,
    conditional: bool,
}

impl Entries {
    fn read(profile: &Map<String, Value>) -> Result<Self> {
        let syscalls = match profile.get("syscalls") {
            None | Some(Value::Null) => &[][..],
            Some(Value::Array(entries)) => entries,
            Some(_) => return Err(malformed("linux.seccomp.syscalls", "an array")),
        };
        syscalls
            .iter()
            .enumerate()
            .map(|(i, e)| Entry::read(i, e))
            .collect::<Result<_>>()
            .map(Self)
    }

    fn verdict(&self, call: &str, default: &str) -> Verdict {
        // 32-bit x86 reaches the socket calls through `socketcall` too, and the runtimes' library turns a rule for one of
        // them into a conditional rule for it. That is harmless only beside a plain permission of `socketcall`.
        if SOCKET_CALLS.contains(&call) && !self.about("socketcall").all(Entry::is_permission) {
            return Verdict::Neither;
        }
        let denies = |action: &str| DENY.contains(&action);
        if self.about(call).next().is_none() {
            return match default {
                ALLOW => Verdict::Allowed,
                action if denies(action) => Verdict::Denied,
                _ => Verdict::Neither,
            };
        }
        if self.about(call).all(Entry::is_permission) {
            return Verdict::Allowed;
        }
        // Where there are conditions, the default decides about the calls that do not meet them.
        let denied = |e: &Entry| denies(&e.action) && (!e.conditional || denies(default));
        if self.about(call).all(denied) {
            Verdict::Denied
        } else {
            Verdict::Neither
        }
    }

    fn about<'a>(&'a self, call: &str) -> impl Iterator<Item = &'a Entry> {
        self.0
            .iter()
            .filter(move |e| e.names.iter().any(|n| n == call))
    }

    /// Takes `calls` out of the entries; all of them are plain permissions. An entry without names would be refused by the runtimes.
    fn take_out(&mut self, calls: &[&str]) {
        self.0.retain_mut(|entry| {
            let before = entry.names.len();
            entry.names.retain(|n| !calls.contains(&n.as_str()));
            if entry.names.len() < before {
                entry.value["names"] = json!(entry.names);
            }
            entry.names.len() == before || !entry.names.is_empty()
        });
    }

    fn into_values(self) -> Vec<Value> {
        self.0.into_iter().map(|e| e.value).collect()
    }
}

impl Entry {
    /// Whether it allows its names whatever the arguments are.
    fn is_permission(&self) -> bool {
        self.action == ALLOW && !self.conditional
    }

    fn read(index: usize, value: &Value) -> Result<Self> {
        let wrong = |member: &str, expected| {
            malformed(
                &format!("linux.seccomp.syscalls[{index}]{member}"),
                expected,
            )
        };
        let names = value
            .get("names")
            .and_then(Value::as_array)
            .and_then(|n| n.iter().map(|n| n.as_str().map(str::to_owned)).collect())
            .ok_or_else(|| wrong(".names", "an array of strings"))?;
        let action = value.get("action").and_then(Value::as_str);
        let conditional = match value.get("args") {
            None | Some(Value::Null) => false,
            Some(Value::Array(conditions)) => !conditions.is_empty(),
            Some(_) => return Err(wrong(".args", "an array")),
        };
        Ok(Self {
            value: value.clone(),
            names,
            action: action
                .ok_or_else(|| wrong(".action", "a string"))?
                .to_owned(),
            conditional,
        })
    }
}

#[cfg(test)]
mod tests;

fn malformed(member: &str, expected: &'static str) -> Error {
    Error::Malformed {
        member: member.to_owned(),
        expected,
    }
}
