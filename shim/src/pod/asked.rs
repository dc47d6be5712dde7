//! What a pod asks for: its annotations, the runtime's options, the node's config.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use kbp_poller::config::Config;
use kbp_poller::policy::{Layer, Policy};

use super::Refusal;
use crate::spec::Spec;
use crate::task::options::{Generic, Options};

/// The settings of a pod, decided with its first container.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) policy: Policy,
    pub(super) config: Config,
}

impl Asked {
    /// Reads every layer; the first that speaks wins. What is malformed anywhere is refused by name.
    pub(super) fn of(spec: &Spec, options: Option<&Any>, config: Config) -> Result<Self, Refusal> {
        let layers = [
            Layer::from_annotations(&spec.annotations()?)?,
            runtime_options(options)?,
            config.policy,
        ];
        Ok(Self {
            policy: Policy::resolve(&layers),
            config,
        })
    }

    /// Refuses malformed annotations of a container for which the pod's first one has decided.
    pub(super) fn check(spec: &Spec) -> Result<(), Refusal> {
        Layer::from_annotations(&spec.annotations()?)?;
        Ok(())
    }
}

/// The `[kbp]` table of the options that CRI sends for a runtime type it does not know; a client's options have none.
fn runtime_options(options: Option<&Any>) -> Result<Layer, Refusal> {
    let generic = options.filter(|any| {
        any.type_url.rsplit('/').next().unwrap_or_default() == "runtimeoptions.v1.Options"
    });
    let Some(any) = generic else {
        return Ok(Layer::default());
    };
    let generic = Generic::decode(&any.value)
        .map_err(|e| Refusal::InvalidArgument(format!("kbp: runtime options: {e}")))?;
    let toml = generic
        .toml()
        .map_err(|e| Refusal::InvalidArgument(format!("kbp: {e}")))?;
    Ok(Layer::from_runtime_options(&toml)?)
}

/// The OCI runtime that will run the container.
pub(super) fn oci_runtime(options: Option<&Any>, config: &Config) -> String {
    // Options that cannot be read are refused by the plain service.
    let named = options
        .and_then(|any| Options::decode(any).ok())
        .map(|options| options.binary_name)
        .filter(|name| !name.is_empty());
    named.unwrap_or_else(|| config.runtime.clone())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::shim::oci;
    use kbp_poller::policy::{BusyPoll, WorkerPolicy};

    use super::*;

    /// The settings of a node without a config file.
    fn config() -> Config {
        Config::read(Path::new("/nonexistent/config.toml")).expect("the default")
    }

    fn spec(annotations: &str) -> Spec {
        let dir = tempfile::tempdir().expect("tempdir");
        let text = format!("{{\"annotations\":{annotations}}}");
        fs::write(dir.path().join("config.json"), text).expect("write");
        Spec::read(dir.path()).expect("read")
    }

    /// A `runtimeoptions.v1.Options` with its body, or its path.
    fn generic(field: u8, text: &str) -> Any {
        let mut value = vec![field << 3 | 2, u8::try_from(text.len()).expect("short")];
        value.extend(text.as_bytes());
        Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn annotations_win_over_options() {
        let options = generic(3, "[kbp]\nworker = \"none\"\nbusy-poll = 50");
        let asked = Asked::of(
            &spec(r#"{"kbp.io/worker":"idle"}"#),
            Some(&options),
            config(),
        )
        .expect("asked");
        assert_eq!(asked.policy.worker, WorkerPolicy::Idle);
        assert_eq!(
            asked.policy.busy_poll,
            BusyPoll::Window(kbp_kernel::Micros(50))
        );
    }

    #[test]
    fn options_may_lie_in_a_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("o.toml");
        fs::write(&path, "[kbp]\nworker = \"none\"").expect("write");
        let options = generic(2, path.to_str().expect("UTF-8"));
        let asked = Asked::of(&spec("{}"), Some(&options), config()).expect("asked");
        assert_eq!(asked.policy.worker, WorkerPolicy::None);
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        for (annotations, options, named) in [
            (
                r#"{"kbp.io/worker":"fast"}"#,
                None,
                ["kbp.io/worker", "fast", "dedicated"],
            ),
            (
                r#"{"kbp.io/wroker":"idle"}"#,
                None,
                ["kbp.io/wroker", "kbp.io/worker", "known"],
            ),
            (
                r#"{"kbp.io/required":true}"#,
                None,
                ["kbp.io/required", "config.json", "string"],
            ),
            (
                "{}",
                Some(generic(3, "[kbp]\nprofile = \"x\"")),
                ["kbp.profile", "\"x\"", "latency"],
            ),
            ("{}", Some(generic(3, "[kbp")), ["runtime options", "1", ""]),
            (
                "{}",
                Some(generic(2, "/nowhere.toml")),
                ["/nowhere.toml", "runtime options", ""],
            ),
        ] {
            let result = Asked::of(&spec(annotations), options.as_ref(), config());
            match result.expect_err(annotations) {
                Refusal::InvalidArgument(reason) => {
                    assert!(named.iter().all(|n| reason.contains(n)), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_runtime_is_the_one_the_options_name() {
        let mut config = config();
        config.runtime = "node-default".to_owned();
        let named = oci::Options {
            binary_name: "crun".to_owned(),
            ..oci::Options::default()
        };
        let any = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: named.write_to_bytes().expect("encode"),
            ..Any::default()
        };
        assert_eq!(oci_runtime(Some(&any), &config), "crun");
        let toml = generic(3, "BinaryName = \"/opt/runc\"");
        assert_eq!(oci_runtime(Some(&toml), &config), "/opt/runc");
        assert_eq!(oci_runtime(None, &config), "node-default");
    }
}
