//! Real programs as pairs of kbp containers under containerd's default profile: the answers are right, and what every socket and every
//! epoll instance of both sides is set to is read from outside.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kbp_poller::state;
use kbp_tests::apps::{App, AppNode, AppPod, Guest};
use kbp_tests::lab::LIMIT;
use kbp_tests::{Leftovers, Output, Runtime, Sandbox, Settings, Sockets, not_tested, wait_until};

const SERVER: u32 = 61;
const CLIENT: u32 = 43;
const CLIENTS: u32 = 3;
/// Long enough to be looked at on most machines; where it is not, there is a longer one.
const LENGTH: Duration = Duration::from_millis(2000);
/// How often a load's length is doubled until it is long enough.
const DOUBLINGS: u32 = 5;

/// What all processes of a container have together.
fn sockets(pids: &[u32]) -> Sockets {
    let mut all = Sockets::default();
    for pid in pids {
        // One that has just ended has none.
        let Ok(sockets) = Sockets::of(*pid) else {
            continue;
        };
        all.inet.extend(sockets.inet);
        all.epoll.extend(sockets.epoll);
        all.other.extend(sockets.other);
    }
    all
}

/// Has so many clients ask until `seen` was satisfied while they did; what they printed at last.
fn under_load(
    app: App,
    (server, client): (&AppPod<'_, '_>, &AppPod<'_, '_>),
    clients: u32,
    length: Duration,
    mut seen: impl FnMut() -> Result<(), String>,
) -> Output {
    let mut lengths = (0..DOUBLINGS + 1).map(|n| length * 2_u32.pow(n));
    loop {
        let length = lengths.next().expect("ends with the last one");
        let command = app.load_command(server.address(), clients, length);
        let id = format!("load{clients}-{}", length.as_secs());
        let load = client.exec_start(&id, &command.expect("command"));
        let mut load = load.expect("load");
        let looked = wait_until("the state under load", length, &mut seen);
        let output = load.wait(LIMIT + length).expect("end of the load");
        match looked {
            Ok(()) => return output.success().expect("right answers"),
            Err(error) if lengths.len() == 0 => {
                panic!("{}, {clients} clients: {error}\n{output}", app.name())
            }
            // The machine may be slow: with more time.
            Err(_) => {}
        }
    }
}

fn serves_and_polls(app: App) {
    if let Some(reason) = app.wanting() {
        return not_tested(&format!("{}: {reason}", app.name()));
    }
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let before = Leftovers::of(&sandbox).expect("state before the test");
    let with =
        |window: u32| move |guest: Guest| guest.annotation("kbp.io/busy-poll", &window.to_string());
    let server = app
        .serve(&node, Runtime::Kbp, with(SERVER))
        .unwrap_or_else(|e| panic!("{}: {e}", app.name()));
    let client = node
        .pod(Runtime::Kbp, &with(CLIENT)(Guest::idle("client")), |_| {
            Ok(())
        })
        .expect("client");

    if let Some((command, expected)) = app.proof(server.address()).expect("proof") {
        let answer = client.exec(&command).expect("an answer");
        assert!(answer.stdout.contains(&expected), "{answer}");
    }
    let output = under_load(app, (&server, &client), CLIENTS, LENGTH, || {
        let there = sockets(&server.processes());
        let here = sockets(&client.processes());
        // One that listens, and one a connection.
        let complete = there.inet.len() > CLIENTS as usize
            && here.inet.len() >= CLIENTS as usize
            && there.epoll.is_empty() != app.server_uses_epoll()
            && here.epoll.is_empty() != app.client_uses_epoll();
        let polls = there.all_poll_for(SERVER) && here.all_poll_for(CLIENT);
        let untouched = there.other.iter().chain(&here.other).all(|w| *w == 0);
        match complete && polls && untouched {
            true => Ok(()),
            false => Err(format!("server {there:?}, client {here:?}")),
        }
    });
    let figures = app
        .figures(&output.stdout, client.root(), Duration::ZERO)
        .unwrap_or_else(|e| panic!("{e}\n{output}"));
    assert!(figures.samples > 0, "{figures:?}");

    wait_until("the counters", LIMIT, || {
        let states = state::read_all(&sandbox.dir().join("run/kbp")).map_err(|e| e.to_string())?;
        let fine = states.len() == 2
            && states.iter().all(|s| {
                s.degraded.is_empty()
                    && s.sockets.errors == 0
                    && (s.id != "server" || !app.server_uses_epoll() || s.sockets.epolls_given > 0)
                    && s.sockets.sockets_set > 0
            });
        if fine {
            Ok(())
        } else {
            Err(format!("{states:#?}"))
        }
    })
    .expect("nothing went wrong");
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
    Leftovers::wait_until_clean(&sandbox, &before).expect("nothing left after the test");
}

