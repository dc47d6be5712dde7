//! Other programs, run to their end in bounded time.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a Go program on a busy machine to print its version.
const PATIENCE: Duration = Duration::from_secs(5);

/// The executable of that name; a name with a slash is a path already.
pub(crate) fn find(name: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|f| runs(f));
    }
    dirs.iter().map(|dir| dir.join(name)).find(|f| runs(f))
}

/// Whether a file is a program.
pub(crate) fn runs(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The first line that a program prints; an error when that is empty.
pub(crate) fn first_line(file: &Path, args: &[&str]) -> Result<String, String> {
    let text = output(file, args)?;
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() {
        Err("it printed nothing".to_owned())
    } else {
        Ok(line.to_owned())
    }
}

/// What a program prints, when it ends well and in time.
pub(crate) fn output(file: &Path, args: &[impl AsRef<OsStr>]) -> Result<String, String> {
    let mut command = Command::new(file);
    command.args(args);
    let output = run(command, b"")?;
    if output.success {
        return Ok(output.stdout);
    }
    // Its last line says most; a Go program logs many before.
    let said = output.stderr.lines().rev().find(|l| !l.trim().is_empty());
    Err(match said {
        Some(line) => format!("{}: {}", output.status, line.trim()),
        None => output.status,
    })
}

/// How a program ended.
pub(crate) struct Output {
    /// With status 0.
    pub(crate) success: bool,
    /// In words.
    pub(crate) status: String,
    /// Its standard output.
    pub(crate) stdout: String,
    /// Its standard error.
    pub(crate) stderr: String,
}

/// Runs a program with `input` on its standard input to its end; kills it when that does not come in time.
pub(crate) fn run(mut command: Command, input: &[u8]) -> Result<Output, String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("its output could not be read".to_owned());
    };
    let input = input.to_vec();
    // Written and read beside the waiting, or a program that prints more than a pipe holds would never end. A program that does not
    // read its input is no error.
    std::thread::spawn(move || stdin.write_all(&input));
    let stdout = std::thread::spawn(move || text(stdout));
    let stderr = std::thread::spawn(move || text(stderr));
    let until = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status,
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("no answer within {} s", PATIENCE.as_secs()));
            }
        }
    };
    let gone = |_| "its output could not be read".to_owned();
    Ok(Output {
        success: status.success(),
        status: status.to_string(),
        stdout: stdout.join().map_err(gone)?,
        stderr: stderr.join().map_err(gone)?,
    })
}

fn text(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    // What came before an error is still worth reading.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first word of a version line that looks like a version.
pub(crate) fn major_minor(line: &str) -> Option<(u32, u32)> {
    line.split_whitespace().find_map(|word| {
        let mut parts = word.trim_start_matches('v').split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// A program that is being written cannot be run (ETXTBSY), and the child of another test holds every open file
    /// until it has become its own program: so these tests take turns.
    static TURN: Mutex<()> = Mutex::new(());

    pub(in crate::doctor) struct Program {
        pub(in crate::doctor) dir: tempfile::TempDir,
        _turn: MutexGuard<'static, ()>,
    }

    /// A directory with one program, a shell script.
    pub(in crate::doctor) fn program(name: &str, script: &str) -> (Program, Vec<PathBuf>) {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join(name);
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("write");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("chmod");
        let dirs = vec![PathBuf::from("/nonexistent"), dir.path().to_owned()];
        (Program { dir, _turn: turn }, dirs)
    }

    #[test]
    fn a_file_that_cannot_be_run_is_not_a_program() {
        let (program, dirs) = program("kbp", "");
        let file = program.dir.path().join("kbp");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).expect("chmod");
        assert_eq!(find("kbp", &dirs), None);
        assert_eq!(find("/nonexistent/kbp", &dirs), None);
    }

    #[test]
    fn versions_are_read_from_the_programs_own_words() {
        assert_eq!(major_minor("containerd x 1.6.20~ds1 y"), Some((1, 6)));
        assert_eq!(major_minor("containerd v2.1.9"), Some((2, 1)));
        assert_eq!(major_minor("no version"), None);
    }

    #[test]
    fn a_program_that_fails_says_why_in_its_last_line() {
        let (_program, dirs) = program("x", "echo first >&2; echo the reason >&2; exit 3");
        let error = output(&dirs[1].join("x"), &["y"]).expect_err("it failed");
        assert_eq!(error, "exit status: 3: the reason");
        drop(_program);
        let (_program, dirs) = program("x", "cat");
        let echoed = run(Command::new(dirs[1].join("x")), b"input").expect("cat");
        assert_eq!((echoed.stdout.as_str(), echoed.success), ("input", true));
    }
}
