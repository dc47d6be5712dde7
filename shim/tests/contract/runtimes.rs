//! The OCI runtime's side: which one is called, what it says when it fails, and that a slow one keeps nobody waiting.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::json;

use crate::support::{Arm, World, arms, refused, until};

arms!(
    [kbp kbp_with_crun stock_1 stock_2]: [
        options_reach_the_runtime,
        a_runtime_that_fails_without_a_log_is_quoted,
        a_checkpoint_is_the_runtime_s_with_criu,
        a_runtime_that_hangs_ends_with_the_shim,
        a_checkpoint_brings_a_container_back_or_is_refused,
    ],
    // The stock shims hold a lock meanwhile, take no TOML, and leave the driver to their caller.
    [kbp kbp_with_crun]: [
        a_systemd_cgroup_path_is_recognised_where_systemd_runs,
        state_answers_while_the_runtime_takes_its_time,
        cri_s_options_are_understood_from_body_and_file,
    ],
    [kbp kbp_with_crun]: [the_criu_of_the_options_is_found_first],
    [kbp]: [without_criu_a_checkpoint_is_not_implemented],
);

/// containerd gives `State` two seconds, and tears a container down whose answer comes later.
const STATE_LIMIT: Duration = Duration::from_secs(20);

/// A runtime that is runc, after `prologue`, which sees the verb in `$verb` and the world in `$world`.
fn add_runtime(world: &mut World, prologue: &str) {
    let path = world.path("runtime");
    let oci = match world.options.binary_name.as_str() {
        "" => "runc",
        name => name,
    };
    let script = format!(
        "#!/bin/sh\nworld={}\noci={oci}\nall=\" $* \"\nfor verb in create start exec kill delete pause resume ps checkpoint; do\n\
         case \"$all\" in *\" $verb \"*) break;; esac\ndone\necho \"$*\" >> $world/calls\n{prologue}\nexec $oci \"$@\"\n",
        world.path("").display(),
    );
    fs::write(&path, script).expect("write the runtime");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    world.options.binary_name = path.display().to_string();
}

fn calls(world: &World) -> String {
    fs::read_to_string(world.path("calls")).unwrap_or_default()
}

async fn state_answers_while_the_runtime_takes_its_time(arm: Arm) {
    let mut world = World::new(arm).await;
    // Each of these verbs waits until the test lets it go on.
    add_runtime(
        &mut world,
        "case $verb in start|pause|kill|exec|delete) while [ ! -e $world/go ]; do sleep 0.02; done; sleep 0.05;; esac",
    );
    let go = world.path("go");
    let shim = world.created("c", &["sleep", "1000"]).await;
    world.add_bundle("d", &["sleep", "1000"]);
    shim.create(&world.create_request("d"))
        .await
        .expect("create");

    let start = api::StartRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    let pause = api::PauseRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    let kill = api::KillRequest {
        id: "c".to_owned(),
        signal: 9,
        ..Default::default()
    };
    let delete = api::DeleteRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    let add_exec = shim.add_exec("c", "x", &["sleep", "1000"]);
    add_exec.await.expect("exec");
    let start_exec = api::StartRequest {
        id: "c".to_owned(),
        exec_id: "x".to_owned(),
        ..Default::default()
    };

    for verb in ["start", "exec", "pause", "kill", "delete"] {
        let _ = fs::remove_file(&go);
        let before = calls(&world).lines().count();
        let call = async {
            match verb {
                "start" => shim.start(&start).await.map(drop),
                "exec" => shim.start(&start_exec).await.map(drop),
                "pause" => shim.pause(&pause).await.map(drop),
                "kill" => shim.kill(&kill).await.map(drop),
                _ => shim.delete(&delete).await.map(drop),
            }
        };
        let looks = async {
            until("the runtime's run", || {
                calls(&world).lines().count() > before
            })
            .await;
            for (id, exec_id) in [("c", ""), ("c", "x"), ("d", "")] {
                let asked = Instant::now();
                shim.status(id, exec_id).await;
                assert!(
                    asked.elapsed() < STATE_LIMIT,
                    "state of {id}/{exec_id} during {verb}: {:?}",
                    asked.elapsed()
                );
            }
            fs::write(&go, "").expect("let it go on");
        };
        let (called, ()) = tokio::join!(call, looks);
        called.unwrap_or_else(|error| panic!("{verb}: {error}"));
        match verb {
            "pause" => {
                let resume = api::ResumeRequest {
                    id: "c".to_owned(),
                    ..Default::default()
                };
                shim.resume(&resume).await.expect("resume");
            }
            "kill" => assert_eq!(shim.exit_status("c", "").await, 137),
            _ => {}
        }
    }
}

