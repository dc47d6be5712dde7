//! The node's `/etc/kbp/config.toml`; another path by `KBP_CONFIG`.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use kbp_kernel::cpu::Topology;
use kbp_kernel::{CpuSet, Micros};
use serde::{Deserialize, Serialize};

use crate::policy::{Layer, MAX_WINDOW, choose, toml_reason};
use crate::window::LONG;
use crate::{Error, Result, kubelet};

/// Where the config is when `KBP_CONFIG` names no other place.
pub const DEFAULT_PATH: &str = "/etc/kbp/config.toml";

/// Where state and claims are when the config names no other place.
pub const DEFAULT_STATE_DIR: &str = "/run/kbp";

/// Packets a second that make a core hot when the config names no other number: less than a third of what one worker was
/// measured to take (370,000 of 64 bytes), so that there is time to move.
const DEFAULT_HOT: u64 = 100_000;

/// What windows on CPUs of their own may be widened to when the config names no other number.
const DEFAULT_WIDEST: Micros = Micros(2_000);

/// Value of `cpus` for the CPUs that the kernel isolates.
const ISOLATED: &str = "isolated";

const KEYS: &str = "worker, busy-poll, profile, required, cpu-latency, prefer-busy-poll, busy-poll-mode, cpus, uplinks, state-dir, runtime, disable, hot, kubelet-state, node-busy-poll, busy-poll-widest";

/// A kernel feature that the operator can switch off, for a kernel on which it misbehaves.
/// kbp then acts as if the kernel had refused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// GRO and TSO settings that give a veth its NAPI instances.
    Napi,
    /// Polling by the NAPI's own kernel thread: dedicated workers are rings instead.
    Kthread,
    /// The NAPIs' own threads, woken by packets: workers of the profile `throughput` are rings instead.
    Threaded,
    /// Polling by io_uring kernel threads: workers are sockets instead.
    Sqpoll,
    /// Polling through sockets of kbp's own.
    Socket,
    /// The seccomp listener: sockets and epoll instances keep the kernel's defaults.
    SeccompNotify,
    /// EPIOCSPARAMS: epoll instances do not busy-poll.
    EpollParams,
    /// Settings of single NAPI instances (`napi-set`): packets never wait for whoever polls.
    NapiSettings,
    /// The way around the NAPI for packets that nobody polls for.
    ShortWay,
}

impl Feature {
    /// Every feature that can be switched off.
    pub const ALL: [Self; 9] = [
        Self::Napi,
        Self::Kthread,
        Self::Threaded,
        Self::Sqpoll,
        Self::Socket,
        Self::SeccompNotify,
        Self::EpollParams,
        Self::NapiSettings,
        Self::ShortWay,
    ];
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Napi => "napi",
            Self::Kthread => "kthread",
            Self::Threaded => "threaded",
            Self::Sqpoll => "sqpoll",
            Self::Socket => "socket",
            Self::SeccompNotify => "seccomp-notify",
            Self::EpollParams => "epoll-params",
            Self::NapiSettings => "napi-settings",
            Self::ShortWay => "short-way",
        })
    }
}

/// The node's settings. A missing file is the default; a malformed one is an error.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file that was read, or would have been.
    pub path: PathBuf,
    /// Policy where neither annotations nor runtime options speak (`worker`, `busy-poll`, `profile`, `required`).
    pub policy: Layer,
    /// CPUs for workers: `cpus = "2-3"` or `"isolated"`; empty: no pool.
    pub cpus: CpuSet,
    /// Whether `cpus` says `"isolated"`: then an empty pool means that the kernel isolates no CPU.
    pub cpus_isolated: bool,
    /// Interfaces of the node itself that the daemon polls (`uplinks = ["eth0"]`).
    pub uplinks: Vec<String>,
    /// Directory of state, claims and notifier sockets (`state-dir`); default `/run/kbp`.
    pub state_dir: PathBuf,
    /// OCI runtime binary when containerd's options name none (`runtime = "runc"`).
    pub runtime: String,
    /// `net.core.busy_poll` while a pod of the node has a window, for programs in `poll` and `select` (`node-busy-poll = 50`);
    /// None: it is left alone.
    pub node_busy_poll: Option<Micros>,
    /// What `auto` may widen the windows of pods with CPUs of their own to (`busy-poll-widest = 2000`); 0: nothing.
    pub busy_poll_widest: Micros,
    /// `disable = ["sqpoll"]`: features that are not to be used.
    pub disable: BTreeSet<Feature>,
    /// Packets a second from which on the core of a shared worker is hot, and pods are moved to others (`hot`).
    pub hot: u64,
    /// The state file of the kubelet's CPU manager (`kubelet-state`).
    pub kubelet_state: PathBuf,
}

