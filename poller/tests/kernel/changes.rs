//! What may happen to the links of an attached pod, and how each is known to be mended or told.
//!
//! The attachments have an idle worker, without which the host end would need no NAPI and could be as it is.

use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use kbp_kernel::Error;
use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::netns::Netns;
use kbp_poller::attach::Attachment;
use kbp_poller::policy::WorkerPolicy;
use kbp_poller::state::{InterfaceState, Part, PodState};

use crate::node::{Node, ip, wait_until};

/// A node with an attached pod, and a namespace that is neither's.
struct Scene {
    // First, so that it ends before the directory that it writes to goes.
    attachment: Attachment,
    node: Node,
    elsewhere: Node,
}

/// Something that happens.
pub(crate) struct Change {
    pub(crate) name: &'static str,
    make: fn(&Scene),
    /// Whether it has been mended or told, given the state before.
    noticed: fn(&Scene, &PodState) -> bool,
    undo: fn(&Scene),
    /// Whether it is seen by NAPI ids, which a kernel before 6.8 does not tell.
    by_ids: bool,
}

/// Every change that can be seen, where the kernel tells NAPI ids or does not.
pub(crate) fn visible(napi_ids: bool) -> Vec<Change> {
    let mut changes = all();
    changes.retain(|change| napi_ids || !change.by_ids);
    changes
}

