//! The programs: how each is started, loaded and read.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::figures::{self, Figures};
use super::node::{AppNode, AppPod, Guest, below_usr};
use super::postgres;
use crate::command;
use crate::error::IoContext;
use crate::{Result, fixtures};

/// The port of every server.
pub const PORT: u16 = 7000;
/// `nobody`: PostgreSQL refuses to run as root.
pub(super) const NOBODY: u32 = 65534;

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
    /// PostgreSQL, loaded by a client with a thread for each connection, which blocks in reading from it.
    PostgresBlocking,
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

impl App {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Redis,
        Self::Memcached,
        Self::MemcachedThreads,
        Self::Nginx,
        Self::Haproxy,
        Self::HaproxyThreads,
        Self::Postgres,
        Self::PostgresBlocking,
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
            Self::PostgresBlocking => "postgres-blocking",
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

    /// Whether its client waits in `epoll`, not in blocking calls nor in `poll`.
    pub fn client_uses_epoll(self) -> bool {
        !self.is_postgres()
    }

    /// Whether its client waits in `poll`, which only the node-wide setting reaches.
    pub fn client_uses_poll(self) -> bool {
        self == Self::Postgres
    }

    fn is_postgres(self) -> bool {
        matches!(self, Self::Postgres | Self::PostgresBlocking)
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
        if self.is_postgres() {
            guest.user = NOBODY;
        }
        let pod = node.pod(runtime, &shape(guest), |root| self.prepare(node, root))?;
        pod.wait_for_port(PORT)?;
        if self.is_postgres() {
            // It listens before it has recovered, and answers after.
            command::wait_until("PostgreSQL's answer", Duration::from_secs(20), || {
                let ready = [postgres::program("pg_isready").map_err(|e| e.to_string())?]
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
            Self::Postgres | Self::PostgresBlocking => with(
                postgres::program("postgres")?,
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
        if !self.is_postgres() {
            return Ok(());
        }
        let template = postgres::template(node)?;
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
        self.load_after(address, clients, Duration::ZERO, length)
    }

    /// The same, where the first `lead` of it counts for nothing. Programs that know whole seconds only take longer.
    pub fn load_after(
        self,
        address: &str,
        clients: u32,
        lead: Duration,
        length: Duration,
    ) -> Result<Vec<String>> {
        let (ms, lead_ms) = (length.as_millis(), lead.as_millis());
        let seconds = |length: Duration| length.as_secs_f64().ceil().max(1.0);
        let own = |protocol: &str| {
            words(&format!(
                "/kbp/app-load --after {lead_ms} {protocol} {address}:{PORT} {clients} {ms}"
            ))
        };
        Ok(match self {
            Self::Redis => own("resp"),
            Self::Memcached | Self::MemcachedThreads => own("memcache"),
            Self::Haproxy | Self::HaproxyThreads | Self::Node => own("http"),
            Self::StaticC | Self::BlockingThreads | Self::Asyncio | Self::Java | Self::Tokio => {
                own("echo")
            }
            Self::PostgresBlocking => own("postgres"),
            Self::Go => words(&format!(
                "/kbp/http-go load {address} {PORT} {clients} {ms} {lead_ms}"
            )),
            // For the times of single requests: wrk counts one that took long once more for every request that had its time meanwhile
            // (stats_correct in its stats.c), so that its tail grows with the rate.
            Self::Nginx if clients == 1 => own("http"),
            Self::Nginx => {
                let wrk = below_usr("wrk", "wrk")?;
                let run = |length: Duration| {
                    let seconds = seconds(length);
                    format!("{wrk} -t1 -c{clients} -d{seconds}s --latency http://{address}:{PORT}/")
                };
                if lead.is_zero() {
                    words(&run(length))
                } else {
                    let script = format!("{} >/dev/null && exec {}", run(lead), run(length));
                    vec!["sh".to_owned(), "-c".to_owned(), script]
                }
            }
            Self::Postgres => {
                let mut command = vec![postgres::program("pgbench")?];
                let seconds = seconds(lead + length);
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
            Self::Postgres | Self::PostgresBlocking => {
                let mut command = vec![postgres::program("psql")?];
                command.extend(words(&format!("-h {address} -p {PORT} -U postgres -At -c")));
                command.push("select 6*7, version() like 'PostgreSQL%'".to_owned());
                Some((command, "42|t".to_owned()))
            }
            _ => None,
        })
    }

    /// Reads what the load printed, or wrote to its container's root, without its `lead`.
    pub fn figures(self, printed: &str, client_root: &Path, lead: Duration) -> Result<Figures> {
        match self {
            Self::Nginx if !printed.starts_with('{') => figures::wrk(printed),
            Self::Postgres => figures::pgbench(printed, client_root, lead),
            _ => figures::own_json(printed),
        }
    }
}

pub(super) fn words(text: &str) -> Vec<String> {
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
