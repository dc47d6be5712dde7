//! A private containerd inside a sandbox, in the version that a test wants.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::binaries::{bin_dir, program, target_dir};
use crate::command::{self, Output, Running, wait_until};
use crate::error::IoContext;
use crate::run::Run;
use crate::{Error, Result, Sandbox, not_tested};

/// Socket inside the sandbox: containerd's own default.
const ADDRESS: &str = "/run/containerd/containerd.sock";
/// Longest that one call of `ctr` may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// The one in PATH (Debian 12: 1.6, Task v2).
    Machine,
    /// 1.7 from Debian 13, unpacked by `tests/scripts/fetch-containerd trixie`.
    V1_7,
    /// 2.x from the suite after that, unpacked by `tests/scripts/fetch-containerd forky` (Task v3).
    V2,
}

impl Generation {
    /// Whether this machine lacks it; then it is said that it was not tested.
    pub fn is_wanting(self) -> bool {
        let found = self.bin_dir();
        if let Err(error) = &found {
            not_tested(&format!("what runs on another containerd: {error}"));
        }
        found.is_err()
    }

    /// Directory of its `containerd`, `ctr` and stock shim; None: they are in PATH.
    fn bin_dir(self) -> Result<Option<PathBuf>> {
        let suite = match self {
            Self::Machine => {
                program("containerd", "containerd")?;
                return Ok(None);
            }
            Self::V1_7 => "trixie",
            Self::V2 => "forky",
        };
        let dir = std::env::var_os("KBP_CONTAINERD_DIR")
            .map(PathBuf::from)
            .or_else(target_dir)
            .unwrap_or_default();
        let bin = dir.join(format!("containerd-{suite}")).join("bin");
        if bin.join("containerd").is_file() {
            return Ok(Some(bin));
        }
        Err(Error::Missing {
            what: bin.join("containerd").display().to_string(),
            remedy: format!("run tests/scripts/fetch-containerd {suite}"),
        })
    }
}

/// What a containerd is started with besides its version.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Whether its CRI plugin runs.
    pub cri: bool,
    /// Whether its config file has format version 3, which 2.x knows, instead of 2, which all know.
    pub version_3: bool,
    /// More config files that it reads.
    pub imports: Vec<PathBuf>,
    /// More lines of its config file.
    pub config: String,
    /// Text of kbp's config file; its path is in KBP_CONFIG. Empty: an empty file, so that the machine's own is not read.
    pub kbp_config: String,
    /// More environment of containerd, and so of its shims.
    pub environment: Vec<(String, String)>,
    /// Whether kbp's binaries are found only where they are installed: the directory of the build is not in PATH then.
    pub installed: bool,
    /// Program and arguments put before containerd's own command line.
    pub wrapper: Vec<String>,
    /// Debug messages in the log.
    pub debug: bool,
}

/// A running containerd. Dropping it stops it; its containers are the test's, else the sandbox's, to end.
#[derive(Debug)]
pub struct Containerd<'s> {
    sandbox: &'s Sandbox,
    bin_dir: Option<PathBuf>,
    path: String,
    settings: Settings,
    child: Mutex<Option<Child>>,
}

impl<'s> Containerd<'s> {
    /// Starts one with default settings and waits until it answers.
    pub fn start(sandbox: &'s Sandbox, generation: Generation) -> Result<Self> {
        Self::start_with(sandbox, generation, Settings::default())
    }

    /// Starts one and waits until it answers. A sandbox has room for one at a time.
    pub fn start_with(
        sandbox: &'s Sandbox,
        generation: Generation,
        settings: Settings,
    ) -> Result<Self> {
        let generation_dir = generation.bin_dir()?;
        // kbp's shim and the generation's own binaries come first; runc and crun are always the machine's.
        let mut path: Vec<String> = Vec::new();
        if let (false, Ok(dir)) = (settings.installed, bin_dir()) {
            path.push(dir.display().to_string());
        }
        path.extend(generation_dir.iter().map(|d| d.display().to_string()));
        path.push(std::env::var("PATH").unwrap_or_default());
        path.push("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        let containerd = Self {
            sandbox,
            bin_dir: generation_dir,
            path: path.join(":"),
            settings,
            child: Mutex::new(None),
        };
        containerd.write_config()?;
        containerd.launch()?;
        Ok(containerd)
    }

