//! The small programs of `tests/fixtures`, compiled once into the cargo target directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::binaries::{program, target_dir};
use crate::command;
use crate::error::IoContext;
use crate::{Error, Result};

/// The echo server and client in C, static.
pub fn echo() -> Result<PathBuf> {
    c_program("echo")
}

/// Every way to a socket and an epoll instance, and storms of them, in C, static.
pub fn ways() -> Result<PathBuf> {
    c_program("ways")
}

/// What a pod's sandbox container runs, in C, static.
pub fn pause() -> Result<PathBuf> {
    c_program("pause")
}

/// Says its effective user, in C, static.
pub fn effective_uid() -> Result<PathBuf> {
    c_program("effective-uid")
}

/// The launcher that takes features of the kernel away.
pub fn without() -> Result<PathBuf> {
    c_program("without")
}

/// The echo server in Go, static.
pub fn go_echo() -> Result<PathBuf> {
    go_program("echo.go", "echo-go")
}

/// The HTTP server and client in Go, static.
pub fn go_http() -> Result<PathBuf> {
    go_program("apps/http.go", "http-go")
}

/// The echo server for a JVM: one class file.
pub fn java_echo() -> Result<PathBuf> {
    built("apps/Echo.java", "Echo.class", |source, out, work| {
        let mut command = Command::new("sh");
        // javac takes a directory, and the class file's name is given.
        command
            .args([
                "-c",
                "mkdir -p \"$3\" && \"$0\" -d \"$3\" \"$1\" && mv \"$3/Echo.class\" \"$2\"",
            ])
            .arg(program("javac", "default-jdk-headless")?)
            .arg(source)
            .arg(out)
            .arg(work.join(format!("java.{}", std::process::id())));
        Ok(command)
    })
}

fn go_program(source: &str, name: &str) -> Result<PathBuf> {
    built(source, name, |source, out, work| {
        let go = program("go", "golang-go")?;
        let mut command = Command::new(go);
        // No module, no download, nothing written to the home directory.
        command.args(["build", "-o"]).arg(out).arg(source);
        command
            .env("CGO_ENABLED", "0")
            .env("GO111MODULE", "off")
            .env("GOFLAGS", "");
        command
            .env("GOCACHE", work.join("go-cache"))
            .env("GOPATH", work.join("go-path"));
        Ok(command)
    })
}

/// A program for i386, which an x86-64 kernel runs as well.
pub fn hello_i386() -> Result<PathBuf> {
    built("hello-i386.S", "hello-i386", |source, out, _| {
        let mut command = Command::new(program("gcc", "gcc libc6-dev")?);
        command
            .args(["-m32", "-nostdlib", "-static", "-o"])
            .arg(out)
            .arg(source);
        Ok(command)
    })
}

fn c_program(name: &str) -> Result<PathBuf> {
    built(&format!("{name}.c"), name, |source, out, _| {
        let mut command = Command::new(program("gcc", "gcc libc6-dev")?);
        command
            .args([
                "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o",
            ])
            .arg(out)
            .arg(source);
        Ok(command)
    })
}

/// Builds a program unless it is newer than its source.
fn built(
    source: &str,
    name: &str,
    compiler: impl FnOnce(&Path, &Path, &Path) -> Result<Command>,
) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(source);
    let work = target_dir()
        .ok_or_else(|| Error::Missing {
            what: "cargo's target directory".to_owned(),
            remedy: "run the tests with cargo".to_owned(),
        })?
        .join("fixtures");
    std::fs::create_dir_all(&work).context(|| format!("create {}", work.display()))?;
    let binary = work.join(name);
    let changed = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    if changed(&binary).is_some_and(|built| Some(built) > changed(&source)) {
        return Ok(binary);
    }
    // Another run may do the same: each renames its own into place.
    let fresh = work.join(format!("{name}.{}", std::process::id()));
    command::run(compiler(&source, &fresh, &work)?, Duration::from_secs(180))?.success()?;
    std::fs::rename(&fresh, &binary).context(|| format!("rename {}", fresh.display()))?;
    Ok(binary)
}
