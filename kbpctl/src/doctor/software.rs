//! The programs around kbp: OCI runtime, containerd, the shim, CNI plugins.

use std::path::{Path, PathBuf};

use kbp_poller::config::Config;

use super::Check;
use super::containerd::Node;
use super::program::{find, first_line, output};

/// Every check of the programs but containerd itself.
pub(super) fn checks(config: Option<&Config>, node: &Node) -> Vec<Check> {
    let runtime = config.map_or("runc", |c| c.runtime.as_str());
    vec![
        oci_runtime(runtime, &node.path),
        shim(node),
        cni_plugin(&node.cni_bin),
        ipam_plugin(&node.cni_bin),
    ]
}

/// The runtime that starts containers when containerd names none.
fn oci_runtime(name: &str, dirs: &[PathBuf]) -> Check {
    const NAME: &str = "oci-runtime";
    let Some(file) = find(name, dirs) else {
        return Check::broken(
            NAME,
            format!("{name} is not in PATH"),
            "no container starts",
            format!("install {name}, or name another runtime by `runtime` in the config file"),
        );
    };
    let version = match first_line(&file, &["--version"]) {
        Ok(version) => version,
        Err(reason) => {
            return Check::broken(
                NAME,
                format!("{} --version: {reason}", file.display()),
                "no container starts",
                format!("install {name} anew"),
            );
        }
    };
    let found = format!("{}: {version}", file.display());
    match has_seccomp(&file) {
        Some(true) => Check::ok(NAME, found),
        Some(false) => Check::degraded(
            NAME,
            format!("{found}, built without seccomp notification"),
            "sockets of unmodified programs get no busy-poll window, which is most of the gain",
            "a runc or crun built with libseccomp 2.5 or later",
        ),
        None => Check::degraded(
            NAME,
            format!("{found}; it does not tell whether it knows seccomp notification"),
            "sockets of unmodified programs may get no busy-poll window",
            "runc 1.1 or later, or crun",
        ),
    }
}

/// Whether the runtime can hand out a seccomp listener, where it tells.
fn has_seccomp(file: &Path) -> Option<bool> {
    if let Ok(features) = output(file, &["features"])
        && let Ok(features) = serde_json::from_str::<serde_json::Value>(&features)
    {
        let seccomp = &features["linux"]["seccomp"];
        let knows = |action| action == "SCMP_ACT_NOTIFY";
        let notify = seccomp["actions"]
            .as_array()
            .is_some_and(|actions| actions.iter().any(knows));
        return Some(seccomp["enabled"] == true && notify);
    }
    // Older cruns have no `features`, but list what they were built with; seccomp there includes the listener.
    let version = output(file, &["--version"]).ok()?;
    let built_with = version.lines().find(|l| l.starts_with('+'))?;
    Some(built_with.split_whitespace().any(|w| w == "+SECCOMP"))
}

/// Where containerd itself looks, when it runs; else where this process does.
fn shim(node: &Node) -> Check {
    const NAME: &str = "shim";
    const FILE: &str = "containerd-shim-kbp-v1";
    let whose = if node.path_is_containerds {
        "containerd's PATH"
    } else {
        "PATH"
    };
    match find(FILE, &node.path) {
        Some(file) => Check::ok(NAME, format!("{}, found in {whose}", file.display())),
        None => Check::broken(
            NAME,
            format!("{FILE} is not in {whose} ({})", list(&node.path)),
            "containerd cannot start pods with io.containerd.kbp.v1, unless the handler's runtime_path names it",
            "make install, or runtime_path in containerd's config",
        ),
    }
}

fn cni_plugin(dirs: &[PathBuf]) -> Check {
    const NAME: &str = "cni-plugin";
    match find("kbp", dirs) {
        Some(file) => Check::ok(NAME, format!("{}", file.display())),
        None => Check::degraded(
            NAME,
            format!("no plugin kbp in {}", list(dirs)),
            "pods get the veth of another plugin; the shim tunes it, but bulk TCP stays at a small MTU",
            "make install CNI_BIN_DIR=DIR with the directory where your containerd looks",
        ),
    }
}

fn ipam_plugin(dirs: &[PathBuf]) -> Check {
    const NAME: &str = "ipam-plugin";
    match find("host-local", dirs) {
        Some(file) => Check::ok(NAME, format!("{}", file.display())),
        None => Check::degraded(
            NAME,
            format!("no plugin host-local in {}", list(dirs)),
            "network lists with host-local cannot give out addresses; those with the built-in kbp-local can",
            "install the reference CNI plugins (Debian: containernetworking-plugins), or take 10-kbp-local.conflist",
        ),
    }
}

fn list(dirs: &[PathBuf]) -> String {
    let dirs: Vec<String> = dirs.iter().map(|d| d.display().to_string()).collect();
    dirs.join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::program::tests::program;
    use super::*;

    #[test]
    fn runtimes_are_asked_for_seccomp_notification() {
        const NEW: &str = r#"case $1 in features) echo '{"linux":{"seccomp":{"enabled":true,"actions":["SCMP_ACT_NOTIFY"]}}}';; *) echo runc version 1.1.5;; esac"#;
        const WITHOUT: &str = r#"case $1 in features) echo '{"linux":{"seccomp":{"enabled":false}}}';; *) echo runc version 1.1.5;; esac"#;
        const CRUN: &str = "case $1 in features) exit 1;; *) echo crun version 1.8.1; echo '+SYSTEMD +SECCOMP';; esac";
        const MUTE: &str = "case $1 in features) exit 1;; *) echo runc version 1.0;; esac";
        for (script, verdict, words) in [
            (NEW, Verdict::Ok, "runc version 1.1.5"),
            (WITHOUT, Verdict::Degraded, "without seccomp"),
            (CRUN, Verdict::Ok, "crun version 1.8.1"),
            (MUTE, Verdict::Degraded, "does not tell"),
            ("exit 3", Verdict::Broken, "--version: exit status: 3"),
            ("true", Verdict::Broken, "printed nothing"),
        ] {
            let (_dir, dirs) = program("runc", script);
            let check = oci_runtime("runc", &dirs);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.found.contains(words), "{check:?}");
        }
        let check = oci_runtime("runc", &[]);
        assert_eq!(check.verdict, Verdict::Broken);
        assert!(check.found.contains("not in PATH"), "{check:?}");
    }

    #[test]
    fn the_pieces_of_kbp_are_looked_for_where_they_are_installed() {
        let (other, dirs) = program("containerd-shim-kbp-v1", "");
        let node = |path: &[PathBuf]| Node {
            path: path.to_vec(),
            ..Node::default()
        };
        assert_eq!(shim(&node(&dirs)).verdict, Verdict::Ok);
        assert_eq!(shim(&node(&[])).verdict, Verdict::Broken);
        drop(other);
        let (_dir, dirs) = program("kbp", "");
        assert_eq!(cni_plugin(&dirs).verdict, Verdict::Ok);
        let check = ipam_plugin(&dirs);
        assert_eq!(check.verdict, Verdict::Degraded);
        assert!(check.found.contains("/nonexistent, "), "{check:?}");
    }
}
