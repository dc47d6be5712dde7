//! `kbpctl bench`: what kbp gains on this node, measured so that an expert would accept it.

mod app;
mod arm;
mod around;
mod cni;
mod command;
mod compare;
mod ctr;
mod html;
mod interrupt;
mod keeper;
mod machine;
mod pair;
mod progress;
mod result;
mod svg;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use kbp_kernel::CpuId;
use kbp_kernel::cpu::Topology;
use kbp_poller::config::Config;

use crate::load::Talk;
use app::App;
use arm::{Arm, Link};
use cni::Network;
use ctr::Ctr;
use interrupt::Interrupt;
pub(crate) use interrupt::Interrupted;
use keeper::Keeper;
use machine::{Machine, other_work};
use pair::{Job, Node};
use progress::Progress;
use result::{ArmResult, Asked, Bench, FORMAT};

/// Seconds that starting and removing a pair takes, for the first guess of the time left.
const AROUND: f64 = 1.5;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// Round trips: one client, one server, one request under way, or a fixed rate with --rate.
    Rtt(Rtt),
    /// Datagrams a second, one way.
    Pps(Common),
    /// One TCP stream as fast as it goes.
    Bulk(Common),
    /// Requests to a server of this machine, as it is.
    App(OfApp),
    /// Compares two result.json: of two kernels, two settings, before and after.
    Compare {
        /// The result.json of the first bench.
        a: PathBuf,
        /// The result.json of the second bench.
        b: PathBuf,
    },
}

/// Flags of `rtt`.
#[derive(Debug, Args)]
pub(crate) struct Rtt {
    /// Over one TCP connection instead of UDP.
    #[arg(long)]
    tcp: bool,
    /// Requests a second, sent when they are due whether or not answers came (open loop); latencies count from when each was due.
    #[arg(long, value_name = "N", value_parser = positive)]
    rate: Option<f64>,
    /// Asks sockperf the same in the same containers, and says how far the ratios agree.
    #[arg(long, conflicts_with_all = ["tcp", "rate"])]
    sockperf: bool,
    #[command(flatten)]
    common: Common,
}

/// Flags of `app`.
#[derive(Debug, Args)]
pub(crate) struct OfApp {
    /// The server; without it the first that is installed.
    server: Option<App>,
    /// Requests a second, sent when they are due whether or not answers came (open loop); latencies count from when each was due.
    #[arg(long, value_name = "N", value_parser = positive)]
    rate: Option<f64>,
    #[command(flatten)]
    common: Common,
}

