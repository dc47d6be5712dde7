//! The merged profile and the notifier with real OCI runtimes and a static, unmodified program: what a container's
//! processes get is looked at from outside.
//!
//! Needs root, runc, crun and a C compiler with its static C library.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kbp_kernel::Micros;
use kbp_kernel::process::PidFd;
use kbp_kernel::sockopt;
use kbp_shim::sockets::{Event, Notifier, Treatment};
use kbp_shim::spec::Spec;
use kbp_shim::spec::seccomp::{self, EPOLL_CALLS, Listener, Merged, SOCKET_CALLS};
use serde_json::{Value, json};

const WINDOW: Micros = Micros(37);
const RUNTIMES: [&str; 2] = ["runc", "crun"];

/// Calls that the helper and the runtimes' own last steps need.
const NEEDED: [&str; 91] = [
    "accept4",
    "access",
    "arch_prctl",
    "bind",
    "brk",
    "capget",
    "capset",
    "chdir",
    "clone",
    "clone3",
    "close",
    "close_range",
    "connect",
    "dup",
    "dup2",
    "dup3",
    "epoll_create",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "eventfd2",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fchdir",
    "fchmod",
    "fchown",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getpid",
    "getppid",
    "getrandom",
    "getsockname",
    "getsockopt",
    "gettid",
    "getuid",
    "ioctl",
    "keyctl",
    "listen",
    "lseek",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pipe2",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setitimer",
    "setuid",
    "sigaltstack",
    "socket",
    "socketcall",
    "statx",
    "tgkill",
    "uname",
    "umask",
    "wait4",
    "setresuid",
    "setresgid",
    "write",
];

/// The helper, compiled once; no file of it stays.
fn helper() -> &'static [u8] {
    static HELPER: OnceLock<Vec<u8>> = OnceLock::new();
    HELPER.get_or_init(|| {
        let dir = tempfile::tempdir().expect("tempdir");
        let program = dir.path().join("helper");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/seccomp/helper.c");
        let status = Command::new("gcc")
            .args(["-O1", "-Wall", "-static", "-no-pie", "-o"])
            .args([&program, &source])
            .status()
            .expect("run gcc");
        assert!(status.success(), "gcc could not compile the helper");
        fs::read(&program).expect("read the helper")
    })
}

/// A bundle with its notifier, and the container that runs from it.
struct Container {
    runtime: &'static str,
    id: String,
    dir: tempfile::TempDir,
    notifier: Notifier,
    merged: Merged,
    children: Vec<Child>,
}

/// A process in the container, and what it told.
struct Process {
    pid: u32,
    told: BTreeMap<String, String>,
}

impl Container {
    /// Prepares a bundle with this seccomp profile and merges the listener into it.
    fn new(runtime: &'static str, profile: Value, no_new_privileges: bool) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let id = format!("kbp-test-{}-{number}", std::process::id());
        let dir = tempfile::tempdir().expect("tempdir");
        let bundle = dir.path().join("bundle");
        for inside in ["rootfs/proc", "rootfs/dev"] {
            fs::create_dir_all(bundle.join(inside)).expect("make the bundle");
        }
        let program = bundle.join("rootfs/helper");
        fs::write(&program, helper()).expect("write the helper");
        let mut permissions = fs::metadata(&program).expect("stat").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
        fs::set_permissions(&program, permissions).expect("chmod");
        fs::write(
            bundle.join("config.json"),
            config(&id, profile, no_new_privileges).to_string(),
        )
        .expect("write");

        let notifier = Notifier::start(&dir.path().join("state"), "test", &id, |event| {
            assert!(!matches!(event, Event::Refused(_)), "{event:?}");
        })
        .expect("start the notifier");
        notifier.admit(
            &id,
            Treatment {
                window: Some(WINDOW),
                epoll: true,
                bounded: false,
                prefer: Default::default(),
            },
        );
        let mut spec = Spec::read(&bundle).expect("read config.json");
        let calls = [&SOCKET_CALLS[..], &EPOLL_CALLS[..]].concat();
        let listener = Listener {
            path: notifier.socket(),
            metadata: notifier.metadata(),
            flags: &[],
            runtime_needs: &[],
        };
        let merged = seccomp::trap(spec.value_mut(), &calls, &listener).expect("merge");
        spec.write().expect("write config.json");
        Self {
            runtime,
            id,
            dir,
            notifier,
            merged,
            children: Vec::new(),
        }
    }

