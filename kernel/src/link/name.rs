//! Questions about a link that the kernel answers without its RTNL lock (`dev_ioctl` in net/core/dev_ioctl.c): with
//! many attachments at once, callers queue for that lock.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::RouteSocket;
use crate::sys::interface_request;
use crate::{Error, IfIndex, Mtu, Result};

impl RouteSocket {
    /// The index of the link of that name, None when there is none.
    pub fn index_of(&self, name: &str) -> Result<Option<IfIndex>> {
        let mut request = interface_request(name)?;
        let what = || format!("look up the index of link {name:?}");
        if !self.ask(libc::SIOCGIFINDEX, &mut request, what)? {
            return Ok(None);
        }
        // SAFETY: SIOCGIFINDEX has written this member of the union.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        // An ifindex is a positive i32 in the kernel.
        Ok(Some(IfIndex(index as u32)))
    }

    /// The MTU of a link, None when there is no such link.
    pub fn mtu_of(&self, link: IfIndex) -> Result<Option<Mtu>> {
        // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // An ifindex is a positive i32 in the kernel.
        request.ifr_ifru.ifru_ifindex = link.0 as i32;
        let what = || format!("look up the MTU of link {link}");
        // This one writes the name that the next one reads.
        if !self.ask(libc::SIOCGIFNAME, &mut request, what)?
            || !self.ask(libc::SIOCGIFMTU, &mut request, what)?
        {
            return Ok(None);
        }
        // SAFETY: SIOCGIFMTU has written this member of the union.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        // Never negative: the kernel keeps it unsigned.
        Ok(Some(Mtu(mtu as u32)))
    }

    /// One ioctl; false when there is no such link.
    fn ask(
        &self,
        command: libc::Ioctl,
        request: &mut libc::ifreq,
        what: impl Fn() -> String,
    ) -> Result<bool> {
        // SAFETY: the commands of this module read and write one struct ifreq, which lives until the call returns. That
        // the socket is netlink's does not matter: what it does not know goes on to dev_ioctl (sock_do_ioctl).
        let answer = unsafe {
            libc::ioctl(
                self.as_fd().as_raw_fd(),
                command,
                std::ptr::from_mut(request),
            )
        };
        if answer == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            source if source.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            source => Err(Error::Syscall {
                what: what(),
                source,
            }),
        }
    }
}
