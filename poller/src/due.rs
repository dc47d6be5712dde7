//! How long a thread waits for what is due.

use std::time::Instant;

use nix::poll::PollTimeout;

/// Timeout of a wait that is to end when `due` has come; None: when something happens. Rounded up, so that what is due is
/// due when the wait returns. It serves poll and epoll.
pub(crate) fn timeout_until(due: Option<Instant>) -> PollTimeout {
    let Some(due) = due else {
        return PollTimeout::NONE;
    };
    due.saturating_duration_since(Instant::now())
        .as_micros()
        .div_ceil(1000)
        .try_into()
        .unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_due_is_due_when_the_wait_returns() {
        assert_eq!(timeout_until(None), PollTimeout::NONE);
        let past = Instant::now();
        assert_eq!(timeout_until(Some(past)), PollTimeout::ZERO);
        let due = Instant::now() + Duration::from_secs(60);
        let wait = timeout_until(Some(due)).as_millis().expect("an end");
        let left = due.saturating_duration_since(Instant::now());
        assert!(
            left <= Duration::from_millis(wait.into()),
            "{wait} ms for {left:?}"
        );
        let never = Instant::now() + Duration::from_secs(60 * 60 * 24 * 365);
        assert_eq!(timeout_until(Some(never)), PollTimeout::MAX);
    }
}
