//! `kbpctl status`: the state files, readable, with the counters behind them.

mod sample;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kbp_poller::config::Config;
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::state::{self, PodState, Stale, WorkerState};
use kbp_poller::uplink::{self, UplinkState};
use serde::Serialize;

use crate::text;
use sample::{Counters, Previous, Rates, Sampler};

/// Between the two readings that tell how much of the time a worker is parked: some of its leases, and no wait that is noticed.
const APART: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Status {
    pods: Vec<PodState>,
    uplinks: Vec<UplinkState>,
    stale: Vec<Stale>,
}

/// A pod as `--json` has it: its state, and the counters and rates beside it.
#[derive(Debug, Serialize)]
struct WrittenPod<'a> {
    #[serde(flatten)]
    state: &'a PodState,
    counters: Counters,
    /// None where one reading was all: no pod has a worker, and nobody watches.
    #[serde(skip_serializing_if = "Option::is_none")]
    rates: Option<Rates>,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Written<'a> {
    pods: Vec<WrittenPod<'a>>,
    uplinks: &'a [UplinkState],
    stale: &'a [Stale],
}

impl<'a> Written<'a> {
    fn of(status: &'a Status, counters: &[Counters], rates: Option<&[Rates]>) -> Self {
        let pods = status.pods.iter().zip(counters).enumerate();
        Self {
            pods: pods
                .map(|(n, (state, counters))| WrittenPod {
                    state,
                    counters: *counters,
                    rates: rates.and_then(|r| r.get(n)).copied(),
                })
                .collect(),
            uplinks: &status.uplinks,
            stale: &status.stale,
        }
    }
}

impl Status {
    fn read(dir: &Path) -> Result<Self> {
        let read = || {
            anyhow::Ok(Self {
                pods: state::read_all(dir)?,
                uplinks: uplink::read_all(dir)?,
                stale: state::stale(dir)?,
            })
        };
        if dir.exists() && !dir.is_dir() {
            bail!(
                "{} is no directory: --state-dir names the `state-dir` of the config file",
                dir.display()
            );
        }
        if nix::unistd::geteuid().is_root() {
            return read();
        }
        read().context("the state is for root only: run as root")
    }
}

/// What to show and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) json: bool,
    pub(crate) verbose: bool,
    /// Live, with this pause between two readings.
    pub(crate) watch: Option<Duration>,
}

/// The whole output; empty when it was shown live.
pub(crate) fn run(state_dir: Option<&Path>, options: Options) -> Result<String> {
    let dir: PathBuf = match state_dir {
        Some(dir) => dir.to_owned(),
        None => {
            Config::load()
                .context("the node's config says where the state is, unless --state-dir does")?
                .state_dir
        }
    };
    if let Some(interval) = options.watch {
        watch::run(&dir, interval, options.json)?;
        return Ok(String::new());
    }
    let status = Status::read(&dir)?;
    let (counters, rates) = readings(&status.pods);
    if options.json {
        let written = Written::of(&status, &counters, rates.as_deref());
        return Ok(serde_json::to_string_pretty(&written)? + "\n");
    }
    let seen = Seen {
        counters: &counters,
        rates: rates.as_deref().unwrap_or_default(),
    };
    Ok(render(&status, seen, &dir, options.verbose))
}

/// The counters, and the rates where a worker's thread can be looked at twice.
fn readings(pods: &[PodState]) -> (Vec<Counters>, Option<Vec<Rates>>) {
    let (mut sampler, mut previous) = (Sampler::default(), Previous::default());
    let counters = sampler.read(pods);
    previous.rates(pods, &counters);
    if counters.iter().all(|c| c.worker_cpu_ns.is_none()) {
        return (counters, None);
    }
    std::thread::sleep(APART);
    let counters = sampler.read(pods);
    let rates = previous.rates(pods, &counters);
    (counters, Some(rates))
}

/// What was read beside the state files, in the order of the pods.
#[derive(Debug, Clone, Copy, Default)]
struct Seen<'a> {
    counters: &'a [Counters],
    rates: &'a [Rates],
}

