//! Bare veths between namespaces of the bench's own: a node and pods, with no container.

use std::io::Write as _;
use std::net::UdpSocket;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use kbp_kernel::ethtool::{Features, set_features};
use kbp_kernel::gro_list::GroList;
use kbp_kernel::link::{Batch, Route, RouteSocket, VethPair};
use kbp_kernel::napi::NetdevSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::{IfIndex, MacAddr, Mtu, NapiId};

/// Packets that a pod's qdisc holds while the receiving ring is full, as kbp sets it.
const QDISC_LIMIT: u32 = 1000;

/// The namespace of a node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) netns: Netns,
}

/// A pod and its veth; both go with it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) netns: Netns,
    pub(crate) number: u8,
    pub(crate) host_index: IfIndex,
    pub(crate) pod_index: IfIndex,
}

fn host_name(number: u8) -> String {
    format!("vhost{number}")
}

/// The node's address on a veth.
fn host_address(number: u8) -> String {
    format!("10.77.{number}.1")
}

impl Pod {
    /// Its own address.
    pub(crate) fn address(&self) -> String {
        format!("10.77.{}.2", self.number)
    }

    /// NAPI instance of the host end and that of the pod end.
    pub(crate) fn napis(&self, node: &Node) -> Result<[NapiId; 2]> {
        let of = |netns: &Netns, link: IfIndex| -> Result<NapiId> {
            let napis = NetdevSocket::open_in(netns)?.napis(link)?;
            Ok(napis.first().context("the link has no NAPI instance")?.id)
        };
        Ok([
            of(&node.netns, self.host_index)?,
            of(&self.netns, self.pod_index)?,
        ])
    }

    /// A socket in the pod and one on the node, connected to each other over the veth.
    pub(crate) fn sockets(&self, node: &Node) -> Result<(UdpSocket, UdpSocket)> {
        let (here, there) = (host_address(self.number), self.address());
        let bind = |netns: &Netns, address: &str| -> Result<UdpSocket> {
            let socket = netns.run(|| UdpSocket::bind((address, 9)))?;
            socket.with_context(|| format!("bind {address}"))
        };
        let (pod, host) = (bind(&self.netns, &there)?, bind(&node.netns, &here)?);
        pod.connect((here.as_str(), 9)).context("connect")?;
        host.connect((there.as_str(), 9)).context("connect")?;
        Ok((pod, host))
    }
}

impl Node {
    pub(crate) fn new() -> Result<Self> {
        let netns = Netns::create()?;
        // The pods talk to each other through it.
        netns
            .run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?
            .context("let the node route")?;
        Ok(Self { netns })
    }

    /// A pod with a veth as the kernel makes it, or as kbp sets it up.
    pub(crate) fn pod(&self, number: u8, pollable: bool) -> Result<Pod> {
        let netns = Netns::create()?;
        let name = host_name(number);
        let macs = [1, 2].map(|end| MacAddr([2, 0, 0, 77, number, end]));
        let mut batch = Batch::new();
        batch.create_veth(&VethPair {
            host_name: &name,
            host_mac: macs[0],
            pod_name: "eth0",
            pod_mac: macs[1],
            pod_netns: &netns,
            mtu: Mtu(1500),
            tx_queue_len: 0,
        });
        let mut on_node = RouteSocket::open_in(&self.netns)?;
        let mut in_pod = RouteSocket::open_in(&netns)?;
        on_node.execute(&batch)?;
        let index = |socket: &mut RouteSocket, name: &str| -> Result<IfIndex> {
            let link = socket.link_by_name(name)?;
            Ok(link.with_context(|| format!("{name} is gone"))?.index)
        };
        let pod = Pod {
            host_index: index(&mut on_node, &name)?,
            pod_index: index(&mut in_pod, "eth0")?,
            netns,
            number,
        };
        let (here, there) = (host_address(number), pod.address());
        let mut batch = Batch::new();
        batch
            .add_address(pod.host_index, format!("{here}/30").parse()?, false)
            .add_neighbour(pod.host_index, there.parse()?, macs[1]);
        if pollable {
            batch.set_pfifo(pod.host_index, QDISC_LIMIT);
        }
        on_node.execute(&batch)?;
        let mut batch = Batch::new();
        batch
            .set_up(pod.pod_index)
            .add_address(pod.pod_index, format!("{there}/30").parse()?, false)
            .add_neighbour(pod.pod_index, here.parse()?, macs[0])
            .add_route(&Route {
                gateway: Some(here.parse()?),
                ..Route::new("0.0.0.0/0".parse()?, pod.pod_index)
            });
        if pollable {
            batch.set_pfifo(pod.pod_index, QDISC_LIMIT);
        }
        in_pod.execute(&batch)?;
        if pollable {
            let wanted = Features {
                gro: true,
                tso: false,
            };
            set_features(&self.netns, &name, wanted)?;
            set_features(&pod.netns, "eth0", wanted)?;
        }
        Ok(pod)
    }

    /// Makes a pollable veth one of the profile `throughput`.
    pub(crate) fn chain(&self, pod: &Pod) -> Result<()> {
        let with_tso = Features {
            gro: true,
            tso: true,
        };
        set_features(&pod.netns, "eth0", with_tso)?;
        GroList::open_in(&self.netns)?.set(pod.host_index, true)?;
        Ok(())
    }

    /// Gives the node what nodes have: connection tracking, masquerading, and `rules` that each packet is held against, as for services
    /// and policies of other pods.
    pub(crate) fn filter(&self, rules: u16) -> Result<()> {
        let others: String = (0..rules)
            .map(|n| {
                format!(
                    "udp dport {} ip saddr 10.1.2.{} drop\n",
                    10_000 + n,
                    n % 250
                )
            })
            .collect();
        let text = format!(
            "table ip bench {{\n chain in {{\n type filter hook prerouting priority 0;\n ct state invalid drop\n{others}}}\n \
             chain out {{\n type nat hook postrouting priority 100;\n ip saddr 10.77.0.0/16 ip daddr != 10.77.0.0/16 masquerade\n}}\n}}\n"
        );
        let nft = || -> std::io::Result<bool> {
            let mut command = Command::new("nft");
            let mut child = command.args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(text.as_bytes())?;
            }
            Ok(child.wait()?.success())
        };
        let done = self.netns.run(nft)?.context("run nft")?;
        ensure!(done, "nft did not take the rules");
        Ok(())
    }

    /// Datagrams that came to the node's sockets, whether or not these had room for them.
    pub(crate) fn datagrams(&self) -> Result<u64> {
        let path = "/proc/thread-self/net/snmp";
        let text = self.netns.run(|| std::fs::read_to_string(path))?;
        let text = text.with_context(|| format!("read {path}"))?;
        let mut lines = text.lines().filter_map(|l| l.strip_prefix("Udp: "));
        let (names, values) = (lines.next(), lines.next());
        let (names, values) = names.zip(values).context("no UDP counters")?;
        let columns = names.split(' ').zip(values.split(' '));
        columns
            .filter(|(name, _)| ["InDatagrams", "InErrors"].contains(name))
            .map(|(_, value)| value.parse::<u64>().context("a UDP counter"))
            .sum()
    }
}
