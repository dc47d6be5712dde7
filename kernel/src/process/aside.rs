//! A process beside this one that shares its memory and its files: what it makes belongs to it as far as cgroups go, and is used from
//! here all the same. Cgroup v2 moves no single thread out of the cgroup of its process.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};

use super::{PidFd, raw_pid};
use crate::sys::errno;
use crate::{Error, Result};

/// Of which a process beside touches two or three pages, after what it was made for is done.
const STACK: usize = 256 * 1024;

/// A process that shares memory and files with this one and waits for this one's end. Dropping it ends it.
///
/// SIGCHLD is not sent for it, and only a wait with `__WALL` sees it: whoever reaps all children of this process does not meet it.
#[derive(Debug)]
pub struct Aside {
    pid: u32,
    /// Those two are in use as long as it lives.
    _stack: Stack,
    _parent: PidFd,
}

impl Aside {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let Ok(pid) = raw_pid(self.pid) else { return };
        // SAFETY: no pointers. It is a child that nobody has waited for, so the id is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        // SAFETY: no status is wanted.
        while unsafe { libc::waitpid(pid, ptr::null_mut(), libc::__WALL) } == -1
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
    }
}

/// Memory that is a stack.
#[derive(Debug)]
struct Stack(*mut c_void);

// SAFETY: it is memory of the process, which any thread may give back.
unsafe impl Send for Stack {}
// SAFETY: nothing is read or written through it.
unsafe impl Sync for Stack {}

impl Stack {
    fn new() -> Result<Self> {
        // SAFETY: new memory, wherever there is room.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                STACK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error()));
        }
        let stack = Self(at);
        // SAFETY: the lowest page of the above; what grows into it ends there.
        if unsafe { libc::mprotect(at, 4096, libc::PROT_NONE) } == -1 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        Ok(stack)
    }

    fn top(&self) -> *mut c_void {
        // SAFETY: the end of the mapping; page-aligned, as a stack has to be to 16.
        unsafe { self.0.byte_add(STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and whoever ran on it has ended.
        unsafe { libc::munmap(self.0, STACK) };
    }
}

fn failed(source: std::io::Error) -> Error {
    Error::Syscall {
        what: "make a process beside this one (clone)".to_owned(),
        source,
    }
}

/// What the new process is told, and what it answers.
struct Call<F, T> {
    make: Option<F>,
    made: Option<std::thread::Result<T>>,
    /// Readable from the answer on.
    done: RawFd,
    /// A pidfd, readable from the end of this process on.
    parent: RawFd,
}

/// Calls `make` in a process beside this one. What it returns can be used here, and what it made in the kernel lives as long as the
/// [`Aside`], of which it is: threads, for one. The process is in the cgroups of the caller until it is moved.
///
/// # Errors
/// The kernel's, when it makes no process; [`Error::Protocol`] when that ended at once. `make`'s own are in its answer.
///
/// # Panics
/// As `make` does.
pub fn aside<T, F: FnOnce() -> T>(make: F) -> Result<(T, Aside)> {
    let what = || "make a process beside this one".to_owned();
    let parent = PidFd::open(std::process::id())?;
    let done = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(errno(what))?;
    let stack = Stack::new()?;
    let mut call = Call {
        make: Some(make),
        made: None,
        done: done.as_fd().as_raw_fd(),
        parent: parent.fd.as_raw_fd(),
    };
    // The process inherits the mask: it has handlers of this one, which are not for it, and none may interrupt what follows.
    let mut before = SigSet::empty();
    pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut before),
    )
    .map_err(errno(what))?;
    let answer = begin(&mut call, &stack);
    // Whatever it says, the thread goes on as it was.
    let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    let pid = answer.map_err(failed)?;
    let aside = Aside {
        pid: pid.unsigned_abs(),
        _stack: stack,
        _parent: parent,
    };
    match call.made {
        Some(Ok(made)) => Ok((made, aside)),
        Some(Err(panic)) => {
            drop(aside);
            resume_unwind(panic)
        }
        None => Err(Error::Protocol {
            what: what(),
            detail: "it ended before it had done anything".to_owned(),
        }),
    }
}

