//! The beginning of a program that is started for every call and over within milliseconds.
//!
//! Before `main` the standard library looks for the bounds of the stack in `/proc/self/maps`, and gives every thread a stack for the handler
//! that tells of an overflow; the C library gives every thread a heap of its own. Together that is a tenth of a millisecond.

use std::process::ExitCode;

/// Makes a function without arguments that returns [`ExitCode`] the program's beginning, in a crate with `#![no_main]`.
///
/// The standard library works as usual in it, but for this: a stack that overflows ends the program without a word, and what is in the buffer of
/// `stdout` when the function returns is not written.
#[macro_export]
macro_rules! short_lived_main {
    ($main:path) => {
        // SAFETY: every C program has one `main`, and with `no_main` the standard library brings none.
        #[unsafe(no_mangle)]
        extern "C" fn main() -> ::core::ffi::c_int {
            $crate::process::run_short_lived($main)
        }
    };
}

/// What [`short_lived_main!`](crate::short_lived_main) makes: does what the standard library does before `main` and cannot be left out, calls
/// `main` and ends the process with status 0 or 1.
#[doc(hidden)]
pub fn run_short_lived(main: fn() -> ExitCode) -> ! {
    open_standard_files();
    // SAFETY: no handler is installed. A reader that has gone is an error of the write, not the end of the program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers, and there is no other thread yet. What fails leaves every thread with a heap of its own.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
    let status = i32::from(main() != ExitCode::SUCCESS);
    // SAFETY: whatever another thread does, nothing of this process is used any more.
    unsafe { libc::_exit(status) }
}

/// Has the three standard files be something. Otherwise the first files that are opened would be taken for them.
fn open_standard_files() {
    for number in 0..=2 {
        // SAFETY: no pointers.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
            // SAFETY: the path ends with a zero byte. The lowest free number is this one, which nobody closes.
            unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
        }
    }
}
