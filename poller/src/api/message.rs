//! The messages, field by field as in `proto/poller.proto`; a test holds the two together.

use prost::{Enumeration, Message};

/// A call (ttrpc's own message).
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Full name of the service.
    #[prost(string, tag = "1")]
    pub service: String,
    /// The method.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The method's request.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// How long the caller waits, in nanoseconds; 0: as long as it takes.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// What came of a call (ttrpc's own message).
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// None: fine.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The method's answer.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// See [`super::Code`].
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people, with the remedy.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Asks for an attachment.
#[derive(Clone, PartialEq, Message)]
pub struct AttachRequest {
    /// Sandbox or container id: 1 to 110 letters, digits, dots, dashes and underscores, not starting with a dot.
    #[prost(string, tag = "1")]
    pub id: String,
    /// containerd namespace, or what else keeps ids apart; the same alphabet.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Path of the network namespace, opened by the poller: `/run/netns/NAME`, `/proc/PID/ns/net` or `/proc/PID/fd/N`.
    #[prost(string, tag = "3")]
    pub netns: String,
    /// `kbp.io/worker`; empty: what the poller's config file says.
    #[prost(string, tag = "4")]
    pub worker: String,
    /// `kbp.io/profile`; empty: what the poller's config file says.
    #[prost(string, tag = "5")]
    pub profile: String,
    /// Fail rather than attach with a part missing.
    #[prost(bool, tag = "6")]
    pub required: bool,
    /// CPUs of the pod in the kernel's list format (`2-3,8`); empty: all.
    #[prost(string, tag = "7")]
    pub cpuset: String,
    /// What holds for its sockets.
    #[prost(message, optional, tag = "8")]
    pub sockets: Option<Sockets>,
    /// What the caller knows to be missing.
    #[prost(message, repeated, tag = "9")]
    pub degraded: Vec<Degraded>,
    /// Whether the attachment ends with the connection. Else it lasts until it is detached or its namespace vanishes,
    /// and a poller that is started again takes it up; such a path has to stay valid, so it is not one in `/proc`.
    #[prost(bool, tag = "10")]
    pub bound: bool,
    /// `kbp.io/cpu-latency`: longest exit latency of a CPU's sleep states while the pod is attached, in microseconds.
    #[prost(uint32, optional, tag = "11")]
    pub cpu_latency_us: Option<u32>,
    /// `kbp.io/prefer-busy-poll`.
    #[prost(bool, tag = "12")]
    pub prefer_busy_poll: bool,
    /// `kbp.io/busy-poll-mode`; empty: what the poller's config file says.
    #[prost(string, tag = "13")]
    pub busy_poll_mode: String,
}

/// What became of an attach.
#[derive(Clone, PartialEq, Message)]
pub struct AttachResponse {
    /// What it came to.
    #[prost(enumeration = "Outcome", tag = "1")]
    pub outcome: i32,
    /// The attachment; none while a registered one waits for another to end.
    #[prost(message, optional, tag = "2")]
    pub pod: Option<Pod>,
}

/// What an attach came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum Outcome {
    /// Never sent.
    Unspecified = 0,
    /// See the pod, perhaps with degraded parts.
    Attached = 1,
    /// The namespace has only a loopback (yet); nothing was done.
    NoInterface = 2,
    /// It is the host's own namespace; nothing was done.
    HostNetwork = 3,
}

/// Asks for the end of an attachment.
#[derive(Clone, PartialEq, Message)]
pub struct DetachRequest {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its containerd namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Set the offloads of the veths back to what they were: for a pod that lives on.
    #[prost(bool, tag = "3")]
    pub restore: bool,
}

/// What became of a detach.
#[derive(Clone, PartialEq, Message)]
pub struct DetachResponse {
    /// Whether there was an attachment.
    #[prost(bool, tag = "1")]
    pub was_attached: bool,
}

/// Tells what has changed about the sockets of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct UpdateRequest {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its containerd namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// What holds for its sockets.
    #[prost(message, optional, tag = "3")]
    pub sockets: Option<Sockets>,
    /// CPUs of the pod; empty: all.
    #[prost(string, tag = "4")]
    pub cpuset: String,
    /// Added to what is known to be missing.
    #[prost(message, repeated, tag = "5")]
    pub degraded: Vec<Degraded>,
}

/// Nothing.
#[derive(Clone, PartialEq, Message)]
pub struct UpdateResponse {}

/// Nothing.
#[derive(Clone, PartialEq, Message)]
pub struct ListRequest {}

/// What is attached.
#[derive(Clone, PartialEq, Message)]
pub struct ListResponse {
    /// Every attachment.
    #[prost(message, repeated, tag = "1")]
    pub pods: Vec<Pod>,
    /// Every interface of `uplinks` in the config.
    #[prost(message, repeated, tag = "2")]
    pub uplinks: Vec<Uplink>,
}

/// Nothing.
#[derive(Clone, PartialEq, Message)]
pub struct WatchRequest {}

