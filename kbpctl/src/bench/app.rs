//! Servers of the machine that are measured as they are.

use std::net::Ipv4Addr;

use clap::ValueEnum;

use crate::load::Talk;

/// A server that may be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum App {
    /// GET of 64 bytes.
    Redis,
    /// get of 64 bytes.
    Memcached,
    /// GET / over one HTTP/1.1 connection.
    Nginx,
}

impl App {
    pub(crate) const ALL: [Self; 3] = [Self::Redis, Self::Memcached, Self::Nginx];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Memcached => "memcached",
            Self::Nginx => "nginx",
        }
    }

    /// Its binary.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Redis => "redis-server",
            Self::Memcached => "memcached",
            Self::Nginx => "nginx",
        }
    }

    /// Debian's package of it.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Redis => "redis-server",
            Self::Memcached => "memcached",
            Self::Nginx => "nginx-light",
        }
    }

    pub(crate) fn talk(self) -> Talk {
        match self {
            Self::Redis => Talk::Redis,
            Self::Memcached => Talk::Memcached,
            Self::Nginx => Talk::Http,
        }
    }

    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Redis => 6379,
            Self::Memcached => 11211,
            Self::Nginx => 8080,
        }
    }

    /// A configuration file in the shared directory.
    pub(crate) fn config(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Nginx => Some((
                "nginx.conf",
                "daemon off;\nworker_processes 1;\nuser root;\npid /tmp/kbp-bench-nginx.pid;\nevents { }\nhttp {\n  access_log off;\n  keepalive_requests 1000000000;\n  \
                 client_body_temp_path /tmp/kbp-bench-nginx-body;\n  proxy_temp_path /tmp/kbp-bench-nginx-proxy;\n  fastcgi_temp_path /tmp/kbp-bench-nginx-fastcgi;\n  \
                 uwsgi_temp_path /tmp/kbp-bench-nginx-uwsgi;\n  scgi_temp_path /tmp/kbp-bench-nginx-scgi;\n  \
                 server {\n    listen 8080;\n    location / { return 200 \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"; }\n  }\n}\n",
            )),
            Self::Redis | Self::Memcached => None,
        }
    }

    /// Its command line; `shared` is where the configuration is.
    pub(crate) fn command(self, bind: Ipv4Addr, port: u16, shared: &str) -> Vec<String> {
        let (bind, port) = (bind.to_string(), port.to_string());
        let words: Vec<String> = match self {
            Self::Redis => [
                "redis-server",
                "--bind",
                &bind,
                "--port",
                &port,
                "--protected-mode",
                "no",
                "--save",
                "",
                "--appendonly",
                "no",
            ]
            .map(str::to_owned)
            .to_vec(),
            Self::Memcached => [
                "memcached",
                "-u",
                "root",
                "-l",
                &bind,
                "-p",
                &port,
                "-U",
                "0",
                "-t",
                "1",
            ]
            .map(str::to_owned)
            .to_vec(),
            Self::Nginx => [
                "nginx",
                "-e",
                "stderr",
                "-c",
                &format!("{shared}/nginx.conf"),
            ]
            .map(str::to_owned)
            .to_vec(),
        };
        words
    }
}
