//! Who holds which pod.
//!
//! An attachment is *bound* to the connection that asked for it, and ends with it: a shim's. Or it is *registered*: it lasts until
//! it is detached or its namespace vanishes: a CNI plugin's. Where both name the same namespace, the bound one holds it and the
//! registered one waits, since what is polled twice is polled worse.

use std::path::PathBuf;

use kbp_kernel::fd::Peer;
use kbp_kernel::netns::NetnsId;

use super::answer::{Refusal, Result, invalid};
use super::{MAX_PODS, Name, Service};
use crate::api::{self, AttachRequest, AttachResponse, Code, DetachRequest, DetachResponse, Pod};
use crate::attach::{Attachment, Outcome, Terms};
use crate::daemon::connection::ConnectionId;
use crate::daemon::netns;
use crate::daemon::registration::{self, Registration};
use crate::{Error, state};

/// An attachment and whose it is.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) netns: NetnsId,
    /// None: registered, and waiting for a bound one of the same namespace to end.
    pub(super) attachment: Option<Attachment>,
    pub(super) owner: Owner,
}

impl Held {
    /// What is true of it, but for its packets; None while it waits.
    pub(super) fn pod(&self) -> Option<Pod> {
        let state = self.attachment.as_ref()?.state();
        Some(api::pod(&state, matches!(self.owner, Owner::Bound(_)), 0))
    }
}

#[derive(Debug)]
pub(super) enum Owner {
    Bound(ConnectionId),
    Registered(Registration),
}

enum Kept {
    Attached,
    NoInterface,
    HostNetwork,
}

impl Service {
    /// Takes up what was registered with a daemon before this one.
    pub(in crate::daemon) fn take_up(&mut self) {
        for registration in registration::read_all(&self.config.state_dir) {
            let request = registration.request();
            let still_there = netns::open(&request.netns)
                .ok()
                .and_then(|netns| netns.id().ok())
                .is_some_and(|id| (id.dev, id.ino) == registration.netns_id);
            if !still_there {
                registration.remove(&self.config.state_dir);
                continue;
            }
            if let Err(Refusal(_, reason)) = self.register(&request) {
                tracing::warn!(
                    "{}/{} is not attached again: {reason}",
                    registration.namespace,
                    registration.id
                );
            }
        }
    }