    fn write_config(&self) -> Result<()> {
        let dir = self.sandbox.dir();
        // Plugins that a test does not use and that would touch the machine: devices, /opt, /etc/cni.
        let mut disabled = vec![
            "io.containerd.snapshotter.v1.aufs",
            "io.containerd.snapshotter.v1.btrfs",
            "io.containerd.snapshotter.v1.devmapper",
            "io.containerd.snapshotter.v1.zfs",
            "io.containerd.snapshotter.v1.blockfile",
            "io.containerd.snapshotter.v1.erofs",
            "io.containerd.internal.v1.opt",
            "io.containerd.internal.v1.tracing",
            "io.containerd.tracing.processor.v1.otlp",
            "io.containerd.nri.v1.nri",
        ];
        if !self.settings.cri {
            disabled.extend([
                "io.containerd.grpc.v1.cri",
                "io.containerd.cri.v1.images",
                "io.containerd.cri.v1.runtime",
            ]);
        }
        let disabled = disabled
            .iter()
            .map(|p| format!("{p:?}"))
            .collect::<Vec<_>>()
            .join(", ");
        let version = if self.settings.version_3 { 3 } else { 2 };
        let text = format!(
            "version = {version}\nimports = {:?}\nroot = {:?}\nstate = \"/run/containerd\"\ndisabled_plugins = [{disabled}]\n[grpc]\naddress = {ADDRESS:?}\n{}\n",
            self.settings.imports,
            dir.join("root"),
            self.settings.config
        );
        let path = dir.join("containerd.toml");
        std::fs::write(&path, text).context(|| format!("write {}", path.display()))?;
        self.set_kbp_config(&self.settings.kbp_config)
    }

    /// Replaces kbp's config file; shims that start from now on read it.
    pub fn set_kbp_config(&self, text: &str) -> Result<()> {
        let path = self.sandbox.dir().join("kbp.toml");
        std::fs::write(&path, text).context(|| format!("write {}", path.display()))
    }

