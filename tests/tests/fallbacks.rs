//! A kernel or a node that lacks a part: the container runs, the state says which part is missing and why, and who requires it is told.

use kbp_poller::state::Part;
use kbp_tests::lab::{LIMIT, on_with};
use kbp_tests::{
    Arm, Lab, Output, Run, Settings, Sockets, binaries, command, fixtures, wait_until,
};

/// One way of being without something.
struct Lack {
    settings: Settings,
    /// The parts that are missing then, and no others.
    parts: &'static [Part],
    /// What the reason speaks of.
    reason: &'static str,
}

fn disabled(features: &[&str], parts: &'static [Part]) -> Lack {
    let kbp_config = format!("disable = {features:?}\n");
    Lack {
        settings: Settings {
            kbp_config,
            ..Settings::default()
        },
        parts,
        reason: "switched off",
    }
}

/// The feature is really gone: containerd and everything below it live under a filter that answers as a kernel without it.
fn without(feature: &str, parts: &'static [Part], reason: &'static str) -> Lack {
    let launcher = fixtures::without().expect("launcher").display().to_string();
    let wrapper = vec![launcher, feature.to_owned(), "--".to_owned()];
    Lack {
        settings: Settings {
            wrapper,
            ..Settings::default()
        },
        parts,
        reason,
    }
}

fn server(lab: &Lab<'_>, id: &str, netns: &std::path::Path) -> Run {
    let echo = fixtures::echo().expect("echo server");
    lab.rootfs.binary(&echo, "/usr/bin/server").expect("copy");
    lab.container(id, ["/usr/bin/server", "epoll", "7000"])
        .netns(netns)
        .seccomp()
        .annotation("kbp.io/busy-poll", "40")
        .annotation("kbp.io/worker", "idle")
}

/// `kbpctl status`, as a person on the node sees it.
fn status(lab: &Lab<'_>, arguments: &[&str]) -> Output {
    let kbpctl = binaries::kbp_binary("kbpctl").expect("kbpctl");
    let mut run = lab.containerd.command(kbpctl);
    run.arg("status").args(arguments);
    command::run(run, LIMIT).expect("kbpctl status")
}

fn runs_degraded_and_is_refused_when_required(arm: Arm, lack: Lack) {
    let Lack {
        settings,
        parts,
        reason,
    } = lack;
    on_with(arm, settings, |lab| {
        let (pod, other) = (lab.pod("pod"), lab.pod("other"));
        lab.containerd
            .start_container(server(lab, "server", &pod.netns.path()))
            .expect("it runs all the same");
        let pid = lab.containerd.pid("server").expect("pid");
        lab.wait_for_port(pid, 7000);
        let client = lab
            .container(
                "client",
                ["/usr/bin/server", "client", &pod.ip(), "7000", "20"],
            )
            .netns(&other.netns.path());
        let output = lab
            .containerd
            .run(&client)
            .expect("client")
            .success()
            .expect("it answers");
        assert!(output.stdout.contains("answered 20"), "{output}");

        // Some of it shows only when the first call was trapped.
        let state = wait_until("what is missing", LIMIT, || {
            let state = lab.state("server").ok_or("no state")?;
            let missing = parts
                .iter()
                .all(|p| state.degraded.iter().any(|d| d.part == *p));
            if missing {
                Ok(state)
            } else {
                Err(format!("{state:#?}\n{}", lab.containerd.log()))
            }
        })
        .expect("the state says so");
        for degraded in &state.degraded {
            assert!(
                parts.contains(&degraded.part),
                "{degraded:?} is not what was taken away"
            );
            assert!(
                degraded.reason.contains(reason),
                "{degraded:?} does not speak of {reason:?}"
            );
        }
        let sockets = Sockets::of(pid).expect("sockets");
        let expected = |part: Part| if parts.contains(&part) { 0 } else { 40 };
        assert!(
            sockets
                .inet
                .iter()
                .all(|w| *w == expected(Part::SocketBusyPoll)),
            "{sockets:?}"
        );
        assert!(
            sockets
                .epoll
                .iter()
                .all(|w| *w == expected(Part::EpollBusyPoll)),
            "{sockets:?}"
        );
        if parts.contains(&Part::Worker) || parts.contains(&Part::PollableVeth) {
            assert!(state.worker.is_none(), "{state:#?}");
        }

        let shown = status(lab, &[]).success().expect("status").stdout;
        for part in parts {
            assert!(
                shown.contains(&part.to_string()) && shown.contains(reason),
                "{part} and {reason:?} are not in\n{shown}"
            );
        }
        lab.containerd.remove("server").expect("remove");

        let required = server(lab, "server", &pod.netns.path())
            .annotation("kbp.io/required", "true")
            .detached();
        let refused = lab.containerd.run(&required).expect("run");
        assert_ne!(refused.code, Some(0), "it was not refused: {refused}");
        let text = refused.text();
        let named = parts.iter().any(|p| text.contains(&p.to_string()));
        assert!(
            named && text.contains("kbp.io/required") && text.contains(reason),
            "{refused}"
        );
        lab.containerd.remove("server").expect("remove");
        assert!(lab.state("server").is_none());
    });
}