/// Who has their server on the first CPU: the windows of two that want it at once are taken away.
static ONE_CPU: Mutex<()> = Mutex::new(());

/// The server on the first CPU, and a client that may run anywhere.
fn on_one_cpu<'n, 's>(app: App, node: &'n AppNode<'s>) -> (AppPod<'n, 's>, AppPod<'n, 's>) {
    let usable = kbp_kernel::cpu::usable().expect("cpus");
    let one = usable.iter().next().expect("a CPU");
    let server = app
        .serve(node, Runtime::Kbp, |mut guest| {
            guest.cpus = Some(one.to_string());
            guest
        })
        .unwrap_or_else(|e| panic!("{}: {e}", app.name()));
    let client = node.pod(Runtime::Kbp, &Guest::idle("client"), |_| Ok(()));
    (server, client.expect("client"))
}

/// Servers whose master or helpers make epoll instances first: on one CPU it is still the process with the connection that polls.
fn its_busy_process_polls_under_auto(app: App) {
    let _alone = ONE_CPU.lock().unwrap_or_else(PoisonError::into_inner);
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let (server, client) = on_one_cpu(app, &node);
    // Once more while it does not poll: helpers keep their places for a second.
    wait_until(
        &format!("a polling process of {}", app.name()),
        3 * LIMIT,
        || {
            let command = app
                .load_command(server.address(), 1, LENGTH)
                .map_err(|e| e.to_string())?;
            let mut load = client
                .exec_start("load", &command)
                .map_err(|e| e.to_string())?;
            let looked = wait_until("an epoll instance with a connection", LENGTH, || {
                let all: Vec<Sockets> = server
                    .processes()
                    .into_iter()
                    .filter_map(|pid| Sockets::of(pid).ok())
                    .collect();
                let polls = |s: &&Sockets| !s.inet.is_empty() && s.epoll.iter().any(|w| *w > 0);
                match all.iter().filter(polls).count() {
                    1 => Ok(()),
                    _ => Err(format!("{all:?}")),
                }
            });
            let output = load.wait(LIMIT).ok_or("the load does not end")?;
            output.success().map_err(|e| e.to_string())?;
            looked.map_err(|e| e.to_string())
        },
    )
    .expect("the process that serves polls");
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
}

#[test]
fn nginx_worker_polls_on_one_cpu() {
    its_busy_process_polls_under_auto(App::Nginx);
}

#[test]
fn postgres_backend_polls_on_one_cpu() {
    its_busy_process_polls_under_auto(App::Postgres);
}

/// What `kbpctl status` would say of the server's window: it, and why.
fn told(sandbox: &Sandbox) -> (Option<u32>, String) {
    let states = state::read_all(&sandbox.dir().join("run/kbp")).expect("states");
    let server = states.into_iter().find(|s| s.id == "server");
    let server = server.expect("the server's state");
    (server.busy_poll_us, server.busy_poll_reason)
}

/// Whether its threads are not said to be too many, and all that it has, has the window that is told: on a machine with other work
/// it may be none, since it hurts.
fn is_not_crowded(there: &Sockets, (window, reason): &(Option<u32>, String)) -> bool {
    !reason.contains("would poll at once") && there.all_poll_for(window.unwrap_or(0))
}

/// With more threads that wait for connections than CPUs none of them polls; with one it does again.
fn its_threads_poll_while_they_are_few(app: App) {
    let _alone = ONE_CPU.lock().unwrap_or_else(PoisonError::into_inner);
    const LONG: Duration = Duration::from_secs(4);
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let (server, client) = on_one_cpu(app, &node);
    for clients in [CLIENTS, 1] {
        under_load(app, (&server, &client), clients, LONG, || {
            let (there, told) = (sockets(&server.processes()), told(&sandbox));
            let complete = there.inet.len() > clients as usize;
            let right = match clients {
                1 => is_not_crowded(&there, &told),
                _ => there.all_poll_for(0),
            };
            match complete && right {
                true => Ok(()),
                false => Err(format!("{there:?}, {told:?}")),
            }
        });
    }
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
}

#[test]
fn blocking_threads_poll_while_they_are_few() {
    its_threads_poll_while_they_are_few(App::BlockingThreads);
}

