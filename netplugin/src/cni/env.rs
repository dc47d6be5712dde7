//! The environment of a call.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::error::{CniError, Code, Result};

/// What the runtime asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Attach a container to the network.
    Add,
    /// Detach it.
    Del,
    /// Look whether the attachment is as ADD left it.
    Check,
    /// Remove what belongs to no attachment.
    Gc,
    /// Tell whether an ADD could work.
    Status,
    /// Tell the supported versions.
    Version,
}

impl Verb {
    /// Every verb by name.
    pub(crate) const NAMES: [&'static str; 6] = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"];
    const ALL: [Self; 6] = [
        Self::Add,
        Self::Del,
        Self::Check,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    /// The value of CNI_COMMAND.
    pub(crate) const fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// Reads the value of CNI_COMMAND.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|verb| verb.as_str() == text)
            .ok_or_else(|| {
                let all = Self::NAMES.join(", ");
                CniError::new(
                    Code::ENVIRONMENT,
                    format!("CNI_COMMAND {text:?} is not known; allowed: {all}"),
                )
            })
    }

    /// Variables without which it cannot be carried out, beside CNI_COMMAND.
    const fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Gc | Self::Status | Self::Version => &[],
        }
    }
}

/// One call of the plugin.
#[derive(Debug)]
pub(crate) struct Call {
    /// Container id; empty for GC and STATUS.
    pub(crate) container_id: String,
    /// Name of the interface inside the container; empty for GC and STATUS.
    pub(crate) ifname: String,
    /// File of the network namespace; DEL may come without.
    pub(crate) netns: Option<PathBuf>,
    /// Directories with plugins.
    pub(crate) plugin_dirs: Vec<PathBuf>,
    /// Pairs of CNI_ARGS.
    args: Vec<(String, String)>,
}

impl Call {
    /// Reads and checks the environment of this process.
    pub(crate) fn from_environment(verb: Verb) -> Result<Self> {
        Self::read(verb, |name| std::env::var_os(name))
    }

    /// A call with nothing but CNI_ARGS.
    #[cfg(test)]
    pub(crate) fn for_test(args: &str) -> Self {
        let args = parse_args(args).expect("valid arguments");
        Self {
            container_id: "c1".into(),
            ifname: "eth0".into(),
            netns: None,
            plugin_dirs: Vec::new(),
            args,
        }
    }

    /// As [`Call::from_environment`], with variables from elsewhere.
    pub(crate) fn read(verb: Verb, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let value = |name: &str| variable(name).unwrap_or_default();
        let missing: Vec<_> = verb
            .required()
            .iter()
            .copied()
            .filter(|name| value(name).is_empty())
            .collect();
        if !missing.is_empty() {
            let missing = missing.join(", ");
            return Err(environment(format!(
                "{} needs {missing} in the environment",
                verb.as_str()
            )));
        }
        let container_id = value("CNI_CONTAINERID").to_string_lossy().into_owned();
        let ifname = value("CNI_IFNAME").to_string_lossy().into_owned();
        if !verb.required().is_empty() {
            check_container_id(&container_id)?;
            check_ifname(&ifname)?;
        }
        Ok(Self {
            container_id,
            ifname,
            netns: Some(value("CNI_NETNS"))
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            plugin_dirs: std::env::split_paths(&value("CNI_PATH"))
                .filter(|dir| dir != Path::new(""))
                .collect(),
            args: parse_args(&value("CNI_ARGS").to_string_lossy())?,
        })
    }

    /// The value of a key of CNI_ARGS; the last one wins.
    pub(crate) fn arg(&self, key: &str) -> Option<&str> {
        self.args
            .iter()
            .rev()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value.as_str())
    }
}

fn environment(msg: String) -> CniError {
    CniError::new(Code::ENVIRONMENT, msg)
}

/// Whether `text` is an identifier of the specification (container ids and network names).
pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// What [`is_identifier`] allows, for messages.
pub(crate) const IDENTIFIER: &str = "a letter or digit, then letters, digits, '_', '.' or '-'";