impl Config {
    /// Reads the file that `KBP_CONFIG` names, else `/etc/kbp/config.toml`.
    pub fn load() -> Result<Self> {
        let named = std::env::var_os("KBP_CONFIG").filter(|p| !p.is_empty());
        Self::read(Path::new(named.as_deref().unwrap_or(DEFAULT_PATH.as_ref())))
    }

    /// Reads one file.
    pub fn read(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text, Path::new("/sys")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default_at(path)),
            Err(e) => Err(Error::Config {
                path: path.display().to_string(),
                reason: e.to_string(),
            }),
        }
    }

    /// What `auto` may widen the windows of pods with CPUs of their own to; None: it may not.
    pub fn widest(&self) -> Option<Micros> {
        Some(self.busy_poll_widest).filter(|widest| *widest > LONG)
    }

    /// Why `feature` is not to be used, when the operator switched it off.
    pub fn switched_off(&self, feature: Feature) -> Option<String> {
        self.disable.contains(&feature).then(|| {
            format!(
                "switched off by disable = [\"{feature}\"] in {}",
                self.path.display()
            )
        })
    }

    fn default_at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            policy: Layer::default(),
            cpus: CpuSet::default(),
            cpus_isolated: false,
            uplinks: Vec::new(),
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            runtime: "runc".to_owned(),
            disable: BTreeSet::new(),
            hot: DEFAULT_HOT,
            node_busy_poll: None,
            busy_poll_widest: DEFAULT_WIDEST,
            kubelet_state: PathBuf::from(kubelet::DEFAULT_PATH),
        }
    }

    fn parse(path: &Path, text: &str, sys: &Path) -> Result<Self> {
        let origin = format!("config {}", path.display());
        let table: toml::Table = text.parse().map_err(|e| Error::Config {
            path: path.display().to_string(),
            reason: toml_reason(&e),
        })?;
        let mut config = Self::default_at(path);
        for (key, value) in &table {
            let refuse_part = |part: &toml::Value, allowed: &str| Error::InvalidValue {
                origin: origin.clone(),
                key: key.clone(),
                value: part
                    .as_str()
                    .map_or_else(|| part.to_string(), str::to_owned),
                allowed: allowed.to_owned(),
            };
            let refuse = |allowed: &str| refuse_part(value, allowed);
            let text = value.as_str().filter(|t| !t.is_empty());
            match key.as_str() {
                "cpus" => {
                    let text = value
                        .as_str()
                        .ok_or_else(|| refuse("a CPU list such as \"2-3\", or \"isolated\""))?;
                    let topology = Topology::read_from(sys)?;
                    config.cpus = pool(text, &topology, sys).map_err(|a| refuse(&a))?;
                    config.cpus_isolated = text == ISOLATED;
                }
                "uplinks" => {
                    let allowed = "a list of interface names, e.g. [\"eth0\"]";
                    for entry in value.as_array().ok_or_else(|| refuse(allowed))? {
                        let name = entry.as_str().filter(|n| is_interface_name(n));
                        let name = name.ok_or_else(|| refuse_part(entry, allowed))?.to_owned();
                        if config.uplinks.contains(&name) {
                            return Err(refuse_part(entry, "each interface once"));
                        }
                        config.uplinks.push(name);
                    }
                }
                "state-dir" => {
                    let dir = text.map(Path::new).filter(|d| d.is_absolute());
                    config.state_dir = dir.ok_or_else(|| refuse("an absolute path"))?.to_owned();
                }
                "runtime" => {
                    config.runtime = text
                        .ok_or_else(|| refuse("name or path of an OCI runtime, e.g. \"runc\""))?
                        .to_owned();
                }
                "node-busy-poll" => {
                    let micros = value.as_integer().and_then(|n| u32::try_from(n).ok());
                    let micros = micros.filter(|n| *n <= MAX_WINDOW.0).ok_or_else(|| {
                        refuse(&format!("whole microseconds from 0 (off) to {MAX_WINDOW}"))
                    })?;
                    config.node_busy_poll = (micros > 0).then_some(Micros(micros));
                }
                "busy-poll-widest" => {
                    let micros = value.as_integer().and_then(|n| u32::try_from(n).ok());
                    let micros = micros.filter(|n| *n <= MAX_WINDOW.0).ok_or_else(|| {
                        refuse(&format!("whole microseconds from 0 (off) to {MAX_WINDOW}"))
                    })?;
                    config.busy_poll_widest = Micros(micros);
                }
                "hot" => {
                    config.hot = value
                        .as_integer()
                        .and_then(|n| u64::try_from(n).ok())
                        .filter(|n| *n > 0)
                        .ok_or_else(|| refuse("packets a second, at least 1"))?;
                }
                "kubelet-state" => {
                    let file = text.map(Path::new).filter(|f| f.is_absolute());
                    config.kubelet_state =
                        file.ok_or_else(|| refuse("an absolute path"))?.to_owned();
                }
                "disable" => {
                    let allowed = || {
                        let names = Feature::ALL.map(|f| format!("\"{f}\"")).join(", ");
                        format!("a list of any of {names}")
                    };
                    for entry in value.as_array().ok_or_else(|| refuse(&allowed()))? {
                        let feature = entry.as_str().and_then(|e| choose(e, &Feature::ALL).ok());
                        let feature = feature.ok_or_else(|| refuse_part(entry, &allowed()))?;
                        config.disable.insert(feature);
                    }
                }
                _ => {
                    if !config.policy.set_toml(&origin, key, key, value)? {
                        return Err(Error::UnknownKey {
                            origin,
                            key: key.clone(),
                            known: KEYS.to_owned(),
                        });
                    }
                }
            }
        }
        Ok(config)
    }
}

