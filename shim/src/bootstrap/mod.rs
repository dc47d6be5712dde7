//! The contract of the binary with containerd.
//!
//! containerd runs the binary in the bundle: `start` ([`start`]) leaves a server process ([`server`]) behind and prints
//! its address, `delete` ([`delete`]) cleans up after a server that died, `-info` ([`info`]) describes the runtime. Standard
//! output carries the answer and nothing else; what there is to say goes to the fifo `log` in the bundle ([`log`]).

pub mod address;
pub mod caller;
pub mod delete;
pub mod detached;
pub mod flags;
pub mod info;
pub mod log;
pub mod server;
pub mod start;

use std::io::{Read, Write};
use std::process::ExitCode;

use anyhow::Context;
use containerd_shim_protos::protobuf::Message;

use crate::task::container::check_id;
use flags::{Action, Flags};

/// Name of the runtime in containerd's configuration.
pub const RUNTIME_NAME: &str = "io.containerd.kbp.v1";

/// containerd's own limit for what it sends is far below.
const MAX_INPUT: u64 = 10 << 20;

/// Does what the command line asks for. An error goes to standard error, which containerd shows to its client.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{RUNTIME_NAME}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes; most of ours repeat theirs already.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run() -> anyhow::Result<()> {
    let flags = Flags::parse(std::env::args().skip(1))?;
    if flags.version {
        println!("containerd-shim-kbp-v1:");
        println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        let info = info::runtime_info(&read_input()?)?;
        return answer(&info.write_to_bytes()?);
    }
    anyhow::ensure!(
        !flags.namespace.is_empty(),
        "flag -namespace is missing: containerd always gives it"
    );
    check_id("flag -namespace:", &flags.namespace)?;
    if !flags.id.is_empty() {
        check_id("flag -id:", &flags.id)?;
    }
    match flags.action {
        Action::Start => answer(&start::start(&flags, &read_input()?)?),
        Action::Delete => answer(&delete::delete(&flags)?.write_to_bytes()?),
        Action::Serve => server::serve(&flags),
    }
}

fn read_input() -> anyhow::Result<Vec<u8>> {
    let mut input = Vec::new();
    std::io::stdin()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .context("read standard input")?;
    Ok(input)
}

fn answer(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .context("write the answer to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let inner =
            crate::task::Error::io("read x")(std::io::Error::from(std::io::ErrorKind::NotFound));
        let error = anyhow::Error::from(inner).context("start");
        assert_eq!(chain(&error), "start: read x: entity not found");
        assert_eq!(chain(&anyhow::anyhow!("alone")), "alone");
    }
}