/// Flags of every workload.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// At most a minute: 3 rounds of 1.5 s.
    #[arg(long, conflicts_with_all = ["rounds", "seconds", "warm_up"])]
    quick: bool,
    /// Rounds; each measures every arm once, in alternating order.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds of one measurement.
    #[arg(long, value_name = "SECONDS", default_value_t = 4.0, value_parser = positive)]
    seconds: f64,
    /// Seconds before each measurement whose figures are thrown away.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5, value_parser = positive)]
    warm_up: f64,
    /// What is compared: stock, veth, kbp, kbp-none, kbp-idle, kbp-shared, kbp-dedicated, kbp-no-window, spinner, spin-floor,
    /// loopback, or one of your own: NAME=RUNTIME or NAME=RUNTIME@CONFLIST.
    #[arg(long, value_name = "ARMS", value_delimiter = ',', default_values = ["stock", "kbp", "spinner"])]
    arms: Vec<Arm>,
    /// Bytes of a request.
    #[arg(long, value_name = "BYTES", default_value_t = 64, value_parser = clap::value_parser!(u32).range(16..=60000))]
    size: u32,
    /// A process that never sleeps on each CPU of the pair.
    #[arg(long)]
    hog: bool,
    /// Datagrams a second that a neighbour sends to the server's pod.
    #[arg(long, value_name = "N", value_parser = positive)]
    flood: Option<f64>,
    /// CPUs of client and server [default: the first, and the first of another core].
    #[arg(long, value_name = "CLIENT,SERVER", value_parser = cpus)]
    cpus: Option<(u32, u32)>,
    /// Directory for result.json, report.html, latency.svg and latency.png.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Prints the JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Socket of the node's containerd.
    #[arg(long, value_name = "SOCKET", env = "CONTAINERD_ADDRESS", default_value = crate::doctor::containerd::SOCKET)]
    address: PathBuf,
    /// containerd's client.
    #[arg(long, value_name = "PROGRAM", default_value = "ctr")]
    ctr: PathBuf,
    /// Runtime of the stock arms.
    #[arg(long, value_name = "RUNTIME", default_value = "io.containerd.runc.v2")]
    stock_runtime: String,
    /// Runtime of the kbp arms.
    #[arg(long, value_name = "RUNTIME", default_value = "io.containerd.kbp.v1")]
    kbp_runtime: String,
    /// Network of the stock arms [default: the reference plugin ptp with addresses of the bench's own].
    #[arg(long, value_name = "CONFLIST")]
    stock_cni: Option<PathBuf>,
    /// Network of the kbp arms [default: the plugin kbp with addresses of the bench's own].
    #[arg(long, value_name = "CONFLIST")]
    kbp_cni: Option<PathBuf>,
    /// Directory of CNI plugins; more than one is allowed [default: those of containerd's configuration].
    #[arg(long, value_name = "DIR")]
    cni_bin: Vec<PathBuf>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 && number <= 1e8 => Ok(number),
        _ => Err("a number above 0, at most 100000000".to_owned()),
    }
}

fn cpus(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once(',');
    let parts = parts.and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    parts.ok_or_else(|| "two CPU numbers, such as 2,3".to_owned())
}

/// The whole output.
pub(crate) fn run(what: What) -> Result<String> {
    match what {
        What::Compare { a, b } => compare::run(&a, &b),
        What::Rtt(rtt) => {
            let talk = if rtt.tcp {
                Talk::TcpEcho
            } else {
                Talk::UdpEcho
            };
            let job = job(&rtt.common, talk, None, rtt.rate, rtt.sockperf);
            measure("rtt", &rtt.common, &job)
        }
        What::Pps(common) => {
            let job = job(&common, Talk::UdpSink, None, None, false);
            measure("pps", &common, &job)
        }
        What::Bulk(common) => {
            let job = job(&common, Talk::TcpSink, None, None, false);
            measure("bulk", &common, &job)
        }
        What::App(of) => {
            let app = find_app(of.server)?;
            let job = job(&of.common, app.talk(), Some(app), of.rate, false);
            measure("app", &of.common, &job)
        }
    }
}

/// The keeper of another kbpctl.
pub(crate) fn keep(ctr: PathBuf, address: PathBuf) -> Result<()> {
    keeper::run(ctr, address)
}

fn job(common: &Common, talk: Talk, app: Option<App>, rate: Option<f64>, sockperf: bool) -> Job {
    let (seconds, warm_up) = match common.quick {
        true => (1.5, 0.4),
        false => (common.seconds, common.warm_up),
    };
    Job {
        talk,
        app,
        seconds,
        warm_up,
        rate,
        size: common.size as usize,
        hog: common.hog,
        flood: common.flood,
        sockperf,
    }
}

fn find_app(named: Option<App>) -> Result<App> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/usr/bin"].map(PathBuf::from));
    let there = |app: &App| crate::doctor::program::find(app.program(), &dirs).is_some();
    match named {
        Some(app) if there(&app) => Ok(app),
        Some(app) => bail!(
            "{} is not installed: no {} in PATH (Debian: apt-get install {})",
            app.name(),
            app.program(),
            app.package()
        ),
        None => App::ALL.into_iter().find(there).context(
            "none of redis-server, memcached and nginx is installed: install one, or measure with kbpctl bench rtt",
        ),
    }
}

