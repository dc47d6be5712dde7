//! `kbpctl report`: everything that a report of a fault needs, in one archive, and nothing secret.
//!
//! What goes in is chosen piece by piece: no environment, no command lines of containers, no annotations, no whole configuration of
//! containerd. What is text of somebody else's goes through [`redact`] besides.

mod redact;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use kbp_poller::config::Config;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;
use serde_json::{Value, json};

use crate::doctor::program::{find, output};
use crate::{doctor, status};

/// Kernel parameters that matter here; others may be anything.
const PARAMETERS: [&str; 12] = [
    "isolcpus",
    "nohz_full",
    "rcu_nocbs",
    "idle",
    "intel_idle.max_cstate",
    "processor.max_cstate",
    "cpuidle.off",
    "mitigations",
    "preempt",
    "skew_tick",
    "tsc",
    "systemd.unified_cgroup_hierarchy",
];
const SYSCTLS: [&str; 9] = [
    "kernel/io_uring_disabled",
    "kernel/sched_rt_runtime_us",
    "kernel/sched_autogroup_enabled",
    "kernel/perf_event_paranoid",
    "net/core/busy_read",
    "net/core/busy_poll",
    "net/core/default_qdisc",
    "net/core/netdev_budget",
    "net/ipv4/ip_forward",
];
/// Words of the kernel log's lines that matter here.
const LOG_WORDS: [&str; 8] = [
    "rcu_tasks",
    "rcu:",
    "soft lockup",
    "hung_task",
    "blocked for more than",
    "napi",
    "veth",
    "io_uring",
];
/// Lines of the kernel log, the last ones.
const LOG_LINES: usize = 200;

/// Writes the archive and returns what to say about it.
pub(crate) fn run(out: Option<PathBuf>, address: &Path) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let name = format!("kbp-report-{now}");
    let out = out.unwrap_or_else(|| PathBuf::from(format!("{name}.tar")));
    let files = gather(address);
    let mut archive = tar::Builder::new(Vec::new());
    for (file, text) in &files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now);
        archive
            .append_data(&mut header, format!("{name}/{file}"), text.as_bytes())
            .with_context(|| format!("pack {file}"))?;
    }
    let bytes = archive.into_inner().context("pack the archive")?;
    write_new(&out, &bytes)?;
    let names: Vec<&str> = files.iter().map(|f| f.0.as_str()).collect();
    Ok(format!(
        "{}: {}\nLook through it before you hand it on: it names interfaces, pods and their namespaces. Values that look secret were replaced by {}.\n",
        out.display(),
        names.join(", "),
        redact::REMOVED
    ))
}

/// Writes a file whole or not at all, also when a signal comes in between, and never over one that is there.
fn write_new(out: &Path, bytes: &[u8]) -> Result<()> {
    let create = || format!("create {} (another name by --out)", out.display());
    let write = || format!("write {}", out.display());
    let dir = out.parent().filter(|d| !d.as_os_str().is_empty());
    let mut options = std::fs::File::options();
    options.write(true).mode(0o600);
    // A file without a name, which goes by itself when this process ends before the file gets one.
    let nameless = options
        .clone()
        .custom_flags(OFlag::O_TMPFILE.bits())
        .open(dir.unwrap_or(Path::new(".")));
    if let Ok(mut file) = nameless {
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .with_context(write)?;
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        return linkat(
            AT_FDCWD,
            own.as_str(),
            AT_FDCWD,
            out,
            AtFlags::AT_SYMLINK_FOLLOW,
        )
        .with_context(create);
    }
    // Not every file system has them.
    let mut file = options.create_new(true).open(out).with_context(create)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written
        .inspect_err(|_| {
            // Half an archive is of no use.
            let _ = std::fs::remove_file(out);
        })
        .with_context(write)
}

