//! A headless browser, for pages that people look at.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use crate::binaries::program;
use crate::command;
use crate::error::{Error, IoContext, Result};

const LIMIT: Duration = Duration::from_secs(60);
/// What stands in front of what the page's own observer writes to the console.
const SAID: &str = "kbp-tests saw ";
/// A window is never narrower than 500 pixels, so the page is put into a frame. Asked once it is drawn: sizes are those on the screen.
const OBSERVER: &str = r#"<script>onload = () => requestAnimationFrame(() => {
  const page = document.querySelector("iframe").contentWindow, root = page.document.documentElement;
  const seen = e => { const b = e.getBoundingClientRect(); return Math.max(b.width, b.height) > 5 && b.right <= root.clientWidth + 1; };
  const curves = [...page.document.querySelectorAll("polyline")], paper = page.getComputedStyle(page.document.body).backgroundColor;
  console.log("kbp-tests saw " + JSON.stringify({
    title: page.document.title, width: root.clientWidth, needed: root.scrollWidth, dark: page.matchMedia("(prefers-color-scheme: dark)").matches,
    paper, ink: page.getComputedStyle(page.document.body).color, curves: curves.length, visible: curves.filter(seen).length,
    strokes: curves.map(c => page.getComputedStyle(c).stroke),
  }));
});</script>"#;

/// A page as a browser shows it.
#[derive(Debug, Deserialize)]
pub struct Seen {
    /// The document's title.
    pub title: String,
    /// Width of the view, in CSS pixels.
    pub width: u32,
    /// Width that the page takes; more than `width` means that it is to be moved sideways.
    pub needed: u32,
    /// Whether the page was asked to be dark.
    pub dark: bool,
    /// Colour of the background, as CSS writes it.
    pub paper: String,
    /// Colour of the text.
    pub ink: String,
    /// Polylines of the page.
    pub curves: usize,
    /// Those that have an extent, inside of the view.
    pub visible: usize,
    /// The polylines' colours.
    pub strokes: Vec<String>,
    /// What was written to the console.
    #[serde(skip)]
    pub console: Vec<String>,
}

/// Chromium or its kin; none where there is none.
pub fn browser() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    names.iter().find_map(|name| program(name, name).ok())
}

/// Opens the file `page` as a browser of that width does, and says what is seen. With `picture` what is seen is also left there as PNG.
///
/// # Errors
/// The file cannot be read, or the browser does not end or says nothing.
pub fn look(
    browser: &Path,
    page: &Path,
    width: u32,
    dark: bool,
    picture: Option<&Path>,
) -> Result<Seen> {
    let text = std::fs::read_to_string(page).context(|| format!("read {}", page.display()))?;
    let dir = tempfile::tempdir().context(|| "make a directory for the browser".to_owned())?;
    let frame = dir.path().join("frame.html");
    let inner = text.replace('&', "&amp;").replace('"', "&quot;");
    let outer = format!(
        "<!DOCTYPE html>\n<meta charset=\"utf-8\">\n<link rel=\"icon\" href=\"data:,\">\n<style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>\n\
         <iframe width=\"{width}\" height=\"4000\" srcdoc=\"{inner}\"></iframe>\n{OBSERVER}\n"
    );
    std::fs::write(&frame, outer).context(|| format!("write {}", frame.display()))?;
    let mut command = Command::new(browser);
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu"])
        .args(["--disable-quic", "--no-first-run", "--disable-sync"])
        .args(["--disable-background-networking"])
        .args(["--disable-component-update", "--enable-logging=stderr"])
        .arg(format!("--user-data-dir={}", dir.path().display()))
        .arg(format!("--window-size={},4000", width.max(500)))
        .env("HOME", dir.path());
    if dark {
        command.arg("--blink-settings=preferredColorScheme=0");
    }
    let drawn = dir.path().join("picture.png");
    let drawn = picture.unwrap_or(&drawn);
    command
        .arg(format!("--screenshot={}", drawn.display()))
        .arg(format!("file://{}", frame.display()));
    let output = command::run(command, LIMIT)?.success()?;
    let lines = output.stderr.lines().filter(|l| l.contains(":CONSOLE"));
    let (own, console): (Vec<&str>, Vec<&str>) = lines.partition(|l| l.contains(SAID));
    let json = own.first().and_then(|l| {
        let (_, rest) = l.split_once(SAID)?;
        Some(&rest[..=rest.rfind('}')?])
    });
    let seen = json.and_then(|json| serde_json::from_str::<Seen>(json).ok());
    let seen = seen.ok_or_else(|| Error::Command {
        command: browser.display().to_string(),
        reason: format!("it does not say what it sees: {output}"),
    })?;
    let console = console.into_iter().map(str::to_owned).collect();
    Ok(Seen { console, ..seen })
}
