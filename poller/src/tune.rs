//! Makes a veth pollable: GRO on at the end that is polled, TSO off and a qdisc at the one that sends to it, NAPI ids. The pod end is polled by the
//! pod's sockets, the host end by a worker only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kbp_kernel::ethtool::{self, Features};
use kbp_kernel::gro_list::GroList;
use kbp_kernel::link::{Batch, Link, RouteSocket};
use kbp_kernel::napi::{Napi, NetdevSocket};
use kbp_kernel::netns::Netns;
use kbp_kernel::{Error, IfIndex, NapiId, Result};
use serde::{Deserialize, Serialize};

use crate::defer::Deferral;
use crate::endpoint::Endpoint;
use crate::policy::Profile;
use crate::record::End;
use crate::short_way::ShortWay;
use crate::worker::learn;

/// Packets that the qdisc of a veth end holds while the receiving ring (256 packets) is full; the default queue length
/// of the kernel's Ethernet devices. Without a qdisc a full ring drops.
pub(crate) const QDISC_LIMIT: u32 = 1000;

/// Both ends of a veth as they are now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tuned {
    /// NAPI instances of the host end.
    pub(crate) host_napis: Vec<NapiId>,
    /// NAPI instances of the pod end.
    pub(crate) pod_napis: Vec<NapiId>,
    /// Why packets do not pass the NAPIs, where they do not.
    pub(crate) problem: Option<String>,
    /// Why the ids are not known although the NAPIs may be there: the kernel has no way to tell.
    pub(crate) ids_unknown: Option<String>,
    /// Why packets do not wait for whoever polls, although they should.
    pub(crate) not_deferred: Option<String>,
    /// Whether what the pod sends takes the way around the host end's NAPI.
    pub(crate) rests: bool,
}

/// Offloads of both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offloads {
    #[serde(with = "FeaturesFile")]
    host: Features,
    #[serde(with = "FeaturesFile")]
    pod: Features,
    /// `rx-gro-list` of the host end, where the profile changes it.
    #[serde(default)]
    gro_list: Option<bool>,
}

/// How [`Features`] are written to a file.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Features")]
struct FeaturesFile {
    gro: bool,
    tso: bool,
}

/// Sets up the veths between two namespaces.
#[derive(Debug)]
pub(crate) struct Tuner {
    pub(crate) host: Netns,
    pub(crate) pod: Netns,
    pub(crate) profile: Profile,
    /// Whether a worker is to poll the host ends: only then they get a NAPI instance, whose id is learnt from a packet where the kernel
    /// does not tell it. Without one, what the pod sends takes the shorter way.
    pub(crate) for_worker: bool,
    /// Whether packets to the pod wait for whoever polls.
    pub(crate) deferral: Deferral,
    /// Whether the worker has not been wanted for a while: then what the pod sends takes the way around the host end's NAPI, which nobody polls.
    pub(crate) resting: Arc<AtomicBool>,
    /// Whether packets to the pod pass by whoever could poll.
    pub(crate) short_way: ShortWay,
}

/// Has what a host end sends pass the NAPI of the pod end again; fine when it is gone.
pub(crate) fn leave_short_way(host: &Netns, name: &str) -> Result<()> {
    let off = |now: Features| Features { tso: false, ..now };
    match ethtool::features(host, name).and_then(|now| ethtool::set_features(host, name, off(now)))
    {
        Err(Error::NotFound { .. }) => Ok(()),
        outcome => outcome,
    }
}

/// The NAPI instances of a link, and a socket to set them by.
fn napis_of(netns: &Netns, link: IfIndex) -> Result<(NetdevSocket, Vec<Napi>)> {
    let mut socket = NetdevSocket::open_in(netns)?;
    let napis = socket.napis(link)?;
    Ok((socket, napis))
}

