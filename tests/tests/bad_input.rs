//! Bad settings are refused by name with what is allowed; what cannot be polled is left alone and said.

use kbp_kernel::ethtool;
use kbp_poller::state::Part;
use kbp_tests::lab::{on, on_with};
use kbp_tests::{Arm, Lab, PodNetns, Run, Settings};

kbp_tests::scenarios!(on [kbp_on_machine, kbp_on_v2]: annotations, host_network);

/// Expects that a container is not started and that the error contains every one of `words`.
fn refused(lab: &Lab<'_>, run: Run, words: &[&str]) {
    let id = run.id().to_owned();
    let output = lab.containerd.run(&run.detached()).expect("run");
    assert_ne!(output.code, Some(0), "it was started: {output}");
    for word in words {
        assert!(
            output.text().contains(word),
            "{word:?} is not in the error: {output}"
        );
    }
    lab.containerd.remove(&id).expect("remove");
}

fn annotations(lab: &Lab<'_>) {
    let pod = lab.pod("pod");
    for (key, value, allowed) in [
        ("kbp.io/worker", "fast", "dedicated"),
        ("kbp.io/worker", "", "dedicated"),
        ("kbp.io/busy-poll", "soon", "off"),
        ("kbp.io/busy-poll", "-1", "off"),
        ("kbp.io/busy-poll", "20000", "10000"),
        ("kbp.io/busy-poll", "99999999999999999999", "10000"),
        ("kbp.io/profile", "turbo", "throughput"),
        ("kbp.io/required", "yes", "true"),
        ("kbp.io/wroker", "idle", "worker"),
    ] {
        let run = lab
            .container("c", ["sleep", "1000"])
            .netns(&pod.netns.path())
            .annotation(key, value);
        refused(lab, run, &[key, allowed]);
    }
    // Annotations of others are none of kbp's business.
    let run = lab
        .container("c", ["true"])
        .netns(&pod.netns.path())
        .annotation("kbp.example/worker", "fast");
    lab.containerd
        .run(&run)
        .expect("run")
        .success()
        .expect("a stranger's annotation");
}

#[test]
fn config_values() {
    on(Arm::KBP, |lab| {
        let pod = lab.pod("pod");
        for (text, words) in [
            ("worker = \"fast\"", ["worker", "dedicated"]),
            ("busy-poll = \"soon\"", ["busy-poll", "off"]),
            ("profile = 7", ["profile", "throughput"]),
            ("required = \"perhaps\"", ["required", "true"]),
            ("cpus = \"4096\"", ["4096", "does not exist"]),
            ("cpus = \"zero\"", ["cpus", "zero"]),
            ("state-dir = \"here\"", ["state-dir", "absolute"]),
            ("disable = [\"gravity\"]", ["gravity", "sqpoll"]),
            ("wroker = \"idle\"", ["wroker", "worker"]),
            ("worker = ", ["kbp.toml", "line 1"]),
        ] {
            lab.containerd
                .set_kbp_config(text)
                .expect("write the config");
            let run = lab
                .container("c", ["sleep", "1000"])
                .netns(&pod.netns.path());
            refused(lab, run, &["kbp.toml", words[0], words[1]]);
        }
        lab.containerd
            .set_kbp_config("worker = \"none\"\n")
            .expect("write the config");
        let run = lab.container("c", ["true"]).netns(&pod.netns.path());
        lab.containerd
            .run(&run)
            .expect("run")
            .success()
            .expect("a good config");
    });
}

/// A pod whose only interface is a bridge: nothing to poll, said and not failed, unless required.
#[test]
fn a_bridge_instead_of_a_veth() {
    on(Arm::KBP, |lab| {
        let netns = PodNetns::new(lab.sandbox, "pod").expect("netns");
        netns.ip("link add eth0 type bridge").expect("bridge");
        netns.ip("link set eth0 up").expect("up");
        let run = || lab.container("c", ["sleep", "1000"]).netns(&netns.path());
        lab.containerd.start_container(run()).expect("it runs");
        let state = lab.state("c").expect("state");
        let reason = state
            .degraded
            .iter()
            .find(|d| d.part == Part::PollableVeth)
            .map(|d| d.reason.clone());
        assert!(
            reason
                .as_ref()
                .is_some_and(|r| r.contains("eth0") && r.contains("bridge")),
            "{state:#?}"
        );
        assert!(state.worker.is_none());
        lab.containerd.remove("c").expect("remove");
        refused(
            lab,
            run().annotation("kbp.io/required", "true"),
            &["kbp.io/required", "pollable-veth", "bridge"],
        );
    });
}