/// What is, or what has changed.
#[derive(Clone, PartialEq, Message)]
pub struct WatchEvent {
    /// What has happened.
    #[prost(enumeration = "EventKind", tag = "1")]
    pub kind: i32,
    /// The attachment.
    #[prost(message, optional, tag = "2")]
    pub pod: Option<Pod>,
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum EventKind {
    /// Never sent.
    Unspecified = 0,
    /// It is attached.
    Attached = 1,
    /// Something about it changed.
    Changed = 2,
    /// It is not attached any more.
    Detached = 3,
}

/// What is true of an attachment.
#[derive(Clone, PartialEq, Message)]
pub struct Pod {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its containerd namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// As asked.
    #[prost(string, tag = "3")]
    pub worker_policy: String,
    /// As asked.
    #[prost(string, tag = "4")]
    pub profile: String,
    /// Polled interfaces.
    #[prost(message, repeated, tag = "5")]
    pub interfaces: Vec<Interface>,
    /// None: nobody polls the host ends.
    #[prost(message, optional, tag = "6")]
    pub worker: Option<Worker>,
    /// Why there is this worker, or none.
    #[prost(string, tag = "7")]
    pub worker_reason: String,
    /// What is not active.
    #[prost(message, repeated, tag = "8")]
    pub degraded: Vec<Degraded>,
    /// See [`AttachRequest::bound`].
    #[prost(bool, tag = "9")]
    pub bound: bool,
    /// Packets that went over the host ends since the attach, both ways; told by List only.
    #[prost(uint64, tag = "10")]
    pub packets: u64,
    /// Process that owns the worker.
    #[prost(uint32, tag = "11")]
    pub owner_pid: u32,
    /// Whether TSO is on in the pod since its worker has not been wanted for a while: what it sends passes by the NAPI.
    #[prost(bool, tag = "12")]
    pub rests: bool,
}

/// One polled interface.
#[derive(Clone, PartialEq, Message)]
pub struct Interface {
    /// Name in the pod.
    #[prost(string, tag = "1")]
    pub pod_interface: String,
    /// Name on the host.
    #[prost(string, tag = "2")]
    pub host_interface: String,
    /// Index on the host.
    #[prost(uint32, tag = "3")]
    pub host_ifindex: u32,
    /// NAPI of the host end.
    #[prost(uint32, optional, tag = "4")]
    pub host_napi: Option<u32>,
    /// NAPI of the pod end.
    #[prost(uint32, optional, tag = "5")]
    pub pod_napi: Option<u32>,
}

/// The worker of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct Worker {
    /// `sqpoll` and so on.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// What the policy came to: `dedicated`, `shared` or `idle`.
    #[prost(string, tag = "2")]
    pub policy: String,
    /// Its kernel thread.
    #[prost(uint32, tag = "3")]
    pub tid: u32,
    /// Its CPU.
    #[prost(uint32, tag = "4")]
    pub cpu: u32,
    /// Whether it runs only on idle cycles.
    #[prost(bool, tag = "5")]
    pub idle_class: bool,
    /// How long it polls on after the last packet.
    #[prost(uint32, tag = "6")]
    pub lease_ms: u32,
}

/// An interface of the node itself.
#[derive(Clone, PartialEq, Message)]
pub struct Uplink {
    /// Its name.
    #[prost(string, tag = "1")]
    pub interface: String,
    /// NAPI instances that are polled.
    #[prost(uint32, repeated, tag = "2")]
    pub napis: Vec<u32>,
    /// None: nobody polls it.
    #[prost(message, optional, tag = "3")]
    pub worker: Option<Worker>,
    /// Why nobody does; empty: somebody does.
    #[prost(string, tag = "4")]
    pub degraded: String,
    /// Packets that it has received since it exists.
    #[prost(uint64, tag = "5")]
    pub packets: u64,
}

/// What holds for the sockets of a pod, and what was done to them so far.
#[derive(Clone, PartialEq, Message)]
pub struct Sockets {
    /// None: no busy polling.
    #[prost(uint32, optional, tag = "1")]
    pub busy_poll_us: Option<u32>,
    /// Why that window.
    #[prost(string, tag = "2")]
    pub busy_poll_reason: String,
    /// Trapped calls that were answered.
    #[prost(uint64, tag = "3")]
    pub calls_handled: u64,
    /// Sockets that were given a window.
    #[prost(uint64, tag = "4")]
    pub sockets_set: u64,
    /// Epoll instances that were given a window.
    #[prost(uint64, tag = "5")]
    pub epolls_given: u64,
    /// Calls that ran on without what they should have been given.
    #[prost(uint64, tag = "6")]
    pub errors: u64,
    /// Epoll instances that were left to sleep, since more processes than CPUs would poll.
    #[prost(uint64, tag = "7")]
    pub epolls_crowded: u64,
    /// Why packets for the pod pass by its NAPI; empty: they do not.
    #[prost(string, tag = "8")]
    pub short_way: String,
}

/// A part that is not active.
#[derive(Clone, PartialEq, Message)]
pub struct Degraded {
    /// `pollable-veth`, `worker`, `socket-busy-poll`, `epoll-busy-poll`.
    #[prost(string, tag = "1")]
    pub part: String,
    /// Why, with the remedy where there is one.
    #[prost(string, tag = "2")]
    pub reason: String,
}
