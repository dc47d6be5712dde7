//! `kbp-poller`: the node's daemon, and a tool that attaches a kernel worker to the veth of a namespace that no kbp shim manages,
//! in the foreground.

use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kbp_kernel::netns::Netns;
use kbp_poller::attach::{AttachRequest, Attachment, Outcome, Terms};
use kbp_poller::config::Config;
use kbp_poller::daemon::{self, Inherited};
use kbp_poller::engine::Engine;
use kbp_poller::error::one_line;
use kbp_poller::policy::{Layer, Policy, Profile, WorkerPolicy};
use kbp_poller::state::{Part, PodState};
use kbp_poller::window::Window;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Polls the veths of pods in the kernel.
///
/// Pods that run with io.containerd.kbp.v1 need none of this: their shims do it. `serve` does it for all pods of the node
/// together; `attach` is for a pod of another runtime.
#[derive(Debug, Parser)]
#[command(name = "kbp-poller", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes the veth of a namespace pollable and polls its host end until SIGINT or SIGTERM.
    ///
    /// Sets GRO on and TSO off at both ends, gives both a qdisc, starts a worker and keeps it awake while packets flow.
    /// At the end the offloads are set back to what they were; a qdisc that was added stays.
    ///
    /// The sockets of the pod are not touched: without a shim nobody can set SO_BUSY_POLL for them, so what is polled is
    /// the way from the pod to the host.
    Attach(AttachArgs),
    /// Serves the pods of this node until SIGINT or SIGTERM: shared workers, one thread for all, metrics.
    ///
    /// Shims find it by its socket in the state directory and hand their pods over; when it ends, they poll for themselves again.
    Serve(ServeArgs),
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Config file [default: $KBP_CONFIG, else /etc/kbp/config.toml].
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Serves the metrics on this loopback address, too: 127.0.0.1:9469, say. They are always on STATE-DIR/metrics.sock.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct AttachArgs {
    /// The namespace: /run/netns/NAME or /proc/PID/ns/net.
    #[arg(long, value_name = "PATH")]
    netns: PathBuf,
    /// The worker [default: what the config file says, else shared where the node has a CPU pool, else idle].
    #[arg(long, value_enum)]
    worker: Option<Worker>,
    /// The offloads [default: what the config file says, else latency].
    #[arg(long, value_enum)]
    profile: Option<ProfileChoice>,
    /// Name of the attachment in `kbpctl status` [default: netns-NAME, or netns-pid-PID].
    #[arg(long)]
    id: Option<String>,
    /// Config file [default: $KBP_CONFIG, else /etc/kbp/config.toml].
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Worker {
    /// As for a pod: a shared core of the node's CPU pool, and nothing where there is none.
    Auto,
    /// A core of the pool for this pod alone.
    Dedicated,
    /// A core of the pool together with other pods.
    Shared,
    /// Idle cycles of any CPU (SCHED_IDLE).
    Idle,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProfileChoice {
    /// TSO off: every packet passes the NAPI.
    Latency,
    /// TSO as it is: TCP is not polled, bulk transfers lose nothing.
    Throughput,
}

fn main() -> ExitCode {
    // First of all: what is opened later could take its number.
    let inherited = daemon::take_inherited().map_err(anyhow::Error::from);
    let cli = Cli::parse();
    let level = match cli.command {
        Command::Attach(_) => tracing::Level::WARN,
        Command::Serve(_) => tracing::Level::INFO,
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        // A log that nobody reads any more must not end the daemon.
        .log_internal_errors(false)
        .init();
    let outcome = match &cli.command {
        Command::Attach(args) => run(args),
        Command::Serve(args) => inherited.and_then(|inherited| serve(args, inherited)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kbp-poller: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &AttachArgs) -> Result<()> {
    // Before any thread is there, so that all of them inherit the mask and the signals come to the descriptor.
    let signals = block_signals()?;
    let config = config(args.config.as_deref())?;
    let asked = Layer {
        worker: args.worker.map(|w| match w {
            Worker::Auto => WorkerPolicy::Auto,
            Worker::Dedicated => WorkerPolicy::Dedicated,
            Worker::Shared => WorkerPolicy::Shared,
            Worker::Idle => WorkerPolicy::Idle,
        }),
        profile: args.profile.map(|p| match p {
            ProfileChoice::Latency => Profile::Latency,
            ProfileChoice::Throughput => Profile::Throughput,
        }),
        ..Layer::default()
    };
    // Nobody makes these sockets poll, so a worker is what there is to gain: without a pool one on idle cycles.
    let default = Layer {
        worker: Some(if config.cpus.is_empty() {
            WorkerPolicy::Idle
        } else {
            WorkerPolicy::Shared
        }),
        ..Layer::default()
    };
    let policy = Policy {
        // What is missing is told here, in the words of this tool.
        required: false,
        ..Policy::resolve(&[asked, config.policy, default])
    };
    if policy.worker == WorkerPolicy::None {
        bail!(
            "{} says worker = \"none\"; name another with --worker",
            config.path.display()
        );
    }
    let attachment = start(args, policy, config)?;
    let id = attachment.state().id;
    say(&describe(&attachment.state()))?;
    let end = wait(&signals, &attachment)?;
    attachment
        .detach_and_restore()
        .with_context(|| format!("{end}, but detaching {id} left something behind"))?;
    say(&format!("{end}: detached {id}\n"))
}

fn serve(args: &ServeArgs, inherited: Inherited) -> Result<()> {
    let signals = block_signals()?;
    let options = daemon::Options {
        config: config(args.config.as_deref())?,
        metrics: args.metrics,
        inherited,
    };
    Ok(daemon::serve(options, &signals)?)
}

fn config(path: Option<&Path>) -> Result<Config> {
    Ok(match path {
        Some(path) if !path.exists() => bail!("no config file {}", path.display()),
        Some(path) => Config::read(path)?,
        None => Config::load()?,
    })
}

fn start(args: &AttachArgs, policy: Policy, config: Config) -> Result<Attachment> {
    let place = args.netns.display();
    let netns = Netns::open(&args.netns)?;
    let request = AttachRequest {
        id: args.id.clone().unwrap_or_else(|| default_id(&args.netns)),
        namespace: "-".to_owned(),
        netns,
        policy,
        cpuset: None,
        window: Window {
            micros: None,
            reason: "attached by hand: the sockets of the pod are not touched".to_owned(),
        },
        degraded: Vec::new(),
        config,
    };
    let terms = Terms {
        path: Some(args.netns.clone()),
        keep_originals: true,
        ..Terms::default()
    };
    let outcome = Engine::start()?.attach(request, terms)?;
    let attachment = match outcome {
        Outcome::Attached(attachment) => attachment,
        Outcome::NoInterface => {
            bail!(
                "{place} has no interface but its loopback; attach after the CNI plugin has made one"
            )
        }
        Outcome::HostNetwork => {
            bail!("{place} is the host's own network namespace; kbp never touches that")
        }
    };
    let state = attachment.state();
    let reasons = |part| {
        let of_part = state.degraded.iter().filter(|d| d.part == part);
        of_part
            .map(|d| d.reason.clone())
            .collect::<Vec<_>>()
            .join("; ")
    };
    if state.interfaces.is_empty() {
        bail!(
            "{place} has no veth that can be polled: {}",
            reasons(Part::PollableVeth)
        );
    }
    if state.worker.is_none() {
        let why = match reasons(Part::Worker) {
            why if why.is_empty() => state.worker_reason.clone(),
            why => why,
        };
        bail!("no worker could be started for {place}: {why}");
    }
    Ok(attachment)
}

/// A name that tells people which namespace it is, and that can be the name of a file.
fn default_id(netns: &Path) -> String {
    let parts: Vec<_> = netns
        .iter()
        .filter_map(|p| p.to_str())
        .filter(|p| !matches!(*p, "/" | "ns" | "net"))
        .collect();
    match parts[..] {
        ["proc", pid] => format!("netns-pid-{pid}"),
        [.., name] => format!("netns-{name}"),
        [] => format!("netns-of-{}", std::process::id()),
    }
}

fn describe(state: &PodState) -> String {
    let mut lines = vec![format!("attached {}", state.id)];
    let id = |napi: Option<u32>| napi.map_or("none".to_owned(), |n| n.to_string());
    for interface in &state.interfaces {
        lines.push(format!(
            "  veth    {} (NAPI {}) - {} in the pod (NAPI {})",
            interface.host_interface,
            id(interface.host_napi),
            interface.pod_interface,
            id(interface.pod_napi),
        ));
    }
    if let Some(worker) = &state.worker {
        lines.push(format!(
            "  worker  {} thread {} on CPU {}, {}, sleeps {} ms after the last packet ({})",
            worker.kind,
            worker.tid,
            worker.cpu,
            worker.policy,
            worker.lease_ms,
            state.worker_reason,
        ));
    }
    for degraded in &state.degraded {
        lines.push(format!("  missing {}: {}", degraded.part, degraded.reason));
    }
    lines.push("running until SIGINT or SIGTERM".to_owned());
    lines.join("\n") + "\n"
}

fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("write to standard output")
}

fn block_signals() -> Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGTERM);
    mask.thread_block().context("block SIGINT and SIGTERM")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("make a descriptor for SIGINT and SIGTERM")
}

/// Waits for a signal or for the end of the pod, and says which it was.
fn wait(signals: &SignalFd, attachment: &Attachment) -> Result<String> {
    loop {
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(1000u16)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("wait for a signal"),
        }
        if let Some(info) = signals.read_signal().context("read a signal")? {
            let name = i32::try_from(info.ssi_signo)
                .ok()
                .and_then(|number| Signal::try_from(number).ok())
                .map_or("signal", Signal::as_str);
            return Ok(name.to_owned());
        }
        if attachment.has_vanished() {
            return Ok("the pod's network namespace is gone".to_owned());
        }
        if attachment.state().interfaces.is_empty() {
            return Ok("the pod's interfaces are gone".to_owned());
        }
    }
}
