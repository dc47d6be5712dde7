//! Decides who polls a pod's veth, where, how hard and when not, and does it.
//!
//! [`policy`] says what a pod asked for, [`config`] what the node allows, [`endpoint`] finds the pod's veth from both sides,
//! [`claim`] hands out CPUs, [`worker`] polls, [`attach`] puts these together and [`state`] tells the world.

pub mod attach;
pub mod claim;
pub mod config;
pub mod endpoint;
pub mod error;
pub mod policy;
pub mod state;
pub mod window;
pub mod worker;

pub use error::{Error, Result};
