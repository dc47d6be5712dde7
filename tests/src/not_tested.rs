//! What this machine lacks the means to test.

use std::fs;
use std::io::Write;

use crate::binaries::target_dir;

/// Says so on the terminal, where nothing is seen of what a test that passes prints, and in a file that `make test` shows at its end.
pub fn not_tested(what: &str) {
    let line = format!("NOT TESTED: {what}\n");
    // A closed terminal is no reason to fail.
    let _ = std::io::stderr().write_all(line.as_bytes());
    let list = target_dir().expect("cargo's target directory").join("tmp");
    fs::create_dir_all(&list).expect("cargo's directory for tests");
    let written = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(list.join("not-tested"))
        .and_then(|mut file| file.write_all(line.as_bytes()));
    written.expect("write to the list of what was not tested");
}
