//! Running a program with an input, two outputs and a time limit.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kbp_kernel::process::PidFd;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// No plugin has that much to say; a broken one shall not fill the memory.
const MAX_OUTPUT: usize = 4 << 20;

/// What became of a program.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// How it ended; None: it was killed at the time limit.
    pub(crate) status: Option<ExitStatus>,
    /// What it wrote to stdout.
    pub(crate) stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub(crate) stderr: Vec<u8>,
}

/// A program that has been started and not yet been waited for. Past its time limit, or dropped before its end, it is
/// killed with every process that it has started and left in its process group.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    /// How much of the input it has by now.
    given: usize,
    deadline: Instant,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Why talking to a program came to an end.
#[derive(Debug, PartialEq, Eq)]
enum Talked {
    /// It has closed its outputs, or ended.
    ToTheEnd,
    /// What it wrote is what was waited for.
    Enough,
    /// The time limit came first.
    TooLong,
}

impl Running {
    /// Starts `command`, which has no input yet: it comes as far as it comes without.
    pub(crate) fn start(command: &mut Command, limit: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + limit;
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let running = Self {
            child,
            given: 0,
            deadline,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        let Child {
            stdin,
            stdout,
            stderr,
            ..
        } = &running.child;
        let pipes = [
            stdin.as_ref().map(AsFd::as_fd),
            stdout.as_ref().map(AsFd::as_fd),
            stderr.as_ref().map(AsFd::as_fd),
        ];
        for pipe in pipes.into_iter().flatten() {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(running)
    }

    /// Gives it as much of `input` as its pipe takes at once: nearly always all of it, so that it can work while the
    /// caller does something else.
    pub(crate) fn give(&mut self, input: &[u8]) -> io::Result<()> {
        give(&mut self.child.stdin, input, &mut self.given)
    }

    /// What it has written to stdout, as soon as `is_whole` says that this is all; None: it has not said so and ended,
    /// or come to its time limit, which [`Running::finish`] tells apart. `input` is all that it is to be given.
    pub(crate) fn answer<T>(
        &mut self,
        input: &[u8],
        is_whole: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let mut answer = None;
        self.talk(input, |stdout| {
            answer = is_whole(stdout);
            answer.is_some()
        })?;
        Ok(answer)
    }

    /// Waits for its end or the time limit. `input` is all that it is to be given. What it has started and left behind
    /// may hold its outputs for longer: that says nothing more for it.
    pub(crate) fn finish(mut self, input: &[u8]) -> io::Result<Outcome> {
        let outcome = self.give(input).and_then(|()| self.await_end(input));
        if !matches!(outcome, Ok(Some(_))) {
            self.kill()?;
        }
        Ok(Outcome {
            status: outcome?,
            stdout: std::mem::take(&mut self.stdout),
            stderr: std::mem::take(&mut self.stderr),
        })
    }

    fn await_end(&mut self, input: &[u8]) -> io::Result<Option<ExitStatus>> {
        self.await_end_alone()?;
        // Who came to its end in time has done so, however late we look.
        if self.child.try_wait()?.is_none() && self.talk(input, |_| false)? == Talked::TooLong {
            return Ok(None);
        }
        let status = wait(&mut self.child, self.deadline)?;
        // What it said last, which is all in the pipes by now.
        read_some(&mut self.child.stdout, &mut self.stdout)?;
        read_some(&mut self.child.stderr, &mut self.stderr)?;
        Ok(status)
    }

    /// Waits a little for its end alone. Who has its input and says no more than its pipes hold ends without our reading them,
    /// and then there is one thing to wake up for instead of three: the ends of two pipes and its own.
    fn await_end_alone(&self) -> io::Result<()> {
        const A_LITTLE: Duration = Duration::from_millis(20);
        if self.child.stdin.is_some() {
            return Ok(());
        }
        match PidFd::open(self.child.id()) {
            Ok(process) => await_exit(&process, A_LITTLE),
            // A filter forbids to ask for it.
            Err(_) => Ok(()),
        }
    }

    /// Writes the input and reads both outputs, to their ends, to the program's own end, or until stdout is `enough`.
    fn talk(&mut self, input: &[u8], mut enough: impl FnMut(&[u8]) -> bool) -> io::Result<Talked> {
        let process = PidFd::open(self.child.id());
        let Child {
            stdin,
            stdout: out,
            stderr: err,
            ..
        } = &mut self.child;
        // None where a filter forbids to ask for it.
        let process = process.ok();
        loop {
            if out.is_none() && err.is_none() {
                return Ok(Talked::ToTheEnd);
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Talked::TooLong);
            }
            let mut fds: Vec<_> = [
                stdin
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)),
                out.as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
                err.as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
                process
                    .as_ref()
                    .map(|process| PollFd::new(process.as_fd(), PollFlags::POLLIN)),
            ]
            .into_iter()
            .flatten()
            .collect();
            match poll(&mut fds, whole_milliseconds(left)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let ended = process.is_some() && fds.last().and_then(PollFd::any).unwrap_or_default();
            drop(fds);
            give(stdin, input, &mut self.given)?;
            let before = self.stdout.len();
            read_some(out, &mut self.stdout)?;
            read_some(err, &mut self.stderr)?;
            if self.stdout.len() > before && enough(&self.stdout) {
                return Ok(Talked::Enough);
            }
            // Then all that it has written was there to be read.
            if ended {
                return Ok(Talked::ToTheEnd);
            }
        }
    }

