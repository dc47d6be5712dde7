//! The real binary against the running kernel and the real host-local: every test has a "host" namespace of its
//! own, in which the plugin runs, and namespaces of its own as pods. Needs root and the package
//! containernetworking-plugins.

mod attach;
mod bridge;
mod examples;
mod failure;
mod inject;
mod input;
mod kill;
mod lifecycle;
mod local_ipam;
mod matrix;
mod node;
mod options;
mod parallel;
mod pollable;
mod traffic;
mod tune;
mod world;
