//! The CRI plugin's runtime handlers, as containerd has loaded them.

use std::path::Path;

use toml::{Table, Value};

use crate::doctor::{Check, Verdict};

/// The CRI plugin's tables in config formats 2 and 3.
const CRI: [&str; 2] = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
const RUNTIME: &str = "io.containerd.kbp.v1";
const ANNOTATIONS: &str = "kbp.io/*";

pub(super) fn cri(dump: &Table) -> Option<&Value> {
    let plugins = dump.get("plugins")?;
    // 2.x prints the table of the old name as well, for its image service.
    CRI.iter()
        .rev()
        .filter_map(|name| plugins.get(name))
        .find(|table| table.get("containerd").is_some() || table.get("cni").is_some())
}

/// The CRI runtime handlers that lead to the kbp shim.
pub(super) fn handler(dump: &Table, file: &str) -> Check {
    const NAME: &str = "containerd-config";
    const NO_CRI: &str = "ctr and nerdctl take --runtime io.containerd.kbp.v1 without any configuration; Kubernetes needs a handler";
    let disabled = dump.get("disabled_plugins").and_then(Value::as_array);
    let disabled = disabled
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .any(|name| name == "cri" || CRI.contains(&name));
    if disabled {
        return Check::ok(
            NAME,
            format!("{file} loads; its CRI plugin is switched off by disabled_plugins"),
        )
        .meaning(NO_CRI);
    }
    let runtimes = cri(dump)
        .and_then(|cri| cri.get("containerd")?.get("runtimes")?.as_table())
        .cloned()
        .unwrap_or_default();
    let text = |table: &Value, key: &str| {
        table
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let own: Vec<(&String, &Value)> = runtimes
        .iter()
        .filter(|(name, table)| text(table, "runtime_type") == RUNTIME || name.as_str() == "kbp")
        .collect();
    if own.is_empty() {
        return Check::ok(
            NAME,
            format!("{file} loads; no CRI runtime handler is of type {RUNTIME}"),
        )
        .meaning(format!("{NO_CRI} (examples in config/containerd/)"));
    }
    let mut worst = Check::ok(
        NAME,
        format!(
            "{file} loads; handlers of {RUNTIME}: {}",
            own.iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        ),
    );
    let mut worse = |check: Check| {
        if check.verdict > worst.verdict {
            worst = check;
        }
    };
    for (name, table) in own {
        let kind = text(table, "runtime_type");
        if kind != RUNTIME {
            worse(Check::broken(
                NAME,
                format!("handler {name:?} has runtime_type {kind:?}"),
                "pods of this handler do not run with kbp",
                format!("runtime_type = {RUNTIME:?} for that handler in {file}"),
            ));
        }
        let path = text(table, "runtime_path");
        if !path.is_empty() && !crate::doctor::program::runs(Path::new(&path)) {
            worse(Check::broken(
                NAME,
                format!("runtime_path {path:?} of handler {name:?} is no program"),
                "no pod of this handler starts",
                format!("make install, and mend or remove runtime_path in {file}"),
            ));
        }
        let options = |key: &str| {
            table
                .get("options")
                .map_or_else(String::new, |o| text(o, key))
        };
        let config = options("ConfigPath");
        if !config.is_empty() && !Path::new(&config).exists() {
            worse(Check::broken(
                NAME,
                format!("ConfigPath {config:?} of handler {name:?} does not exist"),
                "pods of this handler are refused, or run without their settings",
                format!("write that file, or remove ConfigPath in {file}"),
            ));
        }
        let passes = |key: &str| {
            let patterns = table.get(key).and_then(Value::as_array);
            patterns
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .any(|p| ["*", ANNOTATIONS].contains(&p) || p.starts_with("kbp.io/"))
        };
        if !passes("pod_annotations") {
            worse(Check::degraded(
                NAME,
                format!("handler {name:?} passes no kbp.io/ annotations on"),
                "the kbp.io/ settings of pods are ignored: they run with the node's defaults",
                format!("pod_annotations = [{ANNOTATIONS:?}] for that handler in {file}"),
            ));
        }
    }
    debug_assert!(worst.verdict == Verdict::Ok || worst.remedy.is_some());
    worst
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_judged_as_they_load() {
        let judged = |text: &str| handler(&text.parse().expect("TOML"), "c.toml");
        const V2: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes";
        const V3: &str = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes";
        for (text, verdict, words) in [
            (String::new(), Verdict::Ok, "no CRI runtime handler"),
            (
                "disabled_plugins = [\"cri\"]".to_owned(),
                Verdict::Ok,
                "switched off",
            ),
            (
                format!(
                    "{V2}.kbp]\nruntime_type = \"{RUNTIME}\"\npod_annotations = [\"kbp.io/*\"]"
                ),
                Verdict::Ok,
                "handlers of io.containerd.kbp.v1: kbp",
            ),
            (
                format!(
                    "{V3}.fast]\nruntime_type = \"{RUNTIME}\"\npod_annotations = [\"kbp.io/*\"]"
                ),
                Verdict::Ok,
                "handlers of io.containerd.kbp.v1: fast",
            ),
            (
                format!("{V3}.fast]\nruntime_type = \"{RUNTIME}\"\n"),
                Verdict::Degraded,
                "\"fast\" passes no kbp.io/ annotations",
            ),
            (
                format!("{V2}.kbp]\nruntime_type = \"io.containerd.runc.v2\"\n"),
                Verdict::Broken,
                "runtime_type \"io.containerd.runc.v2\"",
            ),
            (
                format!(
                    "{V2}.kbp]\nruntime_type = \"{RUNTIME}\"\nruntime_path = \"/nonexistent/shim\"\n"
                ),
                Verdict::Broken,
                "/nonexistent/shim",
            ),
            (
                format!(
                    "{V2}.kbp]\nruntime_type = \"{RUNTIME}\"\n{V2}.kbp.options]\nConfigPath = \"/nonexistent/x\"\n"
                ),
                Verdict::Broken,
                "ConfigPath \"/nonexistent/x\"",
            ),
        ] {
            let check = judged(&text);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.found.contains(words), "{check:?}");
        }
    }
}
