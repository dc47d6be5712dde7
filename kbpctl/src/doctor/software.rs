//! The programs around kbp: OCI runtime, containerd, the shim, CNI plugins.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kbp_poller::config::Config;

use super::Check;

/// Long enough for a Go program on a busy machine to print its version.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where containerd, nerdctl and CRI-O look for CNI plugins.
const CNI_DIRS: [&str; 4] = [
    "/opt/cni/bin",
    "/usr/lib/cni",
    "/usr/libexec/cni",
    "/usr/local/libexec/cni",
];

/// containerd's default address.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// Every check of the programs.
pub(super) fn checks(config: Option<&Config>) -> Vec<Check> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let runtime = config.map_or("runc", |c| c.runtime.as_str());
    let cni: Vec<PathBuf> = match std::env::var_os("CNI_PATH") {
        Some(named) => std::env::split_paths(&named).collect(),
        None => CNI_DIRS.iter().map(PathBuf::from).collect(),
    };
    vec![
        oci_runtime(runtime, &dirs),
        containerd(&dirs, Path::new(CONTAINERD_SOCKET)),
        shim(&dirs),
        cni_plugin(&cni),
        ipam_plugin(&cni),
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

fn containerd(dirs: &[PathBuf], socket: &Path) -> Check {
    const NAME: &str = "containerd";
    let Some(file) = find("containerd", dirs) else {
        return Check::broken(
            NAME,
            "containerd is not in PATH",
            "nothing starts the shim",
            "install containerd 1.6 or later",
        );
    };
    let version = match first_line(&file, &["--version"]) {
        Ok(version) => version,
        Err(reason) => {
            return Check::broken(
                NAME,
                format!("{} --version: {reason}", file.display()),
                "nothing starts the shim",
                "install containerd 1.6 or later anew",
            );
        }
    };
    let found = format!("{}: {version}", file.display());
    match major_minor(&version) {
        Some(v) if v < (1, 6) => Check::broken(
            NAME,
            found,
            "this containerd speaks no protocol that the shim knows",
            "containerd 1.6 or later",
        ),
        _ if !socket.exists() => Check::ok(
            NAME,
            format!("{found}; nothing listens on {}", socket.display()),
        )
        .meaning("it is not running, or elsewhere (k3s, a private root): then this is no defect"),
        _ => Check::ok(NAME, found),
    }
}

fn shim(dirs: &[PathBuf]) -> Check {
    const NAME: &str = "shim";
    const FILE: &str = "containerd-shim-kbp-v1";
    match find(FILE, dirs) {
        Some(file) => Check::ok(NAME, format!("{}", file.display())),
        None => Check::broken(
            NAME,
            format!("{FILE} is not in PATH"),
            "containerd cannot start pods with io.containerd.kbp.v1, unless its own PATH or runtime_path has it",
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

/// The executable of that name; a name with a slash is a path already.
fn find(name: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let runs = |file: &PathBuf| {
        file.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(runs);
    }
    dirs.iter().map(|dir| dir.join(name)).find(runs)
}

fn first_line(file: &Path, args: &[&str]) -> Result<String, String> {
    let text = output(file, args)?;
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() {
        Err("it printed nothing".to_owned())
    } else {
        Ok(line.to_owned())
    }
}

/// What a program prints, when it ends well and in time.
fn output(file: &Path, args: &[impl AsRef<OsStr>]) -> Result<String, String> {
    let mut child = Command::new(file)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let Some(mut stdout) = child.stdout.take() else {
        return Err("its output could not be read".to_owned());
    };
    // Read beside the waiting, or a program that prints more than a pipe holds would never end.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let until = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status,
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("no answer within {} s", PATIENCE.as_secs()));
            }
        }
    };
    if !status.success() {
        return Err(status.to_string());
    }
    match reader.join() {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("its output could not be read".to_owned()),
    }
}

/// The first word of a version line that looks like a version.
fn major_minor(line: &str) -> Option<(u32, u32)> {
    line.split_whitespace().find_map(|word| {
        let mut parts = word.trim_start_matches('v').split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::super::Verdict;
    use super::*;

    /// A program that is being written cannot be run (ETXTBSY), and the child of another test holds every open file
    /// until it has become its own program: so these tests take turns.
    static TURN: Mutex<()> = Mutex::new(());

    struct Program {
        dir: tempfile::TempDir,
        _turn: MutexGuard<'static, ()>,
    }

    /// A directory with one program, a shell script.
    fn program(name: &str, script: &str) -> (Program, Vec<PathBuf>) {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join(name);
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("write");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("chmod");
        let dirs = vec![PathBuf::from("/nonexistent"), dir.path().to_owned()];
        (Program { dir, _turn: turn }, dirs)
    }

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
    fn containerd_must_be_new_enough() {
        let socket = tempfile::NamedTempFile::new().expect("file");
        for (script, verdict) in [
            (
                "echo containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20",
                Verdict::Ok,
            ),
            (
                "echo containerd github.com/containerd/containerd/v2 v2.1.9 abc",
                Verdict::Ok,
            ),
            (
                "echo containerd github.com/containerd/containerd v1.4.13 abc",
                Verdict::Broken,
            ),
            ("exit 1", Verdict::Broken),
        ] {
            let (_dir, dirs) = program("containerd", script);
            let check = containerd(&dirs, socket.path());
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
        let (_dir, dirs) = program("containerd", "echo containerd v2.1.9");
        let check = containerd(&dirs, Path::new("/nonexistent"));
        assert_eq!(check.verdict, Verdict::Ok);
        assert!(check.found.contains("nothing listens"), "{check:?}");
        assert_eq!(containerd(&[], socket.path()).verdict, Verdict::Broken);
    }

    #[test]
    fn the_pieces_of_kbp_are_looked_for_where_they_are_installed() {
        let (other, dirs) = program("containerd-shim-kbp-v1", "");
        assert_eq!(shim(&dirs).verdict, Verdict::Ok);
        assert_eq!(shim(&[]).verdict, Verdict::Broken);
        drop(other);
        let (_dir, dirs) = program("kbp", "");
        assert_eq!(cni_plugin(&dirs).verdict, Verdict::Ok);
        let check = ipam_plugin(&dirs);
        assert_eq!(check.verdict, Verdict::Degraded);
        assert!(check.found.contains("/nonexistent, "), "{check:?}");
    }

    #[test]
    fn a_file_that_cannot_be_run_is_not_a_program() {
        let (program, dirs) = program("kbp", "");
        let file = program.dir.path().join("kbp");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).expect("chmod");
        assert_eq!(find("kbp", &dirs), None);
        assert_eq!(find("/nonexistent/kbp", &dirs), None);
    }

    #[test]
    fn versions_are_read_from_the_programs_own_words() {
        assert_eq!(major_minor("containerd x 1.6.20~ds1 y"), Some((1, 6)));
        assert_eq!(major_minor("containerd v2.1.9"), Some((2, 1)));
        assert_eq!(major_minor("no version"), None);
    }
}
