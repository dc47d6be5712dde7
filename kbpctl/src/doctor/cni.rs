//! The network configuration that the runtime would load, each plugin of it found and asked.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::Check;
use super::containerd::Node;
use super::program::{self, find};

const NAME: &str = "cni-config";
/// The first version with STATUS.
const STATUS_VERSION: &str = "1.1.0";

/// One check a network configuration that is loaded or cannot be.
pub(super) fn checks(node: &Node) -> Vec<Check> {
    let dir = &node.cni_conf;
    let files = match configurations(dir) {
        Ok(files) => files,
        Err(reason) => {
            return vec![Check::degraded(
                NAME,
                format!(
                    "the directory {} cannot be read: {reason} (it is named by {})",
                    dir.display(),
                    node.cni_source
                ),
                "pods have no network from CRI, nerdctl or ctr --cni, so nothing to poll",
                "mkdir -p that directory, and install a list such as config/cni/10-kbp.conflist there",
            )];
        }
    };
    // CRI loads the first by name; nerdctl and others may use any.
    let Some((first, others)) = files.split_first() else {
        return vec![Check::degraded(
            NAME,
            format!(
                "no network configuration in {} (named by {})",
                dir.display(),
                node.cni_source
            ),
            "pods have no network from CRI, nerdctl or ctr --cni, so nothing to poll",
            format!("cp config/cni/10-kbp.conflist {}/", dir.display()),
        )];
    };
    let mut checks = vec![judge(first, node)];
    checks.extend(
        others
            .iter()
            .map(|file| judge(file, node))
            .filter(|check| check.verdict == super::Verdict::Broken)
            .map(|check| Check {
                verdict: super::Verdict::Degraded,
                means: Some(format!(
                    "networks of this file cannot be used; CRI loads {}, which comes first",
                    first.display()
                )),
                ..check
            }),
    );
    checks
}

/// What libcni takes for a configuration, by name.
fn configurations(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| e.to_string())?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            p.extension()
                .is_some_and(|e| ["conf", "conflist", "json"].iter().any(|k| e == *k))
        })
        .collect();
    files.sort();
    Ok(files)
}

fn judge(file: &Path, node: &Node) -> Check {
    let broken = |reason: String, remedy: String| {
        Check::broken(
            NAME,
            format!("{}: {reason}", file.display()),
            "pods of this network do not start",
            remedy,
        )
    };
    let mend = || format!("mend {}", file.display());
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) => return broken(e.to_string(), mend()),
    };
    let list: Value = match serde_json::from_str(&text) {
        Ok(list) => list,
        Err(e) => return broken(format!("no JSON: {e}"), mend()),
    };
    // A .conf is one plugin, a .conflist several.
    let plugins = match &list["plugins"] {
        Value::Array(plugins) => plugins.clone(),
        Value::Null if list["type"].is_string() => vec![list.clone()],
        _ => return broken("it has no list \"plugins\"".to_owned(), mend()),
    };
    let (Some(name), version) = (
        list["name"].as_str(),
        list["cniVersion"].as_str().unwrap_or("0.2.0"),
    ) else {
        return broken("it has no \"name\"".to_owned(), mend());
    };
    let mut kinds = Vec::new();
    for plugin in &plugins {
        let Some(kind) = plugin["type"].as_str() else {
            return broken("a plugin of it has no \"type\"".to_owned(), mend());
        };
        let Some(binary) = find(kind, &node.cni_bin) else {
            return broken(missing(kind, node), install(kind, node));
        };
        if let Some(ipam) = plugin["ipam"]["type"].as_str()
            && !(kind == "kbp" && ipam == "kbp-local")
            && find(ipam, &node.cni_bin).is_none()
        {
            return broken(missing(ipam, node), install(ipam, node));
        }
        match supported(&binary) {
            Ok(versions) if !versions.iter().any(|v| v == version) => {
                return broken(
                    format!(
                        "cniVersion {version} is not known to {} ({})",
                        binary.display(),
                        versions.join(", ")
                    ),
                    format!("one of these versions in {}", file.display()),
                );
            }
            Ok(_) => {}
            Err(reason) => {
                return broken(
                    format!("{} VERSION: {reason}", binary.display()),
                    install(kind, node),
                );
            }
        }
        if kind == "kbp"
            && let Err(reason) = status(&binary, name, plugin, node)
        {
            return broken(format!("plugin kbp says: {reason}"), mend());
        }
        kinds.push(kind.to_owned());
    }
    let found = format!(
        "{}: network {name:?}, {}, cniVersion {version}, every plugin found in {} (named by {})",
        file.display(),
        kinds.join(" + "),
        list_of(&node.cni_bin),
        node.cni_source
    );
    if kinds.iter().any(|k| k == "kbp") {
        return Check::ok(NAME, found);
    }
    let none = "netkit, macvlan, ipvlan and host-device have no veth queue to poll";
    let unpollable = ["macvlan", "ipvlan", "host-device", "sriov"];
    if let Some(kind) = kinds.iter().find(|k| unpollable.contains(&k.as_str())) {
        return Check::degraded(
            NAME,
            format!("{found}; {kind} makes no veth"),
            format!("pods of this network run as under runc: {none}"),
            "a network of type kbp, bridge or ptp",
        );
    }
    Check::degraded(
        NAME,
        format!("{found}; kbp is not among them"),
        "the shim tunes the veth that others made, but bulk TCP stays at their MTU",
        format!(
            "cp config/cni/10-kbp.conflist {}/, or kbp in mode tune behind them (config/cni/README.md)",
            node.cni_conf.display()
        ),
    )
}