async fn options_reach_the_runtime(arm: Arm) {
    let mut world = World::new(arm).await;
    add_runtime(&mut world, "");
    world.options.no_pivot_root = true;
    world.options.no_new_keyring = true;
    let shim = world.created("c", &["true"]).await;
    let create = calls(&world);
    let bundle = world.bundle("c").display().to_string();
    for part in [
        format!("--root {}/test", world.path("runc").display()),
        format!("--log {bundle}/log.json --log-format json"),
        format!(
            "create --bundle {bundle} --pid-file {}init.pid --no-pivot --no-new-keyring c",
            match arm.is_kbp() {
                true => String::new(),
                false => format!("{bundle}/"),
            }
        ),
    ] {
        assert!(create.contains(&part), "{part} in {create}");
    }
    assert!(!create.contains("--systemd-cgroup"));
    // What `delete` needs after a crash.
    let stored =
        fs::read_to_string(world.bundle("c").join("options.json")).expect("stored options");
    assert!(stored.contains("\"binary_name\""), "{stored}");
    shim.remove("c", "").await.expect("delete");
}

async fn cri_s_options_are_understood_from_body_and_file(arm: Arm) {
    let mut world = World::new(arm).await;
    add_runtime(&mut world, "");
    let toml = format!(
        "BinaryName = {:?}\nRoot = {:?}\nSystemdCgroup = false\nsomebody_else = \"key\"\n",
        world.options.binary_name, world.options.root
    );
    let file = world.path("options.toml");
    fs::write(&file, &toml).expect("write");
    let field = |number: u8, text: &str| {
        let mut bytes = vec![
            number << 3 | 2,
            (text.len() & 0x7f) as u8 | 0x80,
            (text.len() >> 7) as u8,
        ];
        bytes.extend(text.bytes());
        bytes
    };
    for (id, value) in [
        ("body", field(3, &toml)),
        ("file", field(2, &file.display().to_string())),
    ] {
        world.add_bundle(id, &["true"]);
        let shim = world.start_shim(id).await;
        let mut request = world.create_request(id);
        request.options = MessageField::some(Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value,
            ..Default::default()
        });
        let before = calls(&world).lines().count();
        shim.create(&request).await.expect("create");
        assert!(
            calls(&world).lines().count() > before,
            "{id}: not our runtime"
        );
        assert!(
            world.path("runc/test").join(id).exists(),
            "{id}: not our root"
        );
        shim.remove(id, "").await.expect("delete");

        request.options = MessageField::some(Any {
            type_url: "example.Options".to_owned(),
            ..Default::default()
        });
        let (code, message) = refused(shim.create(&request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(message.contains("example.Options"), "{message}");
    }
}

async fn a_systemd_cgroup_path_is_recognised_where_systemd_runs(arm: Arm) {
    for (runs, put) in [(true, "mkdir /run/systemd/system"), (false, "true")] {
        let mut world = World::new(arm).await;
        add_runtime(&mut world, "[ $verb = create ] && exit 1");
        world.add_bundle_with("c", &["true"], |spec| {
            spec["linux"]["cgroupsPath"] = json!("user.slice:kbp:c")
        });
        // In a mount namespace of its own it is for the test to say whether systemd runs.
        let start = world.binary("c", &["start"]);
        let script = format!(
            "mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd && {put} && exec \"$@\""
        );
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]);
        command.arg(start.get_program()).args(start.get_args());
        command.current_dir(world.bundle("c"));
        for (name, value) in start.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let output = world.run(command, &world.bootstrap_params("c"));
        let shim = world.connect_to(&output).await;
        shim.create(&world.create_request("c"))
            .await
            .expect_err("the runtime fails");
        let calls = calls(&world);
        assert!(calls.contains(" create "), "{calls}");
        assert_eq!(calls.contains("--systemd-cgroup create"), runs, "{calls}");
    }
}

