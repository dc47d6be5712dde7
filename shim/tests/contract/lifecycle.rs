//! What happens to containers and processes, and what is told of it in which order.

use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics::Metrics as MetricsV1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::json;

use crate::support::{Arm, Shim, World, arms, refused, until};

arms!(
    [kbp kbp_with_crun stock_1 stock_2]: [
        a_life_in_order,
        an_init_that_ends_at_once_is_told_after_its_start,
        an_init_that_is_killed_before_its_start_is_told,
        execs_end_before_their_init,
        execs_have_a_life_of_their_own,
        an_exec_that_cannot_start_says_why_and_waits_for_nobody,
        pause_and_resume,
        statistics_and_limits,
        what_cannot_be_done_is_refused_with_its_code,
        memory_that_runs_out_is_told,
        deleting_what_was_never_started_ends_it_first,
    ],
    // The newer stock shim leaves the orphan to run, and crun's ps dies of such a container.
    [kbp stock_1]: [the_end_of_an_init_takes_along_what_shares_its_pid_namespace_with_others],
    // The stock ones know one version, and give up the creation.
    [kbp kbp_with_crun]: [
        both_versions_of_the_service_answer,
        a_caller_that_hangs_up_does_not_leave_half_a_container,
    ],
);

const TERM: u32 = 15;
const KILL: u32 = 9;

fn exits(world: &World) -> Vec<events::TaskExit> {
    let exits = world
        .events()
        .into_iter()
        .filter(|event| event.topic == "/tasks/exit");
    exits
        .map(|event| events::TaskExit::parse_from_bytes(&event.value).expect("a TaskExit"))
        .collect()
}

/// Refused for the state of what it is about. The stock shims have no code for most of these.
fn assert_wrong_state<T: std::fmt::Debug>(arm: Arm, answer: ttrpc::Result<T>) {
    let (code, message) = refused(answer);
    let right = code == Code::FAILED_PRECONDITION || !arm.is_kbp() && code == Code::UNKNOWN;
    assert!(right, "{code:?}: {message}");
}

async fn a_life_in_order(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sh", "-c", "exit 7"]).await;
    assert_eq!(shim.status("c", "").await, api::Status::CREATED);
    let pid = shim.start_init("c").await;
    assert_eq!(shim.exit_status("c", "").await, 7);
    let state = shim
        .state(&api::StateRequest {
            id: "c".to_owned(),
            ..Default::default()
        })
        .await
        .expect("state");
    assert_eq!(
        (state.status(), state.pid, state.exit_status),
        (api::Status::STOPPED, pid, 7)
    );
    assert!(state.exited_at.seconds > 0);
    assert_eq!(state.bundle, world.bundle("c").display().to_string());
    let deleted = shim.remove("c", "").await.expect("delete");
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 7));
    assert_eq!(deleted.exited_at, state.exited_at);
    assert_eq!(refused(shim.remove("c", "").await).0, Code::NOT_FOUND);
    let all = world.wait_for("/tasks/delete").await;
    let topics: Vec<_> = all.iter().map(|event| event.topic.as_str()).collect();
    assert_eq!(
        topics,
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete"
        ]
    );
    assert_eq!(all[0].type_url, "containerd.events.TaskCreate");
    let start = events::TaskStart::parse_from_bytes(&all[1].value).expect("a TaskStart");
    assert_eq!((start.container_id.as_str(), start.pid), ("c", pid));
    shim.end().await;
    assert_eq!(world.leftovers("c"), [""; 0]);
}

async fn an_init_that_ends_at_once_is_told_after_its_start(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c0", &["true"]);
    let shim = world.start_shim("c0").await;
    for round in 0..20 {
        let id = format!("c{round}");
        if round > 0 {
            world.add_bundle(&id, &["true"]);
        }
        shim.create(&world.create_request(&id))
            .await
            .expect("create");
        shim.start_init(&id).await;
        assert_eq!(shim.exit_status(&id, "").await, 0, "{id}");
        shim.remove(&id, "").await.expect("delete");
    }
    until("the last event", || world.topics().len() >= 80).await;
    let once = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    assert_eq!(world.topics(), once.repeat(20));
    shim.end().await;
}

