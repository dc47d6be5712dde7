//! A kernel that lacks something, or a node that forbids it: one system call fails on one thread.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kbp_kernel::notify::{Listener, Received, trap_calling_thread};

/// Runs `work` on a thread on which the system call `number` fails with `errno`, and on no other.
pub(crate) fn with_failing_call<T: Send>(
    number: i64,
    errno: i32,
    work: impl FnOnce() -> T + Send,
) -> T {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let thread = scope.spawn(move || {
            sender
                .send(trap_calling_thread(&[number]))
                .expect("hand over the listener");
            work()
        });
        let fd = receiver
            .recv()
            .expect("a listener")
            .expect("install a filter");
        let listener = Listener::new(fd);
        while !thread.is_finished() {
            match listener.receive().expect("receive") {
                Received::Call(call) => {
                    listener.answer_with_error(call.id, errno).expect("answer");
                }
                Received::Gone | Received::Closed => thread::sleep(Duration::from_millis(1)),
            }
        }
        thread.join().expect("no panic when a call fails")
    })
}
