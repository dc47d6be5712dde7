//! A node that is ready for a test: sandbox, rootfs, containerd, and the check that the test leaves nothing.

use std::time::Duration;

use crate::{Containerd, Generation, Leftovers, Rootfs, Run, Runtime, Sandbox, Settings};

/// Longest that anything awaited in a test may take.
pub const LIMIT: Duration = Duration::from_secs(20);

/// The OCI runtime behind the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oci {
    /// The usual one.
    Runc,
    /// The one written in C.
    Crun,
}

/// What a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arm {
    /// Which containerd.
    pub generation: Generation,
    /// Which shim.
    pub runtime: Runtime,
    /// Which OCI runtime.
    pub oci: Oci,
}

impl Arm {
    /// kbp on the machine's containerd with runc.
    pub const KBP: Self = Self {
        generation: Generation::Machine,
        runtime: Runtime::Kbp,
        oci: Oci::Runc,
    };
    /// kbp on containerd 2 with runc.
    pub const KBP_V2: Self = Self {
        generation: Generation::V2,
        ..Self::KBP
    };
}

/// A node with a running containerd.
#[derive(Debug)]
pub struct Lab<'s> {
    /// The node.
    pub sandbox: &'s Sandbox,
    /// Its containerd.
    pub containerd: Containerd<'s>,
    /// A busybox root file system, to which the test may add.
    pub rootfs: Rootfs,
    /// What the test runs on.
    pub arm: Arm,
}

impl Lab<'_> {
    /// A container of the busybox rootfs under the arm's runtimes.
    pub fn container<S: Into<String>>(
        &self,
        id: &str,
        command: impl IntoIterator<Item = S>,
    ) -> Run {
        self.under(Run::new(id, &self.rootfs, command))
    }

    /// A container that runs a shell script.
    pub fn script(&self, id: &str, script: &str) -> Run {
        self.container(id, ["sh", "-c", script])
    }

    /// Any container under the arm's runtimes.
    pub fn under(&self, run: Run) -> Run {
        let run = run.runtime(self.arm.runtime);
        match (self.arm.runtime, self.arm.oci) {
            (Runtime::Stock, Oci::Crun) => run.flag("--runc-binary", "crun"),
            // kbp reads it from its config file: `ctr` passes that flag only to the stock shim.
            _ => run,
        }
    }
}

/// Runs `test` on a fresh node and expects that it leaves nothing there.
pub fn on(arm: Arm, test: impl FnOnce(&Lab<'_>)) {
    on_with(arm, Settings::default(), test);
}

/// [`on`] with settings of containerd.
pub fn on_with(arm: Arm, mut settings: Settings, test: impl FnOnce(&Lab<'_>)) {
    if arm.oci == Oci::Crun && arm.runtime == Runtime::Kbp {
        settings.kbp_config = format!("runtime = \"crun\"\n{}", settings.kbp_config);
    }
    let sandbox = Sandbox::new().expect("private node");
    if arm.oci == Oci::Crun {
        leave_cgroup_hybrid_mode(&sandbox);
    }
    let rootfs = Rootfs::busybox(&sandbox.dir().join("rootfs")).expect("busybox rootfs");
    let containerd =
        Containerd::start_with(&sandbox, arm.generation, settings).expect("containerd");
    let before = Leftovers::of(&sandbox).expect("state before the test");
    let lab = Lab {
        sandbox: &sandbox,
        containerd,
        rootfs,
        arm,
    };
    test(&lab);
    Leftovers::wait_until_clean(&sandbox, &before).expect("nothing left after the test");
}

/// crun refuses a machine whose cgroups are v1 but some of whose controllers are on v2's side of the hybrid layout. Without that
/// side, seen from the node only, they are plain v1.
fn leave_cgroup_hybrid_mode(sandbox: &Sandbox) {
    let unified = "/sys/fs/cgroup/unified";
    let controllers =
        std::fs::read_to_string(format!("{unified}/cgroup.controllers")).unwrap_or_default();
    if !controllers.trim().is_empty() {
        sandbox
            .run("umount", &[unified])
            .expect("leave the hybrid mode of cgroups");
    }
}

/// Makes tests of scenarios (`fn(&Lab)`): one module an arm, one test in it a scenario. The stock arms prove the scenarios.
#[macro_export]
macro_rules! scenarios {
    ($($scenario:ident),* $(,)?) => {
        $crate::scenarios!(@arm stock_on_machine Machine Stock Runc: $($scenario)*);
        $crate::scenarios!(@arm stock_on_v2 V2 Stock Runc: $($scenario)*);
        $crate::scenarios!(@arm stock_with_crun Machine Stock Crun: $($scenario)*);
        $crate::scenarios!(@arm kbp_on_machine Machine Kbp Runc: $($scenario)*);
        $crate::scenarios!(@arm kbp_on_v1_7 V1_7 Kbp Runc: $($scenario)*);
        $crate::scenarios!(@arm kbp_on_v2 V2 Kbp Runc: $($scenario)*);
        $crate::scenarios!(@arm kbp_with_crun V2 Kbp Crun: $($scenario)*);
    };
    (@arm $module:ident $generation:ident $runtime:ident $oci:ident: $($scenario:ident)*) => {
        mod $module {
            use $crate::{lab, Generation, Runtime};
            const ARM: lab::Arm = lab::Arm { generation: Generation::$generation, runtime: Runtime::$runtime, oci: lab::Oci::$oci };
            $(#[test] fn $scenario() { lab::on(ARM, super::$scenario) })*
        }
    };
}
