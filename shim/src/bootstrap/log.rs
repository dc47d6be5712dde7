//! The server's log: the fifo `log` in the bundle, which containerd copies to its own log.
//!
//! A line is written whole or not at all, and nobody ever waits: when containerd does not read, lines are dropped.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::OFlag;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

/// File in the bundle.
pub const FILE: &str = "log";

/// Longest line, below PIPE_BUF so that the kernel writes it in one piece.
const MAX_LINE: usize = 4000;

#[derive(Debug, Clone)]
struct Log {
    fifo: Arc<File>,
    level: Level,
    dropped: Arc<AtomicU64>,
}

/// Sends this process' events (and its panics) to the bundle's log fifo; nowhere when there is none.
pub fn install(bundle: &Path, debug: bool) {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let Ok(log) = Log::open(&bundle.join(FILE), level) else {
        return;
    };
    let panics = log.clone();
    std::panic::set_hook(Box::new(move |info| {
        panics.line(Level::ERROR, &format!("panic: {info}"), "");
    }));
    // Fails when there is one already: then events go there.
    let _ = tracing::subscriber::set_global_default(log);
}

impl Log {
    fn open(path: &Path, level: Level) -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        // As a reader too: then it does not break when containerd restarts.
        options
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits());
        Ok(Self {
            fifo: Arc::new(options.open(path)?),
            level,
            dropped: Arc::default(),
        })
    }

    fn line(&self, level: Level, message: &str, fields: &str) {
        let level = match level {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            _ => "debug",
        };
        let time = OffsetDateTime::now_utc()
            .format(&Rfc3339)
            .unwrap_or_default();
        let mut line = format!(
            "time={time:?} level={level} msg={message:?} runtime=io.containerd.kbp.v1{fields}"
        );
        while line.len() > MAX_LINE {
            line.pop();
        }
        line.push('\n');
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            line = format!(
                "time={time:?} level=warning msg=\"{dropped} log lines were dropped\"\n{line}"
            );
        }
        if (&*self.fifo).write_all(line.as_bytes()).is_err() {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.others, " {name}={value:?}"),
        };
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.line(*event.metadata().level(), &fields.message, &fields.others);
    }

    // Spans are not enabled.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::stat::Mode;

    use super::*;

    fn fifo() -> (tempfile::TempDir, Log, File) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(FILE);
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).expect("make a fifo");
        let log = Log::open(&path, Level::INFO).expect("open the fifo");
        let mut options = OpenOptions::new();
        let reader = options
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&path);
        (directory, log, reader.expect("open the fifo"))
    }

    fn read(reader: &mut File) -> String {
        let mut bytes = vec![0; 1 << 20];
        let count = reader.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    #[test]
    fn a_line_as_containerd_s_own() {
        let (_directory, log, mut reader) = fifo();
        tracing::subscriber::with_default(log, || {
            tracing::warn!(pid = 7, "two\nlines");
            tracing::debug!("too much");
        });
        let text = read(&mut reader);
        let (time, rest) = text.split_once(' ').expect("words");
        assert!(
            time.starts_with("time=\"20") && time.ends_with("Z\""),
            "{time}"
        );
        assert_eq!(
            rest,
            "level=warning msg=\"two\\nlines\" runtime=io.containerd.kbp.v1 pid=7\n"
        );
    }

    #[test]
    fn a_full_fifo_keeps_nobody_waiting_and_the_loss_is_told() {
        let (_directory, log, mut reader) = fifo();
        let long = "x".repeat(2 * MAX_LINE);
        for _ in 0..100 {
            log.line(Level::INFO, &long, "");
        }
        let kept = read(&mut reader);
        assert!(
            kept.lines()
                .all(|line| line.len() <= MAX_LINE && line.starts_with("time=")),
            "whole lines"
        );
        log.line(Level::INFO, "again", "");
        let text = read(&mut reader);
        let lost = 100 - kept.lines().count();
        assert!(
            lost > 0 && text.contains(&format!("{lost} log lines were dropped")),
            "{lost}: {text}"
        );
        assert!(
            text.trim_end()
                .ends_with("msg=\"again\" runtime=io.containerd.kbp.v1"),
            "{text}"
        );
    }
}
