//! The Container Network Interface: what comes in, what goes out, and how IPAM is called.

pub(crate) mod config;
pub(crate) mod delegate;
pub(crate) mod env;
pub(crate) mod error;
pub(crate) mod exec;
pub(crate) mod ipam;
pub(crate) mod json;
pub(crate) mod options;
pub(crate) mod result;
pub(crate) mod version;
