//! One thread a pod answers the processes of all of it, however many they are.

mod trapped;

use std::sync::{Barrier, Mutex};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Many more than are waited for one by one.
const THREADS: usize = 2_000;

#[test]
fn thousands_of_listeners_are_answered() {
    // A listener, a socket and an epoll instance each.
    let wanted = 4 * THREADS as u64;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    assert!(hard >= wanted, "this test takes {wanted} descriptors");
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).expect("more descriptors");
    }
    let dir = tempfile::tempdir().expect("tempdir");
    // A process with so many threads would lose them under a bound.
    let notifier = trapped::notifier(dir.path(), false);
    let (one_at_a_time, all_there) = (Mutex::new(()), Barrier::new(THREADS));
    std::thread::scope(|scope| {
        let work = || {
            // A runtime is not a thousand: of connections that have said nothing the notifier keeps some dozens.
            let guard = one_at_a_time.lock().expect("nobody panicked");
            trapped::trap(&notifier);
            let early = trapped::one_of_each();
            drop(guard);
            all_there.wait();
            (early, trapped::one_of_each())
        };
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                std::thread::Builder::new()
                    .stack_size(64 * 1024)
                    .spawn_scoped(scope, work)
                    .expect("thread")
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().expect("no panic"), (true, true));
        }
    });
    let counters = notifier.counters();
    assert_eq!(
        (counters.calls_handled, counters.errors),
        (4 * THREADS as u64, 0)
    );
}
