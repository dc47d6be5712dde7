//! A node that is ready for a test: sandbox, rootfs, containerd, and the check that the test leaves nothing.

use std::time::Duration;

use kbp_poller::state::{self, PodState};
use serde_json::Value;

use crate::{
    Attached, Containerd, Error, Generation, Leftovers, Network, PodNetns, Result, Rootfs, Run,
    Runtime, Sandbox, Settings, wait_until,
};

/// Longest that anything awaited in a test may take; generous, since other work may keep the CPUs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Last command of a script whose output is looked at. On a busy machine `ctr` closes its end of the output as soon as it hears of the
/// end of the process, with the stock shim as with any other, and what was written just before is lost.
pub const LINGER: &str = "sleep 0.1";

/// The OCI runtime behind the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oci {
    /// The usual one.
    Runc,
    /// The one written in C. Debian 12's knows the specs of containerd 1.6 and 1.7, not those of 2.
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
    /// kbp on the machine's containerd with crun.
    pub const KBP_CRUN: Self = Self {
        oci: Oci::Crun,
        ..Self::KBP
    };
    /// containerd's own shim on the machine's containerd with runc: what kbp must not differ from.
    pub const STOCK: Self = Self {
        runtime: Runtime::Stock,
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

/// A network namespace with an attachment; both go when it is dropped.
#[derive(Debug)]
pub struct Pod<'s> {
    /// The namespace.
    pub netns: PodNetns<'s>,
    /// What the plugins answered.
    pub attached: Attached,
    network: Network<'s>,
    id: String,
}

impl<'s> Pod<'s> {
    /// A namespace `id` with an `eth0` in `network`.
    pub fn new(sandbox: &'s Sandbox, id: &str, network: &Network<'s>) -> Result<Self> {
        let netns = PodNetns::new(sandbox, id)?;
        let attached = network.add(id, &netns, "eth0")?;
        Ok(Self {
            netns,
            attached,
            network: network.clone(),
            id: id.to_owned(),
        })
    }

    /// Its IPv4 address.
    pub fn ip(&self) -> String {
        self.attached.ipv4().expect("IPv4 address of the pod")
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.network.del(&self.id, Some(&self.netns), "eth0") {
            // What it leaves fails the test: see `on_with`.
            eprintln!("{error}");
        }
    }
}

impl<'s> Lab<'s> {
    /// A pod in the network of kbp's own plugin.
    pub fn pod(&self, id: &str) -> Pod<'s> {
        Pod::new(self.sandbox, id, &Network::kbp(self.sandbox)).expect("pod in kbp's network")
    }

    /// A pod in the network of the reference `ptp` plugin.
    pub fn ptp_pod(&self, id: &str) -> Pod<'s> {
        Pod::new(self.sandbox, id, &Network::ptp(self.sandbox)).expect("pod in ptp's network")
    }

    /// Starts a container in `pod` that does nothing, whose worker has idle cycles: what any machine has.
    pub fn start_sleeper(&self, id: &str, pod: &Pod<'_>) {
        let run = self
            .container(id, ["sleep", "1000"])
            .annotation("kbp.io/worker", "idle")
            .netns(&pod.netns.path());
        self.containerd
            .start_container(run)
            .expect("start a container that sleeps");
    }

    /// Where kbp keeps its state, seen from outside.
    pub fn state_dir(&self) -> std::path::PathBuf {
        self.sandbox.dir().join("run/kbp")
    }

    /// What kbp says of a pod; None: nothing.
    pub fn state(&self, id: &str) -> Option<PodState> {
        let states = state::read_all(&self.state_dir()).expect("state directory");
        states.into_iter().find(|s| s.id == id)
    }

    /// Expects that a container executes commands.
    pub fn answers(&self, container: &str) {
        let script = format!("echo here; {LINGER}");
        let output = self
            .containerd
            .exec(container, ["sh", "-c", &script])
            .expect("exec")
            .success()
            .expect("code");
        assert_eq!(output.stdout, "here\n");
    }

    /// Waits until a process has a socket bound to a port, TCP or UDP.
    pub fn wait_for_port(&self, pid: u32, port: u16) {
        let entry = format!(":{port:04X} ");
        wait_until(&format!("port {port} of {pid}"), LIMIT, || {
            let tables = ["tcp", "udp", "tcp6", "udp6"].map(|t| {
                std::fs::read_to_string(format!("/proc/{pid}/net/{t}")).unwrap_or_default()
            });
            let lines = || tables.iter().flat_map(|t| t.lines());
            let bound = |line: &str| {
                line.split_whitespace()
                    .nth(1)
                    .is_some_and(|a| format!("{a} ").ends_with(&entry))
            };
            if lines().any(bound) {
                Ok(())
            } else {
                Err(format!("it is not bound; log:\n{}", self.containerd.log()))
            }
        })
        .expect("server");
    }

    /// containerd's default OCI spec for a container of the busybox rootfs, to be changed and given to [`Lab::container_of_spec`].
    pub fn spec(&self, id: &str, command: &[&str]) -> Result<Value> {
        let text = self.containerd.ctr(["oci", "spec"])?.success()?.stdout;
        let mut spec: Value = serde_json::from_str(&text).map_err(|e| Error::Command {
            command: "ctr oci spec".to_owned(),
            reason: e.to_string(),
        })?;
        spec["root"] = serde_json::json!({ "path": self.rootfs.dir() });
        spec["process"]["args"] = command.into();
        // As with `Run::new`: there is no image that would say so.
        spec["process"]["env"] =
            ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
                .as_slice()
                .into();
        spec["process"]["terminal"] = false.into();
        spec["process"]["cwd"] = "/".into();
        spec["linux"]["cgroupsPath"] = format!("/{}/{id}", self.sandbox.name()).into();
        Ok(spec)
    }

    /// A container of a whole spec under the arm's runtimes.
    pub fn container_of_spec(&self, id: &str, spec: &Value) -> Run {
        let path = self.sandbox.dir().join(format!("{id}.config.json"));
        std::fs::write(&path, spec.to_string()).expect("write the spec");
        self.under(Run::spec(id, &path))
    }
}

