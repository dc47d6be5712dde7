//! The binary as containerd calls it: start, delete, -info, -v, and how the server ends.

use std::fs;
use std::path::Path;

use crate::support::{Arm, World, annotations, arms, until, within};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::Value;

arms!(
    [kbp kbp_with_crun stock_1 stock_2]: [
        containers_of_a_group_share_a_server,
        a_socket_that_nobody_serves_is_replaced,
        delete_clears_what_a_killed_server_left_and_can_be_repeated,
        the_server_goes_into_the_cgroup_that_the_options_name,
        a_server_that_is_asked_to_terminate_leaves_no_socket,
    ],
    // A stock shim's name is not always free by then.
    [kbp kbp_with_crun]: [the_next_server_can_start_as_soon_as_the_shutdown_is_answered],
    // containerd 1.6's knows no -info, and wants a bundle that its start has prepared.
    [kbp kbp_with_crun stock_2]: [
        info_tells_the_runtime_and_its_features,
        delete_of_what_never_was,
    ],
    [kbp]: [
        each_generation_gets_the_answer_that_it_understands,
        delete_of_one_container_leaves_the_pod_of_a_living_server_alone,
        what_is_wrong_is_told_on_standard_error,
        the_server_is_quiet_and_has_no_huge_pages_but_its_containers_may,
        a_server_can_be_started_by_hand,
    ],
);

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

async fn each_generation_gets_the_answer_that_it_understands(arm: Arm) {
    let world = World::new(arm).await;
    let input = world.any_options().write_to_bytes().expect("encode");
    // 1.6 says nothing, 1.7 says 2 and is no program of version 2's module.
    for (id, version) in [
        ("plain-a", None),
        ("plain-b", Some("2")),
        ("json", Some("3")),
    ] {
        let bundle = world.add_bundle(id, &["true"]);
        let mut command = world.binary(id, &["start"]);
        command.envs(version.map(|version| ("MAX_SHIM_VERSION", version)));
        let output = world.run(command, &input);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        let address = if id == "json" {
            let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert_eq!(
                (&answer["version"], &answer["protocol"]),
                (&3.into(), &"ttrpc".into())
            );
            answer["address"].as_str().expect("an address").to_owned()
        } else {
            text(&output.stdout).to_owned()
        };
        assert!(
            address.starts_with("unix:///run/containerd/s/"),
            "{address}"
        );
        assert_eq!(
            fs::read_to_string(bundle.join("address")).expect("the file"),
            address
        );
        world.connect(&address).await.end().await;
        assert!(
            !Path::new(address.trim_start_matches("unix://")).exists(),
            "the socket is gone"
        );
    }
}

async fn containers_of_a_group_share_a_server(arm: Arm) {
    for group in [
        "io.kubernetes.cri.sandbox-id",
        "io.containerd.runc.v2.group",
    ] {
        let world = World::new(arm).await;
        for id in ["first", "second", "other"] {
            let value = if id == "other" { "pod-2" } else { "pod-1" };
            world.add_bundle_with(id, &["true"], |spec| {
                spec["annotations"] =
                    serde_json::to_value(annotations(&[(group, value)])).expect("JSON");
            });
        }
        let first = world.start_shim("first").await;
        let second = world.start_shim("second").await;
        let other = world.start_shim("other").await;
        assert_eq!(first.pid, second.pid);
        assert_eq!(first.address, second.address);
        assert_ne!(first.pid, other.pid);
        if arm != Arm::Stock2 {
            let file = fs::read_to_string(world.bundle("second").join("address"));
            assert_eq!(file.expect("the file"), second.address);
        }

        within(first.create(&world.create_request("first")))
            .await
            .expect("create");
        within(second.create(&world.create_request("second")))
            .await
            .expect("create");
        // The first is in use still: no shutdown.
        second.remove("second", "").await.expect("delete");
        second
            .shutdown(&api::ShutdownRequest::new())
            .await
            .expect("shutdown");
        assert_eq!(first.status("first", "").await, api::Status::CREATED);
        first.remove("first", "").await.expect("delete");
        first.end().await;
        other.end().await;
        assert_eq!(world.leftovers("first"), [""; 0]);
    }
}

