//! A program behind a terminal, with a person's fingers and eyes.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::pty::openpty;

use crate::command::{Output, Running, describe, wait_until};
use crate::{Error, Result};

/// A running program whose controlling terminal is ours to type into and read from; killed when dropped.
#[derive(Debug)]
pub struct Terminal {
    name: String,
    path: String,
    master: File,
    output: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    running: Running,
}

impl Terminal {
    /// Starts `command` (made by [`crate::Sandbox::command`] or something above it) behind a terminal of 24 rows and 80 columns.
    pub fn start(command: &Command) -> Result<Self> {
        let name = describe(command);
        let failed = |what: &str, error: String| Error::Command {
            command: name.clone(),
            reason: format!("{what}: {error}"),
        };
        let size = nix::pty::Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty =
            openpty(Some(&size), None).map_err(|e| failed("open a terminal", e.to_string()))?;
        let path = nix::unistd::ttyname(&pty.slave)
            .map_err(|e| failed("name of the terminal", e.to_string()))?;
        let clone = || {
            pty.slave
                .try_clone()
                .map(Stdio::from)
                .map_err(|e| failed("copy the terminal", e.to_string()))
        };
        // The same command line in a session of its own, so that the terminal can become its controlling one and a change of its
        // size is signalled.
        let mut wrapped = Command::new("setsid");
        wrapped
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        wrapped.stdin(clone()?).stdout(clone()?).stderr(clone()?);
        let running = Running::start_as_is(wrapped)?;
        drop(pty.slave);
        let master = File::from(pty.master);
        let mut reader = master
            .try_clone()
            .map_err(|e| failed("copy the terminal", e.to_string()))?;
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO is a terminal's end of file.
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            name,
            path: path.display().to_string(),
            master,
            output,
            seen: Vec::new(),
            running,
        })
    }

    /// Types text.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.master
            .write_all(text.as_bytes())
            .map_err(|e| Error::Command {
                command: self.name.clone(),
                reason: format!("type {text:?}: {e}"),
            })
    }

    /// Everything shown so far.
    pub fn screen(&mut self) -> String {
        while let Ok(bytes) = self.output.try_recv() {
            self.seen.extend(bytes);
        }
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Waits until `text` has been shown, and forgets everything up to its end.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        let name = format!("{text:?} on the terminal of {}", self.name);
        let screen = wait_until(&name, limit, || {
            let screen = self.screen();
            if screen.contains(text) {
                Ok(screen)
            } else {
                Err(format!("{screen:?}"))
            }
        })?;
        let end = screen.find(text).unwrap_or(0) + text.len();
        self.seen = screen.as_bytes()[end..].to_vec();
        Ok(screen[..end].to_owned())
    }

    /// Changes the size of the window, which the kernel signals to the program.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let mut stty = Command::new("stty");
        stty.args([
            "-F",
            &self.path,
            "rows",
            &rows.to_string(),
            "cols",
            &columns.to_string(),
        ]);
        crate::command::run(stty, Duration::from_secs(30))?
            .success()
            .map(drop)
    }

    /// Waits for the end of the program; its output is what the terminal has shown since the last [`Terminal::expect`].
    pub fn wait(&mut self, limit: Duration) -> Result<Output> {
        let Some(mut output) = self.running.wait(limit) else {
            let detail = format!(": {:?}", self.screen());
            return Err(Error::Timeout {
                what: format!("end of {}", self.name),
                seconds: limit.as_secs_f64(),
                detail,
            });
        };
        output.stdout = self.screen();
        Ok(output)
    }
}
