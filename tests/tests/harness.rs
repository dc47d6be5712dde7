//! The harness itself, with the stock runtime and the reference plugins: what it says of them must be true before it can say
//! anything of kbp.

use std::time::Duration;

use kbp_tests::{
    Containerd, Generation, Leftovers, Network, PodNetns, Rootfs, Run, Sandbox, running, wait_until,
};

/// A container with a network and one of an image start, answer and leave nothing.
fn containers_leave_nothing(generation: Generation) {
    if generation.is_wanting() {
        return;
    }
    let sandbox = Sandbox::new().expect("sandbox");
    let rootfs = Rootfs::busybox(&sandbox.dir().join("rootfs")).expect("rootfs");
    let containerd = Containerd::start(&sandbox, generation).expect("containerd");
    let before = Leftovers::of(&sandbox).expect("before");

    let network = Network::ptp(&sandbox);
    let netns = PodNetns::new(&sandbox, "pod").expect("network namespace");
    let address = network
        .add("c1", &netns, "eth0")
        .expect("ADD")
        .ipv4()
        .expect("address");
    let script = "ip -4 address show eth0; echo complaint >&2; sleep 0.1; exit 7";
    let output = containerd
        .run(&Run::new("c1", &rootfs, ["sh", "-c", script]).netns(&netns.path()))
        .expect("run");
    assert_eq!(output.code, Some(7), "{output}");
    assert!(output.stdout.contains(&address), "{output}");
    assert_eq!(output.stderr, "complaint\n");

    let archive = rootfs
        .archive(
            "docker.io/library/busybox:test",
            &["sleep", "1000"],
            sandbox.dir(),
        )
        .expect("archive");
    containerd.import(&archive).expect("import");
    containerd
        .start_container(Run::image::<&str>(
            "c2",
            "docker.io/library/busybox:test",
            [],
        ))
        .expect("container of the image");
    let left = Leftovers::of(&sandbox)
        .expect("while it runs")
        .since(&before);
    for what in [
        "process: ",
        "mount (overlay): ",
        "mount (nsfs): ",
        "cgroup: ",
        "link: veth",
        "lease: ",
        "bundle: ",
        "shim socket: ",
    ] {
        assert!(
            left.iter().any(|l| l.starts_with(what)),
            "no {what} in {left:#?}"
        );
    }

    containerd.remove("c2").expect("remove");
    network.del("c1", Some(&netns), "eth0").expect("DEL");
    netns.remove().expect("remove");
    Leftovers::wait_until_clean(&sandbox, &before).expect("clean");
}

#[test]
fn containers_leave_nothing_on_the_machines_containerd() {
    containers_leave_nothing(Generation::Machine);
}

#[test]
fn containers_leave_nothing_on_1_7() {
    containers_leave_nothing(Generation::V1_7);
}

#[test]
fn containers_leave_nothing_on_2() {
    containers_leave_nothing(Generation::V2);
}

/// A test that panics or forgets its containers leaves no process, cgroup or directory on the machine.
#[test]
fn a_dropped_sandbox_ends_what_is_in_it() {
    let sandbox = Sandbox::new().expect("sandbox");
    let rootfs = Rootfs::busybox(&sandbox.dir().join("rootfs")).expect("rootfs");
    let containerd = Containerd::start(&sandbox, Generation::Machine).expect("containerd");
    containerd
        .start_container(Run::new("c", &rootfs, ["sleep", "1000"]))
        .expect("start");
    let pid = containerd.pid("c").expect("pid");
    let shim = containerd.shim_pid("c").expect("shim");
    let (dir, name) = (sandbox.dir().to_path_buf(), sandbox.name().to_owned());
    assert!(running(pid) && running(shim));
    drop(containerd);
    assert!(
        running(pid) && running(shim),
        "containers outlive containerd"
    );
    drop(sandbox);
    assert!(!running(pid) && !running(shim));
    assert!(!dir.exists());
    assert!(
        !std::path::Path::new("/sys/fs/cgroup/cpu")
            .join(&name)
            .exists()
    );
    assert!(!std::path::Path::new("/sys/fs/cgroup").join(&name).exists());
}

/// The machine's own namespace sees nothing of a sandbox.
#[test]
fn a_sandbox_is_invisible_outside() {
    let sandbox = Sandbox::new().expect("sandbox");
    let netns = PodNetns::new(&sandbox, "pod").expect("network namespace");
    let attached = Network::ptp(&sandbox)
        .add("c", &netns, "eth0")
        .expect("ADD");
    let host_end = attached.result["interfaces"][0]["name"]
        .as_str()
        .expect("host end")
        .to_owned();
    assert!(
        sandbox
            .ip("-o link show")
            .expect("links")
            .contains(&host_end)
    );
    let outside = std::fs::read_to_string("/proc/net/dev").expect("links outside");
    assert!(!outside.contains(&host_end), "{outside}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!mounts.contains("/run/netns/pod"), "{mounts}");
    assert!(!std::path::Path::new("/run/netns/pod").exists());
    assert!(
        !netns
            .open()
            .expect("open")
            .is_same(&sandbox.netns().expect("netns"))
            .expect("compare")
    );
}

/// When the process that owns a sandbox is killed, the sandbox goes all the same.
#[test]
fn a_killed_owner_leaves_nothing() {
    if let Ok(file) = std::env::var("KBP_TEST_OWNER") {
        let sandbox = Sandbox::new().expect("sandbox");
        let mut sleeper = sandbox.command("sleep").arg("1000").spawn().expect("sleep");
        std::fs::write(
            &file,
            format!("{} {}", sandbox.dir().display(), sleeper.id()),
        )
        .expect("write");
        // This process is killed long before.
        sleeper.wait().expect("wait");
        return;
    }
    let outer = Sandbox::new().expect("sandbox");
    let file = outer.dir().join("owner");
    let mut owner = std::process::Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "a_killed_owner_leaves_nothing", "--nocapture"])
        .env("KBP_TEST_OWNER", &file)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("start");
    let limit = Duration::from_secs(10);
    let (dir, sleeper) = wait_until("the owner's sandbox", limit, || {
        let text = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
        let (dir, pid) = text.split_once(' ').ok_or("not written yet")?;
        Ok((
            dir.to_owned(),
            pid.parse::<u32>().map_err(|e| e.to_string())?,
        ))
    })
    .expect("owner");
    assert!(running(sleeper));
    owner.kill().expect("kill");
    owner.wait().expect("wait");
    wait_until("removal of the sandbox", limit, || {
        let left = (running(sleeper), std::path::Path::new(&dir).exists());
        if left == (false, false) {
            Ok(())
        } else {
            Err(format!("process, directory: {left:?}"))
        }
    })
    .expect("clean");
}
