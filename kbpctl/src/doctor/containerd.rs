//! containerd: the one that runs, the configuration that it has loaded, and where it looks for programs.

mod handler;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kbp_poller::state;
use toml::{Table, Value};

use super::Check;
use super::program::{find, first_line, major_minor, output};
use handler::{cri, handler};

/// containerd's default address.
pub(crate) const SOCKET: &str = "/run/containerd/containerd.sock";
const CONFIG: &str = "/etc/containerd/config.toml";
/// Where containerd, nerdctl and CRI-O look for CNI plugins.
const CNI_DIRS: [&str; 4] = [
    "/opt/cni/bin",
    "/usr/lib/cni",
    "/usr/libexec/cni",
    "/usr/local/libexec/cni",
];
const CNI_CONF_DIR: &str = "/etc/cni/net.d";
/// `/proc/PID/stat` counts in these.
const TICKS_PER_SECOND: u64 = 100;

/// Where programs and network configurations are looked for on this node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Node {
    /// PATH, containerd's own where it runs.
    pub(crate) path: Vec<PathBuf>,
    /// Whether that is containerd's.
    pub(crate) path_is_containerds: bool,
    /// Directories of CNI plugins.
    pub(crate) cni_bin: Vec<PathBuf>,
    /// Directory of network configurations.
    pub(crate) cni_conf: PathBuf,
    /// Who says so.
    pub(crate) cni_source: String,
}

/// The process at the other end of containerd's socket.
#[derive(Debug)]
struct Running {
    pid: u32,
    exe: Option<PathBuf>,
    arguments: Vec<String>,
    path: Option<String>,
    started: Option<SystemTime>,
}

/// Checks containerd and finds out where it looks for the rest.
pub(super) fn checks(address: &Path) -> (Vec<Check>, Node) {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let mut node = Node {
        path: std::env::split_paths(&own).collect(),
        cni_bin: CNI_DIRS.iter().map(PathBuf::from).collect(),
        cni_conf: PathBuf::from(CNI_CONF_DIR),
        cni_source: "the usual places; containerd's own could not be asked".to_owned(),
        ..Node::default()
    };
    let running = running(address);
    if let Ok(Some(running)) = &running
        && let Some(path) = &running.path
    {
        node.path = std::env::split_paths(path).collect();
        node.path_is_containerds = true;
    }
    // The file that runs may be another than the first in PATH.
    let exe = running.as_ref().ok().and_then(Option::as_ref);
    let exe = exe.and_then(|r| r.exe.clone());
    let binary = exe.or_else(|| find("containerd", &node.path));
    let mut checks = vec![containerd(binary.as_deref(), address, &running)];
    if let Some(binary) = &binary {
        let config = config_file(running.as_ref().ok().and_then(Option::as_ref));
        checks.extend(configuration(
            binary,
            &config,
            running.ok().flatten().as_ref(),
            &mut node,
        ));
    }
    // As nerdctl, cnitool and ctr's own callers are told.
    if let Some(named) = std::env::var_os("CNI_PATH") {
        node.cni_bin = std::env::split_paths(&named).collect();
    }
    if let Some(named) = std::env::var_os("NETCONFPATH") {
        node.cni_conf = PathBuf::from(named);
        node.cni_source = "NETCONFPATH".to_owned();
    }
    (checks, node)
}

/// Where the node of that containerd looks for things.
pub(crate) fn look(address: &Path) -> Node {
    checks(address).1
}

/// What of the loaded configuration is about kbp: nothing of registries, their credentials, or other plugins.
pub(crate) fn excerpt(address: &Path) -> Result<serde_json::Value, String> {
    let running = running(address)?;
    let own = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&own).collect();
    let binary = running.as_ref().and_then(|r| r.exe.clone());
    let binary = binary.or_else(|| find("containerd", &dirs));
    let binary = binary.ok_or("containerd is not in PATH")?;
    let file = config_file(running.as_ref());
    let dump = dump(&binary, &file)?;
    let runtimes = cri(&dump).and_then(|cri| cri.get("containerd")?.get("runtimes"));
    Ok(serde_json::json!({
        "program": binary,
        "file": file,
        "version": dump.get("version"),
        "disabled_plugins": dump.get("disabled_plugins"),
        "runtimes": runtimes,
        "cni": cri(&dump).and_then(|cri| cri.get("cni")),
    }))
}

