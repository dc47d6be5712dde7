//! The real binary against the running kernel and the real host-local: every test has a "host" namespace of its
//! own, in which the plugin runs, and namespaces of its own as pods. Needs root and the package
//! containernetworking-plugins.
//!
//! Where each part of the contract is tested:
//!
//! | what | tests |
//! |---|---|
//! | stdout, exit status, error objects and their codes | `contract::success_and_failure…`, `input`, `failure` |
//! | no CNI_COMMAND; VERSION without stdin | `input::a_person…`, `input::version…` |
//! | environment, identifiers, interface names | `input::a_wrong_environment…`, unit tests of `cni::env` |
//! | versions 0.1.0 to 1.1.0 and their results | `matrix`, `attach::the_result…`, unit tests of `cni::result` |
//! | `interfaces`, `ips[].interface` | `attach::the_result…`, `bridge::the_result…` |
//! | prevResult kept; interface that exists; own namespace | `attach::a_previous…`, `tune::prev_result…`, `failure::an_interface…`, `contract::the_plugins_own…` |
//! | delegation, time limit, a failed ADD undoes itself | `contract::ipam_gets…`, `failure`, `inject` |
//! | DEL: missing things, repeated, changed config, never | `lifecycle`, `contract::del_works…`, `kill` |
//! | CHECK | `lifecycle::check…`, `bridge::check…`, `tune::both_ends…` |
//! | GC | `node::gc…`, `kill` |
//! | STATUS | `node::status…` |
//! | calls at once; unknown keys; runtimeConfig before args before CNI_ARGS | `parallel`, `contract::unknown_keys…`, unit tests of `cni::options` |
//! | capabilities | `attach::an_address…`, `options::an_annotation…`, `contract::unknown_keys…` |
//! | replacing the binary | `contract::the_binary…` |
//! | registering with kbp-poller: there, absent, refusing, silent | `poller` |
//! | libcni: lists, cached results, changed configs, drop-in files | `libcni` (with Go) |
//! | a flood from pod to pod | `flood` |
//! | random stdin and environment | `fuzz` |
//! | a smaller MTU on the way | `contract::a_pod_of_another_plugin…`, `matrix`, `lifecycle::only_what_leaves…` |

mod attach;
mod bridge;
mod contract;
mod examples;
mod failure;
mod flood;
mod fuzz;
mod inject;
mod input;
mod kill;
mod libcni;
mod lifecycle;
mod local_ipam;
mod matrix;
mod node;
mod options;
mod parallel;
mod pollable;
mod poller;
mod random;
mod traffic;
mod tune;
mod world;