fn describe(job: &Job) -> String {
    let how = match job.rate {
        Some(rate) => format!("open loop, {rate} requests a second"),
        None => "closed loop, one request under way".to_owned(),
    };
    let mut text = match (job.talk, job.app) {
        (_, Some(app)) => format!("{}, {how}", app.name()),
        (Talk::UdpSink, _) => format!(
            "UDP datagrams of {} bytes, one way, as many as go",
            job.size
        ),
        (Talk::TcpSink, _) => "one TCP stream as fast as it goes".to_owned(),
        (Talk::TcpEcho, _) => format!("TCP round trip of {} bytes, {how}", job.size),
        _ => format!("UDP round trip of {} bytes, {how}", job.size),
    };
    if job.hog {
        text += ", beside a process on each CPU that never sleeps";
    }
    if let Some(rate) = job.flood {
        text += &format!(", while a neighbour sends {rate} datagrams a second to the server's pod");
    }
    text
}

fn measure(workload: &str, common: &Common, job: &Job) -> Result<String> {
    refuse_what_cannot_be(common, job)?;
    let interrupt = Interrupt::guard()?;
    let rounds = if common.quick { 3 } else { common.rounds };
    let topology = Topology::read()?;
    let place = match common.cpus {
        Some((client, server)) => (CpuId(client), CpuId(server)),
        None => machine::place(&topology)?,
    };
    for cpu in [place.0, place.1] {
        if !topology.online.contains(cpu) {
            bail!("CPU {cpu} is not online; online are {}", topology.online);
        }
    }
    if let Some(out) = &common.out {
        std::fs::create_dir_all(out)
            .with_context(|| format!("create {} (--out names a directory)", out.display()))?;
    }
    let mut ctr = Ctr {
        program: common.ctr.clone(),
        address: common.address.clone(),
        namespace: String::new(),
        interrupt: interrupt.clone(),
        held: Weak::new(),
    };
    let containerd = ctr.version()?;
    let keeper = Keeper::start(&ctr)?;
    ctr.namespace.clone_from(&keeper.kept().name);
    ctr.held = keeper.hold();
    let mut machine = Machine::describe(&topology, containerd, place);
    machine.other_work = other_work(topology.online.len(), Duration::from_secs(1))?;
    if machine.other_work > machine::BUSY {
        eprintln!(
            "kbpctl: other work takes {:.0} % of the CPU time: figures will be noise",
            100.0 * machine.other_work
        );
    }
    let mut node = make_node(common, ctr, keeper, &interrupt, place)?;
    let started = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut arms: Vec<ArmResult> = common
        .arms
        .iter()
        .map(|a| ArmResult::new(&a.name, &a.what))
        .collect();
    let asked_twice = if job.sockperf {
        // Its own start and end included.
        job.seconds.floor().max(1.0) + 2.0
    } else {
        0.0
    };
    let each = Duration::from_secs_f64(job.seconds + job.warm_up + asked_twice + AROUND);
    let mut progress = Progress::new(arms.len() * rounds as usize, each);
    for round in 0..rounds {
        // Whoever comes first meets another machine than whoever comes last: so they take turns.
        let mut order: Vec<usize> = (0..arms.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        let others = other_work(topology.online.len(), Duration::from_millis(200))?;
        machine.other_work_max = machine.other_work_max.max(others);
        for n in order {
            let arm = &common.arms[n];
            progress.step(&format!("round {} of {rounds}, {}", round + 1, arm.name));
            let found = node
                .measure(arm, job)
                .with_context(|| format!("measure the arm {}", arm.name))?;
            arms[n].add(&found.measured, found.sockperf)?;
            for part in found.inactive {
                if !arms[n].inactive.contains(&part) {
                    arms[n].inactive.push(part);
                }
            }
            progress.done();
        }
    }
    drop(progress);
    // Takes everything down before anything is printed.
    drop(node);
    let bench = Bench {
        format: FORMAT,
        workload: workload.to_owned(),
        description: describe(job),
        started,
        machine,
        asked: Asked {
            rounds,
            seconds: job.seconds,
            warm_up: job.warm_up,
            rate: job.rate,
            size: job.size,
            hog: job.hog,
            flood: job.flood,
        },
        arms,
    };
    let mut text = match common.json {
        true => serde_json::to_string_pretty(&bench)? + "\n",
        false => table::render(&bench),
    };
    if let Some(out) = &common.out {
        for file in write(out, &bench)? {
            if !common.json {
                text += &format!("{}\n", out.join(file).display());
            }
        }
    }
    Ok(text)
}

/// What no measurement could come of is refused before anything is made.
fn refuse_what_cannot_be(common: &Common, job: &Job) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("bench makes containers and network namespaces: run it as root");
    }
    if let Some(rate) = job.rate
        && rate * job.seconds < 1.0
    {
        bail!(
            "no request is due in {} s at {rate} a second: a higher --rate or more --seconds",
            job.seconds
        );
    }
    let mut names = std::collections::BTreeSet::new();
    for arm in &common.arms {
        if !names.insert(&arm.name) {
            bail!("the arm {} is named twice", arm.name);
        }
        let own_programs_only = arm.spin || arm.link == Link::Loopback;
        if own_programs_only && (job.app.is_some() || job.sockperf || job.flood.is_some()) {
            bail!(
                "the arm {} is of kbpctl's own client and server: it goes with rtt, without --sockperf and --flood",
                arm.name
            );
        }
        if arm.spin && !matches!(job.talk, Talk::UdpEcho | Talk::TcpEcho) {
            bail!(
                "the arm {} is about waiting for answers: it goes with rtt",
                arm.name
            );
        }
        if arm.spin && job.rate.is_some() {
            bail!("the arm {} has no open loop: leave --rate out", arm.name);
        }
    }
    Ok(())
}