/// The configuration as containerd itself puts it together from defaults, file and imports.
fn dump(binary: &Path, file: &Path) -> Result<Table, String> {
    let named = file.display().to_string();
    // containerd takes a file that is not there for an error when it is named, and for the default when it is not.
    let arguments: Vec<&str> = match file.exists() {
        true => vec!["--config", &named, "config", "dump"],
        false => vec!["config", "default"],
    };
    let said = |reason| format!("{} {}: {reason}", binary.display(), arguments.join(" "));
    let text = output(binary, &arguments).map_err(said)?;
    text.parse::<Table>()
        .map_err(|e| said(format!("what it prints is no TOML: {}", e.message())))
}

/// Who listens at `address`; None: nobody, an error: that cannot be told.
fn running(address: &Path) -> Result<Option<Running>, String> {
    let socket = match UnixStream::connect(address) {
        Ok(socket) => socket,
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(e.to_string()),
        Err(_) => return Ok(None),
    };
    let pid = kbp_kernel::fd::peer(&socket)
        .map_err(|e| e.to_string())?
        .pid;
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let read = |name: &str| std::fs::read(proc.join(name)).unwrap_or_default();
    let strings = |bytes: Vec<u8>| -> Vec<String> {
        let parts = bytes.split(|b| *b == 0);
        parts
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .collect()
    };
    Ok(Some(Running {
        pid,
        exe: std::fs::read_link(proc.join("exe"))
            .ok()
            .filter(|exe| exe.is_file()),
        arguments: strings(read("cmdline")),
        // Of its environment nothing else is looked at.
        path: strings(read("environ"))
            .iter()
            .find_map(|line| line.strip_prefix("PATH=").map(str::to_owned)),
        started: started(pid),
    }))
}

/// When a process started.
fn started(pid: u32) -> Option<SystemTime> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = stat
        .lines()
        .find_map(|l| l.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()?;
    let ticks = state::start_time(pid)?;
    Some(UNIX_EPOCH + Duration::from_secs(boot + ticks / TICKS_PER_SECOND))
}

/// The file that the running containerd was told to read, else the default one.
fn config_file(running: Option<&Running>) -> PathBuf {
    let arguments = running.map_or(&[][..], |r| &r.arguments);
    let mut words = arguments.iter().skip(1);
    while let Some(word) = words.next() {
        for flag in ["--config", "-c", "-config"] {
            if word == flag
                && let Some(file) = words.next()
            {
                return PathBuf::from(file);
            }
            if let Some(file) = word.strip_prefix(&format!("{flag}=")) {
                return PathBuf::from(file);
            }
        }
    }
    PathBuf::from(CONFIG)
}

