//! Checkpoint and restore, which the OCI runtime leaves to criu.

use std::fs;
use std::path::Path;
use std::process::Command;

use containerd_shim_protos::api::{CheckpointTaskRequest, Status};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::CheckpointOptions;

use super::create::Restore;
use super::{Container, PID_FILE, read_pid};
use crate::task::error::{Error, Result};

impl Container {
    /// Writes a checkpoint, and ends the container if the options say so.
    pub async fn checkpoint(&self, request: &CheckpointTaskRequest) -> Result<()> {
        let options = decode(&request.options)?;
        let _operation = self.init.operation.lock().await;
        self.init
            .expect("checkpoint a", &[Status::RUNNING, Status::PAUSED])?;

        let own_work = self.bundle.join("criu-work");
        let work = if options.work_path.is_empty() {
            own_work.as_path()
        } else {
            Path::new(&options.work_path)
        };
        let mut command = self.command_with_criu()?;
        command
            .arg("checkpoint")
            .arg("--image-path")
            .arg(&request.path)
            .arg("--work-path")
            .arg(work);
        let switches = [
            (!options.exit, "--leave-running"),
            (options.open_tcp, "--tcp-established"),
            (options.external_unix_sockets, "--ext-unix-sk"),
            (options.terminal, "--shell-job"),
            (options.file_locks, "--file-locks"),
        ];
        command.args(
            switches
                .into_iter()
                .filter(|(on, _)| *on)
                .map(|(_, switch)| switch),
        );
        for namespace in &options.empty_namespaces {
            command.args(["--empty-ns", namespace]);
        }
        if !options.cgroups_mode.is_empty() {
            command.args(["--manage-cgroups-mode", &options.cgroups_mode]);
        }
        command.arg(&self.id);
        let written = self.runtime.run(&self.around.reaper, command, None).await;
        let dump_log = self.bundle.join("criu-dump.log");
        let mut incapable = None;
        if written.is_err() {
            // The reason is in there, and containerd's message points to it.
            let log = work.join("dump.log");
            let _ = fs::copy(&log, &dump_log);
            incapable = fs::read(&log).ok().and_then(|text| why_not_here(&text));
        }
        let _ = fs::remove_dir_all(&own_work);
        if let Some(reason) = incapable {
            return Err(Error::Unimplemented(format!(
                "checkpoint and restore need a criu that works on this kernel: {reason}; install a newer criu (`criu check` tries it)"
            )));
        }
        written.map(drop).map_err(|mut failure| {
            // crun without criu in it: Debian's.
            if failure.message.contains("unknown command checkpoint") {
                return Error::Unimplemented(format!(
                    "the OCI runtime cannot checkpoint ({}): name one that can, as runc does, with `runtime` in kbp's config or BinaryName in the options, \
                     or have crun built with criu",
                    failure.message
                ));
            }
            failure.message = format!("{} path= {}", failure.message, dump_log.display());
            failure.during("OCI runtime checkpoint failed")
        })
    }

    /// Starts from a checkpoint; returns the init's pid.
    pub(super) async fn run_restore(&self, restore: Restore) -> Result<u32> {
        let Restore {
            image,
            mut prepared,
        } = restore;
        let own_work = self.bundle.join("criu-work");
        let work = if self.options.criu_work_path.is_empty() {
            own_work.as_path()
        } else {
            Path::new(&self.options.criu_work_path)
        };
        let mut command = self.command_with_criu()?;
        command
            .args([
                "restore",
                "--detach",
                "--no-subreaper",
                "--image-path",
                &image,
            ])
            .arg("--work-path")
            .arg(work);
        self.run_for_init(command, None, &mut prepared, "OCI runtime restore failed")
            .await?;
        let pid = read_pid(&self.bundle.join(PID_FILE))?;
        self.init_is(pid, prepared.start().await?);
        Ok(pid)
    }

