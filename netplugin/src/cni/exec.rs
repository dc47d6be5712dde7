//! Running a program with an input, two outputs and a time limit.

use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kbp_kernel::process::{self, PidFd};
use kbp_kernel::{CpuId, CpuSet};
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
    pipes: Pipes,
}

/// A program that is being started by a thread of its own, on another CPU than the caller's, so that both get on at once. Dropped, it is killed
/// when it has started.
///
/// Left to itself the kernel may put all that has only just begun to run on one CPU, whether another one has nothing to do or not: who starts a
/// program sleeps until it is loaded and wakes up where it is, and then the two take turns.
#[derive(Debug)]
pub(crate) struct Starting(Option<(Starter, Pipes)>);

/// The thread; it hands back what it started, and with what.
type Starter = JoinHandle<(io::Result<Child>, Command)>;

/// What connects us with a program.
#[derive(Debug)]
struct Pipes {
    /// None: it has all of its input.
    stdin: Option<PipeWriter>,
    /// How much of the input it has by now.
    given: usize,
    /// None: it has closed it.
    stdout: Option<PipeReader>,
    /// None: it has closed it.
    stderr: Option<PipeReader>,
    deadline: Instant,
    /// What it has written to stdout.
    out: Vec<u8>,
    /// What it has written to stderr.
    err: Vec<u8>,
}

impl Pipes {
    /// Makes them the standard files of `command`, which holds its ends from here on until it is dropped.
    fn connect(command: &mut Command, limit: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + limit;
        let (its_stdin, stdin) = pipe()?;
        let (stdout, its_stdout) = pipe()?;
        let (stderr, its_stderr) = pipe()?;
        for ours in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
            fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        command
            .stdin(its_stdin)
            .stdout(its_stdout)
            .stderr(its_stderr)
            .process_group(0);
        Ok(Self {
            stdin: Some(stdin),
            given: 0,
            stdout: Some(stdout),
            stderr: Some(stderr),
            deadline,
            out: Vec::new(),
            err: Vec::new(),
        })
    }