fn containerd(
    file: Option<&Path>,
    address: &Path,
    running: &Result<Option<Running>, String>,
) -> Check {
    const NAME: &str = "containerd";
    let Some(file) = file else {
        return Check::broken(
            NAME,
            "containerd is not in PATH, and nothing listens on its socket",
            "nothing starts the shim",
            "install containerd 1.6 or later (Debian: apt-get install containerd)",
        );
    };
    let version = match first_line(file, &["--version"]) {
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
    if major_minor(&version).is_some_and(|v| v < (1, 6)) {
        return Check::broken(
            NAME,
            found,
            "this containerd speaks no protocol that the shim knows",
            "containerd 1.6 or later",
        );
    }
    match running {
        Ok(Some(running)) => Check::ok(
            NAME,
            format!(
                "{found}; process {} listens on {}",
                running.pid,
                address.display()
            ),
        ),
        Ok(None) => Check::degraded(
            NAME,
            format!("{found}; nothing listens on {}", address.display()),
            "no container starts there until it runs; its configuration and PATH are guessed below",
            "systemctl start containerd, or kbpctl doctor --address with the socket of the one that runs (k3s: /run/k3s/containerd/containerd.sock)",
        ),
        Err(reason) => Check::degraded(
            NAME,
            format!(
                "{found}; the socket {} cannot be opened: {reason}",
                address.display()
            ),
            "its configuration and PATH are guessed below",
            "run kbpctl doctor as root",
        ),
    }
}

/// Judges the configuration, and takes over what it says of networks.
fn configuration(
    binary: &Path,
    file: &Path,
    running: Option<&Running>,
    node: &mut Node,
) -> Vec<Check> {
    const NAME: &str = "containerd-config";
    let file_text = file.display().to_string();
    let dump = match dump(binary, file) {
        Ok(dump) => dump,
        Err(reason) => {
            return vec![Check::broken(
                NAME,
                reason,
                "containerd does not start with this configuration, or starts without what it was told",
                format!("mend {file_text}; `containerd config dump` says when it is well"),
            )];
        }
    };
    let mut checks = vec![handler(&dump, &file_text)];
    if let Some(running) = running
        && let (Some(started), Ok(written)) = (
            running.started,
            file.metadata().and_then(|m| m.modified()),
        )
        // The start is known to the second only.
        && written > started + Duration::from_secs(2)
    {
        checks.push(Check::degraded(
            "containerd-restart",
            format!(
                "{file_text} is newer than the running containerd (process {})",
                running.pid
            ),
            "containerd reads its configuration at its start only: what was changed does not hold yet",
            "systemctl restart containerd (running containers stay)",
        ));
    }
    if let Some(cni) = cri(&dump).and_then(|cri| cri.get("cni")) {
        let text = |key: &str| {
            cni.get(key)
                .and_then(Value::as_str)
                .filter(|t| !t.is_empty())
        };
        let dirs = cni.get("bin_dirs").and_then(Value::as_array);
        let dirs: Vec<PathBuf> = dirs
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .chain(text("bin_dir"))
            .map(PathBuf::from)
            .collect();
        if !dirs.is_empty() {
            node.cni_bin = dirs;
        }
        if let Some(conf) = text("conf_dir") {
            node.cni_conf = PathBuf::from(conf);
        }
        node.cni_source = if file.exists() {
            file_text
        } else {
            "containerd's defaults".to_owned()
        };
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::program::tests::program;
    use super::*;

    fn nobody() -> Result<Option<Running>, String> {
        Ok(None)
    }

    #[test]
    fn containerd_must_be_new_enough_and_run() {
        let here = Running {
            pid: 1,
            exe: None,
            arguments: Vec::new(),
            path: None,
            started: None,
        };
        let running = Ok(Some(here));
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
            let file = dirs[1].join("containerd");
            let check = containerd(Some(&file), Path::new("/run/x"), &running);
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
        let (_dir, dirs) = program("containerd", "echo containerd v2.1.9");
        let file = dirs[1].join("containerd");
        let check = containerd(Some(&file), Path::new("/nonexistent"), &nobody());
        assert_eq!(check.verdict, Verdict::Degraded);
        assert!(
            check.found.contains("nothing listens on /nonexistent"),
            "{check:?}"
        );
        let check = containerd(None, Path::new("/nonexistent"), &nobody());
        assert_eq!(check.verdict, Verdict::Broken);
    }

    #[test]
    fn the_config_file_is_the_one_that_the_process_was_given() {
        let with = |arguments: &[&str]| {
            let running = Running {
                pid: 1,
                exe: None,
                arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
                path: None,
                started: None,
            };
            config_file(Some(&running))
        };
        assert_eq!(with(&["containerd"]), Path::new(CONFIG));
        assert_eq!(with(&["containerd", "-c", "/a"]), Path::new("/a"));
        assert_eq!(
            with(&["containerd", "-l", "debug", "--config=/b"]),
            Path::new("/b")
        );
        assert_eq!(config_file(None), Path::new(CONFIG));
    }
}
