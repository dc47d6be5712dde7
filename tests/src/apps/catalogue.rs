//! The programs: how each is started, loaded and read.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::node::{AppNode, AppPod, Guest, below_usr};
use crate::command;
use crate::error::IoContext;
use crate::{Error, Result, fixtures};

/// The port of every server.
pub const PORT: u16 = 7000;
/// `nobody`: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65534;

/// A server with the load that belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum App {
    /// `redis-server`.
    Redis,
    /// `memcached` with one thread that serves.
    Memcached,
    /// `memcached` with four, each with an epoll instance.
    MemcachedThreads,
    /// `nginx`, loaded by `wrk`; a single client is one of our own.
    Nginx,
    /// `haproxy` with one thread.
    Haproxy,
    /// `haproxy` with two.
    HaproxyThreads,
    /// PostgreSQL, loaded by `pgbench`, which waits in `poll`.
    Postgres,
    /// A static binary written in C.
    StaticC,
    /// The same with a thread for each connection, which blocks.
    BlockingThreads,
    /// Go's `net/http`, server and client.
    Go,
    /// Node's `http` on libuv.
    Node,
    /// Python's asyncio.
    Asyncio,
    /// Java NIO; where the machine has a JDK.
    Java,
    /// tokio.
    Tokio,
}

/// What a load found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Answers, all of them right.
    pub samples: u64,
    /// Answers a second.
    pub per_second: f64,
    /// Median round trip in µs.
    pub p50_us: f64,
    /// 99th percentile in µs.
    pub p99_us: f64,
    /// Answers to the connection that had the fewest, against the mean of all; 1 where the load does not tell.
    pub fewest_answers: f64,
}

