//! The server process: one for a pod, until containerd has deleted its last container.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc;
use kbp_kernel::process::{Capability, OpenFiles, drop_for_good, give_up};
use kbp_poller::config::Config;
use tokio::signal::unix::{SignalKind, signal};

use super::address;
use super::detached::Detached;
use super::flags::Flags;
use super::log;
use crate::pod;
use crate::task::TaskService;
use crate::task::container::Surroundings;
use crate::task::events::Publisher;
use crate::task::launcher::Launcher;
use crate::task::reaper::Reaper;

/// Threads that serve requests. Two, so that one that is briefly busy in the kernel does not keep the other calls waiting.
const WORKERS: usize = 2;

/// How long the last events may take to reach containerd.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

/// What the server does not need. What it keeps and one might not expect: an overlay that it mounts is worked on with the mounter's
/// capabilities, so those that a container uses on its files (owners, modes, device nodes, file capabilities) have to stay.
const NOT_NEEDED: [Capability; 21] = [
    Capability::SetPcap,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysPacct,
    Capability::SysBoot,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Of use for a moment, in a thread that mounts with mapped owners: out of force, but permitted.
const SELDOM_NEEDED: [Capability; 2] = [Capability::SetGid, Capability::SetUid];

/// OCI runtime where containerd's options name none. A config that cannot be read is reported when a container is created.
pub fn default_runtime() -> String {
    Config::load().map_or_else(|_| "runc".to_owned(), |config| config.runtime)
}

/// Serves until containerd asks for the shutdown.
pub fn serve(flags: &Flags) -> anyhow::Result<()> {
    let bundle =
        std::env::current_dir().context("find the working directory, which is the bundle")?;
    log::install(&bundle, flags.debug);
    let (listener, socket) = listener(flags, &bundle)?;
    // A page that is 2 MiB large costs what the whole server should need. Not vital.
    if let Err(error) = kbp_kernel::process::set_thp_disabled(true) {
        tracing::debug!("{error}");
    }
    // Before there are other threads than this one and the one that starts programs.
    let files = open_files();
    let launcher = launcher(files)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_keep_alive(Duration::from_secs(1))
        .enable_all()
        .build()
        .context("start the async runtime")?;
    // Once: the name may be the next shim's soon after.
    let socket = Arc::new(Mutex::new(socket));
    let remove_socket = move || {
        let mut socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = socket.take() {
            address::remove(&socket);
        }
    };
    let served = runtime.block_on(run(flags, listener, launcher, remove_socket.clone()));
    remove_socket();
    if let Err(error) = &served {
        tracing::error!("{}", super::chain(error));
    }
    // Whatever still runs (a copy to a fifo that nobody reads) must not keep the process.
    runtime.shutdown_background();
    served
}

/// Room for the descriptors of a pod with a great many processes, as Go's programs make it: each has streams and a listener here.
/// containerd's unit may leave 1024.
fn open_files() -> Option<OpenFiles> {
    OpenFiles::raise()
        .inspect_err(|error| tracing::warn!("{error}"))
        .ok()
}

/// Gives up the capabilities that the server does not need. The thread that starts programs has them out of force; all others lose them.
/// In the OCI runtime, which root executes, all of them are in force again.
fn launcher(files: Option<OpenFiles>) -> anyhow::Result<Launcher> {
    let start = || Launcher::start(files).context("start the thread that starts programs");
    match give_up(&[&NOT_NEEDED[..], &SELDOM_NEEDED].concat()) {
        Ok(true) => {}
        Ok(false) => {
            tracing::debug!("capabilities are kept: the OCI runtime would not get them back");
            return start();
        }
        Err(error) => tracing::warn!("{error}"),
    }
    let launcher = start()?;
    if let Err(error) = drop_for_good(&NOT_NEEDED) {
        tracing::warn!("{error}");
    }
    Ok(launcher)
}

/// The socket inherited from `start` as standard input, or the one named on the command line; with the path to remove.
fn listener(flags: &Flags, bundle: &Path) -> anyhow::Result<(UnixListener, Option<PathBuf>)> {
    if !flags.socket.is_empty() {
        let path = PathBuf::from(&flags.socket);
        let address::Socket::Bound(listener) = address::bind(&path)? else {
            anyhow::bail!("{} is in use by another process", path.display());
        };
        return Ok((listener, Some(path)));
    }
    let inherited: OwnedFd = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take the socket that start passed")?;
    // Nothing that is started later shall inherit it.
    let null = std::fs::File::open("/dev/null").context("open /dev/null")?;
    nix::unistd::dup2_stdin(&null).context("replace standard input")?;
    let listener = UnixListener::from(inherited);
    listener
        .local_addr()
        .context("standard input is no socket: use `start`, or give -socket")?;
    Ok((listener, address::of_bundle(bundle)))
}

async fn run(
    flags: &Flags,
    listener: UnixListener,
    launcher: Launcher,
    remove_socket: impl Fn() + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let reaper = Reaper::start(launcher)?;
    let events = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let (publisher, delivery) = Publisher::start(&flags.namespace, &events);
    let plain = TaskService::new(Surroundings {
        namespace: flags.namespace.clone(),
        default_runtime: default_runtime(),
        reaper,
        publisher: Arc::clone(&publisher),
    });
    let plain = Arc::new(plain.at_shutdown(remove_socket));
    let mut shutdown = plain.shutdown();
    let context = pod::Context {
        namespace: flags.namespace.clone(),
        pod_id: flags.id.clone(),
    };
    let service = Arc::new(Detached(pod::decorate(plain, context)));

    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener.try_into().context("serve on the socket")?)
        .register_service(services(service));
    server.start().await.context("start to serve")?;
    tracing::debug!("serving {}", flags.id);

    // A node's shutdown sends these to everybody; the containers' end is containerd's to decide.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        asked = shutdown.wait_for(|asked| *asked) => drop(asked),
        _ = terminate.recv() => tracing::info!("ended by SIGTERM"),
        _ = interrupt.recv() => tracing::info!("ended by SIGINT"),
    }
    publisher.close();
    if tokio::time::timeout(FLUSH_LIMIT, delivery).await.is_err() {
        tracing::warn!("the last events did not reach containerd within {FLUSH_LIMIT:?}");
    }
    let _ = server.shutdown().await;
    Ok(())
}

/// The Task service under the names of versions 2 and 3: their messages are the same.
fn services(
    service: Arc<dyn Task + Send + Sync>,
) -> std::collections::HashMap<String, ttrpc::r#async::Service> {
    let mut services = create_task(Arc::clone(&service));
    let old = create_task(service)
        .into_values()
        .map(|methods| ("containerd.task.v2.Task".to_owned(), methods));
    services.extend(old);
    services
}
