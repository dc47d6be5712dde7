//! `kbp`, the CNI plugin: it gives a container a veth pair that can be busy-polled.
//!
//! A call goes through [`cni`] (environment, configuration, versions, IPAM, result) into one of
//! [`verbs`], which uses [`routed`], [`bridge`] or [`tune`] to work out and apply what the kernel shall have.
//! The only program it ever executes is the IPAM plugin, and none with the built-in [`ipam_local`].
//!
//! A library only so that [`rehearse`] can be given random input; the binary is [`main`] and nothing else.

mod attachment;
mod bridge;
mod cni;
mod ipam_local;
mod masquerade;
mod poller;
mod rehearsal;
mod routed;
mod sysctl;
mod tune;
mod uplink;
mod verbs;
mod verify;
mod wire;

use std::io::Write;
use std::process::ExitCode;

use cni::env::{Call, Verb};
use cni::error::{CniError, Code, Result};
use cni::version::Version;
use serde_json::json;

pub use rehearsal::rehearse;

/// Carries out the call that environment and stdin make; its answer goes to stdout.
pub fn main() -> ExitCode {
    let Some(verb) = std::env::var_os("CNI_COMMAND") else {
        return write_stdout(&introduction());
    };
    // An error has to be in the version of the config; before that is known, in the newest.
    let mut version = Version::NEWEST;
    match run(&verb.to_string_lossy(), &mut version) {
        Ok(output) => write_stdout(&output),
        Err(error) => {
            // Nothing better can be done when even this cannot be written: the exit code stays.
            let _ = write_stdout(&format!("{}\n", error.to_json(version)));
            ExitCode::FAILURE
        }
    }
}

/// Carries out one call and returns what has yet to go to stdout.
fn run(verb: &str, version: &mut Version) -> Result<String> {
    match Verb::parse(verb)? {
        Verb::Version => Ok(format!("{:#}\n", versions())),
        verb => {
            let call = Call::from_environment(verb)?;
            let config = cni::config::Config::from_stdin(version)?;
            config.require_verb(verb)?;
            let done = match verb {
                // It writes the result itself: one that nobody could read is a failure that it has to undo.
                Verb::Add => {
                    verbs::add::add(&call, &config, |result| deliver(&format!("{result:#}\n")))
                }
                Verb::Del => verbs::del::del(&call, &config),
                Verb::Check => verbs::check::check(&call, &config),
                Verb::Gc => verbs::gc::gc(&call, &config),
                Verb::Status => verbs::status::status(&call, &config),
                Verb::Version => Ok(()),
            };
            done.map(|()| String::new())
        }
    }
}

fn versions() -> serde_json::Value {
    json!({
        "cniVersion": Version::NEWEST.as_str(),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

fn introduction() -> String {
    format!(
        "kbp {}: CNI plugin that gives a container a veth pair which can be busy-polled.\n\
         It is called by a container runtime, which sets CNI_COMMAND ({}).\n\
         CNI versions: {}\n",
        env!("CARGO_PKG_VERSION"),
        Verb::NAMES.join(", "),
        Version::ALL.map(Version::as_str).join(", "),
    )
}

fn write_stdout(text: &str) -> ExitCode {
    match deliver(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kbp: {error}");
            ExitCode::FAILURE
        }
    }
}

fn deliver(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| CniError::new(Code::IO, format!("write the result to stdout: {error}")))
}