async fn an_init_that_is_killed_before_its_start_is_told(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["true"]).await;
    shim.signal("c", "", KILL).await.expect("kill");
    assert_eq!(shim.exit_status("c", "").await, 128 + KILL);
    assert_eq!(shim.status("c", "").await, api::Status::STOPPED);
    let start = api::StartRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    assert_wrong_state(arm, shim.start(&start).await);
    shim.remove("c", "").await.expect("delete");
    let all = world.wait_for("/tasks/delete").await;
    assert_eq!(all.len(), 3, "create, exit, delete: {all:?}");
}

async fn deleting_what_was_never_started_ends_it_first(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["true"]).await;
    let deleted = shim.remove("c", "").await.expect("delete");
    // The stock shims answer before they know of its end.
    let status = if arm.is_kbp() { 128 + KILL } else { 0 };
    assert_eq!(deleted.exit_status, status);
    let mut topics = world.wait_for("/tasks/delete").await;
    topics.retain(|event| arm.is_kbp() || event.topic != "/tasks/exit");
    let topics: Vec<_> = topics.iter().map(|event| event.topic.as_str()).collect();
    let exit: &[&str] = if arm.is_kbp() { &["/tasks/exit"] } else { &[] };
    assert_eq!(
        topics,
        [&["/tasks/create"], exit, &["/tasks/delete"]].concat()
    );
    assert_eq!(
        world
            .leftovers("c")
            .iter()
            .filter(|left| !left.starts_with("socket"))
            .count(),
        0
    );
}

async fn execs_end_before_their_init(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    shim.start_init("c").await;
    for exec in ["a", "b"] {
        shim.add_exec("c", exec, &["sleep", "1000"])
            .await
            .expect("exec");
        shim.start_exec("c", exec).await.expect("start");
        assert_eq!(shim.status("c", exec).await, api::Status::RUNNING);
    }
    shim.signal("c", "", KILL).await.expect("kill");
    assert_eq!(shim.exit_status("c", "").await, 128 + KILL);
    until("three exits", || exits(&world).len() == 3).await;
    let ids: Vec<_> = exits(&world).into_iter().map(|exit| exit.id).collect();
    assert_eq!(ids[2], "c", "{ids:?}");
    shim.add_exec("c", "late", &["true"])
        .await
        .expect_err("the container is stopped");
    let order = ["/tasks/exec-added", "/tasks/exec-started"].repeat(2);
    assert_eq!(world.topics()[2..6], order);
}

async fn the_end_of_an_init_takes_along_what_shares_its_pid_namespace_with_others(arm: Arm) {
    let world = World::new(arm).await;
    let script = ["sh", "-c", "sleep 1000 & exit 3"];
    world.add_bundle_with("c", &script, |spec| {
        spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "ipc" }]);
    });
    let shim = world.start_shim("c").await;
    shim.create(&world.create_request("c"))
        .await
        .expect("create");
    shim.start_init("c").await;
    assert_eq!(shim.exit_status("c", "").await, 3);
    let pids = shim
        .pids(&api::PidsRequest {
            id: "c".to_owned(),
            ..Default::default()
        })
        .await
        .expect("pids");
    // The orphan was killed and reaped, or is about to be.
    for process in pids.processes {
        until("the orphan's end", || {
            !std::path::Path::new(&format!("/proc/{}/exe", process.pid)).exists()
        })
        .await;
    }
    shim.remove("c", "").await.expect("delete");
}

