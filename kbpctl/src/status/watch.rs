//! `kbpctl status --watch`: the same, live, with the keys of `top`.

use std::cmp::Ordering;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Memory};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kbp_poller::state::PodState;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table, TableState, Wrap};

use super::sample::{Previous, Rates, Sampler};
use super::{Status, Written, napis, parts, percent, short, veths, window, worker};

/// Longest wait before a signal or a key is noticed.
const LOOK: Duration = Duration::from_millis(100);

/// What the rows are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Name,
    Packets,
    Polled,
    Worker,
    Sockets,
    Missing,
}

impl Key {
    const ALL: [(char, Self, &'static str); 6] = [
        ('n', Self::Name, "name"),
        ('p', Self::Packets, "packets"),
        ('b', Self::Polled, "busy-polled"),
        ('c', Self::Worker, "CPU of the worker"),
        ('s', Self::Sockets, "sockets"),
        ('m', Self::Missing, "missing parts"),
    ];

    fn word(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, key, _)| *key == self)
            .map_or("", |(_, _, word)| word)
    }
}

/// One pod of the view.
struct Shown {
    pod: PodState,
    rates: Rates,
}

struct View {
    key: Key,
    reverse: bool,
    details: bool,
    selected: TableState,
    shown: Vec<Shown>,
    stale: usize,
    error: Option<String>,
}

/// Runs until `q`, Ctrl-C or a signal. With `json` one object a line and no terminal.
pub(crate) fn run(dir: &Path, interval: Duration, json: bool) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
        signal_hook::consts::SIGINT,
    ] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("take over signals")?;
    }
    if json {
        return lines(dir, interval, &stop);
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        bail!(
            "status --watch draws on a terminal, and this is none: use status --watch --json, or status alone"
        );
    }
    // From here on the terminal is ours; it is given back when this returns and, by the hook that try_init sets, on a panic.
    let mut terminal = ratatui::try_init().context("set up the terminal")?;
    let outcome = draw(&mut terminal, dir, interval, &stop);
    ratatui::restore();
    outcome
}

fn lines(dir: &Path, interval: Duration, stop: &AtomicBool) -> Result<()> {
    let (mut sampler, mut previous) = (Sampler::default(), Previous::default());
    while !stop.load(Memory::Relaxed) {
        let status = Status::read(dir)?;
        let counters = sampler.read(&status.pods);
        let rates = previous.rates(&status.pods, &counters);
        let written = Written::of(&status, &counters, Some(&rates));
        let mut stdout = std::io::stdout().lock();
        let text = serde_json::to_string(&written)? + "\n";
        match stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
        {
            // A reader that has gone has read enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.context("write to stdout")?,
        }
        drop(stdout);
        let until = Instant::now() + interval;
        while !stop.load(Memory::Relaxed) && Instant::now() < until {
            std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
        }
    }
    Ok(())
}

fn draw(
    terminal: &mut ratatui::DefaultTerminal,
    dir: &Path,
    interval: Duration,
    stop: &AtomicBool,
) -> Result<()> {
    let (mut sampler, mut previous) = (Sampler::default(), Previous::default());
    let mut view = View {
        key: Key::Packets,
        reverse: false,
        details: true,
        selected: TableState::default().with_selected(0),
        shown: Vec::new(),
        stale: 0,
        error: None,
    };
    let mut due = Instant::now();
    while !stop.load(Memory::Relaxed) {
        if Instant::now() >= due {
            match Status::read(dir) {
                Ok(status) => {
                    let counters = sampler.read(&status.pods);
                    let rates = previous.rates(&status.pods, &counters);
                    view.stale = status.stale.len();
                    view.shown = status
                        .pods
                        .into_iter()
                        .zip(rates)
                        .map(|(pod, rates)| Shown { pod, rates })
                        .collect();
                    view.error = None;
                }
                // The directory may come back: the daemon of the node is being restarted, say.
                Err(error) => view.error = Some(format!("{error:#}")),
            }
            due = Instant::now() + interval;
        }
        view.sort();
        terminal
            .draw(|frame| view.render(frame, dir))
            .context("draw")?;
        let wait = due.saturating_duration_since(Instant::now()).min(LOOK);
        let came = match event::poll(wait) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => false,
            came => came.context("read the keyboard")?,
        };
        if came
            && let Event::Key(key) = event::read().context("read the keyboard")?
            && key.kind != KeyEventKind::Release
            && !view.press(key.code, key.modifiers)
        {
            return Ok(());
        }
    }
    Ok(())
}

