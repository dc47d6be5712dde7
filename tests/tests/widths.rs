//! On CPUs of its own a container's window is wide while requests come often enough.

use std::time::Duration;

use kbp_poller::state;
use kbp_poller::window::LONG;
use kbp_tests::apps::{AppNode, AppPod, Guest};
use kbp_tests::lab::LIMIT;
use kbp_tests::{Leftovers, Runtime, Sandbox, Settings, Sockets, not_tested, wait_until};

const WIDEST: u32 = 1_500;
/// For what has to be seen on a machine that may be busy with other things.
const SEEN: Duration = Duration::from_secs(60);
/// Seconds in which the server is asked every millisecond, and how often it may take that much.
const ASKED: u64 = 8;
const TIMES: usize = 2;

/// What the server's sockets and epoll instances have, and what the state says: the window and why.
fn seen(sandbox: &Sandbox, server: &AppPod<'_, '_>) -> (Sockets, Option<u32>, String) {
    let states = state::read_all(&sandbox.dir().join("run/kbp")).expect("states");
    let state = states.into_iter().find(|s| s.id == "server");
    let state = state.expect("the server's state");
    let sockets = Sockets::of(server.pid().expect("pid")).expect("sockets");
    (sockets, state.busy_poll_us, state.busy_poll_reason)
}

/// Waits until all that the server has, has this window, for one of these reasons.
fn wait_for(
    sandbox: &Sandbox,
    server: &AppPod<'_, '_>,
    limit: Duration,
    wanted: &[(u32, &str)],
) -> kbp_tests::Result<u32> {
    wait_until(&format!("one of {wanted:?}"), limit, || {
        let (sockets, window, reason) = seen(sandbox, server);
        let window = window.unwrap_or(0);
        let fits = |(micros, why): &&(u32, &str)| *micros == window && reason.contains(why);
        match wanted.iter().find(fits) {
            Some((micros, _)) if sockets.all_poll_for(*micros) => Ok(*micros),
            _ => Err(format!("{sockets:?}, {window} µs: {reason}")),
        }
    })
}

#[test]
fn a_window_is_wide_while_that_pays() {
    let online = kbp_kernel::cpu::Topology::read().expect("CPUs").online;
    let (Some(first), Some(last)) = (online.iter().next(), online.iter().last()) else {
        panic!("no CPU is online");
    };
    if first == last {
        return not_tested("windows on CPUs of a pod's own: there is one CPU");
    }
    let sandbox = Sandbox::new().expect("private node");
    let settings = Settings {
        kbp_config: format!("busy-poll-widest = {WIDEST}"),
        ..Settings::default()
    };
    let node = AppNode::start(&sandbox, settings).expect("node");
    let before = Leftovers::of(&sandbox).expect("state before the test");
    let mut server = Guest::new("server", ["/kbp/udp-echo", "0.0.0.0:7"]);
    server.cpus = Some(last.to_string());
    let server = node.pod(Runtime::Kbp, &server, |_| Ok(())).expect("server");
    server.wait_for_port(7).expect("the server's port");
    let mut client = Guest::idle("client").annotation("kbp.io/busy-poll", "off");
    client.cpus = Some(first.to_string());
    let client = node.pod(Runtime::Kbp, &client, |_| Ok(())).expect("client");

    let plain = (LONG.0, "a cpuset of its own");
    let widened = (0..TIMES).any(|turn| {
        let ask = format!("/kbp/udp-rr {}:7 {ASKED} 64 1000", server.address());
        let ask: Vec<String> = ask.split_whitespace().map(str::to_owned).collect();
        let mut load = client
            .exec_start(&format!("ask{turn}"), &ask)
            .expect("load");
        let wide = [(WIDEST, "a thread slept")];
        let seen = wait_for(&sandbox, &server, Duration::from_secs(ASKED), &wide);
        let output = load.wait(LIMIT).expect("the load ends");
        output.success().expect("answers");
        seen.is_ok()
    });
    wait_for(&sandbox, &server, SEEN, &[plain]).expect("nobody asks any more");
    if !widened {
        not_tested("widened windows: others ran on the CPU all the time");
    }
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
    Leftovers::wait_until_clean(&sandbox, &before).expect("nothing left after the test");
}
