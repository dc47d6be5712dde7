//! What is known of each kernel. The code never looks at versions: it tries. These tests say that what it finds is what is there.

use kbp_kernel::probe;
use kbp_poller::policy::{Profile, WorkerPolicy};

/// What a kernel of a series has.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) series: &'static str,
    /// `netdev napi-get` (6.8).
    pub(crate) napi_ids: bool,
    /// EPIOCSPARAMS (6.9).
    pub(crate) epoll: bool,
    /// SQPOLL with static NAPI tracking (6.13).
    pub(crate) sqpoll: bool,
    /// `napi-set threaded=enabled` (6.17).
    pub(crate) threaded: bool,
    /// `napi-set threaded=busy-poll` (6.19).
    pub(crate) kthread: bool,
}

const KERNELS: [Known; 4] = [
    Known {
        series: "6.1",
        napi_ids: false,
        epoll: false,
        sqpoll: false,
        threaded: false,
        kthread: false,
    },
    Known {
        series: "6.12",
        napi_ids: true,
        epoll: true,
        sqpoll: false,
        threaded: false,
        kthread: false,
    },
    Known {
        series: "6.18",
        napi_ids: true,
        epoll: true,
        sqpoll: true,
        threaded: true,
        kthread: false,
    },
    Known {
        series: "7",
        napi_ids: true,
        epoll: true,
        sqpoll: true,
        threaded: true,
        kthread: true,
    },
];

impl Known {
    /// What is known of the kernel that runs this.
    pub(crate) fn here() -> &'static Self {
        let series = std::env::var("KBP_SERIES").expect("KBP_SERIES, which linux_* set");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
        assert!(
            release.starts_with(&format!("{series}.")),
            "{release} is no {series}"
        );
        let known = KERNELS.iter().find(|k| k.series == series);
        known.expect("a series of the table")
    }

    /// Kind of worker that a policy comes to.
    pub(crate) fn worker(&self, policy: WorkerPolicy, profile: Profile) -> &'static str {
        match (policy, profile) {
            (WorkerPolicy::Dedicated, Profile::Latency) if self.kthread => "kthread",
            (_, Profile::Throughput) if self.threaded => "threaded",
            _ if self.sqpoll => "sqpoll",
            _ => "socket",
        }
    }
}

#[test]
#[ignore = "run in an emulated machine by linux_*"]
fn probes_find_what_the_kernel_has_in_a_guest() {
    let known = Known::here();
    for (what, found, expected) in [
        ("a veth's NAPI", probe::veth_napi(), known.napi_ids),
        ("netdev", probe::netdev_family(), known.napi_ids),
        ("SO_BUSY_POLL", probe::socket_busy_poll(), true),
        ("EPIOCSPARAMS", probe::epoll_busy_poll(), known.epoll),
        ("SQPOLL", probe::sqpoll_napi(), known.sqpoll),
        // Both came with 6.13.
        ("NAPI settings", probe::napi_settings(), known.sqpoll),
        (
            "threaded busy poll",
            probe::threaded_busy_poll(),
            known.kthread,
        ),
        ("seccomp notification", probe::seccomp_notify(), true),
        ("pidfd_getfd", probe::pidfd_getfd(), true),
        ("masquerading", probe::masquerade(), true),
    ] {
        assert_eq!(found.is_ok(), expected, "{what}: {found:?}");
        // What is missing is missing for a reason that a person can read.
        if let Err(error) = found {
            assert!(
                matches!(error, kbp_kernel::Error::Unsupported { .. }),
                "{what}: {error}"
            );
        }
    }
}