impl View {
    /// Does what a key says; false: end.
    fn press(&mut self, code: KeyCode, modifiers: KeyModifiers) -> bool {
        match code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            // The terminal is raw: no signal comes of it.
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char('d') | KeyCode::Enter => self.details = !self.details,
            KeyCode::Down | KeyCode::Char('j') => self.selected.select_next(),
            KeyCode::Up | KeyCode::Char('k') => self.selected.select_previous(),
            KeyCode::Char(letter) => {
                if let Some((_, key, _)) = Key::ALL.iter().find(|(l, _, _)| *l == letter) {
                    self.key = *key;
                }
            }
            _ => {}
        }
        true
    }

    fn sort(&mut self) {
        let (key, reverse) = (self.key, self.reverse);
        self.shown.sort_by(|a, b| {
            let order = a.compare(b, key);
            if reverse { order.reverse() } else { order }
        });
    }

    fn render(&mut self, frame: &mut Frame<'_>, dir: &Path) {
        let details = if self.details { 9 } else { 0 };
        let [head, table, below, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(3),
            Constraint::Length(details),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let said = match &self.error {
            Some(error) => format!("kbp: {error}"),
            None => format!(
                "kbp: {} pods, {} stale files in {}, by {}{}",
                self.shown.len(),
                self.stale,
                dir.display(),
                self.key.word(),
                if self.reverse { ", reversed" } else { "" }
            ),
        };
        frame.render_widget(Paragraph::new(said), head);
        let header = [
            "POD", "VETH", "WORKER", "CPU", "BUSY%", "PARKED%", "OUT/s", "IN/s", "POLLED/s",
            "SOCKETS", "EPOLLS", "WINDOW", "MISSING",
        ];
        let widths = [
            Constraint::Min(14),
            Constraint::Min(12),
            Constraint::Length(10),
            Constraint::Length(3),
            Constraint::Length(5),
            Constraint::Length(7),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(7),
            Constraint::Length(6),
            Constraint::Length(7),
            Constraint::Min(8),
        ];
        let rows = self.shown.iter().map(|s| Row::new(s.cells()));
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let chosen = Style::new().add_modifier(Modifier::REVERSED);
        let widget = Table::new(rows, widths)
            .header(Row::new(header).style(bold))
            .row_highlight_style(chosen);
        frame.render_stateful_widget(widget, table, &mut self.selected);
        if self.details {
            let lines = self.selected.selected().and_then(|n| self.shown.get(n));
            let lines = lines.map_or_else(Vec::new, Shown::details);
            let paragraph = Paragraph::new(lines).wrap(Wrap { trim: false });
            frame.render_widget(paragraph, below);
        }
        let keys: Vec<String> = Key::ALL
            .iter()
            .map(|(letter, _, word)| format!("{letter} {word}"))
            .collect();
        let keys = format!("q quit  r reverse  d details  sort: {}", keys.join("  "));
        frame.render_widget(Paragraph::new(keys).style(bold), foot);
    }
}

impl Shown {
    fn cells(&self) -> Vec<String> {
        let none = || "-".to_owned();
        let rate = |r: Option<f64>| r.map_or_else(none, |r| format!("{r:.0}"));
        let (worker, cpu) = worker(self.pod.worker.as_ref());
        vec![
            short(&self.pod),
            veths(&self.pod).join(" "),
            worker,
            cpu,
            percent(self.rates.worker_cpu),
            percent(self.rates.parked()),
            rate(self.rates.from_pod),
            rate(self.rates.to_pod),
            rate(self.rates.polled_by_sockets),
            self.pod.sockets.sockets_set.to_string(),
            self.pod.sockets.epolls_given.to_string(),
            window(&self.pod),
            parts(&self.pod),
        ]
    }

