//! A NAPI instance's own kernel thread that busy-polls it (6.19+): `napi-set threaded=busy-poll`.
//!
//! The kernel makes the thread, and it spins until it is told otherwise: also when whoever asked for it has died. So the
//! owner has to end it, and what finds a dead owner's traces does too ([`stop`]).

use crate::napi::{NapiSettings, NetdevSocket, Threaded};
use crate::netns::Netns;
use crate::process::{Scheduling, set_affinity, set_scheduling};
use crate::{CpuId, CpuSet, Error, IfIndex, NapiId, Result};

/// One polling thread; dropping it gives the instance back to softirq.
#[derive(Debug)]
pub struct NapiThread {
    socket: NetdevSocket,
    napi: NapiId,
    thread_id: u32,
}

impl NapiThread {
    /// Has `napi`, which belongs to `link` in `netns`, polled by its own thread, on `cpu` and in class `scheduling`, from now on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no such threads, [`Error::NotFound`] when the instance is gone.
    pub fn start(
        netns: &Netns,
        link: IfIndex,
        napi: NapiId,
        cpu: CpuId,
        scheduling: Scheduling,
    ) -> Result<Self> {
        Self::start_as(Threaded::BusyPoll, netns, link, napi, cpu, scheduling)
    }

    /// As [`NapiThread::start`], for a thread that sleeps until a packet wakes it (for single instances 6.17+).
    ///
    /// # Errors
    /// As there.
    pub fn start_sleeping(
        netns: &Netns,
        link: IfIndex,
        napi: NapiId,
        cpu: CpuId,
        scheduling: Scheduling,
    ) -> Result<Self> {
        Self::start_as(Threaded::Enabled, netns, link, napi, cpu, scheduling)
    }

    fn start_as(
        mode: Threaded,
        netns: &Netns,
        link: IfIndex,
        napi: NapiId,
        cpu: CpuId,
        scheduling: Scheduling,
    ) -> Result<Self> {
        let mut socket = NetdevSocket::open_in(netns)?;
        set(&mut socket, napi, mode)?;
        // From here on dropping it takes it back.
        let mut thread = Self {
            socket,
            napi,
            thread_id: 0,
        };
        let found = thread.socket.napis(link)?;
        let told = found.iter().find(|n| n.id == napi).and_then(|n| n.pid);
        thread.thread_id = told.ok_or_else(|| Error::NotFound {
            what: format!("the thread of NAPI instance {napi}"),
        })?;
        set_affinity(thread.thread_id, &CpuSet::from_iter([cpu]))?;
        set_scheduling(thread.thread_id, scheduling)?;
        Ok(thread)
    }

    /// Thread id of the kernel thread (`napi/*`), which belongs to no process of user space.
    pub fn thread_id(&self) -> u32 {
        self.thread_id
    }
}

impl Drop for NapiThread {
    fn drop(&mut self) {
        match set(&mut self.socket, self.napi, Threaded::Disabled) {
            // With its instance the thread has gone.
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, "a NAPI thread goes on polling"),
        }
    }
}

/// Ends threads of this `mode` of a link's instances that a dead owner left; how many there were.
///
/// # Errors
/// [`Error::NotFound`] when there is no such link, and what the kernel says.
pub fn stop(netns: &Netns, link: IfIndex, mode: Threaded) -> Result<usize> {
    let mut socket = NetdevSocket::open_in(netns)?;
    let mut stopped = 0;
    for napi in socket.napis(link)? {
        if napi.threaded == Some(mode) {
            set(&mut socket, napi.id, Threaded::Disabled)?;
            stopped += 1;
        }
    }
    Ok(stopped)
}

fn set(socket: &mut NetdevSocket, napi: NapiId, threaded: Threaded) -> Result<()> {
    let settings = NapiSettings {
        threaded: Some(threaded),
        ..NapiSettings::default()
    };
    socket.set(napi, settings)
}