#[test]
fn workers_switched_off() {
    runs_degraded_and_is_refused_when_required(
        Arm::KBP,
        disabled(&["sqpoll", "socket"], &[Part::Worker]),
    );
}

#[test]
fn napi_switched_off() {
    runs_degraded_and_is_refused_when_required(
        Arm::KBP,
        disabled(&["napi"], &[Part::PollableVeth]),
    );
}

#[test]
fn seccomp_notify_switched_off() {
    let parts = &[Part::SocketBusyPoll, Part::EpollBusyPoll];
    runs_degraded_and_is_refused_when_required(Arm::KBP, disabled(&["seccomp-notify"], parts));
}

#[test]
fn seccomp_notify_switched_off_on_v2() {
    let parts = &[Part::SocketBusyPoll, Part::EpollBusyPoll];
    runs_degraded_and_is_refused_when_required(Arm::KBP_V2, disabled(&["seccomp-notify"], parts));
}

#[test]
fn epoll_params_switched_off() {
    runs_degraded_and_is_refused_when_required(
        Arm::KBP,
        disabled(&["epoll-params"], &[Part::EpollBusyPoll]),
    );
}

#[test]
fn a_kernel_without_io_uring() {
    a_socket_takes_the_place_of_the_ring(Arm::KBP);
}

#[test]
fn a_kernel_without_io_uring_on_v2() {
    a_socket_takes_the_place_of_the_ring(Arm::KBP_V2);
}

#[test]
fn a_kernel_without_seccomp_notification() {
    let parts = &[Part::SocketBusyPoll, Part::EpollBusyPoll];
    runs_degraded_and_is_refused_when_required(
        Arm::KBP,
        without("seccomp-notify", parts, "seccomp"),
    );
}

#[test]
fn a_kernel_without_pidfd_getfd() {
    runs_degraded_and_is_refused_when_required(
        Arm::KBP,
        without(
            "pidfd_getfd",
            &[Part::SocketBusyPoll, Part::EpollBusyPoll],
            "pidfd_getfd",
        ),
    );
}

/// Without io_uring the worker is a socket, and nothing is missing.
fn a_socket_takes_the_place_of_the_ring(arm: Arm) {
    let Lack { settings, .. } = without("io_uring", &[], "");
    on_with(arm, settings, |lab| {
        let pod = lab.pod("pod");
        let run = server(lab, "server", &pod.netns.path()).annotation("kbp.io/required", "true");
        lab.containerd
            .start_container(run)
            .expect("what is required is there");
        let state = lab.state("server").expect("state");
        assert!(state.degraded.is_empty(), "{state:#?}");
        let worker = state.worker.expect("a worker");
        assert_eq!(worker.kind, "socket");
        lab.containerd.remove("server").expect("remove");
    });
}

/// With everything there, nothing is missing: the other tests look at something that changes.
#[test]
fn nothing_is_missing_on_this_machine() {
    on_with(Arm::KBP, Settings::default(), |lab| {
        let pod = lab.pod("pod");
        let run = server(lab, "server", &pod.netns.path()).annotation("kbp.io/required", "true");
        lab.containerd
            .start_container(run)
            .expect("what is required is there");
        lab.wait_for_port(lab.containerd.pid("server").expect("pid"), 7000);
        let state = lab.state("server").expect("state");
        assert!(
            state.degraded.is_empty() && state.worker.is_some(),
            "{state:#?}"
        );
        let shown = status(lab, &[]).success().expect("status").stdout;
        let interface = &state.interfaces[0];
        for word in ["server", interface.host_interface.as_str(), "40"] {
            assert!(shown.contains(word), "{word} is not in\n{shown}");
        }
        lab.containerd.remove("server").expect("remove");
        let shown = status(lab, &[]).success().expect("status").stdout;
        assert!(!shown.contains("server"), "{shown}");
    });
}