/// Every file of the archive. What cannot be had says why in its place.
fn gather(address: &Path) -> Vec<(String, String)> {
    let json = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    let mut files = vec![
        ("versions.txt".to_owned(), versions(address)),
        ("kernel.json".to_owned(), json(&kernel())),
        ("kernel-log.txt".to_owned(), kernel_log()),
        (
            "interfaces.txt".to_owned(),
            said("ip", &["-details", "-statistics", "link"]),
        ),
    ];
    let doctor = doctor::run(true, address).map_or_else(|e| format!("{e:#}\n"), |(text, _)| text);
    files.push(("doctor.json".to_owned(), redact::text(&doctor)));
    let config = Config::load();
    let path = config.as_ref().map(|c| c.path.clone());
    if let Ok(path) = &path
        && let Ok(text) = std::fs::read_to_string(path)
    {
        files.push(("config.toml".to_owned(), redact::text(&text)));
    }
    let dir = config.map_or_else(
        |_| PathBuf::from(kbp_poller::config::DEFAULT_STATE_DIR),
        |c| c.state_dir,
    );
    let options = status::Options {
        json: true,
        verbose: false,
        watch: None,
    };
    let status = status::run(Some(&dir), options).unwrap_or_else(|e| format!("{e:#}\n"));
    files.push(("status.json".to_owned(), redact::text(&status)));
    files.push(("state-dir.txt".to_owned(), listing(&dir)));
    let node = doctor::containerd::look(address);
    files.push((
        "containerd.json".to_owned(),
        json(&doctor::containerd::excerpt(address).map_or_else(
            |reason| json!({ "unavailable": reason }),
            |value| redact::value(&value),
        )),
    ));
    let lists = std::fs::read_dir(&node.cni_conf)
        .into_iter()
        .flatten()
        .flatten();
    for path in lists.map(|e| e.path()) {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        // What CNI's callers keep beside the lists, locks for one, starts with a dot.
        if name.starts_with('.') {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let text = match serde_json::from_str::<Value>(&text) {
            Ok(list) => json(&redact::value(&list)),
            Err(e) => format!("no JSON: {e}\n"),
        };
        files.push((format!("cni/{name}"), text));
    }
    files
}

fn versions(address: &Path) -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut text = format!("kbpctl {}\n", env!("CARGO_PKG_VERSION"));
    for (program, argument) in [
        ("containerd-shim-kbp-v1", "-v"),
        ("kbp-poller", "--version"),
        ("containerd", "--version"),
        ("runc", "--version"),
        ("crun", "--version"),
    ] {
        let found = match find(program, &dirs) {
            Some(file) => output(&file, &[argument]).map_or_else(
                |reason| format!("{}: {reason}", file.display()),
                |said| said.lines().take(3).collect::<Vec<_>>().join("; "),
            ),
            None => "not in PATH".to_owned(),
        };
        text += &format!("{program}: {found}\n");
    }
    text + &format!("containerd's socket: {}\n", address.display())
}

fn kernel() -> Value {
    let read = |path: &str| {
        let text = std::fs::read_to_string(path).ok();
        text.map(|t| t.trim().to_owned())
    };
    let parameters: Vec<String> = read("/proc/cmdline")
        .unwrap_or_default()
        .split_whitespace()
        .filter(|p| PARAMETERS.contains(&p.split('=').next().unwrap_or_default()))
        .map(str::to_owned)
        .collect();
    let sysctls: serde_json::Map<String, Value> = SYSCTLS
        .iter()
        .map(|name| {
            (
                name.replace('/', "."),
                json!(read(&format!("/proc/sys/{name}"))),
            )
        })
        .collect();
    let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find(|l| l.starts_with("model name"));
    let cpu = "/sys/devices/system/cpu";
    json!({
        "release": read("/proc/sys/kernel/osrelease"),
        "version": read("/proc/sys/kernel/version"),
        "parameters": parameters,
        "sysctls": sysctls,
        "cpu": model.and_then(|l| l.split(':').nth(1)).map(str::trim),
        "online": read(&format!("{cpu}/online")),
        "isolated": read(&format!("{cpu}/isolated")),
        "cpuidle": read(&format!("{cpu}/cpuidle/current_driver")),
        "smt": read(&format!("{cpu}/smt/active")),
        "load": read("/proc/loadavg"),
    })
}

fn kernel_log() -> String {
    match doctor::kernel_log() {
        None => "the kernel log cannot be read\n".to_owned(),
        Some(log) => {
            let lines: Vec<&str> = log
                .lines()
                .filter(|l| LOG_WORDS.iter().any(|w| l.contains(w)))
                .collect();
            let from = lines.len().saturating_sub(LOG_LINES);
            redact::text(&(lines[from..].join("\n") + "\n"))
        }
    }
}

/// What a program of the machine prints.
fn said(program: &str, arguments: &[&str]) -> String {
    let dirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    match find(program, &dirs) {
        None => format!("{program} is not there\n"),
        Some(file) => output(&file, arguments).unwrap_or_else(|reason| format!("{reason}\n")),
    }
}

/// Names, sizes and modes of the files of the state directory.
fn listing(dir: &Path) -> String {
    fn below(dir: &Path, depth: u32, text: &mut String) {
        use std::os::unix::fs::PermissionsExt;
        let mut entries: Vec<_> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        entries.sort_by_key(std::fs::DirEntry::path);
        for entry in entries {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            *text += &format!(
                "{:o} {} {}\n",
                metadata.permissions().mode() & 0o7777,
                metadata.len(),
                entry.path().display()
            );
            if metadata.is_dir() && depth > 0 {
                below(&entry.path(), depth - 1, text);
            }
        }
    }
    let mut text = format!("{}\n", dir.display());
    below(dir, 3, &mut text);
    text
}