    fn command(&self) -> Command {
        let mut command = runtime(self.runtime);
        command.arg("--root").arg(self.dir.path().join("runtime"));
        command
    }

    fn run(&mut self) -> Process {
        let mut command = self.command();
        command
            .args(["run", "--bundle"])
            .arg(self.dir.path().join("bundle"));
        self.started(command, &[])
    }

    fn exec(&mut self, mode: &str) -> Process {
        let mut command = self.command();
        command.arg("exec");
        self.started(command, &["/helper", mode])
    }

    fn started(&mut self, mut command: Command, words: &[&str]) -> Process {
        let pid_file = self.dir.path().join(format!("pid-{}", self.children.len()));
        let mut child = command
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(&self.id)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run the OCI runtime");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        self.children.push(child);
        let mut told = BTreeMap::new();
        let mut ready = false;
        for line in output.lines() {
            let line = line.expect("read its output");
            if line == "ready" {
                ready = true;
                break;
            }
            let (name, rest) = line.split_once(' ').expect("name and number");
            told.insert(name.to_owned(), rest.to_owned());
        }
        assert!(ready, "{} ended early, having told {told:?}", self.runtime);
        Process {
            pid: read_pid(&pid_file),
            told,
        }
    }
}

/// crun refuses a machine whose cgroups are v1 but some of whose controllers are on v2's side of the hybrid layout. Where
/// it is so, it gets a mount namespace without that side.
fn runtime(name: &str) -> Command {
    let unified = "/sys/fs/cgroup/unified";
    let controllers =
        fs::read_to_string(format!("{unified}/cgroup.controllers")).unwrap_or_default();
    if name != "crun" || controllers.trim().is_empty() {
        return Command::new(name);
    }
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        "umount \"$0\" && exec \"$@\"",
        unified,
        name,
    ]);
    command
}

/// The runtimes write the file after they have let the process go.
fn read_pid(file: &Path) -> u32 {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Ok(pid) = text.trim().parse() {
            return pid;
        }
        assert!(Instant::now() < until, "no pid in {}", file.display());
        std::thread::yield_now();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        for child in &mut self.children {
            // The end of its input ends the helper.
            drop(child.stdin.take());
        }
        let deleted = self
            .command()
            .args(["delete", "--force", &self.id])
            .output()
            .expect("run the OCI runtime");
        for child in &mut self.children {
            child.wait().expect("wait for the OCI runtime");
        }
        // Already deleted by `run` when its process ended first.
        let message = String::from_utf8_lossy(&deleted.stderr);
        let fine = deleted.status.success()
            || message.contains("does not exist")
            || message.contains("No such file");
        assert!(fine || std::thread::panicking(), "{message}");
    }
}

impl Process {
    fn fd(&self, name: &str) -> std::os::fd::OwnedFd {
        let number = self.told.get(name).and_then(|n| n.parse().ok());
        let number = number.unwrap_or_else(|| panic!("no {name} in {:?}", self.told));
        PidFd::open(self.pid)
            .expect("open the process")
            .get_fd(number)
            .expect("its descriptor")
    }

    fn window(&self, name: &str) -> Micros {
        sockopt::busy_poll(self.fd(name).as_fd()).expect("SO_BUSY_POLL")
    }

    fn epoll_window(&self, name: &str) -> Micros {
        sockopt::epoll_params(self.fd(name).as_fd())
            .expect("EPIOCGPARAMS")
            .busy_poll
    }

    fn number(&self, name: &str) -> u64 {
        self.told
            .get(name)
            .and_then(|n| n.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.told))
    }

    /// Everything that `serve` makes has its window.
    fn assert_served(&self) {
        for name in ["udp", "listening", "connected"] {
            assert_eq!(self.window(name), WINDOW, "{name}");
        }
        assert_ne!(self.window("unix"), WINDOW);
        for name in ["epoll1", "epoll"] {
            if name == "epoll1" || cfg!(target_arch = "x86_64") {
                assert_eq!(self.epoll_window(name), WINDOW, "{name}");
            }
        }
    }
}