impl Tuner {
    /// A second one for the same namespaces.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            host: self.host.try_clone()?,
            pod: self.pod.try_clone()?,
            profile: self.profile,
            for_worker: self.for_worker,
            deferral: self.deferral.clone(),
            resting: Arc::clone(&self.resting),
            short_way: self.short_way.clone(),
        })
    }

    /// Says whether the worker rests, for the next look; whether that is news.
    pub(crate) fn set_resting(&self, resting: bool) -> bool {
        self.resting.swap(resting, Ordering::Relaxed) != resting
    }

    /// Does what is still to be done and tells what came of it. Nothing changes when all is as it should be.
    pub(crate) fn tune(&self, endpoint: &Endpoint) -> Tuned {
        let mut tuned = Tuned::default();
        match self.both_ends(endpoint, &mut tuned) {
            Ok(()) => {}
            Err(problem) => tuned.problem = Some(problem),
        }
        tuned
    }

    /// The offloads of both ends.
    pub(crate) fn offloads(&self, endpoint: &Endpoint) -> Result<Offloads> {
        Ok(Offloads {
            host: ethtool::features(&self.host, &endpoint.host_name)?,
            pod: ethtool::features(&self.pod, &endpoint.pod_name)?,
            gro_list: match self.profile {
                Profile::Latency => None,
                // Not known, not changed either.
                Profile::Throughput => GroList::open_in(&self.host)
                    .and_then(|mut lists| lists.is_on(endpoint.host_index))
                    .ok(),
            },
        })
    }

    /// Sets the offloads of both ends back to what they were; fine when the veth is gone.
    pub(crate) fn restore(&self, endpoint: &Endpoint, before: Offloads) -> Result<()> {
        let host = ethtool::set_features(&self.host, &endpoint.host_name, before.host);
        let pod = ethtool::set_features(&self.pod, &endpoint.pod_name, before.pod);
        let list = before.gro_list.map_or(Ok(()), |on| {
            GroList::open_in(&self.host)?.set(endpoint.host_index, on)
        });
        for outcome in [host, pod, list] {
            match outcome {
                Ok(()) | Err(Error::NotFound { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn both_ends(&self, endpoint: &Endpoint, tuned: &mut Tuned) -> Result<(), String> {
        let ends = [
            (
                End::Host,
                &self.host,
                &endpoint.host_name,
                endpoint.host_index,
            ),
            (End::Pod, &self.pod, &endpoint.pod_name, endpoint.pod_index),
        ];
        // Both ends first: packets pass a NAPI only when the *other* end does not segment them later.
        for (end, netns, name, index) in ends {
            tuned.rests |= self
                .one_end(end, netns, name, index)
                .map_err(|e| format!("{}: {e}", endpoint.pod_name))?;
        }
        self.datagrams(endpoint)
            .map_err(|e| format!("{}: {e}", endpoint.pod_name))?;
        let mut found = Vec::new();
        for (end, netns, name, index) in ends {
            let napis = match napis_of(netns, index) {
                Ok((mut socket, napis)) => {
                    if end == End::Pod {
                        let applied = self.deferral.apply(&mut socket, &napis);
                        tuned.not_deferred = applied.err();
                    }
                    napis
                }
                Err(e @ Error::Unsupported { .. }) => {
                    tuned.not_deferred = self.deferral.without_ids(&e);
                    self.without_ids(endpoint, &e, tuned);
                    return Ok(());
                }
                Err(e) => return Err(format!("{}: {e}", endpoint.pod_name)),
            };
            if napis.is_empty() && (end == End::Pod || self.for_worker) {
                return Err(format!(
                    "{}: {name} is up and has GRO on, but no NAPI instance: this kernel's veth driver makes none (5.13 and later do)",
                    endpoint.pod_name
                ));
            }
            found.push(napis.into_iter().map(|n| n.id).collect());
        }
        if let [host, pod] = &mut found[..] {
            tuned.host_napis = std::mem::take(host);
            tuned.pod_napis = std::mem::take(pod);
        }
        Ok(())
    }

    /// A sender with TSO on hands its datagrams to the host end's NAPI when that chains them. Without TSO all packets come there, and
    /// chained TCP could not be sent on as large segments.
    fn datagrams(&self, endpoint: &Endpoint) -> Result<(), String> {
        if self.profile != Profile::Throughput {
            return Ok(());
        }
        let sender = ethtool::features(&self.pod, &endpoint.pod_name).map_err(|e| e.to_string())?;
        let set = || -> Result<()> {
            let mut lists = GroList::open_in(&self.host)?;
            if lists.is_on(endpoint.host_index)? != sender.tso {
                lists.set(endpoint.host_index, sender.tso)?;
            }
            Ok(())
        };
        set().map_err(|e| format!("UDP passes no NAPI of {}: {e}", endpoint.host_name))
    }

    /// Lets packets wait for nobody any more; fine when the veth is gone.
    pub(crate) fn end_deferral(&self, endpoint: &Endpoint) {
        self.deferral.set_sockets_poll(false);
        let ended = match napis_of(&self.pod, endpoint.pod_index) {
            Ok((mut socket, napis)) => self.deferral.apply(&mut socket, &napis),
            Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(reason) = ended {
            tracing::warn!(
                "{}: packets still wait to be polled: {reason}",
                endpoint.pod_name
            );
        }
    }

    /// Leads packets to the pod past its NAPI no longer; fine when the veth is gone.
    pub(crate) fn end_short_way(&self, endpoint: &Endpoint) -> Result<()> {
        self.short_way.set(false);
        leave_short_way(&self.host, &endpoint.host_name)
    }

    /// For kernels that do not tell the ids.
    fn without_ids(&self, endpoint: &Endpoint, error: &Error, tuned: &mut Tuned) {
        if !self.for_worker {
            tuned.ids_unknown = Some(error.to_string());
            return;
        }
        match learn(
            &self.host,
            endpoint.host_index,
            &self.pod,
            &endpoint.pod_name,
        ) {
            Ok(napi) => tuned.host_napis = vec![napi],
            Err(e) => tuned.ids_unknown = Some(format!("{error}; {e}")),
        }
    }

    /// Whether what it sends takes the way around the other end's NAPI because nobody polls that for now.
    fn one_end(&self, end: End, netns: &Netns, name: &str, index: IfIndex) -> Result<bool, String> {
        let text = |e: Error| e.to_string();
        let mut route = RouteSocket::open_in(netns).map_err(text)?;
        let link = route
            .link_by_index(index)
            .map_err(text)?
            .ok_or_else(|| format!("{name} is gone"))?;
        if !link.up {
            return Err(format!("{name} is down; it is polled once it is up"));
        }
        let now = ethtool::features(netns, name).map_err(text)?;
        // An end owns a NAPI with GRO on, and it takes what the other end sends without TSO.
        let (received, sends_to_napi) = match end {
            End::Host => (self.for_worker, true),
            End::Pod => (true, self.for_worker),
        };
        let short = end == End::Host && self.short_way.is_on();
        let wanted = Features {
            gro: now.gro || received,
            tso: short || now.tso && !(sends_to_napi && self.profile == Profile::Latency),
        };
        if end == End::Pod && self.takes_short_way() {
            // A veth that cannot have TSO stays as it is.
            let short = Features {
                tso: true,
                ..wanted
            };
            if now == short || ethtool::set_features(netns, name, short).is_ok() {
                self.ensure_qdisc(&mut route, &link, sends_to_napi)?;
                return Ok(true);
            }
        }
        if now != wanted {
            ethtool::set_features(netns, name, wanted).map_err(text)?;
        }
        self.ensure_qdisc(&mut route, &link, sends_to_napi)?;
        Ok(false)
    }

    /// A sender with TSO on leaves out the receiver's NAPI (`veth_skb_is_eligible_for_gro` in drivers/net/veth.c), without a packet lost and
    /// without a new NAPI: the first packet after a silence then finds as little to be fetched into the caches as on any veth.
    fn takes_short_way(&self) -> bool {
        self.for_worker && self.profile == Profile::Latency && self.resting.load(Ordering::Relaxed)
    }

    fn ensure_qdisc(
        &self,
        route: &mut RouteSocket,
        link: &Link,
        sends_to_napi: bool,
    ) -> Result<(), String> {
        let (name, index) = (&link.name, link.index);
        if sends_to_napi && link.qdisc.as_deref() == Some("noqueue") {
            let mut batch = Batch::new();
            batch.set_pfifo(index, QDISC_LIMIT);
            route.execute(&batch).map_err(|e| {
                format!("{name} has no qdisc, so bursts of more than 256 packets are lost: {e}")
            })?;
        }
        Ok(())
    }
}
