//! Attach and detach on the running kernel: each test on a node of its own, made of two network namespaces. Needs root.

mod attach;
mod changes;
mod claims;
mod daemon;
mod defer;
mod events;
mod find;
mod gives_way;
mod idle;
mod node;
mod rest;
mod short_way;
mod tool;
mod uplink;
mod workers;
