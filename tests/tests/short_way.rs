//! With many clients nobody polls, and the host end leads packets past the pod's NAPI; with one it leads them there again. Seen from outside,
//! at the host ends.

use std::time::Duration;

use kbp_kernel::CpuId;
use kbp_kernel::cpu::Topology;
use kbp_kernel::ethtool;
use kbp_kernel::link::RouteSocket;
use kbp_kernel::process;
use kbp_poller::state::{self, PodState};
use kbp_tests::apps::{App, AppNode, AppPod, Guest};
use kbp_tests::bench::cpu;
use kbp_tests::binaries::kbp_binary;
use kbp_tests::lab::LIMIT;
use kbp_tests::{Leftovers, Runtime, Sandbox, Settings, command, wait_until};

/// For what has to be seen on a machine that may be busy with other things.
const SEEN: Duration = Duration::from_secs(90);
/// A load that lasts until it has been seen.
const LONG: Duration = Duration::from_secs(120);
const MANY: u32 = 50;
const SIGKILL: i32 = 9;

/// Whether the host end of a pod's veth has TSO.
fn has_tso(sandbox: &Sandbox, pod: &AppPod<'_, '_>) -> bool {
    let end = RouteSocket::open_in(&pod.netns().open().expect("namespace"))
        .and_then(|mut route| route.link_by_name("eth0"));
    let peer = end.expect("link").expect("eth0").peer_index.expect("peer");
    let host = sandbox.netns().expect("node");
    let link = RouteSocket::open_in(&host).and_then(|mut route| route.link_by_index(peer));
    let name = link.expect("link").expect("host end").name;
    ethtool::features(&host, &name).expect("features").tso
}

fn state(sandbox: &Sandbox, id: &str) -> PodState {
    let states = state::read_all(&sandbox.dir().join("run/kbp")).expect("states");
    let of = states.into_iter().find(|s| s.id == id);
    of.unwrap_or_else(|| panic!("no state of {id}"))
}

/// Waits until packets for `pod` take the short way or not, and what is said of it is true.
fn wait_for(sandbox: &Sandbox, node: &AppNode<'_>, pod: &AppPod<'_, '_>, id: &str, short: bool) {
    wait_until("the way of the packets", SEEN, || {
        let (tso, said) = (has_tso(sandbox, pod), state(sandbox, id).short_way);
        match tso == short && said.is_some() == short {
            true => Ok(()),
            false => Err(format!("TSO {tso}, {said:?}")),
        }
    })
    .unwrap_or_else(|e| panic!("{id}: {e}\n{}", node.containerd().log()));
}

fn load(client: &AppPod<'_, '_>, server: &AppPod<'_, '_>, clients: u32) -> command::Running {
    let load = App::StaticC.load_command(server.address(), clients, LONG);
    let id = format!("load{clients}");
    client
        .exec_start(&id, &load.expect("load"))
        .expect("start the load")
}

fn end_load(client: &AppPod<'_, '_>, mut load: command::Running) {
    for pid in client.processes() {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "app-load" {
            let _ = process::kill(pid, SIGKILL);
        }
    }
    load.wait(LIMIT).expect("end of the load");
}

#[test]
fn packets_pass_by_the_napi_while_many_clients_ask_and_come_back_for_one() {
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let before = Leftovers::of(&sandbox).expect("state before the test");
    // On CPUs of their own, or their windows may be taken away for being in each other's way.
    let place = cpu::place(&Topology::read().expect("CPUs")).expect("a place");
    let on = |cpu: CpuId| {
        move |mut guest: Guest| {
            guest.cpus = Some(cpu.to_string());
            guest
        }
    };
    let server = App::StaticC.serve(&node, Runtime::Kbp, on(place.server));
    let server = server.expect("server");
    // What it asks for is what it gets, whatever comes.
    let guest = on(place.client)(Guest::idle("client")).annotation("kbp.io/busy-poll", "20");
    let client = node.pod(Runtime::Kbp, &guest, |_| Ok(())).expect("client");
    assert!(!has_tso(&sandbox, &server));

    let many = load(&client, &server, MANY);
    wait_for(&sandbox, &node, &server, "server", true);
    assert!(!has_tso(&sandbox, &client), "it has asked for its window");
    assert_eq!(state(&sandbox, "client").short_way, None);
    assert_eq!(state(&sandbox, "server").degraded, []);
    let mut status = node
        .containerd()
        .command(kbp_binary("kbpctl").expect("kbpctl"));
    status.args(["status", "--verbose"]);
    let said = command::run(status, LIMIT).expect("status").stdout;
    let why = state(&sandbox, "server").short_way.expect("why");
    assert!(
        why.contains("packets a second") && said.contains("short way past the NAPI: "),
        "{why}: {said}"
    );
    end_load(&client, many);

    let one = load(&client, &server, 1);
    wait_for(&sandbox, &node, &server, "server", false);
    let polled = || kbp_kernel::netstat::received_by(server.pid().expect("pid"));
    let begin = polled().expect("counters");
    wait_until("packets that polling receives", SEEN, || {
        let now = polled().map_err(|e| e.to_string())?;
        match now.polled > begin.polled + 100 {
            true => Ok(()),
            false => Err(format!("{begin:?}, {now:?}")),
        }
    })
    .expect("it polls again");
    end_load(&client, one);
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
    Leftovers::wait_until_clean(&sandbox, &before).expect("nothing left after the test");
}

#[test]
fn it_is_undone_after_a_killed_shim() {
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let server = App::StaticC.serve(&node, Runtime::Kbp, |guest| guest);
    let server = server.expect("server");
    let client = node.pod(Runtime::Kbp, &Guest::idle("client"), |_| Ok(()));
    let client = client.expect("client");
    let many = load(&client, &server, MANY);
    wait_for(&sandbox, &node, &server, "server", true);
    let shim = node.containerd().shim_pid("server").expect("shim");
    assert!(process::kill(shim, SIGKILL).expect("kill"));
    wait_until("the end of the short way", SEEN, || {
        match has_tso(&sandbox, &server) {
            false => Ok(()),
            true => Err("TSO is still on".to_owned()),
        }
    })
    .expect("containerd has it cleared up");
    end_load(&client, many);
    client.remove().expect("remove the client");
}