fn all() -> Vec<Change> {
    let nothing = |_: &Scene| {};
    let change = |name, make, noticed, undo| Change {
        name,
        make,
        noticed,
        undo,
        by_ids: false,
    };
    let flap = |name, make, noticed| Change {
        by_ids: true,
        ..change(name, make, noticed, nothing)
    };
    let mended = |scene: &Scene, _: &PodState| scene.is_whole();
    vec![
        flap(
            "host end down and up",
            |s| flap_of(&s.node.host, "vhost0"),
            |s, before| s.has_new_ids(before, |i| i.host_napi),
        ),
        flap(
            "pod end down and up",
            |s| flap_of(&s.node.pod, "eth0"),
            |s, before| s.has_new_ids(before, |i| i.pod_napi),
        ),
        change(
            "host end down",
            |s| ip(&s.node.host, "link set vhost0 down"),
            |s, _| s.tells("vhost0 is down"),
            |s| ip(&s.node.host, "link set vhost0 up"),
        ),
        change(
            "pod end down",
            |s| ip(&s.node.pod, "link set eth0 down"),
            |s, _| s.tells("eth0 is down"),
            |s| ip(&s.node.pod, "link set eth0 up"),
        ),
        change(
            "GRO off in the pod",
            |s| ethtool_k(&s.node.pod, "eth0", "gro off"),
            mended,
            nothing,
        ),
        change(
            "GRO off at the host end",
            |s| ethtool_k(&s.node.host, "vhost0", "gro off"),
            mended,
            nothing,
        ),
        change(
            "TSO on in the pod",
            |s| ethtool_k(&s.node.pod, "eth0", "tso on"),
            mended,
            nothing,
        ),
        change(
            "TSO on at the host end",
            |s| ethtool_k(&s.node.host, "vhost0", "tso on"),
            mended,
            nothing,
        ),
        change(
            "TSO of IPv6 alone on in the pod",
            |s| ethtool_k(&s.node.pod, "eth0", "tx-tcp6-segmentation on"),
            mended,
            nothing,
        ),
        change(
            "both by ioctl in the pod",
            |s| {
                let other = Features {
                    gro: false,
                    tso: true,
                };
                // It looks whether what it set is there, and somebody may have been faster.
                match ethtool::set_features(&s.node.pod, "eth0", other) {
                    Ok(()) | Err(Error::Unsupported { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            },
            mended,
            nothing,
        ),
        change(
            "pod end renamed",
            |s| rename(&s.node.pod, "eth0", "net1"),
            |s, _| {
                s.state()
                    .interfaces
                    .iter()
                    .any(|i| i.pod_interface == "net1")
            },
            |s| rename(&s.node.pod, "net1", "eth0"),
        ),
        change(
            "host end renamed",
            |s| rename(&s.node.host, "vhost0", "other0"),
            |s, _| {
                let is_new = |i: &InterfaceState| i.host_interface == "other0";
                s.state().interfaces.iter().any(is_new)
            },
            |s| rename(&s.node.host, "other0", "vhost0"),
        ),
        change(
            "host end moved to another namespace",
            |s| move_link("vhost0", &s.node.host, &s.elsewhere.host),
            |s, _| s.tells("not in the host's network namespace"),
            |s| {
                move_link("vhost0", &s.elsewhere.host, &s.node.host);
                ip(&s.node.host, "link set vhost0 up");
            },
        ),
        change(
            "pod end moved to another namespace",
            |s| move_link("eth0", &s.node.pod, &s.elsewhere.host),
            |s, _| s.state().interfaces.is_empty() && s.tells("interfaces are gone"),
            |s| {
                move_link("eth0", &s.elsewhere.host, &s.node.pod);
                ip(&s.node.pod, "link set eth0 up");
            },
        ),
    ]
}

/// Has a change happen `times` times, undone in between; how long each took to be noticed, its making included.
pub(crate) fn times_to_notice(change: &Change, times: u32) -> Vec<Duration> {
    let node = Node::new();
    // With a worker, so that both ends matter.
    // Without a rest, in which TSO is on in the pod.
    let always = "disable = [\"short-way\"]";
    let attachment = node.attached(node.request("a", WorkerPolicy::Idle, always));
    let scene = Scene {
        node,
        elsewhere: Node::empty(),
        attachment,
    };
    (0..times)
        .map(|_| {
            scene.wait_whole(change.name);
            let before = scene.state();
            let began = Instant::now();
            (change.make)(&scene);
            wait_until(change.name, || {
                (change.noticed)(&scene, &before).then_some(())
            });
            let took = began.elapsed();
            (change.undo)(&scene);
            scene.wait_whole(change.name);
            took
        })
        .collect()
}

impl Scene {
    fn state(&self) -> PodState {
        self.attachment.state()
    }

    /// Whether a part of the veth is missing for a reason that says this.
    fn tells(&self, part: &str) -> bool {
        let degraded = self.state().degraded;
        let mut veth = degraded.iter().filter(|d| d.part == Part::PollableVeth);
        veth.any(|d| d.reason.contains(part))
    }

    /// Whether everything is as it should be.
    fn is_whole(&self) -> bool {
        let state = self.state();
        let [interface] = &state.interfaces[..] else {
            return false;
        };
        let pollable = Features {
            gro: true,
            tso: false,
        };
        let ends = [
            (&self.node.host, &interface.host_interface),
            (&self.node.pod, &interface.pod_interface),
        ];
        let are_set = ends
            .into_iter()
            .all(|(netns, name)| ethtool::features(netns, name).ok() == Some(pollable));
        // The worker may be another matter: one that polls through sockets needs addresses, and a link that was moved has lost its.
        let mut degraded = state.degraded.iter();
        are_set && !degraded.any(|d| d.part == Part::PollableVeth)
    }

    fn wait_whole(&self, what: &str) {
        wait_until(&format!("the veth to be whole ({what})"), || {
            let state = self.state();
            let names = state
                .interfaces
                .iter()
                .map(|i| (i.host_interface.as_str(), i.pod_interface.as_str()));
            (names.eq([("vhost0", "eth0")]) && self.is_whole()).then_some(())
        });
    }

    fn has_new_ids(&self, before: &PodState, id: fn(&InterfaceState) -> Option<u32>) -> bool {
        let ids = |state: &PodState| state.interfaces.iter().map(id).collect::<Vec<_>>();
        let now = ids(&self.state());
        now != ids(before) && now.iter().all(Option::is_some)
    }
}

fn flap_of(netns: &Netns, name: &str) {
    ip(netns, &format!("link set {name} down"));
    ip(netns, &format!("link set {name} up"));
}

/// By netlink, where ethtool(8) and the kernel have it; kbp itself takes the ioctls.
fn ethtool_k(netns: &Netns, name: &str, feature: &str) {
    let status = netns
        .run(|| {
            let mut ethtool = Command::new("ethtool");
            ethtool.arg("-K").arg(name).args(feature.split(' '));
            ethtool.status()
        })
        .expect("enter")
        .expect("run ethtool (package ethtool)");
    assert!(status.success(), "ethtool -K {name} {feature}: {status}");
}

/// Before 6.2 an interface has to be down for it.
fn rename(netns: &Netns, from: &str, to: &str) {
    let renamed = netns.run(|| {
        let mut ip = Command::new("ip");
        ip.args(["link", "set", from, "name", to]).output()
    });
    if !renamed.expect("enter").expect("run ip").status.success() {
        ip(netns, &format!("link set {from} down"));
        ip(netns, &format!("link set {from} name {to}"));
        ip(netns, &format!("link set {to} up"));
    }
}

fn move_link(name: &str, from: &Netns, to: &Netns) {
    // `ip` takes the number of a process or a name; its own descriptor has the form of a process' namespace.
    let fd = to.as_fd().as_raw_fd();
    let path = format!("/proc/{}/fd/{fd}", std::process::id());
    ip(from, &format!("link set {name} netns {path}"));
}