fn missing(kind: &str, node: &Node) -> String {
    // A file that is there and cannot be run has another remedy than none.
    let there = node
        .cni_bin
        .iter()
        .map(|d| d.join(kind))
        .find(|f| f.exists());
    match there {
        Some(file) => format!("{} is not executable", file.display()),
        None => format!("no plugin {kind:?} in {}", list_of(&node.cni_bin)),
    }
}

fn install(kind: &str, node: &Node) -> String {
    let dir = node
        .cni_bin
        .first()
        .map_or_else(|| "/opt/cni/bin".to_owned(), |d| d.display().to_string());
    match node
        .cni_bin
        .iter()
        .map(|d| d.join(kind))
        .find(|f| f.exists())
    {
        Some(file) => format!("chmod 755 {}", file.display()),
        None if kind == "kbp" => format!("make install CNI_BIN_DIR={dir}"),
        None => format!(
            "install it into {dir} (Debian: apt-get install containernetworking-plugins puts the reference plugins into /usr/lib/cni)"
        ),
    }
}

fn list_of(dirs: &[PathBuf]) -> String {
    let dirs: Vec<String> = dirs.iter().map(|d| d.display().to_string()).collect();
    dirs.join(", ")
}

/// The versions that a plugin says it knows.
fn supported(binary: &Path) -> Result<Vec<String>, String> {
    let answer = call(binary, "VERSION", &json!({ "cniVersion": "1.0.0" }), &[])?;
    let versions = answer["supportedVersions"].as_array();
    let versions = versions.ok_or_else(|| format!("no supportedVersions in {answer}"))?;
    Ok(versions
        .iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect())
}

/// Whether kbp's own plugin would take this configuration; it changes nothing.
fn status(binary: &Path, name: &str, plugin: &Value, node: &Node) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let mut config = plugin.clone();
    config["name"] = json!(name);
    config["cniVersion"] = json!(STATUS_VERSION);
    call(binary, "STATUS", &config, &node.cni_bin).map(drop)
}

fn call(binary: &Path, verb: &str, config: &Value, path: &[PathBuf]) -> Result<Value, String> {
    let mut command = Command::new(binary);
    let path = std::env::join_paths(path).map_err(|e| e.to_string())?;
    command.env("CNI_COMMAND", verb).env("CNI_PATH", path);
    let output = program::run(command, config.to_string().as_bytes())?;
    let answer: Value = serde_json::from_str(&output.stdout).unwrap_or(Value::Null);
    if output.success {
        return Ok(answer);
    }
    let word = |key: &str| answer[key].as_str().filter(|t| !t.is_empty());
    Err(match (word("msg"), word("details")) {
        (Some(msg), Some(details)) => format!("{msg}: {details}"),
        (Some(msg), None) => msg.to_owned(),
        _ => output.status,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::program::tests::program;
    use super::*;

    const PLUGIN: &str = r#"echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}'"#;

    #[test]
    fn every_fault_of_a_network_is_named() {
        let (programs, dirs) = program("ptp", PLUGIN);
        let conf = tempfile::tempdir().expect("tempdir");
        let node = Node {
            cni_bin: dirs,
            cni_conf: conf.path().to_owned(),
            cni_source: "a test".to_owned(),
            ..Node::default()
        };
        let none = checks(&node);
        assert_eq!(none[0].verdict, Verdict::Degraded);
        assert!(
            none[0].found.contains("no network configuration"),
            "{none:?}"
        );
        let file = conf.path().join("10-x.conflist");
        for (text, verdict, words) in [
            ("{", Verdict::Broken, "no JSON"),
            ("{}", Verdict::Broken, "no list \"plugins\""),
            (
                r#"{"plugins":[{"type":"ptp"}]}"#,
                Verdict::Broken,
                "no \"name\"",
            ),
            (
                r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"pptp"}]}"#,
                Verdict::Broken,
                "no plugin \"pptp\" in /nonexistent",
            ),
            (
                r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"ptp","ipam":{"type":"hostlocal"}}]}"#,
                Verdict::Broken,
                "no plugin \"hostlocal\"",
            ),
            (
                r#"{"name":"n","cniVersion":"9.0.0","plugins":[{"type":"ptp"}]}"#,
                Verdict::Broken,
                "cniVersion 9.0.0 is not known to",
            ),
            (
                r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}"#,
                Verdict::Degraded,
                "kbp is not among them",
            ),
        ] {
            std::fs::write(&file, text).expect("write");
            let found = checks(&node);
            assert_eq!(found[0].verdict, verdict, "{text}: {found:?}");
            assert!(found[0].found.contains(words), "{text}: {found:?}");
            assert!(found[0].remedy.is_some());
        }
        // Another file that is not loaded is a smaller evil.
        std::fs::write(conf.path().join("20-y.conf"), "{").expect("write");
        let found = checks(&node);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].verdict, Verdict::Degraded);
        assert!(found[1].found.contains("20-y.conf"), "{found:?}");
        // A plugin that may not be run has a remedy of its own.
        let plugin = programs.dir.path().join("ptp");
        std::fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .expect("chmod");
        let found = checks(&node);
        assert!(found[0].found.contains("not executable"), "{found:?}");
        let remedy = found[0].remedy.clone().unwrap_or_default();
        assert!(remedy.starts_with("chmod 755"), "{remedy}");
    }
}