async fn execs_have_a_life_of_their_own(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    shim.start_init("c").await;
    shim.add_exec("c", "x", &["sh", "-c", "exit 5"])
        .await
        .expect("exec");
    let (code, message) = refused(shim.add_exec("c", "x", &["true"]).await);
    assert_eq!(code, Code::ALREADY_EXISTS);
    assert!(message.starts_with("id x"), "{message}");
    assert_wrong_state(arm, shim.signal("c", "x", TERM).await);
    let pid = shim.start_exec("c", "x").await.expect("start");
    assert_eq!(shim.exit_status("c", "x").await, 5);
    assert_wrong_state(arm, shim.start_exec("c", "x").await);
    let (code, message) = refused(shim.signal("c", "x", TERM).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.starts_with("process already finished"), "{message}");
    let deleted = shim.remove("c", "x").await.expect("delete");
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 5));
    assert_eq!(refused(shim.start_exec("c", "x").await).0, Code::NOT_FOUND);

    shim.add_exec("c", "slow", &["sleep", "1000"])
        .await
        .expect("exec");
    let slow = shim.start_exec("c", "slow").await.expect("start");
    assert_wrong_state(arm, shim.remove("c", "slow").await);
    let pids = shim
        .pids(&api::PidsRequest {
            id: "c".to_owned(),
            ..Default::default()
        })
        .await
        .expect("pids");
    let info = pids
        .processes
        .iter()
        .find(|process| process.pid == slow)
        .expect("listed")
        .info
        .clone();
    let details = ProcessDetails::parse_from_bytes(&info.value).expect("details");
    assert_eq!(
        (info.type_url.as_str(), details.exec_id.as_str()),
        ("containerd.runc.v1.ProcessDetails", "slow")
    );
    // A real-time signal: no name in most libraries.
    shim.signal("c", "slow", 40).await.expect("kill");
    assert_eq!(shim.exit_status("c", "slow").await, 128 + 40);
    assert_eq!(shim.status("c", "").await, api::Status::RUNNING);
}

async fn an_exec_that_cannot_start_says_why_and_waits_for_nobody(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    shim.start_init("c").await;
    shim.add_exec("c", "x", &["true"]).await.expect("exec");
    let mut request = crate::support::exec_request("c", "y", &["true"]);
    request.spec = MessageField::some(Any {
        value: json!({ "args": ["/nonesuch"], "cwd": "/", "user": { "uid": 0, "gid": 0 } })
            .to_string()
            .into_bytes(),
        ..Default::default()
    });
    shim.exec(&request).await.expect("exec");
    let (_, message) = refused(shim.start_exec("c", "y").await);
    assert!(
        message.starts_with("OCI runtime exec failed: ") && message.contains("/nonesuch"),
        "{message}"
    );
    // The stock shims do not keep it.
    let status = if arm.is_kbp() { 255 } else { 0 };
    assert_eq!(shim.exit_status("c", "y").await, status);
    shim.remove("c", "y").await.expect("delete");
    // It must not count as one that runs.
    shim.signal("c", "", KILL).await.expect("kill");
    assert_eq!(shim.exit_status("c", "").await, 128 + KILL);
}

async fn pause_and_resume(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    let pause = api::PauseRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    let resume = api::ResumeRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    assert_wrong_state(arm, shim.pause(&pause).await);
    shim.start_init("c").await;
    shim.add_exec("c", "x", &["sleep", "1000"])
        .await
        .expect("exec");
    shim.start_exec("c", "x").await.expect("start");
    shim.pause(&pause).await.expect("pause");
    assert_eq!(shim.status("c", "").await, api::Status::PAUSED);
    assert_eq!(shim.status("c", "x").await, api::Status::PAUSED);
    assert_wrong_state(arm, shim.pause(&pause).await);
    assert_wrong_state(arm, shim.add_exec("c", "late", &["true"]).await);
    shim.resume(&resume).await.expect("resume");
    assert_eq!(shim.status("c", "x").await, api::Status::RUNNING);
    assert_wrong_state(arm, shim.resume(&resume).await);
    world.wait_for("/tasks/resumed").await;
    let topics = world.topics();
    assert_eq!(
        topics[topics.len() - 2..],
        ["/tasks/paused", "/tasks/resumed"]
    );
}

