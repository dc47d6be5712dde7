//! A call of an unmodified program waits for the notifier: on its way nothing is allocated, which could block or fail.

mod trapped;

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CALLS: usize = 2_000;

// The only test of this process: its allocator counts those of every thread.
#[test]
fn answering_a_call_allocates_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let notifier = trapped::notifier(dir.path(), true);
    let (made, allocated) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            trapped::trap(&notifier);
            // The first ones grow what is kept.
            assert_eq!((0..10).filter(|_| trapped::one_of_each()).count(), 10);
            let region = Region::new(ALLOCATOR);
            let made = (0..CALLS).filter(|_| trapped::one_of_each()).count();
            (made, region.change().allocations)
        });
        thread.join().expect("no panic in the trapped thread")
    });
    assert_eq!(made, CALLS);
    assert_eq!(notifier.counters().errors, 0);
    // libtest's own thread may do something once in a while.
    assert!(
        allocated < 20,
        "{allocated} allocations for {CALLS} sockets and epoll instances"
    );
}