    /// Writes what the pipe takes of the rest of `input`, and closes it at the end.
    fn give(&mut self, input: &[u8]) -> io::Result<()> {
        while let Some(pipe) = &mut self.stdin {
            let rest = input.get(self.given..).unwrap_or_default();
            if rest.is_empty() {
                self.stdin = None;
                break;
            }
            match pipe.write(rest) {
                Ok(written) => self.given += written,
                Err(error) if would_block(&error) => break,
                // It has closed its stdin: that is its own business, its exit status says the rest.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => self.given = input.len(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there now.
    fn read(&mut self) -> io::Result<()> {
        read_some(&mut self.stdout, &mut self.out)?;
        read_some(&mut self.stderr, &mut self.err)
    }
}

/// The CPUs that we may run on, where there are several.
#[derive(Debug, Clone)]
struct Cpus {
    all: CpuSet,
    here: CpuId,
}

impl Cpus {
    fn find() -> Option<Self> {
        let all = process::affinity(0).ok()?;
        let here = process::current_cpu().ok()?;
        (all.len() > 1).then_some(Self { all, here })
    }

    /// Keeps a thread from the CPU on which we are. That it cannot be done is no reason for anything.
    fn elsewhere<T>(&self, thread: &JoinHandle<T>) {
        let others = self.all.iter().filter(|cpu| *cpu != self.here).collect();
        let _ = process::set_affinity_of(thread, &others);
    }

    /// Lets the caller run on any of them.
    fn anywhere(&self) {
        let _ = process::set_affinity(0, &self.all);
    }
}

impl Starting {
    /// Begins to start `command`, which has no input yet: it comes as far as it comes without.
    pub(crate) fn begin(mut command: Command, limit: Duration) -> io::Result<Self> {
        // The thread calls the kernel and nothing else.
        const STACK: usize = 64 << 10;
        let pipes = Pipes::connect(&mut command, limit)?;
        let cpus = Cpus::find();
        let placed = Arc::new(AtomicBool::new(false));
        let body = {
            let (cpus, placed) = (cpus.clone(), Arc::clone(&placed));
            move || {
                while !placed.load(Ordering::Acquire) {
                    thread::park();
                }
                // The program itself may run wherever we may.
                if let Some(cpus) = cpus {
                    cpus.anywhere();
                }
                // What is left of the command is the caller's to drop: here it would keep the program from its CPU.
                (command.spawn(), command)
            }
        };
        let thread = thread::Builder::new().stack_size(STACK).spawn(body)?;
        if let Some(cpus) = cpus {
            cpus.elsewhere(&thread);
        }
        placed.store(true, Ordering::Release);
        thread.thread().unpark();
        Ok(Self(Some((thread, pipes))))
    }

    /// As [`Running::give`]; also when the program cannot be started.
    pub(crate) fn give(&mut self, input: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Some((_, pipes)) => pipes.give(input),
            None => Ok(()),
        }
    }

    /// The program as soon as it is started, or why it cannot be.
    pub(crate) fn started(mut self) -> io::Result<Running> {
        match self.join() {
            Some(running) => running,
            None => Err(io::Error::other("the thread that starts it panicked")),
        }
    }

    /// None: it panicked, or was waited for before.
    fn join(&mut self) -> Option<io::Result<Running>> {
        let (thread, pipes) = self.0.take()?;
        let (child, _command) = thread.join().ok()?;
        Some(child.map(|child| Running { child, pipes }))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        drop(self.join());
    }
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
        let pipes = Pipes::connect(command, limit)?;
        let child = command.spawn();
        // Its ends are its own from here on, or it would never see the end of its input, and we not that of its outputs.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self {
            child: child?,
            pipes,
        })
    }

    /// Gives it as much of `input` as its pipe takes at once: nearly always all of it, so that it can work while the
    /// caller does something else.
    #[cfg(test)]
    pub(crate) fn give(&mut self, input: &[u8]) -> io::Result<()> {
        self.pipes.give(input)
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
        let outcome = self.pipes.give(input).and_then(|()| self.await_end(input));
        if !matches!(outcome, Ok(Some(_))) {
            self.kill()?;
        }
        Ok(Outcome {
            status: outcome?,
            stdout: std::mem::take(&mut self.pipes.out),
            stderr: std::mem::take(&mut self.pipes.err),
        })
    }

    fn await_end(&mut self, input: &[u8]) -> io::Result<Option<ExitStatus>> {
        self.await_end_alone()?;
        // Who came to its end in time has done so, however late we look.
        if self.child.try_wait()?.is_none() && self.talk(input, |_| false)? == Talked::TooLong {
            return Ok(None);
        }
        let status = wait(&mut self.child, self.pipes.deadline)?;
        // What it said last, which is all in the pipes by now.
        self.pipes.read()?;
        Ok(status)
    }

    /// Waits a little for its end alone. Who has its input and says no more than its pipes hold ends without our reading them,
    /// and then there is one thing to wake up for instead of three: the ends of two pipes and its own.
    fn await_end_alone(&self) -> io::Result<()> {
        const A_LITTLE: Duration = Duration::from_millis(20);
        if self.pipes.stdin.is_some() {
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
        // None where a filter forbids to ask for it.
        let process = PidFd::open(self.child.id()).ok();
        let pipes = &mut self.pipes;
        loop {
            if pipes.stdout.is_none() && pipes.stderr.is_none() {
                return Ok(Talked::ToTheEnd);
            }
            let left = pipes.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Talked::TooLong);
            }
            let mut fds: Vec<_> = [
                pipes
                    .stdin
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)),
                pipes
                    .stdout
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
                pipes
                    .stderr
                    .as_ref()
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
            pipes.give(input)?;
            let before = pipes.out.len();
            pipes.read()?;
            if pipes.out.len() > before && enough(&pipes.out) {
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
    fn it_can_be_told_before_it_has_started() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "cat; exit 3"]);
        let mut starting = Starting::begin(command, LONG).expect("begins");
        starting.give(b"it").expect("takes it");
        let running = starting.started().expect("starts");
        let outcome = running.finish(b"it").expect("ends");
        assert_eq!(outcome.stdout, b"it");
        assert_eq!(outcome.status.and_then(|status| status.code()), Some(3));
    }

    #[test]
    fn it_may_run_wherever_we_may() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "grep Cpus_allowed_list /proc/self/status"]);
        let starting = Starting::begin(command, LONG).expect("begins");
        let running = starting.started().expect("starts");
        let outcome = running.finish(b"").expect("ends");
        let its = String::from_utf8(outcome.stdout).expect("text");
        let ours = std::fs::read_to_string("/proc/thread-self/status").expect("status");
        assert!(!its.is_empty() && ours.contains(&its), "{its} in {ours}");
    }

    #[test]
    fn one_that_is_not_told_is_killed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mark = dir.path().to_str().expect("a path of letters").to_owned();
        let mut command = Command::new("/bin/sh");
        // The end of its input alone does not end it.
        command.args(["-c", "sleep 300; :", &mark]);
        drop(Starting::begin(command, LONG).expect("begins"));
        let left = std::fs::read_dir("/proc").expect("proc").flatten();
        let mut left = left.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        assert!(!left.any(|line| String::from_utf8_lossy(&line).contains(&mark)));
    }

    #[test]
    fn what_cannot_be_started_says_so_when_it_is_asked() {
        let begun = Starting::begin(Command::new("/nonexistent"), LONG);
        let mut starting = begun.expect("begins");
        starting.give(&vec![0; 1 << 20]).expect("nobody takes it");
        let error = starting.started().expect_err("there is no such program");
        assert_eq!(error.kind(), ErrorKind::NotFound);
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
        running.pipes.deadline = Instant::now();
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
