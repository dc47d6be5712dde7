//! Offload features of a link by the `SIOCETHTOOL` ioctls (linux/ethtool.h): the ones that decide
//! whether a veth can be polled.
//!
//! A veth end has a NAPI instance while it is up and GRO is on. A packet passes that instance only
//! if none of NETIF_F_ALL_TSO is on at the end that sends it (`veth_skb_is_eligible_for_gro` in
//! drivers/net/veth.c). `ETHTOOL_GTSO` and `ETHTOOL_STSO` stand for the same NETIF_F_ALL_TSO, so
//! they are enough; features beside it, like tx-tcp-accecn-segmentation, do not matter.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::link::RouteSocket;
use crate::netns::Netns;
use crate::sys::interface_request;
use crate::{Error, Result};

/// Features of one link that matter to kbp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Generic receive offload.
    pub gro: bool,
    /// TCP segmentation offload: whether any of NETIF_F_ALL_TSO (TCPv4, TCPv6, ECN, mangled id)
    /// is on; setting it sets all of them.
    pub tso: bool,
}

/// Reads the features of `name` in `netns`.
///
/// # Errors
/// [`Error::NotFound`] when there is no such link, [`Error::Syscall`] when the kernel refuses.
pub fn features(netns: &Netns, name: &str) -> Result<Features> {
    Device::open(netns, name)?.features()
}

/// Sets both features and reads them back.
///
/// Switching GRO gives a veth end that is up a new NAPI instance, so what is already as wanted is
/// not touched.
///
/// # Errors
/// [`Error::NotFound`] when there is no such link, [`Error::Syscall`] when the kernel refuses, and
/// [`Error::Unsupported`] when the device did not take a value over; the last two name the feature.
pub fn set_features(netns: &Netns, name: &str, wanted: Features) -> Result<()> {
    let device = Device::open(netns, name)?;
    let before = device.features()?;
    if before.tso != wanted.tso {
        device.set(&TSO, wanted.tso)?;
    }
    if before.gro != wanted.gro {
        device.set(&GRO, wanted.gro)?;
    }
    device.verify(wanted)
}

/// As [`set_features`], for a link in the namespace of `socket` that nobody has polled yet: what it has is not asked for
/// first, and no other socket is opened. Each question takes the kernel's RTNL lock, for which other callers queue.
///
/// # Errors
/// As [`set_features`].
pub fn set_features_of_new(socket: &RouteSocket, name: &str, wanted: Features) -> Result<()> {
    // An ioctl that netlink does not know goes on to the devices (sock_do_ioctl in net/socket.c).
    let device = Device::new(socket.as_fd(), name)?;
    device.set(&TSO, wanted.tso)?;
    device.set(&GRO, wanted.gro)?;
    device.verify(wanted)
}

struct Feature {
    name: &'static str,
    on: &'static str,
    off: &'static str,
    get: u32,
    set: u32,
}

const TSO: Feature = Feature {
    name: "TSO",
    on: "TCP segmentation offload (TSO) on",
    off: "TCP segmentation offload (TSO) off",
    get: 0x1e,
    set: 0x1f,
};

const GRO: Feature = Feature {
    name: "GRO",
    on: "generic receive offload (GRO) on",
    off: "generic receive offload (GRO) off",
    get: 0x2b,
    set: 0x2c,
};

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// A link, and a socket in its namespace that carries the ioctls.
struct Device<'a, S> {
    socket: S,
    name: &'a str,
    request: libc::ifreq,
}

impl<'a> Device<'a, OwnedFd> {
    fn open(netns: &Netns, name: &'a str) -> Result<Self> {
        // Any family's socket will do; a local one is there also without IPv4.
        let open = || {
            socket(
                AddressFamily::Unix,
                SockType::Datagram,
                SockFlag::SOCK_CLOEXEC,
                None,
            )
        };
        let socket = netns.run(open)?.map_err(|errno| Error::Syscall {
            what: format!("open a socket for the features of link {name}"),
            source: errno.into(),
        })?;
        Self::new(socket, name)
    }
}

impl<'a, S: AsFd> Device<'a, S> {
    fn new(socket: S, name: &'a str) -> Result<Self> {
        Ok(Self {
            socket,
            name,
            request: interface_request(name)?,
        })
    }

    fn verify(&self, wanted: Features) -> Result<()> {
        let is = self.features()?;
        for (feature, is, should) in [(&TSO, is.tso, wanted.tso), (&GRO, is.gro, wanted.gro)] {
            if is != should {
                return Err(Error::Unsupported {
                    feature: if should { feature.on } else { feature.off },
                    reason: format!("link {} does not take it over", self.name),
                });
            }
        }
        Ok(())
    }

    fn features(&self) -> Result<Features> {
        Ok(Features {
            gro: self.get(&GRO)?,
            tso: self.get(&TSO)?,
        })
    }

    fn get(&self, feature: &Feature) -> Result<bool> {
        let what = || format!("read {} of link {}", feature.name, self.name);
        self.ioctl(what, feature.get, 0).map(|value| value != 0)
    }

    fn set(&self, feature: &Feature, on: bool) -> Result<()> {
        let what = || {
            let state = if on { "on" } else { "off" };
            format!("switch {} of link {} {state}", feature.name, self.name)
        };
        self.ioctl(what, feature.set, u32::from(on)).map(|_| ())
    }

    fn ioctl(&self, what: impl Fn() -> String, command: u32, data: u32) -> Result<u32> {
        let mut value = EthtoolValue { command, data };
        let mut request = self.request;
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: for the commands of this module SIOCETHTOOL reads a whole ifreq, and reads and
        // writes one struct ethtool_value behind ifru_data; both live until the call returns.
        let result = unsafe {
            libc::ioctl(
                self.socket.as_fd().as_raw_fd(),
                libc::SIOCETHTOOL,
                &raw mut request,
            )
        };
        if result == 0 {
            return Ok(value.data);
        }
        match io::Error::last_os_error() {
            source if source.raw_os_error() == Some(libc::ENODEV) => Err(Error::NotFound {
                what: format!("link {}", self.name),
            }),
            source => Err(Error::Syscall {
                what: what(),
                source,
            }),
        }
    }
}