/// What the kernel accepts as the name of an interface (net/core/dev.c, dev_valid_name).
fn is_interface_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 16
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}

/// The CPUs that `text` names; on error what would be accepted. A CPU that is merely offline stays in the pool: it may
/// come back, and who wants to claim it is told.
fn pool(text: &str, topology: &Topology, sys: &Path) -> Result<CpuSet, String> {
    if text == ISOLATED {
        return Ok(topology.isolated.clone());
    }
    let cpus: CpuSet = text
        .parse()
        .map_err(|_| "a CPU list such as \"2-3,8\", or \"isolated\"".to_owned())?;
    let missing: CpuSet = cpus
        .iter()
        .filter(|c| !sys.join(format!("devices/system/cpu/cpu{c}")).exists())
        .collect();
    if missing.is_empty() {
        Ok(cpus)
    } else {
        let plural = if missing.len() == 1 { "CPU" } else { "CPUs" };
        let verb = if missing.len() == 1 { "does" } else { "do" };
        Err(format!(
            "CPUs of this machine, of which {} are online; {plural} {missing} {verb} not exist",
            topology.online
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{BusyPoll, BusyPollMode, Policy, Profile, WorkerPolicy};

    /// The sysfs of a machine with CPUs 0-3, 3 offline, 2-3 isolated.
    fn machine() -> tempfile::TempDir {
        let sys = tempfile::tempdir().expect("tempdir");
        let cpus = sys.path().join("devices/system/cpu");
        for cpu in 0..4 {
            std::fs::create_dir_all(cpus.join(format!("cpu{cpu}"))).expect("mkdir");
        }
        for (file, list) in [("online", "0-2\n"), ("isolated", "2-3\n")] {
            std::fs::write(cpus.join(file), list).expect("write");
        }
        sys
    }

    fn parse(text: &str) -> Result<Config> {
        let sys = machine();
        Config::parse(Path::new("/etc/kbp/config.toml"), text, sys.path())
    }

    #[test]
    fn a_full_config_is_read() {
        let config = parse(
            "worker = \"shared\"\nbusy-poll = 50\nprofile = \"throughput\"\nrequired = true\n\
             prefer-busy-poll = true\nbusy-poll-mode = \"suspend\"\n\
             cpus = \"2-3\"\nstate-dir = \"/run/other\"\nruntime = \"crun\"\ndisable = [\"sqpoll\", \"seccomp-notify\"]\n",
        )
        .expect("valid");
        assert_eq!(
            config.policy,
            Layer {
                worker: Some(WorkerPolicy::Shared),
                busy_poll: Some(BusyPoll::Window(Micros(50))),
                profile: Some(Profile::Throughput),
                required: Some(true),
                cpu_latency: None,
                prefer_busy_poll: Some(true),
                busy_poll_mode: Some(BusyPollMode::Suspend),
            }
        );
        assert_eq!(config.cpus.to_string(), "2-3");
        assert_eq!(config.state_dir, Path::new("/run/other"));
        assert_eq!(config.runtime, "crun");
        assert_eq!(
            config.switched_off(Feature::Sqpoll).expect("off"),
            "switched off by disable = [\"sqpoll\"] in /etc/kbp/config.toml"
        );
        assert_eq!(config.switched_off(Feature::Napi), None);
    }

    #[test]
    fn an_empty_and_a_missing_file_are_the_default() {
        let dir = tempfile::tempdir().expect("tempdir");
        for config in [
            parse("# nothing\n").expect("empty"),
            Config::read(&dir.path().join("none.toml")).expect("missing"),
        ] {
            assert_eq!(config.policy, Layer::default());
            assert!(config.cpus.is_empty());
            assert_eq!(config.state_dir, Path::new("/run/kbp"));
            assert_eq!(config.runtime, "runc");
            assert!(config.disable.is_empty());
        }
    }

    /// The sample names every key, and what it calls the default is the default.
    #[test]
    fn the_sample_config_tells_the_defaults() {
        let sample = include_str!("../../config/config.toml");
        let told: String = sample
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| {
                line.starts_with(|c: char| c.is_ascii_lowercase()) && line.contains(" = ")
            })
            .map(|line| format!("{line}\n"))
            .collect();
        for key in KEYS.split(", ") {
            assert!(told.contains(&format!("{key} = ")), "{key} in {told}");
        }
        let told = parse(&told).expect("valid");
        let default = parse(sample).expect("valid");
        assert_eq!(Policy::resolve(&[told.policy]), Policy::default());
        assert_eq!(Policy::resolve(&[default.policy]), Policy::default());
        assert_eq!(
            (told.cpus, told.state_dir, told.runtime, told.disable),
            (
                default.cpus,
                default.state_dir,
                default.runtime,
                default.disable
            )
        );
    }

    #[test]
    fn the_node_wide_window_is_off_unless_asked_for() {
        let of = |text: &str| parse(text).expect("valid").node_busy_poll;
        assert_eq!((of(""), of("node-busy-poll = 0")), (None, None));
        assert_eq!(of("node-busy-poll = 50"), Some(Micros(50)));
        let widest = |text: &str| parse(text).expect("valid").widest();
        assert_eq!(widest(""), Some(DEFAULT_WIDEST));
        assert_eq!(widest("busy-poll-widest = 500"), Some(Micros(500)));
        assert_eq!(widest("busy-poll-widest = 0"), None);
        assert_eq!(
            widest("busy-poll-widest = 100"),
            None,
            "that is no widening"
        );
    }

    #[test]
    fn isolated_cpus_make_a_pool() {
        let isolated = parse("cpus = \"isolated\"").expect("valid");
        assert_eq!(isolated.cpus.to_string(), "2-3");
        assert!(isolated.cpus_isolated);
        assert!(!parse("cpus = \"2-3\"").expect("valid").cpus_isolated);
    }

    #[test]
    fn bad_values_name_file_key_value_and_what_is_allowed() {
        for (text, parts) in [
            (
                "worker = \"fast\"",
                vec!["worker = \"fast\"", "auto, dedicated"],
            ),
            ("cpus = \"two\"", vec!["cpus = \"two\"", "a CPU list"]),
            ("cpus = 2", vec!["cpus = \"2\"", "a CPU list"]),
            (
                "cpus = \"3-5\"",
                vec!["cpus = \"3-5\"", "CPUs 4-5 do not exist", "0-2 are online"],
            ),
            ("state-dir = \"run\"", vec!["state-dir", "absolute path"]),
            ("runtime = \"\"", vec!["runtime", "OCI runtime"]),
            (
                "disable = [\"napi\", \"io_uring\"]",
                vec!["disable = \"io_uring\"", "\"sqpoll\""],
            ),
            ("node-busy-poll = \"50\"", vec!["node-busy-poll", "0 (off)"]),
            ("node-busy-poll = -1", vec!["node-busy-poll", "10000"]),
            ("node-busy-poll = 10001", vec!["node-busy-poll", "10000"]),
            (
                "busy-poll-widest = 10001",
                vec!["busy-poll-widest", "10000"],
            ),
            ("disable = [1]", vec!["disable = \"1\"", "a list of"]),
            ("disable = \"sqpoll\"", vec!["disable", "a list of"]),
            ("uplinks = \"eth0\"", vec!["uplinks", "[\"eth0\"]"]),
            (
                "uplinks = [\"a/b\"]",
                vec!["uplinks = \"a/b\"", "interface names"],
            ),
            (
                "uplinks = [\"eth0\", \"eth1\", \"eth0\"]",
                vec!["uplinks = \"eth0\"", "once"],
            ),
            ("cores = \"2\"", vec!["cores is not a kbp setting", "cpus"]),
            ("worker = ", vec!["line 1"]),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains("/etc/kbp/config.toml"), "{error}");
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error() {
        let dir = tempfile::tempdir().expect("tempdir");
        let error = Config::read(dir.path())
            .expect_err("a directory")
            .to_string();
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
    }
}
