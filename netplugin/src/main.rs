//! `kbp`, the CNI plugin: it gives a container a veth pair that can be busy-polled.
//!
//! A call goes through [`cni`] (environment, configuration, versions, IPAM, result) into one of
//! [`verbs`], which uses [`routed`] to work out and apply what the kernel shall have.
//! The only program it ever executes is the IPAM plugin.

mod attachment;
mod cni;
mod routed;
mod sysctl;
mod verbs;

use std::io::Write;
use std::process::ExitCode;

use cni::env::{Call, Verb};
use cni::error::{CniError, Code, Result};
use cni::version::Version;
use serde_json::json;

fn main() -> ExitCode {
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

/// Carries out one call and returns what belongs on stdout.
fn run(verb: &str, version: &mut Version) -> Result<String> {
    match Verb::parse(verb)? {
        Verb::Version => Ok(format!("{:#}\n", versions())),
        verb => {
            let call = Call::from_environment(verb)?;
            let config = cni::config::Config::from_stdin(version)?;
            config.require_verb(verb)?;
            let output = match verb {
                Verb::Add => Some(verbs::add::add(&call, &config)?),
                Verb::Del => verbs::del::del(&call, &config).map(|()| None)?,
                Verb::Check => verbs::check::check(&call, &config).map(|()| None)?,
                Verb::Gc => verbs::gc::gc(&call, &config).map(|()| None)?,
                Verb::Status => verbs::status::status(&call, &config).map(|()| None)?,
                Verb::Version => None,
            };
            Ok(output
                .map(|result| format!("{result:#}\n"))
                .unwrap_or_default())
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
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = CniError::new(Code::IO, format!("write the result to stdout: {error}"));
            eprintln!("kbp: {error}");
            ExitCode::FAILURE
        }
    }
}
