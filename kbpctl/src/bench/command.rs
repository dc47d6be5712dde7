//! The command lines of a bench's own clients and servers.

use std::net::SocketAddr;

use anyhow::Result;
use kbp_kernel::CpuId;

use super::arm::Arm;
use super::pair::{DISCARD, Job};

fn talk(job: &Job) -> Result<String> {
    let name = serde_json::to_value(job.talk)?;
    Ok(name.as_str().unwrap_or_default().to_owned())
}

/// The command line of a server that is this program.
pub(super) fn server(
    program: &str,
    job: &Job,
    arm: &Arm,
    bind: SocketAddr,
    ready: &str,
    cpu: Option<CpuId>,
) -> Vec<String> {
    let mut command: Vec<String> = [
        program,
        "load",
        "server",
        "--bind",
        &bind.to_string(),
        "--ready",
        ready,
    ]
    .map(str::to_owned)
    .to_vec();
    command.extend(["--talk".to_owned(), talk(job).unwrap_or_default()]);
    if job.flood.is_some() {
        command.extend(["--discard".to_owned(), DISCARD.to_string()]);
    }
    command.extend(arm.spin.then(|| "--spin".to_owned()));
    command.extend(
        cpu.into_iter()
            .flat_map(|c| ["--cpu".to_owned(), c.to_string()]),
    );
    command
}

/// The command line of a client.
pub(super) fn client(
    program: &str,
    job: &Job,
    arm: &Arm,
    to: SocketAddr,
    out: &str,
    cpu: Option<CpuId>,
) -> Vec<String> {
    let mut command: Vec<String> = [
        program,
        "load",
        "client",
        "--to",
        &to.to_string(),
        "--out",
        out,
    ]
    .map(str::to_owned)
    .to_vec();
    for (flag, value) in [
        ("--talk", talk(job).unwrap_or_default()),
        ("--seconds", job.seconds.to_string()),
        ("--warm-up", job.warm_up.to_string()),
        ("--size", job.size.to_string()),
    ] {
        command.extend([flag.to_owned(), value]);
    }
    command.extend(
        job.rate
            .into_iter()
            .flat_map(|r| ["--rate".to_owned(), r.to_string()]),
    );
    command.extend(arm.spin.then(|| "--spin".to_owned()));
    command.extend(
        cpu.into_iter()
            .flat_map(|c| ["--cpu".to_owned(), c.to_string()]),
    );
    command
}
