//! Links, NAPI instances, features and masquerading on the running kernel: each test in
//! network namespaces of its own. Needs root.

mod addresses;
mod bridge;
mod events;
mod features;
mod lookup;
mod napi;
mod netstat;
mod nft;
mod pair;
mod routes;
mod veth;