async fn a_socket_that_nobody_serves_is_replaced(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["true"]);
    let shim = world.start_shim("c").await;
    kbp_kernel::process::kill(shim.pid, 9).expect("kill");
    until("the server's end", || {
        !Path::new(&format!("/proc/{}/exe", shim.pid)).exists()
    })
    .await;
    let socket = Path::new(shim.address.trim_start_matches("unix://"));
    // A process that ends lets go of its program first, and of its sockets a moment later.
    until("the socket's end", || {
        std::os::unix::net::UnixStream::connect(socket).is_err()
    })
    .await;
    assert!(socket.exists(), "nobody removed it");
    let again = world.start_shim("c").await;
    assert_eq!(again.address, shim.address);
    assert_ne!(again.pid, shim.pid);
    again.end().await;
}

async fn the_next_server_can_start_as_soon_as_the_shutdown_is_answered(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["true"]);
    let mut last = 0;
    for round in 0..20 {
        let shim = world.start_shim("c").await;
        assert_ne!(shim.pid, last, "round {round}: the one that ends");
        last = shim.pid;
        // It may hang up before it answers, but not before its socket is gone.
        let _ = shim.shutdown(&api::ShutdownRequest::new()).await;
        let (code, message) = match shim.create(&world.create_request("c")).await {
            Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
            Err(_) => continue,
            Ok(_) => panic!("a container in a server that ends"),
        };
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(message.contains("shutting down"), "{message}");
    }
    let name = world.start_shim("c").await;
    until("the end of the last but one", || {
        !Path::new(&format!("/proc/{last}/exe")).exists()
    })
    .await;
    let socket = name.address.trim_start_matches("unix://");
    assert!(Path::new(socket).exists(), "its successor's was removed");
    name.end().await;
    assert_eq!(world.leftovers("c"), [""; 0]);
}

async fn delete_clears_what_a_killed_server_left_and_can_be_repeated(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    let init = shim.start_init("c").await;
    kbp_kernel::process::kill(shim.pid, 9).expect("kill");
    until("the server's end", || {
        !Path::new(&format!("/proc/{}/exe", shim.pid)).exists()
    })
    .await;
    assert_ne!(world.leftovers("c"), [""; 0], "the container runs still");
    for round in 0..2 {
        let output = world.run(world.binary("c", &["delete"]), b"");
        assert!(
            output.status.success() && (output.stderr.is_empty() || !arm.is_kbp()),
            "{output:?}"
        );
        let answer =
            api::DeleteResponse::parse_from_bytes(&output.stdout).expect("a DeleteResponse");
        assert_eq!(
            (answer.pid, answer.exit_status),
            (init, 137),
            "round {round}"
        );
        assert!(answer.exited_at.seconds > 0);
        assert_eq!(world.leftovers("c"), [""; 0], "round {round}");
    }
    until("the init's end", || {
        !Path::new(&format!("/proc/{init}/exe")).exists()
    })
    .await;
}

