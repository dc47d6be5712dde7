//! A private node: a directory, a network namespace and a mount namespace with a `/run` of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kbp_kernel::netns::Netns;

use crate::binaries::program;
use crate::command::{self, Output, wait_until};
use crate::error::IoContext;
use crate::{Error, Result};

/// The script that owns a sandbox; see its own words.
const KEEPER: &str = include_str!("keeper.sh");

/// A private node. Everything that runs in it, its mounts, links and its directory end when this is dropped, when [`Sandbox::cleanup`]
/// is called, and also when the process ends without doing either.
#[derive(Debug)]
pub struct Sandbox {
    name: String,
    dir: PathBuf,
    /// The shell inside the namespaces.
    inside: u32,
    keeper: Mutex<Option<(Child, ChildStdin)>>,
}

impl Sandbox {
    /// Makes one below `/tmp`. Needs root.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::Missing {
                what: "root".to_owned(),
                remedy: "namespaces, cgroups and containerd need it: run as root".to_owned(),
            });
        }
        // Short, because a unix socket's path has 108 bytes and containerd appends to it.
        let name = format!(
            "kbp-t-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = Path::new("/tmp").join(&name);
        let run = dir.join("run");
        // A killed process of the same id may have left one: its keeper is removing it.
        if dir.exists() {
            std::fs::remove_dir_all(&dir).context(|| format!("remove old {}", dir.display()))?;
        }
        std::fs::create_dir_all(&run).context(|| format!("create {}", run.display()))?;
        let mut keeper = Command::new("/bin/sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(&dir)
            .arg(&name)
            .env("KEEPER", KEEPER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context(|| "start /bin/sh".to_owned())?;
        let (Some(stdin), Some(stdout)) = (keeper.stdin.take(), keeper.stdout.take()) else {
            unreachable!("both are piped");
        };
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .context(|| "read from the keeper".to_owned())?;
        let Some(inside) = line
            .trim()
            .strip_prefix("ready ")
            .and_then(|pid| pid.parse().ok())
        else {
            let _ = keeper.wait();
            return Err(Error::Command {
                command: "set up a private network and mount namespace".to_owned(),
                reason: "it failed: see the lines above (needs util-linux and iproute2)".to_owned(),
            });
        };
        Ok(Self {
            name,
            dir,
            inside,
            keeper: Mutex::new(Some((keeper, stdin))),
        })
    }

    /// Unique on this machine; used as containerd's namespace and with it as the parent of the containers' cgroups.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The sandbox's directory, the same inside and outside. Its `run` is `/run` inside.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A process inside whose namespaces are the sandbox's.
    pub fn pid(&self) -> u32 {
        self.inside
    }

    /// `path` as it is inside, mounts included, for a reader outside.
    pub fn inside(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        Path::new(&format!("/proc/{}/root", self.inside))
            .join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The network namespace of the node: where the host ends of veths are.
    pub fn netns(&self) -> Result<Netns> {
        Ok(Netns::of_process(self.inside)?)
    }

    /// A command that will run inside. It gets a process group of its own, so that a Ctrl-C reaches only the test.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new("nsenter");
        command
            .arg("--target")
            .arg(self.inside.to_string())
            .args(["--net", "--mount", "--"])
            .arg(program)
            .process_group(0);
        command
    }

    /// Runs a program inside and expects it to succeed within 20 s.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command(program);
        command.args(arguments);
        command::run(command, Duration::from_secs(20))?.success()
    }

    /// Makes a directory of the machine the sandbox's own: inside, everything in it is still there, and what is changed is changed
    /// inside only. Returns the directory, seen from outside, that holds the changes.
    pub fn overlay(&self, path: &str) -> Result<PathBuf> {
        let dir = self
            .dir
            .join("overlay")
            .join(path.trim_matches('/').replace('/', "-"));
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        for sub in [&upper, &work] {
            std::fs::create_dir_all(sub).context(|| format!("create {}", sub.display()))?;
        }
        let options = format!(
            "lowerdir={path},upperdir={},workdir={}",
            upper.display(),
            work.display()
        );
        self.run("mount", &["-t", "overlay", "overlay", "-o", &options, path])?;
        Ok(upper)
    }

    /// Runs `ip` inside (Debian's iproute2).
    pub fn ip(&self, arguments: &str) -> Result<String> {
        program("ip", "iproute2")?;
        Ok(self
            .run("ip", &arguments.split_whitespace().collect::<Vec<_>>())?
            .stdout)
    }

    /// Ends everything in the sandbox and removes it, and returns when that is done. For a signal handler's thread; dropping does the same.
    pub fn cleanup(&self) {
        let keeper = self
            .keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((mut keeper, stdin)) = keeper else {
            return;
        };
        drop(stdin);
        let waited = wait_until(
            "end of the sandbox",
            Duration::from_secs(30),
            || match keeper.try_wait() {
                Ok(None) => Err(String::new()),
                _ => Ok(()),
            },
        );
        if let Err(error) = waited {
            eprintln!("{}: {error}", self.name);
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.cleanup();
    }
}
