//! Protocol counters of one network namespace, from `/proc/thread-self/net/netstat`.

use crate::Result;
use crate::netns::Netns;

/// Packets that sockets of `netns` received while they were busy-polling (`TcpExt: BusyPollRxPackets`; UDP counts too).
pub fn busy_poll_rx_packets(_netns: &Netns) -> Result<u64> {
    todo!()
}