async fn delete_of_one_container_leaves_the_pod_of_a_living_server_alone(arm: Arm) {
    let world = World::new(arm).await;
    for id in ["first", "second"] {
        world.add_bundle_with(id, &["sleep", "1000"], |spec| {
            spec["annotations"] = serde_json::to_value(annotations(&[
                ("io.containerd.runc.v2.group", "pod"),
                ("kbp.io/worker", "none"),
                ("kbp.io/busy-poll", "20"),
            ]))
            .expect("JSON");
            let namespaces = spec["linux"]["namespaces"].as_array_mut();
            namespaces
                .expect("an array")
                .push(serde_json::json!({ "type": "network" }));
        });
    }
    let count = |what: &str| {
        let all = fs::read_dir(world.path(what)).into_iter().flatten();
        all.flatten()
            .filter(|e| e.path().is_dir() || e.path().extension().is_some())
            .count()
    };
    let notifiers = || count("kbp/notify");
    let states = || count("kbp/pods");
    let first = world.start_shim("first").await;
    let second = world.start_shim("second").await;
    for (shim, id) in [(&first, "first"), (&second, "second")] {
        within(shim.create(&world.create_request(id)))
            .await
            .expect("create");
        shim.start_init(id).await;
    }
    assert_eq!(notifiers(), 1);

    first.signal("first", "", 9).await.expect("kill");
    assert_eq!(first.exit_status("first", "").await, 137);
    first.remove("first", "").await.expect("delete");
    let output = world.run(world.binary("first", &["delete"]), b"");
    assert!(output.status.success(), "{output:?}");

    assert_eq!(notifiers(), 1, "the second container's sockets need it");
    assert_eq!(states(), 1);
    second
        .add_exec("second", "e", &["true"])
        .await
        .expect("add a process");
    second
        .start_exec("second", "e")
        .await
        .expect("a new process finds the notifier");
    assert_eq!(second.exit_status("second", "e").await, 0);

    second.signal("second", "", 9).await.expect("kill");
    assert_eq!(second.exit_status("second", "").await, 137);
    second.remove("second", "").await.expect("delete");
    second.end().await;
    assert_eq!(notifiers(), 0);
    assert_eq!(states(), 0);
}

async fn delete_of_what_never_was(arm: Arm) {
    let world = World::new(arm).await;
    let bundle = world.add_bundle("c", &["true"]);
    let output = world.run(world.binary("c", &["delete"]), b"");
    assert!(output.status.success(), "{output:?}");
    let answer = api::DeleteResponse::parse_from_bytes(&output.stdout).expect("a DeleteResponse");
    assert_eq!(answer.exit_status, 137);
    // The stock one says what it misses, and has no process either.
    if arm.is_kbp() {
        assert_eq!((answer.pid, text(&output.stderr)), (0, ""));
        let mut command = world.binary("c", &["-bundle", "/nonexistent/bundle", "delete"]);
        command.current_dir("/");
        assert!(world.run(command, b"").status.success());
    }
    fs::remove_dir_all(bundle).expect("remove the bundle");
}

async fn info_tells_the_runtime_and_its_features(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["true"]);
    let options = world.any_options();
    let output = world.run(
        world.binary("c", &["-info"]),
        &options.write_to_bytes().expect("encode"),
    );
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).expect("a RuntimeInfo");
    match arm.is_kbp() {
        true => assert_eq!(
            (info.name.as_str(), info.version.version.as_str()),
            ("io.containerd.kbp.v1", env!("CARGO_PKG_VERSION"))
        ),
        false => assert_eq!(info.name, "io.containerd.runc.v2"),
    }
    assert_eq!(info.options.value, options.value);
    let mut features = std::process::Command::new(match world.options.binary_name.as_str() {
        "" => "runc",
        binary => binary,
    });
    let features = features.arg("features").output().expect("features");
    // Debian 12's crun does not know the verb.
    if !features.status.success() {
        assert!(info.features.is_none(), "{:?}", info.features);
        return;
    }
    let told: Value = serde_json::from_slice(&info.features.value).expect("JSON");
    let own: Value = serde_json::from_slice(&features.stdout).expect("JSON");
    for part in ["ociVersionMin", "hooks", "mountOptions", "linux"] {
        assert_eq!(told[part], own[part], "{part}");
    }
    assert!(told["linux"]["namespaces"].is_array(), "{told}");
    assert!(info.features.type_url.ends_with("features/Features"));
}

async fn what_is_wrong_is_told_on_standard_error(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["true"]);
    let version = world.run(world.binary("c", &["-v"]), b"");
    assert!(text(&version.stdout).contains(env!("CARGO_PKG_VERSION")));

    let output = world.run(world.binary("c", &["-nonsense", "start"]), b"");
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(
        text(&output.stderr).contains("-nonsense"),
        "{}",
        text(&output.stderr)
    );

    for (flag, value) in [("-namespace", "../x"), ("-id", "../c"), ("-id", "-c")] {
        let output = world.run(world.binary("c", &[flag, value, "start"]), b"");
        assert!(!output.status.success() && output.stdout.is_empty());
        let told = text(&output.stderr);
        assert!(told.contains(flag) && told.contains(value), "{told}");
    }

    fs::write(world.bundle("c").join("config.json"), "{").expect("write");
    let output = world.run(world.binary("c", &["start"]), b"");
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(
        text(&output.stderr).contains("config.json"),
        "{}",
        text(&output.stderr)
    );
}

