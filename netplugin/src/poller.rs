//! Registering pods with the node's `kbp-poller`, for runtimes whose shim does not do it (`"poller": true`).
//!
//! A registration outlives this process: it ends with DEL, with GC, or when the daemon sees the namespace vanish.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kbp_poller::api::{AttachRequest, SOCKET};
use kbp_poller::client::{Attached, Client, ClientError};
use kbp_poller::config::DEFAULT_STATE_DIR;
use serde_json::{Map, Value, json};

use crate::attachment::Attachment;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::json::{boolean, is_empty, string};
use crate::cni::options::{Options, Profile};

/// All that a call has to do with the daemon takes no longer.
const LIMIT: Duration = Duration::from_millis(200);
/// Longest id that the daemon takes, in bytes.
const MAX_ID: usize = 110;
const SOCKETS: &str = "the absolute path of kbp-poller's socket";
const ON_UNAVAILABLE: &str = "\"degrade\", \"fail\"";

/// What the config says of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PollerOptions {
    /// Its socket.
    pub(crate) socket: PathBuf,
    /// Whether a pod that it does not poll is an error.
    pub(crate) required: bool,
}

impl PollerOptions {
    /// Reads a config; None: the daemon is not wanted.
    pub(crate) fn read(json: &Map<String, Value>) -> Result<Option<Self>> {
        let required = match json.get("onUnavailable").filter(|value| !is_empty(value)) {
            None => false,
            Some(Value::String(text)) if text == "degrade" => false,
            Some(Value::String(text)) if text == "fail" => true,
            Some(other) => return Err(CniError::config("onUnavailable", other, ON_UNAVAILABLE)),
        };
        let socket = string(json, "pollerSocket", SOCKETS)?.filter(|path| !path.is_empty());
        let socket = socket.map_or_else(default_socket, PathBuf::from);
        if !socket.is_absolute() {
            return Err(CniError::config("pollerSocket", &json!(socket), SOCKETS));
        }
        let wanted = boolean(json, "poller")?;
        Ok(wanted.then_some(Self { socket, required }))
    }

    /// Has the daemon poll a pod. Where it does not, that is an error or a line on stderr, as the config wants it.
    /// Returns whether there may be a registration.
    pub(crate) fn register(
        &self,
        attachment: &Attachment,
        netns: &Path,
        options: &Options,
    ) -> Result<bool> {
        let request = AttachRequest {
            id: id(attachment),
            namespace: namespace(&attachment.network),
            netns: netns.display().to_string(),
            worker: options.worker.clone().unwrap_or_default(),
            profile: match options.profile {
                Profile::Latency => "latency",
                Profile::Throughput => "throughput",
            }
            .to_owned(),
            required: self.required,
            ..AttachRequest::default()
        };
        let attached =
            Client::connect(&self.socket, LIMIT).and_then(|mut client| client.attach(&request));
        let why = match attached {
            Ok(Attached::Pod(_) | Attached::Waiting) => return Ok(true),
            Ok(Attached::NoInterface | Attached::HostNetwork) => {
                "kbp-poller sees no interface in its namespace".to_owned()
            }
            Err(error) => error.to_string(),
        };
        if self.required {
            // What it did not answer in time it may do all the same.
            self.unregister(attachment);
            let msg = format!("{attachment} is not polled: {why}; onUnavailable is \"fail\"");
            return Err(CniError::new(Code::NOT_POLLED, msg));
        }
        eprintln!("kbp: {attachment} is not polled: {why}");
        Ok(true)
    }

    /// Ends a registration, as far as there is one and a daemon; what fails is told on stderr.
    pub(crate) fn unregister(&self, attachment: &Attachment) {
        let detached = Client::connect(&self.socket, LIMIT).and_then(|mut client| {
            client.detach(&namespace(&attachment.network), &id(attachment), false)
        });
        tell(detached.map(drop));
    }