/// A veth whose other end is in the pod as well is a loop, not a way out.
#[test]
fn a_veth_with_both_ends_in_the_pod() {
    on(Arm::KBP, |lab| {
        let netns = PodNetns::new(lab.sandbox, "pod").expect("netns");
        netns
            .ip("link add eth0 type veth peer name eth1")
            .expect("veth");
        netns.ip("link set eth0 up").expect("up");
        netns.ip("link set eth1 up").expect("up");
        lab.containerd
            .start_container(lab.container("c", ["sleep", "1000"]).netns(&netns.path()))
            .expect("it runs");
        let state = lab.state("c").expect("state");
        assert!(
            state.degraded.iter().any(|d| d.part == Part::PollableVeth),
            "{state:#?}"
        );
        lab.containerd.remove("c").expect("remove");
    });
}

/// A namespace without any interface, and a bundle whose namespace only runc will make: the container runs and nothing is claimed.
#[test]
fn no_network_at_all() {
    on(Arm::KBP, |lab| {
        let netns = PodNetns::new(lab.sandbox, "pod").expect("netns");
        for run in [
            lab.container("c", ["sleep", "1000"]),
            lab.container("c", ["sleep", "1000"]).netns(&netns.path()),
        ] {
            lab.containerd
                .start_container(run.clone())
                .expect("it runs");
            assert!(
                lab.state("c")
                    .is_none_or(|s| s.worker.is_none() && s.interfaces.is_empty())
            );
            lab.containerd.remove("c").expect("remove");
            refused(
                lab,
                run.annotation("kbp.io/required", "true"),
                &["kbp.io/required", "pollable-veth"],
            );
        }
    });
}

/// Host network: nothing on the host is tuned, whatever the pod asks for.
fn host_network(lab: &Lab<'_>) {
    let node = lab.sandbox.netns().expect("node");
    let features = || {
        ["lo", "uplink0", "uplink1"].map(|name| ethtool::features(&node, name).expect("features"))
    };
    let before = features();
    let mut explicit = lab.spec("c", &["sleep", "1000"]).expect("spec");
    kbp_tests::lab::join_netns(&mut explicit, std::path::Path::new("/proc/1/ns/net"));
    let path = format!("/proc/{}/ns/net", lab.sandbox.pid());
    kbp_tests::lab::join_netns(&mut explicit, std::path::Path::new(&path));
    let runs = [
        lab.container("c", ["sleep", "1000"]).switch("--net-host"),
        lab.container_of_spec("c", &explicit),
    ];
    for run in runs {
        let run = run.annotation("kbp.io/worker", "idle");
        lab.containerd.start_container(run).expect("it runs");
        assert!(
            lab.state("c")
                .is_none_or(|s| s.worker.is_none() && s.interfaces.is_empty())
        );
        assert_eq!(features(), before);
        lab.containerd.remove("c").expect("remove");
    }
    let run = lab
        .container("c", ["sleep", "1000"])
        .switch("--net-host")
        .annotation("kbp.io/required", "true");
    refused(lab, run, &["kbp.io/required", "host's network"]);
}

/// A network namespace that is not there: the reason names it, and the OCI runtime's word is as good as kbp's.
#[test]
fn a_namespace_that_does_not_exist() {
    on(Arm::KBP, |lab| {
        let run = lab
            .container("c", ["sleep", "1000"])
            .netns(std::path::Path::new("/run/netns/nowhere"));
        refused(lab, run, &["/run/netns/nowhere"]);
    });
}

/// A state directory that cannot be written.
#[test]
fn a_state_directory_that_is_a_file() {
    let settings = Settings {
        kbp_config: "state-dir = \"/run/occupied\"\n".to_owned(),
        ..Settings::default()
    };
    on_with(Arm::KBP, settings, |lab| {
        let file = lab.sandbox.dir().join("run/occupied");
        std::fs::write(&file, "").expect("write");
        let pod = lab.pod("pod");
        let run = lab
            .container("c", ["sleep", "1000"])
            .netns(&pod.netns.path());
        lab.containerd
            .start_container(run.clone())
            .expect("without required it runs all the same");
        lab.answers("c");
        assert!(
            lab.containerd.log().contains("/run/occupied"),
            "nobody is told why"
        );
        lab.containerd.remove("c").expect("remove");
        refused(
            lab,
            run.annotation("kbp.io/required", "true"),
            &["/run/occupied"],
        );
        std::fs::remove_file(&file).expect("remove");
    });
}
