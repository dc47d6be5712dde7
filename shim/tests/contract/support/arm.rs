//! What a test is put to: kbp's shim with each OCI runtime, and containerd's own shims, which prove the test.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

use kbp_tests::not_tested;

use super::BINARY;

/// A shim and the OCI runtime behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arm {
    /// kbp's shim with runc.
    Kbp,
    /// kbp's shim with crun.
    KbpWithCrun,
    /// The machine's own shim, of containerd 1.6, with runc: it speaks version 2 of the Task service.
    Stock1,
    /// That of containerd 2, with runc: it speaks version 3.
    Stock2,
}

impl Arm {
    pub(crate) fn is_kbp(self) -> bool {
        matches!(self, Self::Kbp | Self::KbpWithCrun)
    }

    /// The OCI runtime's program.
    pub(crate) fn oci(self) -> &'static str {
        match self {
            Self::KbpWithCrun => "crun",
            _ => "runc",
        }
    }

    /// The version of the Task service.
    pub(crate) fn service(self) -> &'static str {
        match self {
            Self::Stock1 => "containerd.task.v2.Task",
            _ => "containerd.task.v3.Task",
        }
    }

    /// The shim's program.
    pub(crate) fn shim(self) -> PathBuf {
        match self {
            Self::Kbp | Self::KbpWithCrun => BINARY.into(),
            Self::Stock1 => "/usr/bin/containerd-shim-runc-v2".into(),
            Self::Stock2 => target().join("containerd-forky/bin/containerd-shim-runc-v2"),
        }
    }

    /// Whether this machine lacks it; then it is said that it was not tested.
    fn is_wanting(self) -> bool {
        let path = self.shim();
        if path.is_file() {
            return false;
        }
        let remedy = match self {
            Self::Kbp | Self::KbpWithCrun => "it is built with this test",
            Self::Stock1 => "apt-get install containerd",
            Self::Stock2 => "run tests/scripts/fetch-containerd forky",
        };
        not_tested(&format!("{} is missing: {remedy}", path.display()));
        true
    }
}

/// cargo's target directory.
fn target() -> PathBuf {
    kbp_tests::binaries::target_dir().unwrap_or("target".into())
}

/// Puts an arm to a test. One that fails does not wait for its readers of fifos that nobody will open.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce(Arm) -> F, arm: Arm) {
    if arm.is_wanting() {
        return;
    }
    let test = test(arm);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let done = catch_unwind(AssertUnwindSafe(|| runtime.block_on(test)));
    runtime.shutdown_background();
    if let Err(panic) = done {
        resume_unwind(panic);
    }
}

/// Makes tests of functions (`async fn(Arm)`), each in a module of its name with a test for each arm that it is put to.
macro_rules! arms {
    ($($arms:tt: [$($function:ident),* $(,)?],)*) => { $($(arms!(@one $function $arms);)*)* };
    (@one $function:ident [$($arm:ident)*]) => {
        mod $function {
            $(#[test] fn $arm() { crate::support::run(super::$function, crate::support::arms!(@arm $arm)) })*
        }
    };
    (@arm kbp) => { crate::support::Arm::Kbp };
    (@arm kbp_with_crun) => { crate::support::Arm::KbpWithCrun };
    (@arm stock_1) => { crate::support::Arm::Stock1 };
    (@arm stock_2) => { crate::support::Arm::Stock2 };
}
pub(crate) use arms;
