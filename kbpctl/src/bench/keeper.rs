//! The keeper owns what a bench makes, in a process of its own: when its standard input ends, for whatever reason (the bench is over,
//! was interrupted, was killed with -9), it removes all of it.
//!
//! It also hands out names: the containerd namespace and the address range of a bench are its alone.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kbp_kernel::link::RouteSocket;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::cni::Network;
use super::ctr::Ctr;
use super::interrupt::Interrupt;

/// Below it everything that a bench writes; a tmpfs, so that nothing survives a reboot either.
const BASE: &str = "/run/kbp-bench";
/// RFC 2544 sets 198.18.0.0/15 aside for benchmarks; each bench takes a /24 of its first half.
const SLOTS: u8 = 255;

/// What the keeper has set aside.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// Name of the containerd namespace, and the parent of the cgroups.
    pub(crate) name: String,
    /// A private directory.
    pub(crate) dir: PathBuf,
    /// Third byte of the addresses 198.18.N.0/24.
    pub(crate) slot: u8,
}

/// An attachment that has to be undone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attachment {
    pub(crate) network: Network,
    pub(crate) container: String,
    pub(crate) netns: PathBuf,
}

/// The bench's side of it.
#[derive(Debug)]
pub(crate) struct Keeper {
    child: Child,
    stdin: Option<Arc<OwnedFd>>,
    kept: Kept,
}

impl Keeper {
    /// Starts one for a bench on the containerd that `ctr` speaks to.
    pub(crate) fn start(ctr: &Ctr) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let own = std::env::current_exe().context("find this program")?;
        let mut child = Command::new(own)
            .args(["bench-keeper", "--ctr"])
            .arg(&ctr.program)
            .arg("--address")
            .arg(&ctr.address)
            // A Ctrl-C must not reach it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the keeper")?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut line = String::new();
        if let Some(stdout) = stdout {
            BufReader::new(stdout)
                .read_line(&mut line)
                .context("read from the keeper")?;
        }
        let Ok(kept) = serde_json::from_str(&line) else {
            drop(stdin);
            let _ = child.wait();
            bail!("the set-up could not be reserved; the reason stands above");
        };
        let stdin = stdin.map(|pipe| Arc::new(OwnedFd::from(pipe)));
        Ok(Self { child, stdin, kept })
    }

    /// What is set aside.
    pub(crate) fn kept(&self) -> &Kept {
        &self.kept
    }

    /// What a program holds open that makes things: the clean-up begins when all of them have ended.
    pub(crate) fn hold(&self) -> Weak<OwnedFd> {
        self.stdin.as_ref().map_or_else(Weak::new, Arc::downgrade)
    }

    /// Tells of an attachment before it is made.
    pub(crate) fn note(&self, attachment: &Attachment) -> Result<()> {
        let mut line = serde_json::to_vec(attachment)?;
        line.push(b'\n');
        let stdin = self.stdin.as_ref().context("the keeper is gone")?;
        let mut pipe = File::from(stdin.try_clone().context("copy a descriptor")?);
        pipe.write_all(&line).context("tell the keeper")
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It bounds its own work.
        let _ = self.child.wait();
    }
}

/// The keeper itself.
pub(crate) fn run(program: PathBuf, address: PathBuf) -> Result<()> {
    // A signal ends the bench, whose end is what this process waits for.
    let _ignored = Interrupt::guard()?;
    let (kept, lock) = reserve()?;
    println!("{}", serde_json::to_string(&kept)?);
    let mut attachments: Vec<Attachment> = Vec::new();
    for line in std::io::stdin().lines() {
        // Half a line is of a bench that was killed while it wrote, and so had not yet made what the line is about.
        if let Ok(attachment) = serde_json::from_str(&line.context("read from the bench")?) {
            attachments.push(attachment);
        }
    }
    // An Interrupt that no signal raises: the clean-up is not to be interrupted.
    let calm = Interrupt::default();
    let ctr = Ctr {
        program,
        address,
        namespace: kept.name.clone(),
        interrupt: calm.clone(),
        held: Weak::new(),
    };
    let mut first = Ok(());
    let mut keep = |outcome: Result<()>| {
        if first.is_ok() {
            first = outcome;
        }
    };
    keep(ctr.remove_everything());
    for attachment in attachments.iter().rev() {
        keep(
            attachment
                .network
                .del(&attachment.container, &attachment.netns, &calm),
        );
    }
    remove_cgroups(&kept.name);
    remove_cgroups(&idle_group(&kept.name));
    keep(
        std::fs::remove_dir_all(&kept.dir)
            .with_context(|| format!("remove {}", kept.dir.display())),
    );
    // Removed while it is held: who opened it meanwhile notices, see `reserve`.
    let _ = std::fs::remove_file(lock_file(kept.slot));
    drop(lock);
    // The last one takes the directory along.
    let _ = std::fs::remove_dir(BASE);
    first
}

fn lock_file(slot: u8) -> PathBuf {
    Path::new(BASE).join(format!("slot-{slot}"))
}

/// A slot that no other bench has and whose addresses nobody routes.
fn reserve() -> Result<(Kept, Flock<File>)> {
    let routes = RouteSocket::open()?.routes()?;
    let taken = |slot: u8| {
        let address = std::net::IpAddr::from([198, 18, slot, 0]);
        routes.iter().any(|r| {
            r.destination.prefix_len() > 8 && r.destination.contains(&address)
                || r.destination
                    .to_string()
                    .starts_with(&format!("198.18.{slot}."))
        })
    };
    for slot in 0..SLOTS {
        if taken(slot) {
            continue;
        }
        let path = lock_file(slot);
        let lock = loop {
            make_private(Path::new(BASE))?;
            let file = match File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
            {
                // The last bench took the directory along just now.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                file => file.with_context(|| format!("open {}", path.display()))?,
            };
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
                break None;
            };
            // Its last owner may have removed it between our two calls.
            let same = path
                .metadata()
                .is_ok_and(|m| lock.metadata().is_ok_and(|l| l.ino() == m.ino()));
            if same {
                break Some(lock);
            }
        };
        if let Some(lock) = lock {
            let name = format!("kbp-bench-{:08x}", random()?);
            let dir = Path::new(BASE).join(&name);
            make_private(&dir)?;
            return Ok((Kept { name, dir, slot }, lock));
        }
    }
    bail!(
        "every address range of 198.18.0.0/16 is in use: another bench has each, or a route leads there"
    )
}

fn make_private(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("make directory {} (bench needs root)", dir.display()))
}

fn random() -> Result<u32> {
    use std::io::Read;
    let mut bytes = [0; 4];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(u32::from_ne_bytes(bytes))
}

/// Name of the cgroup of the arm `spinner`.
pub(super) fn idle_group(name: &str) -> String {
    format!("{name}-idle")
}

/// The empty directories that runc leaves above the containers' own.
fn remove_cgroups(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten();
    let until = Instant::now() + Duration::from_secs(5);
    for dir in std::iter::once(root.to_owned())
        .chain(hierarchies.map(|e| e.path()))
        .map(|d| d.join(name))
    {
        // Busy for as long as the last process takes to go.
        while dir.exists() && Instant::now() < until {
            let inside = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            for entry in inside.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
                let _ = std::fs::remove_dir(entry.path());
            }
            if std::fs::remove_dir(&dir).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
