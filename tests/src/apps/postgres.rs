//! PostgreSQL's programs and a database of its own.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::catalogue::{NOBODY, words};
use super::node::AppNode;
use crate::error::IoContext;
use crate::{Error, Result, command};

/// A program of PostgreSQL, of the newest version there is.
pub(super) fn program(name: &str) -> Result<String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    versions
        .map(|v| v.path().join("bin").join(name))
        .filter(|p| p.is_file())
        .max()
        .map(|p| p.display().to_string())
        .ok_or_else(|| Error::Missing {
            what: format!("{name} in /usr/lib/postgresql/*/bin"),
            remedy: "apt-get install postgresql".to_owned(),
        })
}

/// A fresh database cluster that is copied for each server.
pub(super) fn template(node: &AppNode<'_>) -> Result<PathBuf> {
    let dir = node.containerd().sandbox().dir().join("pg");
    let data = dir.join("data");
    if data.is_dir() {
        return Ok(data);
    }
    std::fs::create_dir_all(&dir).context(|| format!("create {}", dir.display()))?;
    std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY))
        .context(|| format!("give {} away", dir.display()))?;
    let mut initdb = Command::new("setpriv");
    initdb
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(program("initdb")?)
        .arg("-D")
        .arg(&data)
        .args(words(
            "-A trust -U postgres --no-sync --locale=C -E UTF8 --no-instructions",
        ))
        .current_dir(&dir)
        .env("HOME", &dir);
    command::run(initdb, Duration::from_secs(120))?.success()?;
    let rules = data.join("pg_hba.conf");
    std::fs::write(
        &rules,
        "host all all 0.0.0.0/0 trust\nlocal all all trust\n",
    )
    .context(|| format!("write {}", rules.display()))?;
    let script = node.files().join("select.sql");
    std::fs::write(&script, "SELECT 6 * 7;\n").context(|| format!("write {}", script.display()))?;
    Ok(data)
}
