//! `kbpctl`: what kbp does on this node now, and what the node lacks for it.

mod bench;
mod doctor;
mod load;
mod manual;
mod report;
mod status;
mod text;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use kbp_poller::error::one_line;

/// sysexits.h EX_USAGE: not to be taken for doctor's 2.
const USAGE: u8 = 64;
/// Below the help of the whole.
const FIRST_STEPS: &str = "\
First steps, as root:
  kbpctl doctor             what this node can do, and the command that mends what it cannot
  kbpctl bench rtt --quick  what kbp gains here, in a minute, from containers that are removed again
  kbpctl status --watch     what kbp does for the pods of this node now";
/// As a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;

/// Says what kbp does on this node, and what the node lacks for it.
#[derive(Debug, Parser)]
#[command(name = "kbpctl", version, about, max_term_width = 100, after_help = FIRST_STEPS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lists the attached pods: veths, NAPI ids, workers, windows, and what is not active and why.
    ///
    /// PARKED% is the share of half a second in which the worker did not run; POLLED the packets that the pod's sockets have taken by
    /// polling, SOCKETS and EPOLLS what was given a window, all since the pod started. `-`: there is none, or it cannot be told.
    #[command(display_order = 3)]
    Status {
        /// Prints JSON: `{"pods": [...], "uplinks": [...], "stale": [...]}`; with --watch one object a line.
        #[arg(long)]
        json: bool,
        /// Live, like top: q ends, n p b c s m sort, r reverses, d shows the reasons of the pod that the arrows choose.
        #[arg(long, short)]
        watch: bool,
        /// Seconds between two readings of --watch.
        #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
        interval: f64,
        /// Also says why each worker and each window was chosen.
        #[arg(long, short)]
        verbose: bool,
        /// Directory of the state files [default: `state-dir` of the config file, else /run/kbp].
        #[arg(long, value_name = "PATH")]
        state_dir: Option<PathBuf>,
    },
    /// Measures what kbp gains on this node, between containers that it makes and removes.
    #[command(subcommand, display_order = 2)]
    Bench(bench::What),
    /// Packs everything that a report of a fault needs into one tar archive, without secrets.
    #[command(display_order = 4)]
    Report {
        /// The archive [default: kbp-report-TIME.tar here]; a file that is there is not replaced.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Socket of the containerd whose configuration is looked at.
        #[arg(long, value_name = "SOCKET", env = "CONTAINERD_ADDRESS", default_value = doctor::containerd::SOCKET)]
        address: PathBuf,
    },
    /// Prints the completions of a shell.
    #[command(hide = true)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Writes the man pages into a directory.
    #[command(hide = true)]
    Man {
        /// The directory.
        dir: PathBuf,
    },
    /// The processes inside of a bench's containers.
    #[command(subcommand, hide = true)]
    Load(load::Load),
    /// Removes what a bench made when the bench ends, however it ends.
    #[command(hide = true)]
    BenchKeeper {
        #[arg(long)]
        ctr: PathBuf,
        #[arg(long)]
        address: PathBuf,
    },
    /// Tries everything that kbp needs from this kernel and node, and says what to do where something is missing.
    ///
    /// Exit status: 0 all is well, 1 something is degraded, 2 something is broken, 64 wrong usage.
    #[command(display_order = 1)]
    Doctor {
        /// Prints JSON: `{"verdict": "...", "checks": [...]}`.
        #[arg(long)]
        json: bool,
        /// Socket of the containerd whose configuration and PATH are looked at.
        #[arg(long, value_name = "SOCKET", env = "CONTAINERD_ADDRESS", default_value = doctor::containerd::SOCKET)]
        address: PathBuf,
    },
}

/// An interval that neither spins nor seems dead.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number from 0.1 to 3600".to_owned()),
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            // Nothing can be said when the terminal is gone.
            let _ = usage.print();
            return ExitCode::from(if usage.use_stderr() { USAGE } else { 0 });
        }
    };
    let outcome = match cli.command {
        Command::Status {
            json,
            watch,
            interval,
            verbose,
            state_dir,
        } => {
            let options = status::Options {
                json,
                verbose,
                watch: watch.then(|| Duration::from_secs_f64(interval)),
            };
            status::run(state_dir.as_deref(), options).map(|text| (text, 0))
        }
        Command::Bench(what) => bench::run(what).map(|text| (text, 0)),
        Command::Report { out, address } => report::run(out, &address).map(|text| (text, 0)),
        Command::Completions { shell } => Ok((manual::completions(Cli::command(), shell), 0)),
        Command::Man { dir } => manual::write(Cli::command(), &dir).map(|text| (text, 0)),
        Command::Load(load) => load::run(load).map(|()| (String::new(), 0)),
        Command::BenchKeeper { ctr, address } => {
            bench::keep(ctr, address).map(|()| (String::new(), 0))
        }
        Command::Doctor { json, address } => doctor::run(json, &address),
    };
    match outcome {
        Ok((text, status)) => {
            let mut stdout = std::io::stdout().lock();
            match stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush())
            {
                // A reader that has gone (`| head`) has read enough.
                Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                    eprintln!("kbpctl: write to stdout: {error}");
                    ExitCode::FAILURE
                }
                _ => ExitCode::from(status),
            }
        }
        Err(error) => {
            eprintln!("kbpctl: {}", one_line(error.as_ref()));
            match error.downcast_ref::<bench::Interrupted>() {
                Some(_) => ExitCode::from(INTERRUPTED),
                None => ExitCode::FAILURE,
            }
        }
    }
}
