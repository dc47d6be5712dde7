//! Changing hands: to the daemon, and back to this process.

use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use kbp_kernel::CpuSet;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::{HAND_OVER_LIMIT, Inner, UPDATE_LIMIT, Who};
use crate::Result;
use crate::api::{self, UpdateRequest};
use crate::attach::{AttachRequest, Outcome, Terms};
use crate::client::{Attached, Client, ClientError};
use crate::engine::Engine;
use crate::state::{Degraded, SocketCounters};

impl Inner {
    /// Sees to it that somebody polls, the daemon rather than this process when `try_daemon`. False: to be tried again.
    pub(super) fn settle(&mut self, try_daemon: bool) -> bool {
        let previous = match &self.who {
            Who::Daemon { .. } if !self.has_lost_daemon() => return true,
            Who::Daemon { pid, .. } => Some(*pid),
            Who::Own(_) if !try_daemon => return true,
            Who::Own(_) => None,
            Who::Nobody { previous } => *previous,
        };
        let mut again = false;
        if try_daemon {
            match Client::connect(&socket_of(&self.request), HAND_OVER_LIMIT) {
                // Nothing is let go for a daemon that does not answer: an end of what is not there is a question that costs
                // nothing.
                Ok(mut client) => match client
                    .detach(&self.request.namespace, &self.request.id, false)
                    .and_then(|_| self.hand_over(client, previous))
                {
                    Ok(()) if matches!(self.who, Who::Daemon { .. }) => return true,
                    Ok(()) => {}
                    Err(error) => {
                        // What it refuses now it would refuse again.
                        again = !matches!(error, ClientError::Refused { .. });
                        tracing::warn!("this process polls for itself: {error}");
                    }
                },
                Err(error) => tracing::debug!("{error}"),
            }
        }
        if matches!(self.who, Who::Own(_)) {
            return !again;
        }
        self.take_back() && !again
    }

    fn hand_over(&mut self, mut client: Client, previous: Option<u32>) -> Result<(), ClientError> {
        let own = std::mem::replace(&mut self.who, Who::Nobody { previous });
        if let Who::Own(attachment) = own {
            attachment.hand_over();
        }
        match attach_at(&mut client, &self.request)? {
            Attached::Pod(pod) => {
                tracing::info!("the daemon, process {}, polls the pod", pod.owner_pid);
                let pid = pod.owner_pid;
                self.who = Who::Daemon { client, pid };
                self.update(&[]);
            }
            Attached::Waiting | Attached::NoInterface | Attached::HostNetwork => {
                tracing::debug!("the pod has no interface to hand over");
            }
        }
        Ok(())
    }

    /// Attaches in this process.
    pub(super) fn take_back(&mut self) -> bool {
        let previous = match &self.who {
            Who::Nobody { previous } => *previous,
            Who::Daemon { pid, .. } => Some(*pid),
            Who::Own(_) => None,
        };
        // First of all: what is bound to the connection ends with it, should the daemon be alive after all.
        self.who = Who::Nobody { previous };
        let terms = Terms {
            previous_owner: previous,
            ..Terms::default()
        };
        let attached = Engine::start().and_then(|engine| {
            copy(&self.request).and_then(|request| engine.attach(request, terms))
        });
        match attached {
            Ok(Outcome::Attached(attachment)) => {
                let cpuset = self.request.cpuset.as_ref();
                attachment.set_sockets(&self.request.window, cpuset, self.counters);
                attachment.set_short_way(self.short_way.as_deref());
                self.who = Who::Own(attachment);
                true
            }
            Ok(Outcome::NoInterface | Outcome::HostNetwork) => false,
            Err(error) => {
                tracing::warn!("nobody polls the pod for now: {error}");
                false
            }
        }
    }

    pub(super) fn has_lost_daemon(&self) -> bool {
        let Who::Daemon { client, .. } = &self.who else {
            return false;
        };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let peeked = recv(client.as_fd().as_raw_fd(), &mut [0], flags);
        !matches!(peeked, Err(Errno::EAGAIN | Errno::EINTR))
    }

    pub(super) fn lose_daemon(&mut self) {
        if let Who::Daemon { pid, .. } = self.who {
            tracing::warn!("the daemon, process {pid}, is gone: this process polls for itself");
            let previous = Some(pid);
            self.who = Who::Nobody { previous };
        }
    }

    /// Tells the daemon what has changed; one that does not listen is left.
    pub(super) fn update(&mut self, degraded: &[Degraded]) {
        let message = UpdateRequest {
            id: self.request.id.clone(),
            namespace: self.request.namespace.clone(),
            sockets: Some(api::Sockets {
                short_way: self.short_way.clone().unwrap_or_default(),
                ..api::sockets(&self.request.window, self.counters)
            }),
            cpuset: text_of(self.request.cpuset.as_ref()),
            degraded: api::degraded(degraded),
        };
        let Who::Daemon { client, .. } = &mut self.who else {
            return;
        };
        client.renew(UPDATE_LIMIT);
        if let Err(error) = client.update(&message) {
            tracing::warn!("{error}");
            self.lose_daemon();
            // The follower tries again if this does not work.
            let _ = self.take_back();
        }
    }
}

pub(super) fn socket_of(request: &AttachRequest) -> PathBuf {
    request.config.state_dir.join(api::SOCKET)
}

fn text_of(cpuset: Option<&CpuSet>) -> String {
    cpuset.map(ToString::to_string).unwrap_or_default()
}

pub(super) fn attach_at(
    client: &mut Client,
    request: &AttachRequest,
) -> Result<Attached, ClientError> {
    client.attach(&api::AttachRequest {
        id: request.id.clone(),
        namespace: request.namespace.clone(),
        // The handle is open as long as the call takes, whatever becomes of the process that the namespace was found by.
        netns: format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            request.netns.as_fd().as_raw_fd()
        ),
        worker: request.policy.worker.to_string(),
        profile: request.policy.profile.to_string(),
        required: request.policy.required,
        cpuset: text_of(request.cpuset.as_ref()),
        sockets: Some(api::sockets(&request.window, SocketCounters::default())),
        degraded: api::degraded(&request.degraded),
        bound: true,
        cpu_latency_us: request.policy.cpu_latency.map(|m| m.0),
        prefer_busy_poll: request.policy.prefer_busy_poll,
        busy_poll_mode: request.policy.busy_poll_mode.to_string(),
    })
}

pub(super) fn copy(request: &AttachRequest) -> Result<AttachRequest> {
    Ok(AttachRequest {
        id: request.id.clone(),
        namespace: request.namespace.clone(),
        netns: request.netns.try_clone()?,
        policy: request.policy,
        cpuset: request.cpuset.clone(),
        window: request.window.clone(),
        degraded: request.degraded.clone(),
        config: request.config.clone(),
    })
}