    fn details(&self) -> Vec<Line<'static>> {
        let pod = &self.pod;
        let mut lines = vec![
            Line::from(format!("{}/{}", pod.namespace, pod.id)),
            Line::from(format!("NAPI: {}", napis(pod).join(", "))),
            Line::from(format!("worker: {}", pod.worker_reason)),
            Line::from(format!("window: {}", pod.busy_poll_reason)),
            Line::from(format!(
                "calls: {} trapped, {} failed",
                pod.sockets.calls_handled, pod.sockets.errors
            )),
        ];
        lines.extend(
            pod.degraded
                .iter()
                .map(|d| Line::from(format!("missing {}: {}", d.part, d.reason))),
        );
        lines
    }

    /// The busiest first; by name where two are alike, so that rows do not dance.
    fn compare(&self, other: &Self, key: Key) -> Ordering {
        let name = |s: &Self| (s.pod.namespace.clone(), s.pod.id.clone());
        let packets = |s: &Self| s.rates.from_pod.unwrap_or(0.0) + s.rates.to_pod.unwrap_or(0.0);
        let falling = |f: &dyn Fn(&Self) -> f64| f(other).total_cmp(&f(self));
        let order = match key {
            Key::Name => Ordering::Equal,
            Key::Packets => falling(&packets),
            Key::Polled => falling(&|s| s.rates.polled_by_sockets.unwrap_or(0.0)),
            Key::Worker => falling(&|s| s.rates.worker_cpu.unwrap_or(-1.0)),
            Key::Sockets => falling(&|s| s.pod.sockets.sockets_set as f64),
            Key::Missing => falling(&|s| s.pod.degraded.len() as f64),
        };
        order.then_with(|| name(self).cmp(&name(other)))
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::tests::pod;
    use super::*;

    fn view() -> View {
        let shown = |id: &str, packets, sockets| {
            let mut pod = pod();
            pod.id = id.to_owned();
            pod.sockets.sockets_set = sockets;
            Shown {
                pod,
                rates: Rates {
                    from_pod: Some(packets),
                    worker_cpu: Some(0.25),
                    ..Rates::default()
                },
            }
        };
        View {
            key: Key::Packets,
            reverse: false,
            details: true,
            selected: TableState::default().with_selected(0),
            shown: vec![shown("quiet", 1.0, 9), shown("busy", 1000.0, 2)],
            stale: 0,
            error: None,
        }
    }

    fn order(view: &mut View) -> Vec<String> {
        view.sort();
        view.shown.iter().map(|s| s.pod.id.clone()).collect()
    }

    #[test]
    fn keys_sort_and_end() {
        let mut view = view();
        let none = KeyModifiers::NONE;
        assert_eq!(order(&mut view), ["busy", "quiet"]);
        assert!(view.press(KeyCode::Char('s'), none));
        assert_eq!(order(&mut view), ["quiet", "busy"]);
        assert!(view.press(KeyCode::Char('r'), none));
        assert_eq!(order(&mut view), ["busy", "quiet"]);
        assert!(view.press(KeyCode::Char('c'), none));
        assert!(!view.press(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!view.press(KeyCode::Char('q'), none));
        assert!(!view.press(KeyCode::Esc, none));
    }

    #[test]
    fn a_frame_shows_pods_reasons_and_keys() {
        let mut view = view();
        view.sort();
        let mut terminal = Terminal::new(TestBackend::new(160, 24)).expect("terminal");
        terminal
            .draw(|frame| view.render(frame, Path::new("/run/kbp")))
            .expect("draw");
        let shown = terminal.backend().to_string();
        for text in [
            "k8s.io/busy",
            "1000",
            "25",
            "75",
            "20 µs",
            "NAPI: ",
            "missing epoll-busy-poll: the kernel is too old",
            "q quit",
        ] {
            assert!(shown.contains(text), "{text}: {shown}");
        }
        // A small window is no reason to panic.
        let mut tiny = Terminal::new(TestBackend::new(5, 2)).expect("terminal");
        tiny.draw(|frame| view.render(frame, Path::new("/run/kbp")))
            .expect("draw");
    }
}
