//! A veth pair between two namespaces of its own; both vanish with it.

use kbp_kernel::link::{Batch, Link, RouteSocket, VethPair};
use kbp_kernel::netns::Netns;
use kbp_kernel::{MacAddr, Mtu};

pub(crate) const HOST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
pub(crate) const POD_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

pub(crate) struct Pair {
    pub(crate) host: Netns,
    pub(crate) pod: Netns,
    pub(crate) host_socket: RouteSocket,
    pub(crate) pod_socket: RouteSocket,
    pub(crate) host_link: Link,
    pub(crate) pod_link: Link,
}

/// What [`Pair::new`] creates.
pub(crate) fn veth<'a>(host_name: &'a str, pod_netns: &'a Netns) -> VethPair<'a> {
    VethPair {
        host_name,
        host_mac: HOST_MAC,
        pod_name: "eth0",
        pod_mac: POD_MAC,
        pod_netns,
        mtu: Mtu(9000),
        tx_queue_len: 500,
    }
}

impl Pair {
    /// `kbphost` on the host, `eth0` in the pod, both up.
    pub(crate) fn new() -> Self {
        let mut pair = Self::with_pod_down();
        let mut batch = Batch::new();
        batch.set_up(pair.pod_link.index);
        pair.pod_socket.execute(&batch).expect("set the pod end up");
        pair.refresh();
        pair
    }

    /// As it is born: the host end up, the pod end down.
    pub(crate) fn with_pod_down() -> Self {
        let host = Netns::create().expect("host namespace");
        let pod = Netns::create().expect("pod namespace");
        let mut host_socket = RouteSocket::open_in(&host).expect("host socket");
        let mut pod_socket = RouteSocket::open_in(&pod).expect("pod socket");
        let mut batch = Batch::new();
        batch.create_veth(&veth("kbphost", &pod));
        host_socket.execute(&batch).expect("create the pair");
        let host_link = host_socket
            .link_by_name("kbphost")
            .expect("ask")
            .expect("host end");
        let pod_link = pod_socket
            .link_by_name("eth0")
            .expect("ask")
            .expect("pod end");
        Self {
            host,
            pod,
            host_socket,
            pod_socket,
            host_link,
            pod_link,
        }
    }

    /// Reads both links anew.
    pub(crate) fn refresh(&mut self) {
        let host = self.host_socket.link_by_index(self.host_link.index);
        self.host_link = host.expect("ask").expect("host end");
        let pod = self.pod_socket.link_by_index(self.pod_link.index);
        self.pod_link = pod.expect("ask").expect("pod end");
    }

    /// Carries out one batch on the host's side.
    pub(crate) fn on_host(&mut self, fill: impl FnOnce(&mut Batch)) -> kbp_kernel::Result<()> {
        let mut batch = Batch::new();
        fill(&mut batch);
        self.host_socket.execute(&batch)
    }

    /// Carries out one batch on the pod's side.
    pub(crate) fn in_pod(&mut self, fill: impl FnOnce(&mut Batch)) -> kbp_kernel::Result<()> {
        let mut batch = Batch::new();
        fill(&mut batch);
        self.pod_socket.execute(&batch)
    }
}
