//! Completions and man pages, from the definitions that the command line itself has.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

/// The script that a shell reads.
pub(crate) fn completions(command: Command, shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut without_hidden(command), "kbpctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes `kbpctl.1` and a page for each subcommand, and returns their names.
pub(crate) fn write(command: Command, dir: &Path) -> Result<String> {
    std::fs::create_dir_all(dir)
        .with_context(|| format!("create {} (man writes into a directory)", dir.display()))?;
    clap_mangen::generate_to(without_hidden(command), dir)
        .with_context(|| format!("write man pages into {}", dir.display()))?;
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n.starts_with("kbpctl"))
        .collect();
    names.sort();
    Ok(names.join("\n") + "\n")
}

/// What people are not meant to call is neither completed nor described.
fn without_hidden(command: Command) -> Command {
    let mut shown = Command::new("kbpctl")
        .about(command.get_about().cloned().unwrap_or_default())
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(command.get_after_help().cloned().unwrap_or_default())
        .subcommand_required(true);
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        shown = shown.subcommand(sub.clone());
    }
    shown
}