fn config(id: &str, profile: Value, no_new_privileges: bool) -> Value {
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 1000, "gid": 1000},
            "args": ["/helper", "serve"],
            "cwd": "/",
            "noNewPrivileges": no_new_privileges,
            "capabilities": {"bounding": [], "effective": [], "permitted": []},
        },
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "namespaces": namespaces,
            "seccomp": profile,
        },
    })
}

fn allow_list(names: &[&str]) -> Value {
    let architectures = if cfg!(target_arch = "x86_64") {
        ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    } else {
        ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    };
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures,
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    })
}

#[test]
fn without_a_profile_init_and_exec_get_their_windows() {
    for runtime in RUNTIMES {
        let mut container = Container::new(runtime, Value::Null, false);
        container.run().assert_served();
        let before = container.notifier.counters();
        assert_eq!(before.errors, 0, "{runtime}: {before:?}");
        container.exec("serve").assert_served();
        container.exec("serve").assert_served();
        let after = container.notifier.counters();
        assert!(
            after.sockets_set >= before.sockets_set + 6,
            "{runtime}: {before:?} {after:?}"
        );
        assert_eq!(after.errors, 0, "{runtime}: {after:?}");
    }
}

#[test]
fn with_an_allow_list_too_and_with_no_new_privileges() {
    for runtime in RUNTIMES {
        for no_new_privileges in [false, true] {
            let mut container = Container::new(runtime, allow_list(&NEEDED), no_new_privileges);
            assert_eq!(container.merged.trapped.len(), 5);
            container.run().assert_served();
            container.exec("serve").assert_served();
        }
    }
}

#[test]
fn what_the_profile_denies_stays_denied() {
    let without_connect: Vec<&str> = NEEDED
        .into_iter()
        .filter(|n| *n != "connect" && *n != "epoll_create")
        .collect();
    for runtime in RUNTIMES {
        let mut container = Container::new(runtime, allow_list(&without_connect), true);
        assert_eq!(container.merged.denied, ["connect", "epoll_create"]);
        let process = container.run();
        assert!(
            process.told["connected"].contains("not permitted"),
            "{:?}",
            process.told
        );
        if cfg!(target_arch = "x86_64") {
            assert!(
                process.told["epoll"].contains("not permitted"),
                "{:?}",
                process.told
            );
        }
        assert_eq!(process.window("udp"), WINDOW);
        assert_eq!(process.epoll_window("epoll1"), WINDOW);
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn calls_of_32_bit_programs_count_too() {
    for runtime in RUNTIMES {
        for profile in [Value::Null, allow_list(&NEEDED)] {
            let without_profile = profile.is_null();
            let mut container = Container::new(runtime, profile, false);
            container.run();
            let process = container.exec("compat");
            assert_eq!(process.window("bind32"), WINDOW, "{runtime}");
            assert_eq!(process.epoll_window("epoll32"), WINDOW, "{runtime}");
            // A plain permission of `socketcall` is stronger than a rule for one of its calls (libseccomp): such a
            // program's sockets are not set up. The call works in any case.
            let reached = process.window("socketcall32") == WINDOW;
            assert_eq!(reached, without_profile, "{runtime}");
        }
    }
}

#[test]
fn signals_during_the_call_neither_fail_it_nor_leak() {
    for runtime in RUNTIMES {
        let mut container = Container::new(runtime, Value::Null, false);
        container.run();
        let process = container.exec("signals");
        assert!(
            !process.told.contains_key("interrupted"),
            "{runtime}: {:?}",
            process.told
        );
        assert!(
            process.number("interruptions") >= 500,
            "{runtime}: {:?}",
            process.told
        );
        // Standard streams are 0 to 2; some runtimes leave nothing else open.
        assert!(process.number("next") < 10, "{runtime}: {:?}", process.told);
        assert_eq!(container.notifier.counters().errors, 0);
    }
}