/// A client that neither listens nor has an epoll instance, with a thread for each connection, all on one CPU.
#[test]
fn a_client_that_blocks_in_many_threads_does_not_poll() {
    const LONG: Duration = Duration::from_secs(20);
    let _alone = ONE_CPU.lock().unwrap_or_else(PoisonError::into_inner);
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let server = App::PostgresBlocking.serve(&node, Runtime::Kbp, |guest| guest);
    let server = server.expect("server");
    let usable = kbp_kernel::cpu::usable().expect("cpus");
    let mut guest = Guest::idle("client");
    guest.cpus = usable.iter().next().map(|cpu| cpu.to_string());
    let client = node.pod(Runtime::Kbp, &guest, |_| Ok(())).expect("client");
    let command = App::PostgresBlocking.load_command(server.address(), 2 * CLIENTS, LONG);
    let command = command.expect("load");
    let mut load = client.exec_start("load", &command).expect("load");
    let looked = wait_until("windows that are gone", LONG, || {
        let here = sockets(&client.processes());
        let states = state::read_all(&sandbox.dir().join("run/kbp")).map_err(|e| e.to_string())?;
        let client = states.into_iter().find(|s| s.id == "client");
        let reason = client.map(|s| s.busy_poll_reason).unwrap_or_default();
        match here.inet.len() >= CLIENTS as usize
            && here.all_poll_for(0)
            && reason.contains("blocking connections of process")
        {
            true => Ok(()),
            false => Err(format!("{here:?}, {reason}")),
        }
    });
    for pid in client.processes() {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "app-load" {
            let _ = kbp_kernel::process::kill(pid, 9);
        }
    }
    load.wait(LIMIT).expect("end of the load");
    looked.expect("too many threads would poll");
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
}

/// tokio's registry is a second descriptor of its epoll instance: one loop, on one CPU, which goes on polling.
#[test]
fn a_registry_that_is_a_copy_is_no_second_event_loop() {
    const LONG: Duration = Duration::from_secs(5);
    /// Several looks later.
    const WORKED: Duration = Duration::from_secs(3);
    let _alone = ONE_CPU.lock().unwrap_or_else(PoisonError::into_inner);
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let (server, client) = on_one_cpu(App::Tokio, &node);
    let mut began = None;
    under_load(App::Tokio, (&server, &client), 1, LONG, || {
        let (there, told) = (sockets(&server.processes()), told(&sandbox));
        // Two descriptors of the instance, the listener and the connection.
        if there.epoll.len() < 2 || there.inet.len() < 2 {
            began = None;
            return Err(format!("{there:?}"));
        }
        let began = began.get_or_insert_with(std::time::Instant::now);
        match began.elapsed() >= WORKED && is_not_crowded(&there, &told) {
            true => Ok(()),
            false => Err(format!("{there:?}, {told:?}")),
        }
    });
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
}

#[test]
fn event_loops_of_one_process_poll_while_they_are_few() {
    its_threads_poll_while_they_are_few(App::MemcachedThreads);
}

/// Each of them is a trapped call of the client; none fails, and each is counted.
#[test]
fn ten_thousand_short_connections() {
    const COUNT: u64 = 10_000;
    let sandbox = Sandbox::new().expect("private node");
    let node = AppNode::start(&sandbox, Settings::default()).expect("node");
    let server = App::StaticC
        .serve(&node, Runtime::Kbp, |guest| guest)
        .expect("server");
    let client = node
        .pod(Runtime::Kbp, &Guest::idle("client"), |_| Ok(()))
        .expect("client");
    let command = [
        "/kbp/app-load",
        "connect",
        &format!("{}:7000", server.address()),
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([COUNT.to_string()]);
    let output = client
        .exec(&command.collect::<Vec<_>>())
        .expect("connections");
    let figures = App::StaticC
        .figures(&output.stdout, client.root(), Duration::ZERO)
        .unwrap_or_else(|e| panic!("{e}\n{output}"));
    assert_eq!(figures.samples, COUNT);
    wait_until("the counters", LIMIT, || {
        let states = state::read_all(&sandbox.dir().join("run/kbp")).map_err(|e| e.to_string())?;
        let counted = states
            .iter()
            .any(|s| s.id == "client" && s.sockets.calls_handled >= COUNT && s.sockets.errors == 0);
        if counted {
            Ok(())
        } else {
            Err(format!("{states:#?}"))
        }
    })
    .expect("all calls handled");
    client.remove().expect("remove the client");
    server.remove().expect("remove the server");
}

macro_rules! apps {
    ($($name:ident $app:ident)*) => {
        $(#[test] fn $name() { serves_and_polls(App::$app) })*
        #[test]
        fn every_program_has_its_test() {
            assert_eq!([$(App::$app),*].len(), App::ALL.len());
        }
    };
}

apps! {
    redis Redis
    memcached Memcached
    memcached_with_four_threads MemcachedThreads
    nginx_with_wrk Nginx
    haproxy Haproxy
    haproxy_with_two_threads HaproxyThreads
    postgres_with_pgbench Postgres
    postgres_with_a_client_that_blocks PostgresBlocking
    a_static_c_binary StaticC
    a_thread_for_each_connection BlockingThreads
    go_http_server_and_client Go
    node_http Node
    python_asyncio Asyncio
    java_nio Java
    a_tokio_server Tokio
}
