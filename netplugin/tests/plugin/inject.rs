//! ADD in which one system call after the other fails: whatever it is that fails, host, pod, leases and masquerading
//! are as they were.

use std::fs;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;

use kbp_kernel::notify::{Listener, Received, trap_calling_thread};
use nix::errno::Errno;
use nix::libc::{SYS_ioctl, SYS_sendmsg, SYS_sendto, SYS_socket};
use nix::poll::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::lifecycle::with_result;
use crate::matrix::{reference, reference_config};
use crate::world::{Answer, Pod, World};

/// Everything by which the plugin changes links, addresses, routes, rules and features.
const STEPS: [i64; 4] = [SYS_sendto, SYS_sendmsg, SYS_ioctl, SYS_socket];
/// More than any mode needs; a plugin that never ends would else keep the test going.
const LIMIT: usize = 200;
/// How long the end of the call may go unnoticed.
const PATIENCE_MS: u16 = 5;

/// Calls ADD with its n-th step failing; None when it has fewer steps.
fn add_with_failing_step(world: &World, pod: &Pod, config: &Value, n: usize) -> Option<Answer> {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let thread = scope.spawn(move || {
            // What this thread starts is under the same filter, and nothing else is.
            let listener = trap_calling_thread(&STEPS).expect("install a filter");
            sender.send(listener).expect("hand over the listener");
            world.call("ADD", pod, config)
        });
        let fd = receiver.recv().expect("a listener");
        let listener = Listener::new(fd);
        let mut seen = 0;
        while !thread.is_finished() {
            // Returns early on a call, and when nobody is left under the filter.
            let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            poll(&mut ready, PATIENCE_MS).expect("wait for a call");
            match listener.receive().expect("receive") {
                Received::Call(call) => {
                    let of_plugin = is_plugin(call.tid);
                    seen += usize::from(of_plugin);
                    // The caller may be gone before it has its answer.
                    let _ = if of_plugin && seen == n {
                        listener.answer_with_error(call.id, Errno::ENOBUFS as i32)
                    } else {
                        listener.continue_call(call.id)
                    };
                }
                Received::Gone | Received::Closed => {}
            }
        }
        let answer = thread.join().expect("the call itself works");
        (seen >= n).then_some(answer)
    })
}

/// Whether a thread is the plugin's, and not that of who starts it or of its IPAM plugin.
fn is_plugin(tid: u32) -> bool {
    fs::read_to_string(format!("/proc/{tid}/comm")).is_ok_and(|name| name.trim() == "kbp")
}

/// Has every step of ADD fail in turn; how many there were.
fn every_step(world: &World, pod: &Pod, config: &Value, clean: impl Fn(&World)) -> usize {
    every_step_with(world, pod, config, clean, String::new)
}

/// As [`every_step`], with something else that has to be as it was.
pub(crate) fn every_step_with(
    world: &World,
    pod: &Pod,
    config: &Value,
    clean: impl Fn(&World),
    more: impl Fn() -> String,
) -> usize {
    // What an ADD that succeeds switches on stays on: others may need it.
    world.forward();
    let state = || (world.dump(), pod.dump(), more());
    let before = state();
    let mut failed = 0;
    for n in 1..LIMIT {
        let Some(answer) = add_with_failing_step(world, pod, config, n) else {
            return failed;
        };
        if answer.ok {
            // A step that there is another way for.
            world.quiet("DEL", pod, config);
            clean(world);
        } else {
            failed += 1;
            let (code, msg, details) = answer.error();
            assert!(code >= 2 && !msg.is_empty(), "step {n}: {answer:?}");
            assert!(!details.contains("undone"), "step {n}: {answer:?}");
        }
        assert_eq!(state(), before, "step {n}: {answer:?}");
    }
    panic!("ADD has {LIMIT} steps or more");
}

#[test]
fn every_step_of_add_in_mode_routed() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let config = world.config(
        "1.1.0",
        json!({ "sysctl": { "net.ipv4.ip_default_ttl": "33" } }),
    );
    let failed = every_step(&world, &pod, &config, |_| {});
    assert!(failed > 15, "{failed} steps failed");
}

#[test]
fn every_step_of_add_in_mode_bridge_with_a_new_bridge() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let more = json!({ "mode": "bridge", "isDefaultGateway": true, "hairpinMode": true });
    let config = world.config("1.1.0", more);
    let failed = every_step(&world, &pod, &config, |world| {
        world.host_command("ip", &["link", "del", "kbp0"]);
    });
    assert!(failed > 15, "{failed} steps failed");
}

#[test]
fn every_step_of_add_in_mode_bridge_with_an_adopted_bridge() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let fresh = |world: &World| {
        world.host_command("ip", &["link", "add", "br7", "type", "bridge"]);
        // Once it was up it has another qdisc, even when it is down again.
        world.host_command("ip", &["link", "set", "br7", "up"]);
        world.host_command("ip", &["link", "set", "br7", "down"]);
    };
    fresh(&world);
    let more = json!({ "mode": "bridge", "bridge": "br7", "isGateway": true });
    let config = world.config("1.1.0", more);
    let failed = every_step(&world, &pod, &config, |world| {
        world.host_command("ip", &["link", "del", "br7"]);
        fresh(world);
    });
    assert!(failed > 15, "{failed} steps failed");
}

#[test]
fn every_step_of_add_in_mode_tune() {
    let world = World::new();
    let pod = Pod::new("pod-a");
    let first = reference_config(&world, "1.0.0", "ptp", false);
    let answer = reference(&world, "ptp", "ADD", &pod, &first);
    assert!(answer.ok, "{answer:?}");
    let result: Value = serde_json::from_str(&answer.stdout).expect("a result");
    let tune = json!({ "cniVersion": "1.0.0", "name": "kbptest", "type": "kbp", "mode": "tune" });
    let failed = every_step(&world, &pod, &with_result(&tune, &result), |_| {});
    assert!(failed > 10, "{failed} steps failed");
}
