//! Protocol counters of one network namespace, from `/proc/thread-self/net/netstat`.

use std::fs;
use std::path::Path;

use crate::netns::Netns;
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
    fn a_counter_is_found_by_group_and_name() {
        assert_eq!(counter(TEXT, "TcpExt:", "BusyPollRxPackets"), Some(42));
        assert_eq!(counter(TEXT, "IpExt:", "BusyPollRxPackets"), Some(6));
        assert_eq!(counter(TEXT, "TcpExt:", "InNoRoutes"), None);
        assert_eq!(counter(TEXT, "MPTcpExt:", "BusyPollRxPackets"), None);
        assert_eq!(counter("TcpExt: A\n", "TcpExt:", "A"), None);
    }
}