fn make_node(
    common: &Common,
    ctr: Ctr,
    keeper: Keeper,
    interrupt: &Interrupt,
    place: (CpuId, CpuId),
) -> Result<Node> {
    let mut path = common.cni_bin.clone();
    if path.is_empty() {
        path = crate::doctor::containerd::look(&common.address).cni_bin;
    }
    let kept = keeper.kept().clone();
    let network = |file: &Option<PathBuf>, kind: &str| match file {
        Some(file) => Network::read(file, &path),
        None => {
            // One range for both: an arm's pods are gone before the next arm's come.
            let name = format!("{}-{kind}", kept.name);
            Ok(Network::own(kind, &name, kept.slot, &kept.dir, &path))
        }
    };
    let networks = (
        network(&common.stock_cni, "ptp")?,
        network(&common.kbp_cni, "kbp")?,
    );
    for arm in &common.arms {
        match &arm.link {
            Link::Stock => networks.0.check()?,
            Link::Kbp => networks.1.check()?,
            Link::File(file) => Network::read(file, &path)?.check()?,
            Link::Loopback => {}
        }
    }
    let runtimes = (common.stock_runtime.clone(), common.kbp_runtime.clone());
    let state_dir = Config::load()?.state_dir;
    Node::new(
        ctr,
        keeper,
        interrupt.clone(),
        runtimes,
        networks,
        path,
        state_dir,
        place,
    )
}

/// Writes every file and returns their names.
fn write(out: &Path, bench: &Bench) -> Result<Vec<&'static str>> {
    let put = |name: &str, text: &[u8]| {
        let path = out.join(name);
        std::fs::File::create(&path)
            .and_then(|mut f| f.write_all(text))
            .with_context(|| format!("write {}", path.display()))
    };
    put(
        "result.json",
        (serde_json::to_string(bench)? + "\n").as_bytes(),
    )?;
    put("report.html", html::render(bench).as_bytes())?;
    let mut files = vec!["result.json", "report.html"];
    let panels = svg::panels(bench);
    if !panels.is_empty() {
        match kbp_plot::write(out, &bench.description, &panels) {
            Ok(()) => files.extend(["latency.svg", "latency.png"]),
            // The report has the same curves, drawn without a font.
            Err(error) => eprintln!("kbpctl: no latency.svg and latency.png: {error:#}"),
        }
    }
    Ok(files)
}
