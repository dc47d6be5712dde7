//! The command line, in the manner of Go's flag package: `-name value`, `-name=value`, one or two dashes.

use anyhow::{Context, bail};

/// What containerd (or a person) asked for on the command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd namespace of the container.
    pub namespace: String,
    /// Id of the container; for the server, of the pod's first.
    pub id: String,
    /// containerd's gRPC address. Only a part of the socket's name here.
    pub address: String,
    /// The containerd binary.
    pub publish_binary: String,
    /// The bundle of `delete`; else the working directory.
    pub bundle: String,
    /// Socket to listen on, instead of the inherited one.
    pub socket: String,
    /// Log more.
    pub debug: bool,
    /// Print the version.
    pub version: bool,
    /// Describe the runtime.
    pub info: bool,
    /// What to do.
    pub action: Action,
}

/// What to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// Start a server (or find the pod's) and print its address.
    Start,
    /// Clean up after a server that died.
    Delete,
    /// Be the server.
    #[default]
    Serve,
}

impl Flags {
    /// Parses the arguments behind the program's name.
    ///
    /// # Errors
    /// An unknown flag or action, or a flag without its value.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> anyhow::Result<Self> {
        let mut flags = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix('-') else {
                flags.action = match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    other => bail!("unknown action {other:?}: expected start or delete"),
                };
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, mut value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut text = || {
                value
                    .take()
                    .or_else(|| arguments.next())
                    .with_context(|| format!("flag -{name} needs a value"))
            };
            match name {
                "namespace" => flags.namespace = text()?,
                "id" => flags.id = text()?,
                "address" => flags.address = text()?,
                "publish-binary" => flags.publish_binary = text()?,
                "bundle" => flags.bundle = text()?,
                "socket" => flags.socket = text()?,
                "debug-socket" => drop(text()?),
                "debug" => flags.debug = truth(name, value.as_deref())?,
                "v" | "version" => flags.version = truth(name, value.as_deref())?,
                "info" => flags.info = truth(name, value.as_deref())?,
                _ => bail!("unknown flag -{name}"),
            }
        }
        Ok(flags)
    }
}

fn truth(name: &str, value: Option<&str>) -> anyhow::Result<bool> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => bail!("flag -{name}: {other:?} is neither true nor false"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Flags> {
        Flags::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn as_containerd_calls_it() {
        let line = "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc -debug start";
        let flags = parse(line).expect("the flags of containerd 1.6");
        assert_eq!(flags.namespace, "k8s.io");
        assert_eq!(flags.address, "/run/c.sock");
        assert_eq!(flags.publish_binary, "/usr/bin/containerd");
        assert_eq!(flags.id, "abc");
        assert!(flags.debug);
        assert_eq!(flags.action, Action::Start);
        let flags =
            parse("--namespace=n -id=x -bundle /b -debug=false delete").expect("other spellings");
        assert_eq!(
            (
                flags.namespace.as_str(),
                flags.id.as_str(),
                flags.bundle.as_str()
            ),
            ("n", "x", "/b")
        );
        assert!(!flags.debug);
        assert_eq!(flags.action, Action::Delete);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, part) in [
            ("-nonsense", "-nonsense"),
            ("stop", "\"stop\""),
            ("-id", "-id needs"),
            ("-debug=maybe", "\"maybe\""),
        ] {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