async fn statistics_and_limits(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    shim.start_init("c").await;
    let update = |value: &str| api::UpdateTaskRequest {
        id: "c".to_owned(),
        resources: MessageField::some(Any {
            value: value.as_bytes().to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    shim.update(&update(
        r#"{"memory":{"limit":33554432},"pids":{"limit":17}}"#,
    ))
    .await
    .expect("update");
    let stats = shim
        .stats(&api::StatsRequest {
            id: "c".to_owned(),
            ..Default::default()
        })
        .await
        .expect("stats")
        .stats;
    let (usage, limit, pids) = match stats.type_url.as_str() {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = MetricsV1::parse_from_bytes(&stats.value).expect("metrics");
            assert!(metrics.cpu.usage.total > 0);
            (
                metrics.memory.usage.usage,
                metrics.memory.usage.limit,
                metrics.pids.limit,
            )
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = MetricsV2::parse_from_bytes(&stats.value).expect("metrics");
            assert!(metrics.cpu.usage_usec > 0);
            (
                metrics.memory.usage,
                metrics.memory.usage_limit,
                metrics.pids.limit,
            )
        }
        other => panic!("statistics of type {other}"),
    };
    assert!(usage > 0 && usage < limit, "{usage} of {limit}");
    assert_eq!((limit, pids), (32 << 20, 17));
    let (_, message) = refused(shim.update(&update("{")).await);
    assert!(
        message.starts_with("OCI runtime update failed") || !arm.is_kbp(),
        "{message}"
    );
}

async fn memory_that_runs_out_is_told(arm: Arm) {
    let world = World::new(arm).await;
    let hog = ["sh", "-c", "x=a; while true; do x=$x$x; done"];
    world.add_bundle_with("c", &hog, |spec| {
        spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    });
    let shim = world.start_shim("c").await;
    shim.create(&world.create_request("c"))
        .await
        .expect("create");
    shim.start_init("c").await;
    assert_eq!(shim.exit_status("c", "").await, 128 + KILL);
    world.wait_for("/tasks/exit").await;
    world.wait_for("/tasks/oom").await;
    // Once and before the end, which the stock shims do not promise: they tell it twice now and then.
    let topics = || {
        let mut topics = world.topics();
        if !arm.is_kbp() {
            topics.sort();
            topics.dedup();
        }
        topics
    };
    let mut expected = ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"];
    if !arm.is_kbp() {
        expected.sort_unstable();
    }
    assert_eq!(topics(), expected);
    shim.remove("c", "").await.expect("delete");
    world.wait_for("/tasks/delete").await;
    let all = topics();
    assert_eq!(all.len(), 5, "the cgroup's removal is no OOM: {all:?}");
}

async fn what_cannot_be_done_is_refused_with_its_code(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    let (code, message) = refused(shim.create(&world.create_request("c")).await);
    // A stock shim asks the runtime, which has no codes.
    if arm.is_kbp() {
        assert_eq!(
            (code, message.as_str()),
            (Code::ALREADY_EXISTS, "container c")
        );
    }
    let delete = api::DeleteRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    shim.start_init("c").await;
    assert_wrong_state(arm, shim.delete(&delete).await);
    let (code, message) = refused(shim.signal("none", "", TERM).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.starts_with("container not created"), "{message}");
    assert_eq!(
        refused(shim.signal("c", "none", TERM).await).0,
        Code::NOT_FOUND
    );
    // containerd has looked at these before; a stock shim trusts it.
    let bad: &[&str] = match arm.is_kbp() {
        true => &["", "../c", ".hidden", "-x"],
        false => &[],
    };
    for bad in bad {
        assert_eq!(
            refused(shim.add_exec("c", bad, &["true"]).await).0,
            Code::INVALID_ARGUMENT,
            "{bad:?}"
        );
    }

    shim.signal("c", "", KILL).await.expect("kill");
    shim.exit_status("c", "").await;
    let (code, message) = refused(shim.signal("c", "", TERM).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.starts_with("process already finished"), "{message}");
}

async fn both_versions_of_the_service_answer(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["true"]).await;
    for version in ["v2", "v3"] {
        let state = api::StateRequest {
            id: "c".to_owned(),
            ..Default::default()
        };
        let state: api::StateResponse = shim
            .call(&format!("containerd.task.{version}.Task"), "State", &state)
            .await
            .expect("an answer");
        assert_eq!(state.status(), api::Status::CREATED, "{version}");
    }
}

async fn a_caller_that_hangs_up_does_not_leave_half_a_container(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["sleep", "1000"]);
    let Shim { address, .. } = world.start_shim("c").await;
    let hasty = world.connect(&address).await;
    let request = world.create_request("c");
    // Sent, and not waited for: the call is dropped with its connection.
    let call = tokio::spawn(async move { hasty.create(&request).await });
    until("the runtime's run", || {
        world.bundle("c").join("options.json").exists()
    })
    .await;
    call.abort();
    let patient = world.connect(&address).await;
    world.wait_for("/tasks/create").await;
    assert_eq!(patient.status("c", "").await, api::Status::CREATED);
    patient.start_init("c").await;
    patient.signal("c", "", KILL).await.expect("kill");
    assert_eq!(patient.exit_status("c", "").await, 128 + KILL);
}