    /// Ends every registration of `network` beside those of `valid`.
    pub(crate) fn collect(&self, network: &str, valid: &[Attachment]) {
        let valid: BTreeSet<_> = valid.iter().map(id).collect();
        let namespace = namespace(network);
        let collected = Client::connect(&self.socket, LIMIT).and_then(|mut client| {
            let pods = client.list()?;
            let gone = pods
                .iter()
                .filter(|pod| pod.namespace == namespace && !valid.contains(&pod.id));
            for pod in gone {
                client.detach(&namespace, &pod.id, false)?;
            }
            Ok(())
        });
        tell(collected);
    }

    /// Whether the daemon says that it polls the attachment; why not, in words.
    pub(crate) fn difference(&self, attachment: &Attachment) -> Option<String> {
        let id = id(attachment);
        let pods = Client::connect(&self.socket, LIMIT).and_then(|mut client| client.list());
        match pods {
            Err(error) => Some(error.to_string()),
            Ok(pods) => {
                let namespace = namespace(&attachment.network);
                let is = |pod: &kbp_poller::api::Pod| pod.namespace == namespace && pod.id == id;
                (!pods.iter().any(is)).then(|| "kbp-poller does not poll it".to_owned())
            }
        }
    }

    /// Whether the daemon answers.
    pub(crate) fn answers(&self) -> Result<(), ClientError> {
        Client::connect(&self.socket, LIMIT)?.list().map(drop)
    }
}

fn default_socket() -> PathBuf {
    Path::new(DEFAULT_STATE_DIR).join(SOCKET)
}

/// Where nobody serves the socket there is nothing to end.
fn tell(done: Result<(), ClientError>) {
    match done {
        Ok(()) | Err(ClientError::NotRunning { .. }) => {}
        Err(error) => eprintln!("kbp: {error}"),
    }
}

/// What the daemon calls an attachment: `CONTAINER.INTERFACE`, or the host end's name where that is no id for it.
fn id(attachment: &Attachment) -> String {
    let id = format!("{}.{}", attachment.container_id, attachment.ifname);
    match is_id(&id) {
        true => id,
        false => attachment.host_end(),
    }
}

/// The network, by which the daemon tells the ids of two networks apart.
fn namespace(network: &str) -> String {
    let namespace = format!("cni.{network}");
    namespace.chars().take(MAX_ID).collect()
}

fn is_id(text: &str) -> bool {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    text.len() <= MAX_ID && text.bytes().all(is_known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_that_the_daemon_takes() {
        let plain = Attachment::new("net", &"a".repeat(64), "eth0");
        assert_eq!(id(&plain), format!("{}.eth0", "a".repeat(64)));
        for odd in [
            Attachment::new("net", &"a".repeat(120), "eth0"),
            Attachment::new("net", "c", "eth@0"),
        ] {
            assert_eq!(id(&odd), odd.host_end());
        }
        assert_eq!(namespace(&"n".repeat(111)).len(), MAX_ID);
    }

    #[test]
    fn the_keys_are_checked_also_where_the_daemon_is_not_wanted() {
        let read = |json: Value| PollerOptions::read(json.as_object().expect("an object"));
        assert_eq!(read(json!({})).expect("valid"), None);
        let options = PollerOptions {
            socket: "/run/kbp/poller.sock".into(),
            required: false,
        };
        assert_eq!(
            read(json!({ "poller": true })).expect("valid"),
            Some(options)
        );
        let fail = json!({ "poller": true, "onUnavailable": "fail", "pollerSocket": "/x" });
        let fail = read(fail).expect("valid").expect("wanted");
        assert!(fail.required && fail.socket == Path::new("/x"));
        for (wrong, key) in [
            (json!({ "poller": 1 }), "poller"),
            (json!({ "onUnavailable": "retry" }), "onUnavailable"),
            (json!({ "pollerSocket": "x" }), "pollerSocket"),
        ] {
            let error = read(wrong).expect_err(key);
            assert!(
                error.code == Code::CONFIG && error.msg.contains(key),
                "{error}"
            );
        }
    }
}
