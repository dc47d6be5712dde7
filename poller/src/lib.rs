//! Decides who polls a pod's veth, where, how hard and when not, and does it.
//!
//! [`policy`] says what a pod asked for, [`config`] what the node allows, [`endpoint`] finds the pod's veth from both sides,
//! [`tune`] sets it up, [`defer`] has packets wait for whoever polls, [`claim`] hands out CPUs, [`place`] decides where a worker goes, [`worker`] polls, [`engine`] keeps every pod of a
//! process and the leases of its workers at the [`pace`] of the traffic, [`attach`] puts these together, [`api`] and [`client`] reach the node's [`daemon`], and [`state`] tells the world what the [`record`] holds.

pub mod api;
pub mod attach;
pub mod claim;
pub mod client;
pub mod config;
pub mod daemon;
mod defer;
mod due;
pub mod endpoint;
pub mod engine;
pub mod error;
pub mod kubelet;
mod originals;
mod pace;
mod place;
pub mod policy;
pub mod polled;
mod record;
mod short_way;
pub mod state;
mod tune;
pub mod uplink;
pub mod window;
pub mod worker;

pub use error::{Error, Result};
pub use kbp_kernel::CpuSet;