/// Makes the process and waits until it has answered or ended. All signals are blocked.
fn begin<T, F: FnOnce() -> T>(
    call: &mut Call<F, T>,
    stack: &Stack,
) -> std::io::Result<libc::pid_t> {
    let done = call.done;
    let call: *mut Call<F, T> = call;
    let mut child: libc::c_int = -1;
    // SAFETY: `run` gets the stack and the call for itself until it has answered, for which this waits below. It runs with this thread's
    // thread-local storage (no CLONE_SETTLS), as a child of vfork(2) does: until it has answered, this thread does nothing but wait in
    // the kernel, and from then on `run` touches none of it.
    let pid = unsafe {
        libc::clone(
            run::<T, F>,
            stack.top(),
            libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PIDFD,
            call.cast(),
            &raw mut child,
        )
    };
    if pid == -1 {
        return Err(std::io::Error::last_os_error());
    }
    let mut events = [done, child].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // Not poll(3), which is a cancellation point and notes that in this thread's storage. Nothing can interrupt it.
    // SAFETY: an array of two that outlives the call.
    unsafe { libc::syscall(libc::SYS_poll, events.as_mut_ptr(), 2, -1) };
    // SAFETY: made by clone for this call.
    drop(unsafe { OwnedFd::from_raw_fd(child) });
    Ok(pid)
}

/// What the process does: `make`, the answer, and then nothing until its parent has ended.
extern "C" fn run<T, F: FnOnce() -> T>(call: *mut c_void) -> libc::c_int {
    let call: *mut Call<F, T> = call.cast();
    // SAFETY: see `begin`: the call is this function's alone until the answer.
    let (done, parent) = unsafe {
        let call = &mut *call;
        if let Some(make) = call.make.take() {
            call.made = Some(catch_unwind(AssertUnwindSafe(make)));
        }
        (call.done, call.parent)
    };
    let one = 1u64;
    let mut event = libc::pollfd {
        fd: parent,
        events: libc::POLLIN,
        revents: 0,
    };
    // `syscall` writes to thread-local storage, which is no longer for this function, only when a call fails, and these cannot: all
    // signals are blocked, and both descriptors are open as long as they are wanted.
    // SAFETY: they get pointers to what is on this function's own stack.
    unsafe {
        libc::syscall(libc::SYS_write, done, &raw const one, size_of::<u64>());
        libc::syscall(libc::SYS_poll, &raw mut event, 1, -1);
        libc::syscall(libc::SYS_exit_group, 0);
    }
    0
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::process::{peek_ended, process_of};

    #[test]
    fn what_is_made_there_is_used_here() {
        let text = String::from("made ");
        let (made, aside) = aside(move || (std::process::id(), text + "there")).expect("a process");
        assert_eq!(made, (aside.pid(), "made there".to_owned()));
        assert_ne!(aside.pid(), std::process::id());
        assert_eq!(process_of(aside.pid()).expect("alive"), aside.pid());
        // Its files are this process' files.
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/fd/2")).expect("a file");
        assert_eq!(of(aside.pid()), of(std::process::id()));
        let pid = aside.pid();
        assert_ne!(peek_ended().expect("children"), Some(pid));
        drop(aside);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn the_thread_that_asked_may_end_first_and_keeps_its_signals() {
        let mask = || {
            let mut mask = SigSet::empty();
            pthread_sigmask(SigmaskHow::SIG_SETMASK, None, Some(&mut mask)).expect("mask");
            mask
        };
        let thread = std::thread::spawn(move || {
            let before = mask();
            let (_, aside) = aside(|| ()).expect("a process");
            assert_eq!(before, mask());
            aside
        });
        let aside = thread.join().expect("no panic");
        let status = std::fs::read_to_string(format!("/proc/{}/status", aside.pid()));
        let status = status.expect("it lives");
        assert!(status.contains("State:\tS"), "{status}");
    }

    #[test]
    fn a_panic_there_is_one_here() {
        let panicked = catch_unwind(|| aside(|| panic!("there")).map(drop));
        let panic = panicked.expect_err("a panic");
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"there"));
    }
}