impl App {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Redis,
        Self::Memcached,
        Self::MemcachedThreads,
        Self::Nginx,
        Self::Haproxy,
        Self::HaproxyThreads,
        Self::Postgres,
        Self::StaticC,
        Self::BlockingThreads,
        Self::Go,
        Self::Node,
        Self::Asyncio,
        Self::Java,
        Self::Tokio,
    ];

    /// As in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Memcached => "memcached",
            Self::MemcachedThreads => "memcached-4-threads",
            Self::Nginx => "nginx-wrk",
            Self::Haproxy => "haproxy",
            Self::HaproxyThreads => "haproxy-2-threads",
            Self::Postgres => "postgres-pgbench",
            Self::StaticC => "static-c",
            Self::BlockingThreads => "blocking-threads",
            Self::Go => "go-http",
            Self::Node => "node-http",
            Self::Asyncio => "python-asyncio",
            Self::Java => "java-nio",
            Self::Tokio => "tokio",
        }
    }

    /// Why this machine cannot run it; only Java may be wanting.
    pub fn wanting(self) -> Option<String> {
        (self == Self::Java)
            .then(|| below_usr("javac", "default-jdk-headless").err())
            .flatten()
            .map(|e| e.to_string())
    }

    /// Whether its client waits in `epoll`; `pgbench` waits in `poll`, which only the node-wide setting reaches.
    pub fn client_uses_epoll(self) -> bool {
        self != Self::Postgres
    }

    /// Whether its server waits in `epoll`, not in blocking calls.
    pub fn server_uses_epoll(self) -> bool {
        self != Self::BlockingThreads
    }

    /// Starts the server in a container and waits until it listens. `shape` sets CPUs and annotations.
    pub fn serve<'n, 's>(
        self,
        node: &'n AppNode<'s>,
        runtime: crate::Runtime,
        shape: impl FnOnce(Guest) -> Guest,
    ) -> Result<AppPod<'n, 's>> {
        let mut guest = Guest::new("server", self.command(node)?);
        if self == Self::Postgres {
            guest.user = NOBODY;
        }
        let pod = node.pod(runtime, &shape(guest), |root| self.prepare(node, root))?;
        pod.wait_for_port(PORT)?;
        if self == Self::Postgres {
            // It listens before it has recovered, and answers after.
            command::wait_until("PostgreSQL's answer", Duration::from_secs(20), || {
                let ready = [postgres_program("pg_isready").map_err(|e| e.to_string())?]
                    .into_iter()
                    .chain(words("-h 127.0.0.1 -p 7000"))
                    .collect::<Vec<_>>();
                pod.exec(&ready).map(drop).map_err(|e| e.to_string())
            })?;
        }
        Ok(pod)
    }

    fn command(self, node: &AppNode<'_>) -> Result<Vec<String>> {
        let with = |program: String, rest: &str| {
            let mut command = vec![program];
            command.extend(words(rest));
            command
        };
        Ok(match self {
            Self::Redis => with(
                below_usr("redis-server", "redis-server")?,
                "--port 7000 --bind 0.0.0.0 --protected-mode no --appendonly no",
            ),
            Self::Memcached => with(
                below_usr("memcached", "memcached")?,
                "-u root -p 7000 -l 0.0.0.0 -t 1",
            ),
            Self::MemcachedThreads => with(
                below_usr("memcached", "memcached")?,
                "-u root -p 7000 -l 0.0.0.0 -t 4",
            ),
            Self::Nginx => with(below_usr("nginx", "nginx-light")?, "-c /kbp/nginx.conf"),
            Self::Haproxy => with(below_usr("haproxy", "haproxy")?, "-f /kbp/haproxy.cfg"),
            Self::HaproxyThreads => with(
                below_usr("haproxy", "haproxy")?,
                "-f /kbp/haproxy.cfg -f /kbp/haproxy-threads.cfg",
            ),
            Self::Postgres => with(
                postgres_program("postgres")?,
                "-D /tmp/pg -p 7000 -c listen_addresses=* -c unix_socket_directories=/tmp -c fsync=off -c shared_buffers=16MB -c autovacuum=off",
            ),
            Self::StaticC => with("/kbp/echo".to_owned(), "epoll 7000"),
            Self::BlockingThreads => with("/kbp/echo".to_owned(), "threads 7000"),
            Self::Go => {
                add(node, &fixtures::go_http()?, "http-go")?;
                with("/kbp/http-go".to_owned(), "serve 7000")
            }
            Self::Node => with(below_usr("node", "nodejs")?, "/kbp/server.js 7000"),
            Self::Asyncio => with(below_usr("python3", "python3")?, "/kbp/echo.py 7000"),
            Self::Java => {
                add(node, &fixtures::java_echo()?, "Echo.class")?;
                with(
                    below_usr("java", "default-jdk-headless")?,
                    "-Xmx64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xshare:auto -cp /kbp Echo 7000",
                )
            }
            Self::Tokio => with("/kbp/tokio-echo".to_owned(), "7000"),
        })
    }

    fn prepare(self, node: &AppNode<'_>, root: &Path) -> Result<()> {
        if self != Self::Postgres {
            return Ok(());
        }
        let template = postgres_template(node)?;
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(&template).arg(root.join("tmp/pg"));
        command::run(copy, Duration::from_secs(60))?
            .success()
            .map(drop)
    }

    /// The command of a load of `clients` connections for `length`, for the client's container.
    pub fn load_command(
        self,
        address: &str,
        clients: u32,
        length: Duration,
    ) -> Result<Vec<String>> {
        let ms = length.as_millis();
        let seconds = length.as_secs().max(1);
        let own = |protocol: &str| {
            words(&format!(
                "/kbp/app-load {protocol} {address}:{PORT} {clients} {ms}"
            ))
        };
        Ok(match self {
            Self::Redis => own("resp"),
            Self::Memcached | Self::MemcachedThreads => own("memcache"),
            Self::Haproxy | Self::HaproxyThreads | Self::Node => own("http"),
            Self::StaticC | Self::BlockingThreads | Self::Asyncio | Self::Java | Self::Tokio => {
                own("echo")
            }
            Self::Go => words(&format!(
                "/kbp/http-go load {address} {PORT} {clients} {ms}"
            )),
            // For the times of single requests: wrk counts one that took long once more for every request that had its time meanwhile
            // (stats_correct in its stats.c), so that its tail grows with the rate.
            Self::Nginx if clients == 1 => own("http"),
            Self::Nginx => {
                let mut command = vec![below_usr("wrk", "wrk")?];
                command.extend(words(&format!(
                    "-t1 -c{clients} -d{seconds}s --latency http://{address}:{PORT}/"
                )));
                command
            }
            Self::Postgres => {
                let mut command = vec![postgres_program("pgbench")?];
                command.extend(words(&format!(
                    "-h {address} -p {PORT} -U postgres -n -f /kbp/select.sql -c {clients} -j 1 -T {seconds} -l --log-prefix=/tmp/pgbench postgres"
                )));
                command
            }
        })
    }

    /// What is sent once to see that the answers are right where the load itself does not compare them; with what has to come.
    pub fn proof(self, address: &str) -> Result<Option<(Vec<String>, String)>> {
        Ok(match self {
            Self::Nginx => {
                let load = words(&format!("/kbp/app-load http {address}:{PORT} 2 100"));
                Some((load, "\"wrong\":0".to_owned()))
            }
            Self::Postgres => {
                let mut command = vec![postgres_program("psql")?];
                command.extend(words(&format!("-h {address} -p {PORT} -U postgres -At -c")));
                command.push("select 6*7, version() like 'PostgreSQL%'".to_owned());
                Some((command, "42|t".to_owned()))
            }
            _ => None,
        })
    }

    /// Reads what the load printed, or wrote to its container's root.
    pub fn figures(self, printed: &str, client_root: &Path) -> Result<Figures> {
        match self {
            Self::Nginx if !printed.starts_with('{') => wrk(printed),
            Self::Postgres => pgbench(printed, client_root),
            _ => own_json(printed),
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Puts a program among the files that all containers see.
fn add(node: &AppNode<'_>, from: &Path, name: &str) -> Result<()> {
    let target = node.files().join(name);
    if target.exists() {
        // It may be running.
        return Ok(());
    }
    std::fs::copy(from, &target)
        .map(drop)
        .context(|| format!("copy {} to {}", from.display(), target.display()))
}

/// A program of PostgreSQL, of the newest version there is.
fn postgres_program(name: &str) -> Result<String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    versions
        .map(|v| v.path().join("bin").join(name))
        .filter(|p| p.is_file())
        .max()
        .map(|p| p.display().to_string())
        .ok_or_else(|| Error::Missing {
            what: format!("{name} in /usr/lib/postgresql/*/bin"),
            remedy: "apt-get install postgresql".to_owned(),
        })
}

/// A fresh database cluster that is copied for each server.
fn postgres_template(node: &AppNode<'_>) -> Result<PathBuf> {
    let dir = node.containerd().sandbox().dir().join("pg");
    let data = dir.join("data");
    if data.is_dir() {
        return Ok(data);
    }
    std::fs::create_dir_all(&dir).context(|| format!("create {}", dir.display()))?;
    std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY))
        .context(|| format!("give {} away", dir.display()))?;
    let mut initdb = Command::new("setpriv");
    initdb
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(postgres_program("initdb")?)
        .arg("-D")
        .arg(&data)
        .args(words(
            "-A trust -U postgres --no-sync --locale=C -E UTF8 --no-instructions",
        ))
        .current_dir(&dir)
        .env("HOME", &dir);
    command::run(initdb, Duration::from_secs(120))?.success()?;
    let rules = data.join("pg_hba.conf");
    std::fs::write(
        &rules,
        "host all all 0.0.0.0/0 trust\nlocal all all trust\n",
    )
    .context(|| format!("write {}", rules.display()))?;
    let script = node.files().join("select.sql");
    std::fs::write(&script, "SELECT 6 * 7;\n").context(|| format!("write {}", script.display()))?;
    Ok(data)
}