    /// A connection is gone, and what was bound to it goes.
    pub(in crate::daemon) fn closed(&mut self, id: ConnectionId) {
        let names: Vec<Name> = self
            .held
            .iter()
            .filter(|(_, held)| matches!(held.owner, Owner::Bound(owner) if owner == id))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            self.release(&name, false);
        }
    }

    pub(super) fn attach(
        &mut self,
        request: &AttachRequest,
        id: ConnectionId,
        peer: Peer,
    ) -> Result<AttachResponse> {
        let name = (request.namespace.clone(), request.id.clone());
        let outcome = if request.bound {
            self.bind(request, id, peer)?
        } else {
            self.register(request)?
        };
        let outcome = match outcome {
            Kept::Attached => api::Outcome::Attached,
            Kept::NoInterface => api::Outcome::NoInterface,
            Kept::HostNetwork => api::Outcome::HostNetwork,
        };
        let pod = match outcome {
            api::Outcome::Attached => self.held.get(&name).and_then(Held::pod),
            _ => None,
        };
        Ok(AttachResponse {
            outcome: outcome.into(),
            pod,
        })
    }

    fn bind(&mut self, request: &AttachRequest, id: ConnectionId, peer: Peer) -> Result<Kept> {
        let name = (request.namespace.clone(), request.id.clone());
        let netns = netns::open(&request.netns).map_err(invalid)?;
        let netns_id = netns.id().map_err(Error::from)?;
        self.make_room(&name, Some(id))?;
        // Registered ones of the namespace wait; also when this one fails, they go on afterwards.
        self.pause(netns_id);
        let terms = Terms {
            previous_owner: (peer.pid != 0).then_some(peer.pid),
            ..Terms::default()
        };
        let outcome = self
            .attach_request(request, netns)
            .and_then(|asked| Ok(self.engine.attach(asked, terms)?));
        let kept = match outcome {
            Ok(Outcome::Attached(attachment)) => {
                let held = Held {
                    netns: netns_id,
                    attachment: Some(attachment),
                    owner: Owner::Bound(id),
                };
                self.held.insert(name, held);
                self.counts.attached += 1;
                return Ok(Kept::Attached);
            }
            Ok(Outcome::NoInterface) => Ok(Kept::NoInterface),
            Ok(Outcome::HostNetwork) => Ok(Kept::HostNetwork),
            Err(refusal) => Err(refusal),
        };
        self.resume(netns_id);
        kept
    }

    fn register(&mut self, request: &AttachRequest) -> Result<Kept> {
        let name = (request.namespace.clone(), request.id.clone());
        if request.netns.starts_with("/proc/") {
            return Err(invalid(format!(
                "{:?} is not a path that lasts: name one like /run/netns/NAME, or bind the attachment to the connection",
                request.netns
            )));
        }
        let netns = netns::open(&request.netns).map_err(invalid)?;
        let netns_id = netns.id().map_err(Error::from)?;
        self.make_room(&name, None)?;
        let registration = Registration::new(request, netns_id);
        let is_held = self
            .held
            .values()
            .any(|h| h.netns == netns_id && matches!(h.owner, Owner::Bound(_)));
        let mut held = Held {
            netns: netns_id,
            attachment: None,
            owner: Owner::Registered(registration.clone()),
        };
        // Fit for a file name, and everything else that could be refused.
        let asked = self.attach_request(request, netns)?;
        state::check_names(&request.namespace, &request.id)?;
        if !is_held {
            let terms = Terms {
                previous_owner: None,
                path: Some(PathBuf::from(&request.netns)),
                keep_originals: true,
            };
            match self.engine.attach(asked, terms)? {
                Outcome::Attached(attachment) => held.attachment = Some(attachment),
                Outcome::NoInterface => return Ok(Kept::NoInterface),
                Outcome::HostNetwork => return Ok(Kept::HostNetwork),
            }
        }
        registration.write(&self.config.state_dir)?;
        self.held.insert(name, held);
        self.counts.attached += 1;
        Ok(Kept::Attached)
    }

    /// Takes away what this name stood for, where the caller may.
    fn make_room(&mut self, name: &Name, id: Option<ConnectionId>) -> Result<()> {
        match self.held.get(name).map(|held| &held.owner) {
            Some(Owner::Bound(owner)) if Some(*owner) != id => Err(Refusal(
                Code::AlreadyExists,
                format!(
                    "{}/{} is attached already, by another connection: end that first, or choose another id",
                    name.0, name.1
                ),
            )),
            Some(_) => {
                self.release(name, false);
                Ok(())
            }
            None if self.held.len() >= MAX_PODS => Err(Refusal(
                Code::ResourceExhausted,
                format!("{MAX_PODS} pods are attached, which is all there may be: detach some"),
            )),
            None => Ok(()),
        }
    }

    pub(super) fn detach(
        &mut self,
        request: &DetachRequest,
        id: ConnectionId,
    ) -> Result<DetachResponse> {
        let name = (request.namespace.clone(), request.id.clone());
        let was_attached = match self.held.get(&name).map(|held| &held.owner) {
            None => false,
            Some(Owner::Bound(owner)) if *owner != id => {
                return Err(Refusal(
                    Code::FailedPrecondition,
                    format!(
                        "{}/{} belongs to another connection, and ends with it: end that process",
                        name.0, name.1
                    ),
                ));
            }
            Some(_) => {
                self.release(&name, request.restore);
                true
            }
        };
        Ok(DetachResponse { was_attached })
    }

    /// Ends an attachment, and gives way to one that has waited.
    pub(super) fn release(&mut self, name: &Name, restore: bool) {
        let Some(held) = self.held.remove(name) else {
            return;
        };
        self.counts.detached += 1;
        if let Some(attachment) = held.attachment {
            let outcome = if restore {
                attachment.detach_and_restore()
            } else {
                attachment.detach()
            };
            if let Err(error) = outcome {
                tracing::warn!(%error, "detaching {}/{} left something behind", name.0, name.1);
            }
        }
        match held.owner {
            Owner::Registered(registration) => registration.remove(&self.config.state_dir),
            Owner::Bound(_) => self.resume(held.netns),
        }
    }

    /// Has registered attachments of a namespace wait.
    fn pause(&mut self, netns: NetnsId) {
        for held in self.held.values_mut() {
            if held.netns == netns && matches!(held.owner, Owner::Registered(_)) {
                held.attachment = None;
            }
        }
    }

    /// Has those that have waited go on, where no other holds the namespace.
    fn resume(&mut self, netns: NetnsId) {
        let of_it = |held: &&Held| held.netns == netns;
        if self
            .held
            .values()
            .filter(of_it)
            .any(|h| h.attachment.is_some())
        {
            return;
        }
        let waiting = self
            .held
            .values()
            .filter(of_it)
            .find_map(|held| match &held.owner {
                Owner::Registered(registration) => Some(registration.clone()),
                Owner::Bound(_) => None,
            });
        if let Some(registration) = waiting
            && let Err(Refusal(_, reason)) = self.register(&registration.request())
        {
            tracing::info!(
                "{}/{} is not attached any more: {reason}",
                registration.namespace,
                registration.id
            );
            self.release(
                &(registration.namespace.clone(), registration.id.clone()),
                false,
            );
        }
    }
}
