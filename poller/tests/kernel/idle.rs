//! Idle-class workers, towards everybody else.

use crate::gives_way;

#[test]
fn an_idle_worker_gives_way_to_other_cgroups_or_the_state_says_that_it_does_not() {
    gives_way::gives_way_or_says_that_it_does_not();
}
