//! What an OCI runtime says of itself, kept below the state directory: asking costs the start of a program, and there is a
//! shim for every pod.

use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Directory of the answers below the state directory.
const PARENT: &str = "runtimes";

/// An answer, and of which file it is. The state directory is empty after a boot, so the kernel is the same too.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    binary: Binary,
    answer: String,
}

/// A program's file as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Binary {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    /// Last change of the file or of what is known of it, in seconds and nanoseconds.
    changed: (i64, i64),
}

impl Binary {
    /// The file that would be run; None also for a script, of which it cannot be told what it runs.
    fn find(name: &str) -> Option<Self> {
        let path = match name.contains('/') {
            true => PathBuf::from(name),
            false => std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|directory| directory.join(name))
                .find(|path| path.is_file())?,
        };
        let mut file = File::open(&path).ok()?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic).ok()?;
        if &magic != b"\x7fELF" {
            return None;
        }
        let metadata = file.metadata().ok()?;
        Some(Self {
            path,
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    fn kept_in(&self, state_dir: &Path) -> PathBuf {
        let hash = Sha256::digest(self.path.as_os_str().as_encoded_bytes());
        let name: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        state_dir.join(PARENT).join(name)
    }
}

/// The answer of `binary`: what was kept, if the file is still the same, else what `ask` finds out.
pub(super) fn of(
    binary: &str,
    state_dir: &Path,
    ask: impl FnOnce() -> Option<Vec<u8>>,
) -> Option<Vec<u8>> {
    let Some(file) = Binary::find(binary) else {
        return ask();
    };
    let path = file.kept_in(state_dir);
    let kept = fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Kept>(&text).ok());
    if let Some(kept) = kept
        && kept.binary == file
    {
        return Some(kept.answer.into_bytes());
    }
    let answer = ask()?;
    // Only what a later shim could understand as well.
    if serde_json::from_slice::<serde::de::IgnoredAny>(&answer).is_ok()
        && let Ok(text) = String::from_utf8(answer.clone())
    {
        let kept = Kept {
            binary: file,
            answer: text,
        };
        if let Err(error) = keep(&path, &kept) {
            tracing::debug!("{} is not kept: {error}", path.display());
        }
    }
    Some(answer)
}

/// Written beside and renamed: other shims read it at any moment.
fn keep(path: &Path, kept: &Kept) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
    }
    let draft = path.with_extension(std::process::id().to_string());
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    let written = serde_json::to_writer(&file, kept).map_err(std::io::Error::from);
    let moved = written.and_then(|()| fs::rename(&draft, path));
    if moved.is_err() {
        let _ = fs::remove_file(&draft);
    }
    moved
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_program_is_asked_again_only_when_it_has_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let state_dir = dir.path().join("state");
        let binary = dir.path().join("runtime");
        fs::write(&binary, b"\x7fELF one").expect("write");
        let name = binary.to_str().expect("UTF-8");
        let asked = Cell::new(0);
        let ask = |answer: &'static str| {
            of(name, &state_dir, || {
                asked.set(asked.get() + 1);
                Some(answer.as_bytes().to_vec())
            })
        };
        for _ in 0..3 {
            assert_eq!(ask("{\"a\":1}").as_deref(), Some(&b"{\"a\":1}"[..]));
        }
        assert_eq!(asked.get(), 1);
        let file = fs::read_dir(state_dir.join(PARENT))
            .expect("the directory")
            .next()
            .expect("a file")
            .expect("an entry");
        let mode = file.metadata().expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // Replaced, as a package manager does it.
        let new = dir.path().join("new");
        fs::write(&new, b"\x7fELF two").expect("write");
        fs::rename(&new, &binary).expect("replace");
        assert_eq!(ask("{\"a\":2}").as_deref(), Some(&b"{\"a\":2}"[..]));
        // What somebody else left there in place of an answer.
        fs::write(file.path(), b"{\"binary\":").expect("write");
        assert_eq!(ask("{\"a\":3}").as_deref(), Some(&b"{\"a\":3}"[..]));
        assert_eq!(asked.get(), 3);
    }

    #[test]
    fn what_could_not_be_told_or_runs_something_else_is_asked_each_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let state_dir = dir.path().join("state");
        let binary = dir.path().join("runtime");
        let name = binary.to_str().expect("UTF-8");
        let asked = Cell::new(0);
        for (program, answer) in [
            ("\x7fELF", Some("no such verb")),
            ("\x7fELF", None),
            ("#!/bin/sh\n", Some("{}")),
        ] {
            fs::write(&binary, program).expect("write");
            for _ in 0..2 {
                let told = of(name, &state_dir, || {
                    asked.set(asked.get() + 1);
                    answer.map(|text| text.as_bytes().to_vec())
                });
                assert_eq!(told.as_deref(), answer.map(str::as_bytes));
            }
        }
        assert_eq!(asked.get(), 6);
        assert!(!state_dir.exists());
    }
}
