//! `-info`: what the runtime is and what its OCI runtime can do.

use std::process::{Command, Stdio};

use anyhow::Context;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use super::RUNTIME_NAME;
use crate::task::options::Options;

/// Type of the OCI runtime's features, whose value is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Describes the runtime; `input` holds the options it is configured with, an Any, or nothing.
pub fn runtime_info(input: &[u8]) -> anyhow::Result<RuntimeInfo> {
    let any = Any::parse_from_bytes(input).context("read the options on standard input")?;
    let options = Options::decode(&any)?;
    let binary = if options.binary_name.is_empty() {
        super::server::default_runtime()
    } else {
        options.binary_name
    };
    Ok(RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        options: if input.is_empty() {
            MessageField::none()
        } else {
            MessageField::some(any)
        },
        features: features(&binary)?.into(),
        ..Default::default()
    })
}

/// What `runc features` prints; None from a runtime that has no such verb.
fn features(binary: &str) -> anyhow::Result<Option<Any>> {
    let output = Command::new(binary)
        .arg("features")
        .stdin(Stdio::null())
        .output()
        .with_context(|| {
            format!("run {binary}, the OCI runtime (BinaryName of the options, else runtime in kbp's config)")
        })?;
    let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(&output.stdout).is_ok();
    if !output.status.success() || !is_json {
        return Ok(None);
    }
    Ok(Some(Any {
        type_url: FEATURES.to_owned(),
        value: output.stdout,
        ..Default::default()
    }))
}