    fn kill(&mut self) -> io::Result<()> {
        // Its process id is the group's, and it is still ours: nobody has waited for it yet.
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        self.child.wait().map(drop)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An end that was waited for is remembered: then there is nothing to do.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.kill();
        }
    }
}

/// Writes what the pipe takes of the rest of `input`, and closes it at the end.
fn give(stdin: &mut Option<ChildStdin>, input: &[u8], given: &mut usize) -> io::Result<()> {
    while let Some(pipe) = stdin {
        let rest = input.get(*given..).unwrap_or_default();
        if rest.is_empty() {
            *stdin = None;
            break;
        }
        match pipe.write(rest) {
            Ok(written) => *given += written,
            Err(error) if would_block(&error) => break,
            // It has closed its stdin: that is its own business, its exit status says the rest.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => *given = input.len(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads what is there now; at the end of the pipe it becomes None.
fn read_some(pipe: &mut Option<impl Read>, to: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 8192];
    while let Some(reader) = pipe {
        match reader.read(&mut buffer) {
            Ok(0) => *pipe = None,
            Ok(n) if to.len() + n > MAX_OUTPUT => {
                return Err(io::Error::other(format!(
                    "it wrote more than {MAX_OUTPUT} bytes"
                )));
            }
            Ok(n) => to.extend_from_slice(&buffer[..n]),
            Err(error) if would_block(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Waits for a program that has closed its outputs, which is to say that it is about to end.
fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    // The kernel tells of its end at once. Only where a filter forbids to ask for that it is looked at again and again.
    let mut process = None;
    let mut pause = Duration::from_micros(50);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        match process.get_or_insert_with(|| PidFd::open(child.id())) {
            Ok(process) => await_exit(process, left)?,
            Err(_) => {
                std::thread::sleep(pause.min(left));
                pause = (pause * 2).min(Duration::from_millis(10));
            }
        }
    }
}

fn await_exit(process: &PidFd, limit: Duration) -> io::Result<()> {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, whole_milliseconds(limit)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Rounded up, or the last millisecond would be spent in a loop.
fn whole_milliseconds(left: Duration) -> PollTimeout {
    PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, input: &[u8], limit: Duration) -> io::Result<Outcome> {
        run(Command::new("/bin/sh").arg("-c").arg(script), input, limit)
    }

    fn run(command: &mut Command, input: &[u8], limit: Duration) -> io::Result<Outcome> {
        Running::start(command, limit)?.finish(input)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn input_and_outputs_larger_than_a_pipe_pass() {
        let input: Vec<u8> = (0..1_000_000_u32)
            .flat_map(u32::to_le_bytes)
            .take(1 << 20)
            .collect();
        let outcome = shell("tee /dev/stderr", &input, LONG).expect("runs");
        assert!(outcome.status.expect("ends").success());
        assert!(outcome.stdout == input && outcome.stderr == input);
    }

    #[test]
    fn a_program_that_reads_nothing_is_no_error() {
        let outcome = shell("exit 3", &vec![0; 1 << 20], LONG).expect("runs");
        assert_eq!(outcome.status.expect("ends").code(), Some(3));
    }

    #[test]
    fn past_the_limit_the_whole_group_is_killed() {
        for script in ["sleep 300", "sleep 300 & wait", "exec >&- 2>&-; sleep 300"] {
            let start = Instant::now();
            let outcome = shell(script, b"", Duration::from_millis(100)).expect("runs");
            assert!(outcome.status.is_none(), "{script}");
            assert!(start.elapsed() < LONG, "{script}");
        }
    }

    #[test]
    fn an_answer_is_there_before_the_program_ends() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let go_on = dir.path().join("go-on");
        let script = "printf a; until [ -e \"$0\" ]; do sleep 0.01; done; printf b; exit 3";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).arg(&go_on);
        let mut running = Running::start(&mut command, LONG).expect("starts");
        let whole = |wanted: &'static [u8]| move |out: &[u8]| (out == wanted).then_some(());
        assert_eq!(running.answer(b"", whole(b"a")).expect("talks"), Some(()));
        std::fs::write(&go_on, "").expect("write");
        // Not what is waited for, and then it has ended.
        assert_eq!(running.answer(b"", whole(b"c")).expect("talks"), None);
        let outcome = running.finish(b"").expect("ends");
        assert_eq!(outcome.status.and_then(|status| status.code()), Some(3));
        assert_eq!(outcome.stdout, b"ab");
    }

    #[test]
    fn without_its_input_it_waits() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "read line; echo got $line"]);
        let mut running = Running::start(&mut command, LONG).expect("starts");
        assert!(matches!(running.child.try_wait(), Ok(None)));
        running.give(b"it\n").expect("takes it");
        let outcome = running.finish(b"it\n").expect("ends");
        assert_eq!(outcome.stdout, b"got it\n");
    }

    #[test]
    fn its_end_is_the_end_whoever_else_holds_its_outputs() {
        // With what it has started still there after a moment, and after more than that.
        for pause in ["0", "0.1"] {
            let script = format!("sleep 300 & echo $!; sleep {pause}; echo said >&2; exit 3");
            let outcome = shell(&script, b"", LONG).expect("runs");
            let pid = String::from_utf8_lossy(&outcome.stdout);
            let pid: i32 = pid.trim().parse().expect("a process id");
            nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is there");
            let status = outcome.status.expect("no time limit");
            assert_eq!(status.code(), Some(3), "{pause}");
            assert_eq!(outcome.stderr, b"said\n", "{pause}");
        }
    }

    #[test]
    fn an_end_in_time_counts_however_late_it_is_looked_at() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo in time"]);
        let mut running = Running::start(&mut command, LONG).expect("starts");
        let process = PidFd::open(running.child.id()).expect("a process");
        await_exit(&process, LONG).expect("ends");
        running.deadline = Instant::now();
        let outcome = running.finish(b"").expect("ended");
        assert!(outcome.status.expect("in time").success());
        assert_eq!(outcome.stdout, b"in time\n");
    }

    #[test]
    fn an_answer_with_more_on_stderr_than_a_pipe_holds_is_whole() {
        let script = "read line; echo answer; head -c 1048576 /dev/zero >&2; echo end >&2";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let mut running = Running::start(&mut command, LONG).expect("starts");
        running.give(b"it\n").expect("takes it");
        let answer = running.answer(b"it\n", |out| (out == b"answer\n").then_some(()));
        assert_eq!(answer.expect("talks"), Some(()));
        let outcome = running.finish(b"it\n").expect("ends");
        assert!(outcome.status.expect("ends").success());
        assert_eq!(outcome.stderr.len(), (1 << 20) + 4);
        assert!(outcome.stderr.ends_with(b"end\n"));
    }

    #[test]
    fn one_that_nobody_waits_for_is_killed() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "sleep 300"]);
        let running = Running::start(&mut command, LONG).expect("starts");
        let pid = running.child.id();
        drop(running);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn endless_output_is_an_error() {
        let error = shell("exec cat /dev/zero", b"", LONG).expect_err("too much");
        assert!(error.to_string().contains("4194304"), "{error}");
    }

    #[test]
    fn a_missing_program_is_an_error() {
        assert!(run(&mut Command::new("/nonexistent"), b"", LONG).is_err());
    }
}
