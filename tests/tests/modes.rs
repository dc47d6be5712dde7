//! `kbp.io/busy-poll-mode` and `kbp.io/prefer-busy-poll` of real containers: what sockets, epoll instances and the NAPI are told.

use std::os::fd::AsFd;

use kbp_kernel::link::RouteSocket;
use kbp_kernel::napi::NetdevSocket;
use kbp_kernel::netns::Netns;
use kbp_kernel::process::PidFd;
use kbp_kernel::sockopt::{self, SocketKind};
use kbp_poller::policy::BusyPollMode;
use kbp_poller::state::Part;
use kbp_tests::lab::{LIMIT, Pod, on, on_with};
use kbp_tests::{Arm, Lab, Run, Settings, fixtures, wait_until};

/// Whether packets wait for them: every IP socket, and every epoll instance, of a process.
fn prefer(pid: u32) -> Result<(Vec<bool>, Vec<bool>), String> {
    let process = PidFd::open(pid).map_err(|e| e.to_string())?;
    let (mut sockets, mut epolls) = (Vec::new(), Vec::new());
    let dir = format!("/proc/{pid}/fd");
    for entry in std::fs::read_dir(&dir)
        .map_err(|e| e.to_string())?
        .flatten()
    {
        let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
        let Some(fd) = number.and_then(|n| process.get_fd(n).ok()) else {
            continue;
        };
        if sockopt::is_epoll(fd.as_fd()) {
            let params = sockopt::epoll_params(fd.as_fd()).map_err(|e| e.to_string())?;
            epolls.push(params.prefer);
        } else if sockopt::kind(fd.as_fd()) == SocketKind::Inet {
            let prefers = sockopt::prefers_busy_poll(fd.as_fd());
            sockets.push(prefers.map_err(|e| e.to_string())?);
        }
    }
    Ok((sockets, epolls))
}

/// (defer-hard-irqs, gro-flush-timeout, irq-suspend-timeout) of the pod's eth0.
fn napi(netns: &Netns) -> (u32, u64, u64) {
    let mut route = RouteSocket::open_in(netns).expect("socket");
    let link = route.link_by_name("eth0").expect("ask").expect("eth0");
    let napis = NetdevSocket::open_in(netns)
        .expect("netdev")
        .napis(link.index);
    let napi = napis.expect("list").remove(0);
    (
        napi.defer_hard_irqs.expect("told"),
        napi.gro_flush_timeout.expect("told"),
        napi.irq_suspend_timeout.expect("told"),
    )
}

fn server(lab: &Lab<'_>, pod: &Pod<'_>) -> Run {
    let echo = fixtures::echo().expect("echo server");
    if !lab.rootfs.dir().join("usr/bin/server").exists() {
        lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    }
    lab.container("server", ["/usr/bin/server", "epoll", "7000"])
        .netns(&pod.netns.path())
        .seccomp()
}

/// Has a client in a pod of its own ask, and be answered.
fn is_answered(lab: &Lab<'_>, pod: &Pod<'_>) {
    let peer = lab.pod("peer");
    let client = lab
        .container(
            "client",
            ["/usr/bin/server", "client", &pod.ip(), "7000", "200"],
        )
        .netns(&peer.netns.path());
    let output = lab.containerd.run(&client).expect("client");
    let output = output.success().expect("answers");
    assert!(output.stdout.contains("answered 200"), "{output}");
}

