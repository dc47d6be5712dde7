//! Mode `routed`: every pod is a host route of its own to a veth pair that can be busy-polled.
//!
//! ```text
//!   pod                                            host
//!   eth0  10.88.0.5/16 (no prefix route)           kbp1f0…  10.88.0.1/32 (the gateway)
//!     10.88.0.0/16 via 10.88.0.1 onlink              10.88.0.5/32 dev kbp1f0…
//!     0.0.0.0/0    via 10.88.0.1 onlink mtu 1500
//!     10.88.0.1 is the host end's MAC, for good      10.88.0.5 is the pod end's MAC, for good
//! ```
//!
//! No address is resolved and nothing is bridged. Both devices have an MTU of 65535, so that TCP without
//! segmentation offload, which would bypass the NAPI instances, is still fast between pods; the routes that
//! leave the node carry the uplink's MTU.

pub(crate) mod plan;
pub(crate) mod wire;
