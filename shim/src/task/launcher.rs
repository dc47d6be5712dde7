//! The one thread that starts programs.
//!
//! Root's programs have all capabilities that the bounding set has from their exec on. The kernel forgets the signal of
//! [`kbp_kernel::process::end_with_parent`] when a program gains permitted ones like that, so that whoever starts the OCI runtime has
//! to keep them permitted. It is this thread alone, which takes nothing but commands; the threads that read what others send have
//! given them up ([`crate::bootstrap::server`]).

use std::io;
use std::process::Command;
use std::sync::mpsc;

/// The thread's name, as /proc shows it.
pub const NAME: &str = "launcher";

/// In bytes: it prepares a command and forks.
const STACK: usize = 256 << 10;

struct Order {
    command: Command,
    answer: mpsc::SyncSender<io::Result<u32>>,
}

/// Starts programs in a thread of its own, which ends when this is dropped.
#[derive(Debug)]
pub struct Launcher {
    orders: mpsc::Sender<Order>,
}

impl Launcher {
    /// Starts the thread, which has the capabilities of the calling one.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start() -> io::Result<Self> {
        let (orders, received) = mpsc::channel::<Order>();
        let work = move || {
            for Order {
                mut command,
                answer,
            } in received
            {
                let started = command.spawn().map(|child| child.id());
                // It holds the child's ends of pipes, whose other ends the caller is about to read.
                drop(command);
                // The caller waits for it.
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
    pub fn launch(&self, command: Command) -> io::Result<u32> {
        let gone = || io::Error::other("the thread that starts programs has ended");
        let (answer, started) = mpsc::sync_channel(1);
        let order = Order { command, answer };
        self.orders.send(order).map_err(|_| gone())?;
        started.recv().map_err(|_| gone())?
    }
}