#[test]
fn each_pair_of_options() {
    on(Arm::KBP, |lab| {
        for (mode, preferring, expected) in [
            ("spin", "false", (0, 0, 0)),
            ("spin", "true", (1, 20_000, 0)),
            ("suspend", "false", (1, 20_000, 200_000)),
            ("suspend", "true", (1, 20_000, 200_000)),
        ] {
            let pod = lab.pod("pod");
            let netns = pod.netns.open().expect("namespace");
            let run = server(lab, &pod)
                .annotation("kbp.io/busy-poll-mode", mode)
                .annotation("kbp.io/prefer-busy-poll", preferring)
                .annotation("kbp.io/required", "true");
            lab.containerd.start_container(run).expect("start");
            let pid = lab.containerd.pid("server").expect("pid");
            lab.wait_for_port(pid, 7000);
            let (sockets, epolls) = prefer(pid).expect("descriptors");
            assert!(!sockets.is_empty() && !epolls.is_empty());
            assert!(
                sockets.iter().all(|p| *p == (preferring == "true")),
                "{mode} {preferring}: {sockets:?}"
            );
            let waited_for = mode == "suspend" || preferring == "true";
            assert!(
                epolls.iter().all(|p| *p == waited_for),
                "{mode} {preferring}: {epolls:?}"
            );
            assert_eq!(napi(&netns), expected, "{mode} {preferring}");
            let state = lab.state("server").expect("state");
            assert_eq!(state.busy_poll_mode.to_string(), mode);
            assert_eq!(state.prefer_busy_poll.to_string(), preferring);
            is_answered(lab, &pod);

            // The settings go with the NAPI, and come back with the next.
            pod.netns.ip("link set eth0 down").expect("down");
            pod.netns.ip("link set eth0 up").expect("up");
            wait_until("the settings of the new NAPI", LIMIT, || {
                let now = napi(&netns);
                if now == expected {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                }
            })
            .expect("settings");
            lab.containerd.remove("server").expect("remove");
            assert_eq!(napi(&netns), (0, 0, 0), "{mode} {preferring}");
        }
    });
}

/// The node's config speaks for pods that say nothing; what they say wins.
#[test]
fn the_nodes_config_decides_where_the_pod_is_silent() {
    let settings = Settings {
        kbp_config: "busy-poll-mode = \"suspend\"\n".to_owned(),
        ..Settings::default()
    };
    on_with(Arm::KBP, settings, |lab| {
        let pod = lab.pod("pod");
        let netns = pod.netns.open().expect("namespace");
        let silent = server(lab, &pod);
        let spinning = server(lab, &pod).annotation("kbp.io/busy-poll-mode", "spin");
        for (run, mode, suspended) in [
            (silent, BusyPollMode::Suspend, 200_000),
            (spinning, BusyPollMode::Spin, 0),
        ] {
            lab.containerd.start_container(run).expect("start");
            let state = lab.state("server").expect("state");
            assert_eq!(state.busy_poll_mode, mode);
            assert_eq!(napi(&netns).2, suspended, "{mode}");
            lab.containerd.remove("server").expect("remove");
            assert_eq!(napi(&netns), (0, 0, 0), "{mode}");
        }
    });
}

#[test]
fn what_is_not_to_be_had_is_told_and_refused_where_it_is_required() {
    let settings = Settings {
        kbp_config: "disable = [\"napi-settings\"]\n".to_owned(),
        ..Settings::default()
    };
    on_with(Arm::KBP, settings, |lab| {
        let pod = lab.pod("pod");
        let netns = pod.netns.open().expect("namespace");
        let run = || server(lab, &pod).annotation("kbp.io/busy-poll-mode", "suspend");
        lab.containerd
            .start_container(run())
            .expect("it runs all the same");
        let pid = lab.containerd.pid("server").expect("pid");
        lab.wait_for_port(pid, 7000);
        let state = lab.state("server").expect("state");
        let parts: Vec<Part> = state.degraded.iter().map(|d| d.part).collect();
        assert_eq!(parts, [Part::PreferBusyPoll], "{state:#?}");
        assert_eq!(napi(&netns), (0, 0, 0));
        let (_, epolls) = prefer(pid).expect("descriptors");
        assert!(epolls.iter().all(|p| !*p), "{epolls:?}");
        is_answered(lab, &pod);
        lab.containerd.remove("server").expect("remove");

        let required = run().annotation("kbp.io/required", "true").detached();
        let refused = lab.containerd.run(&required).expect("run");
        assert_ne!(refused.code, Some(0), "it was not refused: {refused}");
        let text = refused.text();
        assert!(
            text.contains("prefer-busy-poll") && text.contains("napi-settings"),
            "{refused}"
        );
        lab.containerd.remove("server").expect("remove");
    });
}