async fn a_runtime_that_fails_without_a_log_is_quoted(arm: Arm) {
    let mut world = World::new(arm).await;
    add_runtime(
        &mut world,
        "[ $verb = start ] && { echo 'no such luck' >&2; exit 3; }",
    );
    let shim = world.created("c", &["true"]).await;
    let start = api::StartRequest {
        id: "c".to_owned(),
        ..Default::default()
    };
    let (code, message) = refused(shim.start(&start).await);
    assert_eq!(code, Code::UNKNOWN);
    assert!(
        message.starts_with("OCI runtime start failed: ")
            && message.trim_end().ends_with("no such luck"),
        "{message}"
    );

    let mut world = World::new(arm).await;
    world.options.binary_name = "/nonexistent/runtime".to_owned();
    world.add_bundle("c", &["true"]);
    let shim = world.start_shim("c").await;
    let (_, message) = refused(shim.create(&world.create_request("c")).await);
    assert!(
        message.contains("/nonexistent/runtime")
            && (message.contains("not found") || message.contains("no such file")),
        "{message}"
    );
}

async fn a_checkpoint_is_the_runtime_s_with_criu(arm: Arm) {
    let mut world = World::new(arm).await;
    add_runtime(&mut world, "[ $verb = checkpoint ] && exit 0");
    let criu = world.path("criu");
    fs::write(&criu, "").expect("write");
    world.add_bundle("c", &["sleep", "1000"]);
    let mut command = world.binary("c", &["start"]);
    let path = std::env::var("PATH").expect("a PATH");
    command.env("PATH", format!("{}:{path}", world.path("").display()));
    let output = world.run(command, &world.start_input("c"));
    let shim = world.connect_to(&output).await;
    shim.create(&world.create_request("c"))
        .await
        .expect("create");
    shim.start_init("c").await;
    let request = api::CheckpointTaskRequest {
        id: "c".to_owned(),
        path: "/images".to_owned(),
        ..Default::default()
    };
    shim.checkpoint(&request).await.expect("checkpoint");
    let call = calls(&world).lines().last().expect("a call").to_owned();
    let work = match arm.is_kbp() {
        true => world.bundle("c").join("criu-work"),
        false => world.bundle("c").join("work/criu-work"),
    };
    let expected = format!(
        "checkpoint --image-path /images --work-path {} --leave-running c",
        work.display()
    );
    assert!(call.ends_with(&expected), "{call}");
    assert!(!Path::new(&work).exists() || !arm.is_kbp());
}

async fn the_criu_of_the_options_is_found_first(arm: Arm) {
    for (named, right) in [
        ("mine/criu", true),
        ("mine/none/criu", false),
        ("mine/other", false),
    ] {
        let mut world = World::new(arm).await;
        fs::create_dir(world.path("mine")).expect("directory");
        for name in ["criu", "other"] {
            fs::write(world.path("mine").join(name), "").expect("write");
        }
        add_runtime(
            &mut world,
            "[ $verb = checkpoint ] && { echo \"$PATH\" > $world/path; exit 0; }",
        );
        world.add_bundle("c", &["sleep", "1000"]);
        let shim = world.start_shim("c").await;
        let mut request = world.create_request("c");
        // A field that containerd 2 has no more.
        let options = request.options.as_mut().expect("options");
        let named = world.path(named).display().to_string();
        options
            .value
            .extend([0x42, u8::try_from(named.len()).expect("short")]);
        options.value.extend(named.bytes());
        shim.create(&request).await.expect("create");
        shim.start_init("c").await;
        let done = shim
            .checkpoint(&checkpoint_request(&world, "c", false))
            .await;
        if right {
            done.expect("checkpoint");
            let path = fs::read_to_string(world.path("path")).expect("written");
            let first = format!("{}:", world.path("mine").display());
            assert!(path.starts_with(&first), "{path}");
        } else {
            let (code, message) = refused(done);
            assert_eq!(code, Code::INVALID_ARGUMENT);
            assert!(
                message.contains("CriuPath") && message.contains(&named),
                "{message}"
            );
        }
    }
}