fn unreadable(what: &str, text: &str) -> Error {
    Error::Command {
        command: format!("read what {what} printed"),
        reason: text.chars().take(2000).collect(),
    }
}

/// The JSON object of `app-load` and of the Go client.
fn own_json(text: &str) -> Result<Figures> {
    let wrong = || unreadable("the load", text);
    let line = text
        .lines()
        .find(|l| l.starts_with('{'))
        .ok_or_else(wrong)?;
    let value: Value = serde_json::from_str(line).map_err(|_| wrong())?;
    let number = |name: &str| value[name].as_f64().ok_or_else(wrong);
    if value["wrong"] != 0 || number("samples")? < 1.0 {
        return Err(wrong());
    }
    Ok(Figures {
        samples: number("samples")? as u64,
        per_second: number("per_second")?,
        p50_us: number("p50_us")?,
        p99_us: number("p99_us")?,
        fewest_answers: value["fewest_answers"].as_f64().unwrap_or(1.0),
    })
}

/// `wrk --latency`'s report.
fn wrk(text: &str) -> Result<Figures> {
    let wrong = || unreadable("wrk", text);
    if text.contains("Socket errors") || text.contains("Non-2xx") {
        return Err(wrong());
    }
    let after = |start: &str| {
        text.lines()
            .find_map(|l| l.trim().strip_prefix(start))
            .map(str::trim)
    };
    let samples = text
        .lines()
        .find_map(|l| l.split_once(" requests in "))
        .and_then(|(n, _)| n.trim().parse().ok());
    Ok(Figures {
        samples: samples.filter(|n| *n > 0).ok_or_else(wrong)?,
        per_second: after("Requests/sec:")
            .and_then(|n| n.parse().ok())
            .ok_or_else(wrong)?,
        p50_us: after("50%").and_then(wrk_time).ok_or_else(wrong)?,
        p99_us: after("99%").and_then(wrk_time).ok_or_else(wrong)?,
        fewest_answers: 1.0,
    })
}