fn check_container_id(id: &str) -> Result<()> {
    if !is_identifier(id) {
        return Err(environment(format!(
            "CNI_CONTAINERID {id:?} is not valid; allowed: {IDENTIFIER}"
        )));
    }
    if id.len() > crate::attachment::MAX_CONTAINER_ID {
        return Err(environment(format!(
            "CNI_CONTAINERID {id:?} has {} bytes; allowed: at most {}",
            id.len(),
            crate::attachment::MAX_CONTAINER_ID,
        )));
    }
    Ok(())
}

/// Whether a link can have this name: the kernel's own rules (dev_valid_name in net/core/dev.c), the names that it has
/// for all links at once in /proc/sys, and no pattern, which it would make another name of.
pub(crate) fn is_ifname(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && ![".", "..", "all", "default"].contains(&name)
        && !name.contains(|c: char| "/:%".contains(c) || c.is_whitespace() || c.is_control())
}

fn check_ifname(name: &str) -> Result<()> {
    if is_ifname(name) {
        return Ok(());
    }
    Err(environment(format!(
        "CNI_IFNAME {name:?} is not valid; allowed: 1 to 15 bytes without '/', ':', '%' and white space, not '.', '..', 'all' or 'default'"
    )))
}

fn parse_args(text: &str) -> Result<Vec<(String, String)>> {
    text.split(';')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(environment(format!(
                "CNI_ARGS: {pair:?} is not valid; allowed: KEY=VALUE pairs separated by ';'"
            ))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As [`Call::from_environment`], with variables from elsewhere.
    pub(crate) fn read(verb: Verb, variables: &[(&str, &str)]) -> Result<Call> {
        Call::read(verb, |name| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| v.into())
        })
    }

    const COMPLETE: [(&str, &str); 5] = [
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/a::/b"),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;MAC=02:00:00:00:00:01;K8S_POD_NAME=a=b",
        ),
    ];

    #[test]
    fn a_complete_environment_is_read() {
        let call = read(Verb::Add, &COMPLETE).expect("valid");
        assert_eq!(call.container_id, "c1");
        assert_eq!(call.ifname, "eth0");
        assert_eq!(call.netns.as_deref(), Some(Path::new("/run/netns/x")));
        assert_eq!(call.plugin_dirs, [Path::new("/a"), Path::new("/b")]);
        assert_eq!(call.arg("MAC"), Some("02:00:00:00:00:01"));
        assert_eq!(call.arg("K8S_POD_NAME"), Some("a=b"));
        assert_eq!(call.arg("IP"), None);
    }

    #[test]
    fn every_missing_variable_is_named() {
        let error = read(Verb::Add, &[("CNI_NETNS", "")]).expect_err("incomplete");
        assert_eq!(error.code, Code::ENVIRONMENT);
        assert_eq!(
            error.msg,
            "ADD needs CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME in the environment"
        );
        read(Verb::Del, &[COMPLETE[0], COMPLETE[2]]).expect("DEL does not need CNI_NETNS");
        read(Verb::Gc, &[]).expect("GC needs nothing");
        read(Verb::Status, &[]).expect("STATUS needs nothing");
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        let long = "a".repeat(200);
        for (name, value) in [
            ("CNI_CONTAINERID", "-a"),
            ("CNI_CONTAINERID", "a/b"),
            ("CNI_CONTAINERID", "../a"),
            ("CNI_CONTAINERID", &long),
            ("CNI_IFNAME", "sixteen-bytes-ab"),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_IFNAME", "a b"),
            ("CNI_IFNAME", "."),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "eth%d"),
            ("CNI_IFNAME", "all"),
            ("CNI_IFNAME", "default"),
            ("CNI_ARGS", "MAC"),
            ("CNI_ARGS", "A=1;=2"),
        ] {
            let mut variables = COMPLETE.to_vec();
            variables.insert(0, (name, value));
            let error = read(Verb::Del, &variables).expect_err(value);
            assert_eq!(error.code, Code::ENVIRONMENT, "{error}");
            assert!(error.msg.contains(name), "{error}");
        }
    }
}
