//! Everything in kbp that touches the kernel: typed, synchronous wrappers around
//! netlink, ethtool, io_uring, seccomp notifications, socket options, network
//! namespaces and CPU placement.
//!
//! This is the only crate of the workspace that contains `unsafe`; every block
//! says why it is sound. Nothing here decides policy, and no function asks for a
//! kernel version: a feature is there when trying it works ([`probe`]).
//!
//! # Errors
//! A function that names none fails with what the kernel says: [`Error::Syscall`], [`Error::File`] or
//! [`Error::Netlink`] with its errno ([`Error::errno`]). Those worth telling apart are ESRCH, or ENOENT where
//! /proc is read (the process or thread is gone), ENODEV (the link is gone) and EPERM (a capability is missing).
//! [`Error::Protocol`] is an answer that cannot be read. What callers decide by ([`Error::Invalid`],
//! [`Error::NotFound`], [`Error::Unsupported`]) is named at the function.

#![allow(unsafe_code)]

pub mod cpu;
pub mod cpu_time;
pub mod error;
pub mod ethtool;
pub mod fd;
pub mod gro_list;
pub mod idmap;
pub mod link;
pub mod napi;
pub mod napi_thread;
mod netlink;
pub mod netns;
pub mod netstat;
pub mod nft;
pub mod notify;
pub mod poll_socket;
pub mod probe;
pub mod process;
pub mod ring;
pub mod sockopt;
mod sys;
pub mod syscalls;
pub mod types;

pub use error::{Error, Result};
pub use types::{CpuId, CpuSet, IfIndex, MacAddr, Micros, Mtu, NapiId};