async fn the_server_is_quiet_and_has_no_huge_pages_but_its_containers_may(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    let init = shim.start_init("c").await;
    let of_init = fs::read_to_string(format!("/proc/{init}/status")).expect("a file of /proc");
    assert!(of_init.contains("THP_enabled:\t1\n"), "{of_init}");
    let proc = |name: &str| {
        fs::read_to_string(format!("/proc/{}/{name}", shim.pid)).expect("a file of /proc")
    };
    let status = proc("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name}"))
            .trim()
            .to_owned()
    };
    assert_eq!(field("THP_enabled:"), "0");
    let ignored = u64::from_str_radix(&field("SigIgn:"), 16).expect("hexadecimal");
    assert_ne!(ignored & 1 << (13 - 1), 0, "SIGPIPE is ignored");
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{}/fd/{fd}", shim.pid)).expect("a descriptor");
        assert_eq!(target, Path::new("/dev/null"), "descriptor {fd}");
    }
    let own = fs::read_to_string("/proc/self/oom_score_adj").expect("own score");
    let score: i32 = proc("oom_score_adj").trim().parse().expect("a number");
    assert_eq!(score, own.trim().parse::<i32>().expect("a number") + 1);
}

async fn the_server_goes_into_the_cgroup_that_the_options_name(arm: Arm) {
    let mut world = World::new(arm).await;
    let name = world
        .path("")
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let root = Path::new("/sys/fs/cgroup");
    let unified = root.join("cgroup.controllers").exists();
    let cgroup = if unified {
        root.join(&name)
    } else {
        root.join("pids").join(&name)
    };
    fs::create_dir(&cgroup).expect("make a cgroup");
    world.options.shim_cgroup = format!("/{name}");
    world.add_bundle("c", &["true"]);
    let shim = world.start_shim("c").await;
    let joined = fs::read_to_string(cgroup.join("cgroup.procs"));
    let pid = shim.pid;
    shim.end().await;
    // A process that has ended leaves its cgroup a moment later.
    until("the cgroup's removal", || fs::remove_dir(&cgroup).is_ok()).await;
    assert_eq!(joined.expect("its processes").trim(), pid.to_string());

    // The other ones may make it.
    if !arm.is_kbp() {
        return;
    }
    world.options.shim_cgroup = "/nonexistent/cgroup".to_owned();
    let output = world.run(world.binary("c", &["start"]), &world.start_input("c"));
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(
        text(&output.stderr).contains("/nonexistent/cgroup"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(world.leftovers("c"), [""; 0], "no socket");
}

async fn a_server_can_be_started_by_hand(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["true"]);
    let socket = world.path("by-hand.sock");
    let mut server = world
        .binary("c", &["-socket", &socket.display().to_string()])
        .spawn()
        .expect("start the server");
    until("the socket", || socket.exists()).await;
    let shim = world.connect(&format!("unix://{}", socket.display())).await;
    assert_eq!(shim.pid, server.id());
    let _ = shim.shutdown(&api::ShutdownRequest::new()).await;
    let ended = tokio::task::spawn_blocking(move || server.wait().expect("its end"));
    assert!(within(ended).await.expect("no panic").success());
    assert!(!socket.exists());
}

async fn a_server_that_is_asked_to_terminate_leaves_no_socket(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["true"]);
    let shim = world.start_shim("c").await;
    kbp_kernel::process::kill(shim.pid, 13).expect("SIGPIPE");
    assert!(
        shim.stats(&api::StatsRequest::new()).await.is_err(),
        "alive, and has no such container"
    );
    kbp_kernel::process::kill(shim.pid, 15).expect("SIGTERM");
    until("the server's end", || {
        !Path::new(&format!("/proc/{}/exe", shim.pid)).exists()
    })
    .await;
    assert_eq!(world.leftovers("c"), [""; 0]);
}