/// Puts the network namespace at `path` into a spec.
pub fn join_netns(spec: &mut Value, path: &std::path::Path) {
    let namespaces = spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("namespaces");
    namespaces.retain(|n| n["type"] != "network");
    namespaces.push(serde_json::json!({ "type": "network", "path": path }));
}

/// Runs `test` on a fresh node and expects that it leaves nothing there. Where the arm's containerd is missing, that is said.
pub fn on(arm: Arm, test: impl FnOnce(&Lab<'_>)) {
    on_with(arm, Settings::default(), test);
}

/// [`on`] with settings of containerd.
pub fn on_with(arm: Arm, mut settings: Settings, test: impl FnOnce(&Lab<'_>)) {
    if arm.generation.is_wanting() {
        return;
    }
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
    let before = match arm.runtime {
        Runtime::Kbp => before,
        Runtime::Stock => before.bearing_with_shim_sockets(),
    };
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
///
/// `scenarios!(a, b)` runs them on every arm, `scenarios!(on [kbp_on_machine, kbp_on_v2]: a, b)` on these.
#[macro_export]
macro_rules! scenarios {
    (on [$($arm:ident),* $(,)?]: $($scenario:ident),* $(,)?) => {
        $crate::scenarios!(@each [$($arm)*] [$($scenario)*]);
    };
    (@each [] $scenarios:tt) => {};
    (@each [$arm:ident $($further:ident)*] $scenarios:tt) => {
        $crate::scenarios!(@$arm $scenarios);
        $crate::scenarios!(@each [$($further)*] $scenarios);
    };
    (@stock_on_machine $list:tt) => { $crate::scenarios!(@arm stock_on_machine Machine Stock Runc $list); };
    (@stock_on_v2 $list:tt) => { $crate::scenarios!(@arm stock_on_v2 V2 Stock Runc $list); };
    (@stock_on_v1_7 $list:tt) => { $crate::scenarios!(@arm stock_on_v1_7 V1_7 Stock Runc $list); };
    (@stock_with_crun $list:tt) => { $crate::scenarios!(@arm stock_with_crun Machine Stock Crun $list); };
    (@kbp_on_machine $list:tt) => { $crate::scenarios!(@arm kbp_on_machine Machine Kbp Runc $list); };
    (@kbp_on_v1_7 $list:tt) => { $crate::scenarios!(@arm kbp_on_v1_7 V1_7 Kbp Runc $list); };
    (@kbp_on_v2 $list:tt) => { $crate::scenarios!(@arm kbp_on_v2 V2 Kbp Runc $list); };
    (@kbp_with_crun $list:tt) => { $crate::scenarios!(@arm kbp_with_crun Machine Kbp Crun $list); };
    (@arm $module:ident $generation:ident $runtime:ident $oci:ident [$($scenario:ident)*]) => {
        mod $module {
            use $crate::{lab, Generation, Runtime};
            const ARM: lab::Arm = lab::Arm { generation: Generation::$generation, runtime: Runtime::$runtime, oci: lab::Oci::$oci };
            $(#[test] fn $scenario() { lab::on(ARM, super::$scenario) })*
        }
    };
    ($($scenario:ident),* $(,)?) => {
        $crate::scenarios!(on [
            stock_on_machine, stock_on_v2, stock_on_v1_7, stock_with_crun, kbp_on_machine, kbp_on_v1_7, kbp_on_v2, kbp_with_crun,
        ]: $($scenario),*);
    };
}