/// `63.00us`, `1.25ms` or `1.00s` in µs.
fn wrk_time(text: &str) -> Option<f64> {
    [("us", 1.0), ("ms", 1e3), ("s", 1e6)]
        .into_iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor))
}

/// pgbench's report and its log, a line a transaction, the third column its time in µs. The log is removed.
fn pgbench(text: &str, root: &Path) -> Result<Figures> {
    let wrong = || unreadable("pgbench", text);
    let failed = text
        .lines()
        .find_map(|l| l.strip_prefix("number of failed transactions: "));
    if failed.is_some_and(|f| !f.starts_with("0 ")) {
        return Err(wrong());
    }
    let per_second = text
        .lines()
        .find_map(|l| l.strip_prefix("tps = "))
        .and_then(|l| l.split_whitespace().next()?.parse().ok())
        .ok_or_else(wrong)?;
    let dir = root.join("tmp");
    let mut times: Vec<f64> = Vec::new();
    for entry in std::fs::read_dir(&dir)
        .context(|| format!("read {}", dir.display()))?
        .flatten()
    {
        if !entry.file_name().to_string_lossy().starts_with("pgbench.") {
            continue;
        }
        let path = entry.path();
        let log = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        times.extend(
            log.lines()
                .filter_map(|l| l.split(' ').nth(2)?.parse::<f64>().ok()),
        );
        std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
    }
    times.sort_by(f64::total_cmp);
    let at = |quantile: f64| {
        let rank = (quantile * times.len() as f64).ceil() as usize;
        times.get(rank.max(1) - 1).copied().ok_or_else(wrong)
    };
    Ok(Figures {
        samples: times.len() as u64,
        per_second,
        p50_us: at(0.5)?,
        p99_us: at(0.99)?,
        fewest_answers: 1.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrks_report_is_read_and_errors_refuse_it() {
        let report = "Running 1s test @ http://10.0.0.2:7000/\n  1 threads and 1 connections\n  Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency    70.19us   20.10us   1.02ms   95.10%\n  Latency Distribution\n     50%   63.00us\n     75%   70.00us\n     90%   88.00us\n     99%    1.25ms\n  14000 requests in 1.10s, 2.37MB read\nRequests/sec:  12727.27\nTransfer/sec:      2.16MB\n";
        let figures = wrk(report).expect("a report");
        assert_eq!(
            figures,
            Figures {
                samples: 14000,
                per_second: 12727.27,
                p50_us: 63.0,
                p99_us: 1250.0,
                fewest_answers: 1.0,
            }
        );
        assert!(wrk(&format!("{report}  Non-2xx or 3xx responses: 3\n")).is_err());
        assert!(wrk("unable to connect").is_err());
    }

    #[test]
    fn pgbenchs_log_gives_the_quantiles() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("tmp")).expect("mkdir");
        let log: String = (1..=100)
            .rev()
            .map(|n| format!("0 {n} {n} 0 1700000000 12\n"))
            .collect();
        std::fs::write(dir.path().join("tmp/pgbench.17"), log).expect("write");
        let report = "number of failed transactions: 0 (0.000%)\ntps = 1234.5 (without initial connection time)\n";
        let figures = pgbench(report, dir.path()).expect("a report");
        assert_eq!(
            (
                figures.samples,
                figures.p50_us,
                figures.p99_us,
                figures.per_second
            ),
            (100, 50.0, 99.0, 1234.5)
        );
        assert!(pgbench(report, dir.path()).is_err(), "the log is used up");
        assert!(pgbench(&report.replace(": 0 ", ": 7 "), dir.path()).is_err());
    }

    #[test]
    fn a_load_with_wrong_answers_is_refused() {
        let text = r#"{"samples":5,"wrong":0,"per_second":1.0,"p50_us":2.0,"p99_us":3.0}"#;
        assert_eq!(own_json(text).expect("figures").samples, 5);
        assert!(own_json(&text.replace("\"wrong\":0", "\"wrong\":1")).is_err());
        assert!(own_json(&text.replace("\"samples\":5", "\"samples\":0")).is_err());
        assert!(own_json("").is_err());
    }
}