    /// The OCI runtime's command line up to the verb, with a criu to be found in PATH, which is where every version of runc and crun looks.
    fn command_with_criu(&self) -> Result<Command> {
        let mut command = self.runtime.command();
        let named = Path::new(&self.options.criu_path);
        if named.as_os_str().is_empty() {
            require_criu()?;
            return Ok(command);
        }
        let directory = match (named.file_name(), named.parent()) {
            (Some(name), Some(directory)) if name == "criu" && named.is_file() => directory,
            _ => {
                return Err(Error::InvalidArgument(format!(
                    "CriuPath {named:?} of the options: expected is the path of a program that is named criu"
                )));
            }
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let all = [directory.to_owned()].into_iter();
        let all = std::env::join_paths(all.chain(std::env::split_paths(&path)));
        command.env(
            "PATH",
            all.map_err(|error| {
                Error::InvalidArgument(format!("CriuPath {named:?} of the options: {error}"))
            })?,
        );
        Ok(command)
    }
}

/// The options of containerd's clients. Those of containerd 1 send `containerd.linux.runc.CheckpointOptions` to a runtime whose name does
/// not begin with `io.containerd.runc`: the same message with its last two fields the other way round.
fn decode(any: &Any) -> Result<CheckpointOptions> {
    let mut options = CheckpointOptions::parse_from_bytes(&any.value).map_err(|error| {
        Error::InvalidArgument(format!(
            "checkpoint options of type {:?}: {error}",
            any.type_url
        ))
    })?;
    if any
        .type_url
        .ends_with("containerd.linux.runc.CheckpointOptions")
    {
        std::mem::swap(&mut options.image_path, &mut options.work_path);
    }
    Ok(options)
}

/// The first error in criu's log when it came to nothing before it looked at the container: it finds out about the kernel first.
fn why_not_here(log: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(log);
    let mut errors = text.lines().filter_map(|line| {
        let (_, error) = line.split_once("Error (")?;
        error.split_once("): ").map(|(_, what)| what.trim())
    });
    let first = errors.next()?;
    let is_about_kernel = |error: &str| error.contains("initializing kerndat");
    (is_about_kernel(first) || errors.any(is_about_kernel)).then(|| first.to_owned())
}

/// runc and crun both run the program.
fn require_criu() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|directory| directory.join("criu").is_file()) {
        return Ok(());
    }
    Err(Error::Unimplemented(
        "checkpoint and restore need criu, which is not in containerd's PATH: install criu"
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_options_name_the_same_directory() {
        let options = |type_url: &str, value: &[u8]| {
            let any = Any {
                type_url: type_url.to_owned(),
                value: value.to_vec(),
                ..Default::default()
            };
            decode(&any)
        };
        // exit (1); the image's and the work's directory are 8 and 9 in the one, 9 and 8 in the other.
        for (name, value) in [
            (
                "containerd.runc.v1.CheckpointOptions",
                b"\x08\x01\x42\x02/i\x4a\x02/w",
            ),
            (
                "containerd.linux.runc.CheckpointOptions",
                b"\x08\x01\x42\x02/w\x4a\x02/i",
            ),
        ] {
            let options = options(name, value).expect(name);
            assert_eq!(
                (options.exit, options.image_path, options.work_path),
                (true, "/i".to_owned(), "/w".to_owned()),
                "{name}"
            );
        }
        let error = options("some.Options", b"\x42").expect_err("half a field");
        assert!(error.to_string().contains("some.Options"), "{error}");
    }

    #[test]
    fn a_criu_that_does_not_know_the_kernel_is_told_from_a_container_that_cannot_be_dumped() {
        let kernel = "(00.05) Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds\n\
                      (00.06) Error (criu/kerndat.c:1615): kerndat_vdso_fill_symtable failed when initializing kerndat.\n";
        assert_eq!(
            why_not_here(kernel.as_bytes()).as_deref(),
            Some("vdso: Unexpected rt vDSO area bounds")
        );
        let container = "(00.1) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.\n";
        for log in [container, "", "(00.1) Dumping\n"] {
            assert_eq!(why_not_here(log.as_bytes()), None);
        }
    }
}