fn render(status: &Status, seen: Seen<'_>, dir: &Path, verbose: bool) -> String {
    let mut out = String::new();
    if status.pods.is_empty() {
        let missing = match dir.exists() {
            true => "",
            false => ", which is not there",
        };
        out += &format!(
            "no pod is attached (state directory {}{missing})\n",
            dir.display()
        );
    } else {
        let header = [
            "POD", "VETH", "NAPI", "WORKER", "CPU", "PARKED%", "POLLED", "SOCKETS", "EPOLLS",
            "WINDOW", "MISSING",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for (n, pod) in status.pods.iter().enumerate() {
            let counters = seen.counters.get(n).copied().unwrap_or_default();
            let rates = seen.rates.get(n).copied().unwrap_or_default();
            rows.extend(rows_of(pod, &counters, &rates));
        }
        out += &text::table(&rows);
    }
    for (pod, counters) in status.pods.iter().zip(seen.counters) {
        let mut lines = Vec::new();
        for missing in &pod.degraded {
            lines.push(format!("missing {}: {}", missing.part, missing.reason));
        }
        if verbose {
            lines.push(format!("worker: {}", pod.worker_reason));
            lines.push(format!("window: {}", pod.busy_poll_reason));
            if let Some(why) = &pod.short_way {
                lines.push(format!("short way past the NAPI: {why}"));
            }
            if pod.rests {
                lines.push("rests: what it sends passes by the NAPI, by TSO in the pod, until its worker is wanted".to_owned());
            }
            lines.push(format!("busy-poll-mode: {}", mode(pod)));
            let done = &pod.sockets;
            lines.push(format!(
                "sockets: {} given a window, {} epoll instances, {} more left to sleep (more processes than CPUs), {} trapped calls, {} of them failed",
                done.sockets_set, done.epolls_given, done.epolls_crowded, done.calls_handled, done.errors
            ));
            lines.push(format!("packets: {}", packets(counters)));
            if let Some(cpuset) = &pod.cpuset {
                lines.push(format!("cpuset: {cpuset}"));
            }
            lines.push(format!("profile: {}", pod.profile));
            lines.push(format!("owner: process {}", pod.owner_pid));
        }
        if !lines.is_empty() {
            out += &format!("\n{}/{}\n", pod.namespace, pod.id);
            for line in lines {
                out += &format!("  {}\n", text::fold(&line, 4, 100));
            }
        }
    }
    out += &uplinks(&status.uplinks);
    if !status.stale.is_empty() {
        out += "\nstale (the next pod that starts removes what a dead owner left):\n";
        for stale in &status.stale {
            out += &format!("  pods/{}: {}\n", stale.file, stale.reason);
        }
    }
    out
}

/// One row an interface; what is about the whole pod stands in the first.
fn rows_of(pod: &PodState, counters: &Counters, rates: &Rates) -> Vec<Vec<String>> {
    let none = || "-".to_owned();
    let ends = veths(pod).into_iter().zip(napis(pod));
    let mut rows: Vec<Vec<String>> = ends
        .map(|(veth, napi)| vec![String::new(), veth, napi])
        .collect();
    if rows.is_empty() {
        rows.push(vec![String::new(), none(), none()]);
    }
    let (worker, cpu) = worker(pod.worker.as_ref());
    let first = &mut rows[0];
    first[0] = short(pod);
    let polled = counters
        .polled_by_sockets
        .map_or_else(none, |n| n.to_string());
    first.extend([
        worker,
        cpu,
        percent(rates.parked()),
        polled,
        pod.sockets.sockets_set.to_string(),
        pod.sockets.epolls_given.to_string(),
        window(pod),
        parts(pod),
    ]);
    rows
}

/// A share of 0 to 1.
fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}", 100.0 * share))
}

/// `host end > pod end` of each interface.
fn veths(pod: &PodState) -> Vec<String> {
    let name = |i: &state::InterfaceState| format!("{} > {}", i.host_interface, i.pod_interface);
    pod.interfaces.iter().map(name).collect()
}