    fn launch(&self) -> Result<()> {
        let dir = self.sandbox.dir();
        let log_path = self.log_path();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .context(|| format!("open {}", log_path.display()))?;
        let log2 = log
            .try_clone()
            .context(|| format!("clone {}", log_path.display()))?;
        let binary = self.binary("containerd");
        let mut command = match self.settings.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = self.command(program);
                command.args(arguments).arg(binary);
                command
            }
            None => self.command(binary),
        };
        command.arg("--config").arg(dir.join("containerd.toml"));
        if self.settings.debug {
            command.args(["--log-level", "debug"]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log2)
            .spawn()
            .context(|| "start containerd".to_owned())?;
        let socket = self.sandbox.inside(ADDRESS);
        let answers = wait_until("containerd's answer", LIMIT, || {
            // One that ended will not answer any more.
            if let Ok(Some(status)) = child.try_wait() {
                return Ok(Err(Error::Command {
                    command: "containerd".to_owned(),
                    reason: format!("it ended with {status}\n{}", self.log_tail(30)),
                }));
            }
            std::os::unix::net::UnixStream::connect(&socket)
                .map(|_| Ok(()))
                .map_err(|e| e.to_string())
        });
        if let Err(error) = answers.and_then(|answer| answer) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        *self
            .child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(child);
        self.ctr(["version"])?.success()?;
        Ok(())
    }

    /// The sandbox it runs in.
    pub fn sandbox(&self) -> &'s Sandbox {
        self.sandbox
    }

    /// PATH of containerd, its shims and `ctr`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What containerd and its shims logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.sandbox.dir().join("containerd.log")
    }

    fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log
            .lines()
            .filter(|l| {
                !l.contains("loading plugin") && !l.contains("level=info msg=\"skip loading")
            })
            .collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn binary(&self, name: &str) -> PathBuf {
        self.bin_dir
            .as_ref()
            .map_or_else(|| PathBuf::from(name), |dir| dir.join(name))
    }

    /// A command in the sandbox with this containerd's environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.sandbox.command(program);
        command
            .env("PATH", &self.path)
            .env("KBP_CONFIG", self.sandbox.dir().join("kbp.toml"))
            .env("CONTAINERD_ADDRESS", ADDRESS)
            .env("CONTAINERD_NAMESPACE", self.sandbox.name())
            .envs(self.settings.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// `ctr` with these arguments, ready to be started.
    pub fn ctr_command<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = self.command(self.binary("ctr"));
        command.args(arguments);
        command
    }

    /// Runs `ctr` to its end.
    pub fn ctr<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        command::run(self.ctr_command(arguments), LIMIT)
    }

    /// Runs `ctr` to its end with text on its standard input.
    pub fn ctr_with_input<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
        input: &[u8],
    ) -> Result<Output> {
        command::run_with_input(self.ctr_command(arguments), input, LIMIT)
    }

    /// Starts `ctr` and lets it run beside the test, its standard input a pipe.
    pub fn ctr_start<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Running> {
        let mut command = self.ctr_command(arguments);
        command.stdin(Stdio::piped());
        Running::start(command)
    }

    /// `ctr run`: to the end of the container, or, when detached, to its start.
    pub fn run(&self, run: &Run) -> Result<Output> {
        self.ctr(run.arguments())
    }

    /// Runs a detached container and expects that it started.
    pub fn start_container(&self, run: Run) -> Result<()> {
        self.run(&run.detached())?.success().map(drop)
    }

    /// Executes a command in a running container to its end.
    pub fn exec<S: AsRef<str>>(
        &self,
        container: &str,
        command: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let id = format!(
            "e{}",
            COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
        );
        let mut arguments: Vec<String> = ["tasks", "exec", "--exec-id", &id, container]
            .map(str::to_owned)
            .to_vec();
        arguments.extend(command.into_iter().map(|c| c.as_ref().to_owned()));
        self.ctr(arguments)
    }

    /// What `ctr tasks …` prints.
    ///
    /// # Errors
    /// When it does not succeed.
    pub fn tasks<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let mut words = vec!["tasks".to_owned()];
        words.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        Ok(self.ctr(words)?.success()?.stdout)
    }

    /// State of a container's task as `ctr tasks ls` says it (`RUNNING`, `STOPPED`, `PAUSED`…) and its process id; None: no task.
    pub fn task(&self, container: &str) -> Result<Option<(String, u32)>> {
        let list = self.tasks(["ls"])?;
        Ok(list.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next()? == container).then_some(())?;
            let pid = words.next()?.parse().ok()?;
            Some((words.next()?.to_owned(), pid))
        }))
    }

    /// Process id of a running container's init.
    pub fn pid(&self, container: &str) -> Result<u32> {
        let task = self.task(container)?;
        task.map(|(_, pid)| pid).ok_or_else(|| Error::Command {
            command: format!("look for {container}"),
            reason: "it has no task".to_owned(),
        })
    }

    /// Waits until a container's task has that state.
    pub fn wait_for_state(&self, container: &str, state: &str) -> Result<()> {
        wait_until(
            &format!("state {state} of {container}"),
            LIMIT,
            || match self.task(container) {
                Ok(Some((now, _))) if now == state => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )
    }

    /// Ends a container's task, whatever its state, and removes the container. Nothing to do is fine.
    pub fn remove(&self, container: &str) -> Result<()> {
        if self.task(container)?.is_some() {
            self.ctr(["tasks", "delete", "--force", container])?
                .success()?;
        }
        let list = self.ctr(["containers", "ls", "--quiet"])?.success()?.stdout;
        if list.lines().any(|l| l == container) {
            self.ctr(["containers", "delete", container])?.success()?;
        }
        Ok(())
    }

    /// Imports an archive made by [`crate::Rootfs::archive`].
    pub fn import(&self, archive: &Path) -> Result<()> {
        let archive = archive.display().to_string();
        self.ctr(["images", "import", &archive])?
            .success()
            .map(drop)
    }

    /// Process id of the shim that runs a container.
    pub fn shim_pid(&self, container: &str) -> Result<u32> {
        let mut pid = self.pid(container)?;
        // The shim is the parent of init; in a pod's second container too.
        let status_path = format!("/proc/{pid}/status");
        let status =
            std::fs::read_to_string(&status_path).context(|| format!("read {status_path}"))?;
        if let Some(parent) = status
            .lines()
            .find_map(|l| l.strip_prefix("PPid:"))
            .and_then(|p| p.trim().parse().ok())
        {
            pid = parent;
        }
        Ok(pid)
    }

    /// Stops containerd in the orderly way; its containers go on.
    pub fn stop(&self) {
        let Some(mut child) = self
            .child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take()
        else {
            return;
        };
        // Only fails when it is gone already.
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
        let ended = wait_until("end of containerd", Duration::from_secs(10), || match child
            .try_wait()
        {
            Ok(None) => Err(String::new()),
            _ => Ok(()),
        });
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Kills containerd, as a crash does; its containers go on.
    pub fn kill(&self) {
        if let Some(mut child) = self
            .child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again after [`Containerd::stop`], with the same root and state.
    pub fn restart(&self) -> Result<()> {
        self.stop();
        self.launch()
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of containerd's log\n{}", self.log_tail(60));
        }
        self.stop();
    }
}
