//! The one thread that starts programs.
//!
//! Root's programs have all capabilities that the bounding set has from their exec on. The kernel forgets the signal of
//! [`kbp_kernel::process::end_with_parent`] when a program gains permitted ones like that, so that whoever starts the OCI runtime has
//! to keep them permitted. It is this thread alone, which takes nothing but commands; the threads that read what others send have
//! given them up ([`crate::bootstrap::server`]).
//!
//! A start may take as long as it likes, e.g. when the program lies on a file system that does not answer: only further starts wait for
//! it, since callers wait without a thread and hold no lock.

use std::io;
use std::process::{Child, Command};
use std::sync::mpsc;

use kbp_kernel::process::{OpenFiles, set_thp_disabled, thp_disabled};
use tokio::sync::oneshot;

/// The thread's name, as /proc shows it.
pub const NAME: &str = "launcher";

/// In bytes: it prepares a command and forks.
const STACK: usize = 256 << 10;

struct Order {
    command: Command,
    answer: oneshot::Sender<io::Result<u32>>,
}

/// Starts programs in a thread of its own, which ends when this is dropped.
#[derive(Debug)]
pub struct Launcher {
    orders: mpsc::Sender<Order>,
}

impl Launcher {
    /// Starts the thread, which has the capabilities of the calling one. Programs begin with the limit of `files`, where there is one.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(files: Option<OpenFiles>) -> io::Result<Self> {
        let (orders, received) = mpsc::channel::<Order>();
        let work = move || {
            for Order {
                mut command,
                answer,
            } in received
            {
                if let Some(files) = files {
                    files.restore_in(&mut command);
                }
                let started = spawn(&mut command).map(|child| child.id());
                // It holds the child's ends of pipes, whose other ends the caller is about to read.
                drop(command);
                // The caller may have given up.
                let _ = answer.send(started);
            }
        };
        std::thread::Builder::new()
            .name(NAME.to_owned())
            .stack_size(STACK)
            .spawn(work)?;
        Ok(Self { orders })
    }

    /// Starts a program and returns its process id; it has exec'd by then. Waiting for it is the caller's.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub async fn launch(&self, command: Command) -> io::Result<u32> {
        let gone = || io::Error::other("the thread that starts programs has ended");
        let (answer, started) = oneshot::channel();
        let order = Order { command, answer };
        self.orders.send(order).map_err(|_| gone())?;
        started.await.map_err(|_| gone())?
    }
}

/// Starts a program with transparent huge pages, which the shim switches off for itself: the setting belongs to the address space and
/// is inherited at exec, so it is switched for the moment of the spawn. std waits for the child's exec.
fn spawn(command: &mut Command) -> io::Result<Child> {
    let thp_off = thp_disabled().unwrap_or(false);
    if thp_off {
        let _ = set_thp_disabled(false);
    }
    let spawned = command.spawn();
    if thp_off {
        let _ = set_thp_disabled(true);
    }
    spawned
}