/// Interfaces of the node itself; empty where none is to be polled.
fn uplinks(uplinks: &[UplinkState]) -> String {
    if uplinks.is_empty() {
        return String::new();
    }
    let header = ["UPLINK", "NAPI", "WORKER", "CPU"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for uplink in uplinks {
        let napis: Vec<String> = uplink.napis.iter().map(ToString::to_string).collect();
        let napis = match napis.is_empty() {
            true => "-".to_owned(),
            false => napis.join(","),
        };
        let (worker, cpu) = worker(uplink.worker.as_ref());
        rows.push(vec![uplink.interface.clone(), napis, worker, cpu]);
    }
    let mut out = format!("\n{}", text::table(&rows));
    for uplink in uplinks {
        if let Some(reason) = &uplink.degraded {
            let line = format!("{} is not polled: {reason}", uplink.interface);
            out += &format!("  {}\n", text::fold(&line, 4, 100));
        }
    }
    out
}

/// The NAPI ids of both ends of each interface.
fn napis(pod: &PodState) -> Vec<String> {
    let id = |napi: Option<u32>| napi.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let ends = |i: &state::InterfaceState| format!("{} > {}", id(i.host_napi), id(i.pod_napi));
    pod.interfaces.iter().map(ends).collect()
}

/// The worker and its CPU.
fn worker(worker: Option<&WorkerState>) -> (String, String) {
    match worker {
        Some(w) => (
            // A NAPI's own thread is another one each time it wakes.
            match w.tid {
                0 => format!("{} {}", w.policy, w.kind),
                tid => format!("{} {} {tid}", w.policy, w.kind),
            },
            w.cpu.to_string(),
        ),
        None => (WorkerPolicy::None.to_string(), "-".to_owned()),
    }
}

/// How long the sockets poll.
fn window(pod: &PodState) -> String {
    pod.busy_poll_us
        .map_or_else(|| "off".to_owned(), |us| format!("{us} µs"))
}

/// What becomes of packets that come while nobody polls.
fn mode(pod: &PodState) -> String {
    match pod.prefer_busy_poll {
        true => format!("{}, prefer-busy-poll", pod.busy_poll_mode),
        false => pod.busy_poll_mode.to_string(),
    }
}

/// The parts that are not active.
fn parts(pod: &PodState) -> String {
    let parts: Vec<String> = pod.degraded.iter().map(|d| d.part.to_string()).collect();
    match parts.is_empty() {
        true => "-".to_owned(),
        false => parts.join(","),
    }
}

fn packets(counters: &Counters) -> String {
    let known = |n: Option<u64>| n.map_or_else(|| "unknown".to_owned(), |n| n.to_string());
    let cpu = match counters.worker_cpu_ns {
        Some(ns) => format!(", worker {:.3} s of CPU", ns as f64 / 1e9),
        None => String::new(),
    };
    format!(
        "{} from the pod, {} to it, {} of these polled by its sockets{cpu}",
        known(counters.from_pod),
        known(counters.to_pod),
        known(counters.polled_by_sockets)
    )
}

/// Namespace and id; Kubernetes' ids of 64 digits are cut as every other tool cuts them.
fn short(pod: &PodState) -> String {
    let id = &pod.id;
    let is_hash = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let id = if is_hash { &id[..12] } else { id };
    format!("{}/{id}", pod.namespace)
}

#[cfg(test)]
pub(super) mod tests {
    use kbp_poller::policy::Profile;
    use kbp_poller::state::{Degraded, InterfaceState, Part, SocketCounters, WorkerState};

    use super::*;

    pub(super) fn pod() -> PodState {
        PodState {
            id: "a".repeat(64),
            namespace: "k8s.io".to_owned(),
            owner_pid: 7,
            owner_start: 1,
            worker_policy: WorkerPolicy::Auto,
            profile: Profile::Latency,
            interfaces: vec![InterfaceState {
                pod_interface: "eth0".to_owned(),
                host_interface: "kbp1234".to_owned(),
                host_ifindex: 9,
                host_napi: Some(8193),
                pod_napi: Some(8194),
            }],
            worker: Some(WorkerState {
                kind: "sqpoll".to_owned(),
                policy: WorkerPolicy::Idle,
                tid: 4711,
                cpu: 1,
                idle_class: true,
                lease_ms: 200,
            }),
            worker_reason: "auto: no pool".to_owned(),
            busy_poll_us: Some(20),
            busy_poll_reason: "auto: shared CPUs".to_owned(),
            busy_poll_mode: Default::default(),
            prefer_busy_poll: false,
            sockets: SocketCounters {
                sockets_set: 3,
                ..SocketCounters::default()
            },
            cpuset: None,
            short_way: None,
            rests: false,
            degraded: vec![Degraded {
                part: Part::EpollBusyPoll,
                reason: "the kernel is too old".to_owned(),
            }],
        }
    }

    fn seen() -> Seen<'static> {
        const COUNTERS: Counters = Counters {
            from_pod: None,
            to_pod: None,
            polled_by_sockets: Some(77),
            worker_cpu_ns: Some(1),
        };
        const RATES: Rates = Rates {
            from_pod: None,
            to_pod: None,
            polled_by_sockets: None,
            worker_cpu: Some(0.25),
        };
        Seen {
            counters: &[COUNTERS],
            rates: &[RATES],
        }
    }

    fn status(pods: Vec<PodState>) -> Status {
        Status {
            pods,
            uplinks: Vec::new(),
            stale: vec![Stale {
                file: "gone@default.json".to_owned(),
                reason: "its owner, process 3, is gone".to_owned(),
                owner_gone: true,
            }],
        }
    }

    #[test]
    fn a_pod_is_one_line_and_its_reasons_follow() {
        let text = render(&status(vec![pod()]), seen(), Path::new("/run/kbp"), false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1]
                .split("  ")
                .filter(|c| !c.is_empty())
                .map(str::trim)
                .collect::<Vec<_>>(),
            [
                "k8s.io/aaaaaaaaaaaa",
                "kbp1234 > eth0",
                "8193 > 8194",
                "idle sqpoll 4711",
                "1",
                "75",
                "77",
                "3",
                "0",
                "20 µs",
                "epoll-busy-poll"
            ]
        );
        assert!(
            text.contains("missing epoll-busy-poll: the kernel is too old"),
            "{text}"
        );
        assert!(
            text.contains("pods/gone@default.json: its owner, process 3, is gone"),
            "{text}"
        );
        assert!(!text.contains("auto: shared CPUs"), "{text}");
        assert!(!text.contains('\x1b'), "no colours");
    }

    #[test]
    fn verbose_says_why() {
        let text = render(&status(vec![pod()]), seen(), Path::new("/run/kbp"), true);
        for part in [
            "worker: auto: no pool",
            "window: auto: shared CPUs",
            "busy-poll-mode: spin",
            "owner: process 7",
            "sockets: 3 given a window",
            "packets: unknown from the pod",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_pod_without_interface_worker_and_window_still_has_its_line() {
        let mut bare = pod();
        bare.interfaces.clear();
        bare.worker = None;
        bare.busy_poll_us = None;
        bare.degraded.clear();
        let text = render(
            &status(vec![bare]),
            Seen::default(),
            Path::new("/run/kbp"),
            false,
        );
        let line = text.lines().nth(1).expect("a line");
        assert_eq!(
            line.split_whitespace().skip(1).collect::<Vec<_>>(),
            ["-", "-", "none", "-", "-", "-", "3", "0", "off", "-"]
        );
    }

    #[test]
    fn uplinks_have_lines_of_their_own_and_say_what_keeps_them() {
        let uplink = UplinkState {
            interface: "eth0".to_owned(),
            owner_pid: 7,
            owner_start: 1,
            napis: vec![8193, 8194],
            worker: pod().worker,
            degraded: None,
        };
        let down = UplinkState {
            interface: "eth1".to_owned(),
            napis: Vec::new(),
            worker: None,
            degraded: Some("eth1 is down".to_owned()),
            ..uplink.clone()
        };
        let mut status = status(Vec::new());
        status.uplinks = vec![uplink, down];
        let text = render(&status, Seen::default(), Path::new("/run/kbp"), false);
        let words = |start: &str| -> Vec<String> {
            let line = text.lines().find(|l| l.starts_with(start)).expect("a line");
            line.split_whitespace().map(str::to_owned).collect()
        };
        assert_eq!(
            words("eth0"),
            ["eth0", "8193,8194", "idle", "sqpoll", "4711", "1"]
        );
        assert_eq!(words("eth1"), ["eth1", "-", "none", "-"]);
        assert!(text.contains("eth1 is not polled: eth1 is down"), "{text}");
        let written = Written::of(&status, &[], None);
        let json = serde_json::to_value(&written).expect("JSON");
        assert_eq!(json["uplinks"][0]["worker"]["kind"], "sqpoll", "{json}");
        assert_eq!(json["uplinks"][1]["degraded"], "eth1 is down", "{json}");
    }

    #[test]
    fn no_pods_is_said() {
        let text = render(&status(Vec::new()), Seen::default(), Path::new("/"), false);
        assert!(
            text.starts_with("no pod is attached (state directory /)"),
            "{text}"
        );
    }
}