/// A shim that is killed takes along the runtime that hangs in the middle of a creation, and `delete` clears the rest.
async fn a_runtime_that_hangs_ends_with_the_shim(arm: Arm) {
    for when in ["before", "behind"] {
        let mut world = World::new(arm).await;
        // One that has done nothing yet, and one whose container is made already.
        let hang = "echo $$ > $world/hanging.new; mv $world/hanging.new $world/hanging; while :; do sleep 0.05; done";
        let made = match when {
            "behind" => "$oci \"$@\" </dev/null >/dev/null 2>&1; ",
            _ => "",
        };
        add_runtime(
            &mut world,
            &format!("if [ $verb = create ]; then {made}{hang}; fi"),
        );
        world.add_bundle("c", &["sleep", "1000"]);
        let shim = world.start_shim("c").await;
        let pid = shim.pid;
        let request = world.create_request("c");
        let creation = tokio::spawn(async move { shim.create(&request).await });
        let file = world.path("hanging");
        until("the runtime's run", || file.exists()).await;
        let runtime = fs::read_to_string(&file).expect("its pid");
        let runtime: u32 = runtime.trim().parse().expect("a pid");
        assert!(kbp_kernel::process::kill(pid, 9).expect("kill the shim"));
        until("the runtime's end", || {
            !Path::new(&format!("/proc/{runtime}/exe")).exists()
        })
        .await;
        creation
            .await
            .expect("no panic")
            .expect_err("its shim is gone");
        let deleted = world.run(world.binary("c", &["delete"]), b"");
        assert!(deleted.status.success(), "{deleted:?}");
        assert_eq!(world.leftovers("c"), [""; 0], "hanging {when}");
    }
}

fn checkpoint_request(world: &World, id: &str, exit: bool) -> api::CheckpointTaskRequest {
    let options = CheckpointOptions {
        exit,
        ..Default::default()
    };
    api::CheckpointTaskRequest {
        id: id.to_owned(),
        path: world.path("image").display().to_string(),
        options: MessageField::some(Any {
            type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
            value: options.write_to_bytes().expect("encode"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// With the real criu: there and back, or the reason why that is not possible here, and a container that runs on.
async fn a_checkpoint_brings_a_container_back_or_is_refused(arm: Arm) {
    let world = World::new(arm).await;
    let shim = world.created("c", &["sleep", "1000"]).await;
    shim.start_init("c").await;
    let done = shim
        .checkpoint(&checkpoint_request(&world, "c", true))
        .await;
    if let Err(ttrpc::Error::RpcStatus(status)) = done {
        let code = if arm.is_kbp() {
            Code::UNIMPLEMENTED
        } else {
            Code::UNKNOWN
        };
        assert_eq!(status.code(), code, "{}", status.message);
        assert!(status.message.contains("criu"), "{}", status.message);
        shim.add_exec("c", "x", &["true"]).await.expect("exec");
        shim.start_exec("c", "x").await.expect("it runs on");
        assert_eq!(shim.exit_status("c", "x").await, 0);
        assert_eq!(shim.status("c", "").await, api::Status::RUNNING);
        println!("refused: {}", status.message);
        return;
    }
    done.expect("checkpoint");
    shim.exit_status("c", "").await;
    shim.remove("c", "").await.expect("delete");
    world.add_bundle("back", &["sleep", "1000"]);
    let shim = world.start_shim("back").await;
    let request = api::CreateTaskRequest {
        checkpoint: world.path("image").display().to_string(),
        ..world.create_request("back")
    };
    shim.create(&request).await.expect("create");
    let pid = shim.start_init("back").await;
    let command = fs::read(format!("/proc/{pid}/cmdline")).expect("it runs");
    assert!(command.starts_with(b"/bin/busybox\0sleep"), "{command:?}");
}

async fn without_criu_a_checkpoint_is_not_implemented(arm: Arm) {
    let world = World::new(arm).await;
    world.add_bundle("c", &["sleep", "1000"]);
    // Nothing but the runtime and what it needs.
    let programs = world.path("programs");
    fs::create_dir(&programs).expect("directory");
    let path = std::env::var_os("PATH").expect("a PATH");
    let runc = std::env::split_paths(&path)
        .chain(["/usr/sbin".into()])
        .map(|directory| directory.join("runc"))
        .find(|path| path.is_file());
    std::os::unix::fs::symlink(runc.expect("runc"), programs.join("runc")).expect("link");
    let mut command = world.binary("c", &["start"]);
    command.env("PATH", &programs);
    let output = world.run(command, &world.bootstrap_params("c"));
    let shim = world.connect_to(&output).await;
    shim.create(&world.create_request("c"))
        .await
        .expect("create");
    shim.start_init("c").await;
    let answer = shim
        .checkpoint(&checkpoint_request(&world, "c", false))
        .await;
    let (code, message) = refused(answer);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(message.contains("install criu"), "{message}");
    assert_eq!(shim.status("c", "").await, api::Status::RUNNING);
}
