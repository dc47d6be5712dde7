//! Counters of one network namespace, from the files of a thread or a process in it below `/proc/*/net`.

use std::fs;
use std::path::Path;

use crate::netns::Netns;
use crate::sys::read_text;
use crate::{Error, Result};

/// The file is that of the thread's namespace; `/proc/net` would be the main thread's.
const NETSTAT: &str = "/proc/thread-self/net/netstat";

/// Packets that busy polling took off the devices of `netns`: that of sockets and epoll instances, and that of a
/// polling ring's thread, wherever its owner lives (`TcpExt: BusyPollRxPackets`; UDP counts too, a NAPI's own
/// thread does not).
///
/// # Errors
/// [`Error::File`] when the counters cannot be read, [`Error::Protocol`] when this one is missing.
pub fn busy_poll_rx_packets(netns: &Netns) -> Result<u64> {
    let text = netns.run(|| fs::read_to_string(NETSTAT))?;
    let text = text.map_err(|source| Error::File {
        path: Path::new(NETSTAT).to_owned(),
        source,
    })?;
    counter(&text, "TcpExt:", "BusyPollRxPackets").ok_or_else(|| Error::Protocol {
        what: format!("read {NETSTAT}"),
        detail: "there is no counter TcpExt: BusyPollRxPackets".to_owned(),
    })
}

/// What a network namespace has received since it is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// Packets, over all its devices but the loopback.
    pub packets: u64,
    /// Those of them that busy polling took off the devices ([`busy_poll_rx_packets`]).
    pub polled: u64,
}

/// What the network namespace of process `pid` has received.
///
/// # Errors
/// As [`busy_poll_rx_packets`]; also when there is no such process any more.
pub fn received_by(pid: u32) -> Result<Received> {
    let (devices, netstat) = (
        format!("/proc/{pid}/net/dev"),
        format!("/proc/{pid}/net/netstat"),
    );
    let polled = counter(&read_text(&netstat)?, "TcpExt:", "BusyPollRxPackets");
    Ok(Received {
        packets: packets(&read_text(&devices)?),
        polled: polled.ok_or_else(|| Error::Protocol {
            what: format!("read {netstat}"),
            detail: "there is no counter TcpExt: BusyPollRxPackets".to_owned(),
        })?,
    })
}

/// A line a device: its name, and what it has received as bytes and packets. The two lines above have no such name.
fn packets(text: &str) -> u64 {
    let of = |line: &str| -> Option<u64> {
        let (name, counts) = line.split_once(':')?;
        let packets = counts.split_whitespace().nth(1)?.parse().ok()?;
        (name.trim() != "lo").then_some(packets)
    };
    text.lines().filter_map(of).sum()
}

/// Every group has a line of names and then one of values, both beginning with the group's name.
fn counter(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group));
    let (names, values) = (lines.next()?, lines.next()?);
    let found = names
        .split_whitespace()
        .zip(values.split_whitespace())
        .find(|(n, _)| *n == name);
    found?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "TcpExt: SyncookiesSent BusyPollRxPackets TCPTimeouts\n\
                        TcpExt: 1 42 3\n\
                        IpExt: InNoRoutes BusyPollRxPackets\n\
                        IpExt: 5 6\n";

    #[test]
    fn packets_of_all_devices_but_the_loopback_are_added() {
        let text = "Inter-|   Receive                            |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
                    lo:  100 50 0 0 0 0 0 0 100 50\n  eth0: 900 7 0 0 0 0 0 0 1 1\n  net1:1 2 0 0\n";
        assert_eq!(packets(text), 9);
        assert_eq!(packets(""), 0);
    }

    #[test]
    fn this_process_can_be_asked() {
        let own = Netns::current().expect("namespace");
        let before = busy_poll_rx_packets(&own).expect("counter");
        let received = received_by(std::process::id()).expect("its files");
        let after = busy_poll_rx_packets(&own).expect("counter");
        assert!((before..=after).contains(&received.polled), "{received:?}");
        assert!(received_by(u32::MAX).is_err());
    }

    #[test]
    fn a_counter_is_found_by_group_and_name() {
        assert_eq!(counter(TEXT, "TcpExt:", "BusyPollRxPackets"), Some(42));
        assert_eq!(counter(TEXT, "IpExt:", "BusyPollRxPackets"), Some(6));
        assert_eq!(counter(TEXT, "TcpExt:", "InNoRoutes"), None);
        assert_eq!(counter(TEXT, "MPTcpExt:", "BusyPollRxPackets"), None);
        assert_eq!(counter("TcpExt: A\n", "TcpExt:", "A"), None);
    }
}
